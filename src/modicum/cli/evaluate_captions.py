"""`modicum evaluate` on captioners: what they write about held-out videos, beside what people, or a grammar, say of them."""

import json
import sys
from functools import partial
from typing import Any

from modicum.errors import UsageError


def is_captioner(name: str) -> bool:
    """Whether a preset, folder or hub id is a captioner; a model whose files nobody here reads is none."""
    from modicum import resources
    from modicum.checkpoint import captioner_folder
    from modicum.checkpoint.hub import resolve
    from modicum.checkpoint.io import read_checkpoint

    return captioner_folder.is_captioner(read_checkpoint(resources.model_presets().get(name) or resolve(name)).config)


def evaluate(
    names: list[str],
    data: str,
    control: str | None,
    split: str | None,
    device: str,
    dtype: str,
    *,
    as_json: bool,
) -> None:
    """Print the scores of each captioner."""
    from rich.console import Console

    rows = measure(names, data, control, split, device, dtype)
    if as_json:
        print(json.dumps(rows))
        return
    console = Console(highlight=False)
    for row in rows:
        control_words = "" if control is None else f", {control} frames"
        console.print(f"{row['model']}: {row['captions']:,} videos{control_words}", soft_wrap=True)
        console.print(table(row))


def measure(
    names: list[str], data: str, control: str | None, split: str | None, device: str, dtype: str
) -> list[dict[str, Any]]:
    """A row per captioner: its scores, and how fast it wrote. One is in memory at a time."""
    from rich.console import Console
    from rich.progress import Progress

    from modicum import api
    from modicum.classification.predict import protocol_for
    from modicum.train.captions.data import judged_videos, training_captions
    from modicum.train.captions.evaluate import evaluate_captions

    dataset, training = judged_videos(data, split), training_captions(data)
    rows = []
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        for name in names:
            model = api.check_captioner(api.load(name, device=device, dtype=dtype))
            if model.config.shares_encoder is not None:
                raise UsageError(
                    f"{name} is a draft without an encoder of its own: evaluate the captioner it was made for"
                )
            task = bar.add_task(name, total=len(dataset))
            found = evaluate_captions(
                model,
                dataset,
                protocol_for(model, views=(1, 1)),
                control=control,  # type: ignore[arg-type]
                training=training,
                on_clips=partial(show, bar, task),
            )
            rows.append(
                {
                    "model": name,
                    "control": control,
                    **found.scores.to_dict(),
                    "tokens": found.stats.tokens,
                    "seconds": found.stats.seconds,
                    "seconds_by_part": found.stats.seconds_by_part,
                    "broken": found.broken,
                }
            )
    return rows


def show(bar: Any, task: Any, n_clips: int) -> None:
    bar.update(task, completed=n_clips)


def table(row: dict[str, Any]) -> Any:
    from rich.table import Table

    from modicum.train.captions.evaluate import share

    facts = row["facts"] or {}
    blind = ["majority caption", "majority value"] if facts else []
    result = Table("", "right", *blind)
    for kind, score in facts.items():
        result.add_row(kind, *(share(score[name]) for name in ("right", "majority_caption", "majority_value")))
    result.add_row("exact caption", share(row["exact"]))
    result.add_row("BLEU-4", f"{row['bleu4']:.1f}")
    result.add_row("CIDEr-D", f"{row['cider_d']:.2f}")
    return result
