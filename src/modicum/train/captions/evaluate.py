"""How good a model's captions of held-out videos are, and what is left of them without what it should see."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from rich.table import Table

from modicum import api
from modicum.captioning.model import Captioner
from modicum.captioning.scores import CaptionScores, score_captions
from modicum.classification.predict import Protocol
from modicum.config import nearest
from modicum.decode.stats import GenerationStats
from modicum.errors import UsageError
from modicum.parallel.data import Processes
from modicum.train.video.judge import Judge
from modicum.video.datasets import VideoDataset

Control = Literal["shuffled", "blank"]
# Longer captions are cut off, which a loop of words deserves.
MAX_NEW_TOKENS = 64


@dataclass
class Written:
    """Captions of held-out videos, by id, and what they are worth.

    captions, references: of every video that could be read, in the data set's order. stats: of writing them in this process.
    """

    scores: CaptionScores
    ids: list[str]
    captions: list[str]
    references: list[list[str]]
    stats: GenerationStats
    broken: dict[str, str] = field(default_factory=dict)


def evaluate_captions(
    model: Captioner,
    dataset: VideoDataset,
    protocol: Protocol,
    *,
    control: Control | None = None,
    training: Sequence[str] | None = None,
    draft: Any = None,
    num_draft_tokens: int = 4,
    workers: int = 0,
    batch: int = 32,
    seed: int = 0,
    processes: Processes | None = None,
    on_clips: Callable[[int], Any] | None = None,
) -> Written:
    """Greedy captions of a data set's videos, by the path that `modicum.caption` takes, and their scores.

    Args:
        model: from here on packed for inference.
        protocol: which frames are looked at; of views there is one.
        control: "shuffled" puts the frames of every clip in a random order, which leaves no order of events or movements to
            tell; "blank" blackens them, which leaves nothing.
        training: captions of the videos trained on: with them the facts of synthetic scenes are scored, beside those that
            one caption for all would get right.
        draft: as for `modicum.caption`; the words are the same.
        workers, batch: processes that decode, clips written about together.
        seed: of the order that "shuffled" draws.
        processes: those that share the videos out; all know the result.
        on_clips: called with the number of clips that have been written about.

    Raises:
        UsageError: another control, a model without tokenizer, or no video that can be read.
        MissingExtraError: sacrebleu is not installed.
    """
    if control not in (None, *get_args(Control)):
        raise UsageError(f"`control` is {control!r}{nearest(str(control), get_args(Control))}")
    if model.tokenizer is None:
        raise UsageError("the captioner has no tokenizer, and captions are judged as text: add its files")
    reader = Judge(
        dataset,
        model.config.encoder,  # type: ignore[arg-type]
        replace(protocol, views=(1, 1)),
        workers=workers,
        batch=batch,
        processes=processes or Processes(),
        shuffle=(seed,) if control == "shuffled" else None,
    )
    said: dict[int, str] = {}
    broken: dict[str, str] = {}
    stats = GenerationStats()
    for group in reader.groups(broken):
        clips = [views[0] if control != "blank" else torch.zeros_like(views[0]) for _, views in group]
        out = api.caption(
            model, clips, draft=draft, num_draft_tokens=num_draft_tokens, max_new_tokens=MAX_NEW_TOKENS, temperature=0.0
        )
        assert out.texts is not None
        said.update(zip((index for index, _ in group), out.texts, strict=True))
        add(stats, out.stats)
        if on_clips is not None:
            on_clips(len(said))
    for others in reader.processes.gathered((said, broken)):
        said, broken = said | others[0], broken | others[1]
    if not said:
        raise UsageError(
            f"none of the {len(dataset)} videos can be read; the first: {next(iter(broken.values()), 'there are none')}"
        )
    order = sorted(said)
    samples = [dataset.samples[index] for index in order]
    captions, references = [said[index] for index in order], [list(sample.captions) for sample in samples]
    scores = score_captions(captions, references, training)
    return Written(scores, [sample.id for sample in samples], captions, references, stats, broken)


def add(total: GenerationStats, other: GenerationStats) -> None:
    """Take in another call's figures, its time as well: calls follow each other."""
    total.add(other)
    total.seconds += other.seconds
    for part, seconds in other.seconds_by_part.items():
        total.seconds_by_part[part] = total.seconds_by_part.get(part, 0.0) + seconds


def scores_table(by_control: dict[str, CaptionScores]) -> Table:
    """Scores side by side, "" being the videos as they are; of synthetic scenes the facts, and what blind guesses get."""
    own = by_control[""]
    table = Table(
        "", *(name or "right" for name in by_control), *(["majority caption", "majority value"] if own.facts else [])
    )
    for kind in own.facts or ():
        scores = [given.facts[kind] for given in by_control.values() if given.facts]
        blind = scores[0].majority_caption, scores[0].majority_value
        table.add_row(kind, *(share(score.right) for score in scores), *map(share, blind))
    table.add_row("exact caption", *(share(given.exact) for given in by_control.values()))
    table.add_row("BLEU-4", *(f"{given.bleu4:.1f}" for given in by_control.values()))
    table.add_row("CIDEr-D", *(f"{given.cider_d:.2f}" for given in by_control.values()))
    return table


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
