"""`modicum uptrain`: convert a checkpoint, then train it on."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.cli import common

EXAMPLES = """Examples:

modicum uptrain modicum-code-target ./gqa-2 --kv-heads 2 --data stdlib --dry-run

modicum uptrain ./multi-head ./gqa-8 --kv-heads 8 --data ./texts --original-tokens 300000000000 --fraction 0.001

modicum uptrain ./multi-head ./gqa-8 --kv-heads 8 --data ./texts --tokens 5000000 --teacher ./multi-head

modicum uptrain ./multi-head ./control --control --data ./texts --tokens 5000000

modicum uptrain ./captioner ./captioner-2 --kv-heads 2 --data ./captioned-videos --fraction 0.05"""


def uptrain(
    source: Annotated[str, typer.Argument(help="A model that ships with modicum, a local folder, or a hub id.")],
    destination: Annotated[Path, typer.Argument(help="The folder to write.")],
    data: Annotated[
        list[str],
        typer.Option(
            help="Text: a file, a folder, a pattern, or `stdlib`. May be given several times. For a captioner one folder of "
            "captioned videos, or its annotations in the layout of MSR-VTT or VATEX."
        ),
    ],
    kv_heads: Annotated[
        int | None, typer.Option(help="Key-value heads afterwards; must divide those there are. 1: multi-query.")
    ] = None,
    method: Annotated[str, typer.Option(help="How to convert: see `modicum convert`.")] = "merged",
    calibration: Annotated[
        Path | None, typer.Option(help="For aligned and merged: a text; pieces of the data if not given.")
    ] = None,
    fraction: Annotated[float | None, typer.Option(help="Of the original tokens; 0.05 if not given.")] = None,
    tokens: Annotated[int | None, typer.Option(help="How many tokens to train on, instead of a fraction.")] = None,
    original_tokens: Annotated[
        int | None, typer.Option(help="What the source was trained on, if its training.json does not say.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Distil from this model, such as the source: one with the same tokenizer.")
    ] = None,
    teacher_weight: Annotated[float, typer.Option(help="The teacher's share of the loss.")] = 0.9,
    control: Annotated[
        bool,
        typer.Option(
            "--control",
            help="Train the source as it is, for the same steps on the same batches; --kv-heads and --method may stay.",
        ),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last saved state, bit for bit.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    lr: Annotated[
        float | None,
        typer.Option(
            help="The highest learning rate; a tenth of the original's, or 1e-4. The worse the start, the higher."
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Windows per batch; the original's, or 8.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens per window; the original's, or 512 (T5: 568).")] = None,
    seed: Annotated[int, typer.Option(help="Of the order of the data, and of the method random.")] = 0,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="A share of the files, or where others are; the original's rule, or 0.02. Of videos the name of a split, "
            "or VATEX's other file."
        ),
    ] = None,
    device: common.Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that holds something.")] = False,
    as_json: common.Json = False,
) -> None:
    """Convert, then go on with the original training for a few per cent of its tokens (2305.13245).

    Ctrl-C saves, --resume goes on as if nothing had happened, also after a crash. The result is a stock folder; its
    training.json says what was done.
    """
    from modicum.gqa.uptrain import Settings
    from modicum.gqa.uptrain_captions import uptraining

    settings = Settings(
        kv_heads=kv_heads,
        method=method,
        data=tuple(data),
        fraction=fraction,
        tokens=tokens,
        original_tokens=original_tokens,
        calibration=None if calibration is None else str(calibration),
        teacher=teacher,
        teacher_weight=teacher_weight,
        control=control,
        lr=lr,
        batch=batch,
        window=window,
        seed=seed,
        held_out=share_or_source(held_out),
        device=device,
    )
    planned = uptraining(source, destination, settings)
    planned.describe()
    facts = planned.facts if dry_run else planned.go(resume, force)
    if facts is None:
        raise typer.Exit(common.INTERRUPTED)
    if as_json:
        print(json.dumps(facts))
    elif not dry_run:
        from rich.console import Console

        Console(highlight=False).print(table(facts))


def share_or_source(text: str | None) -> float | str | None:
    """ "0.1" is a share, anything else a place."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def table(facts: dict[str, Any]) -> Any:
    from rich.table import Column, Table

    per_clip = facts.get("context_bytes_per_clip")
    names = ["KV heads", "held out, nats/token", "KV bytes/token", *(["KV bytes/clip"] if per_clip else [])]
    columns = [Column(name, justify="right") for name in names]
    result = Table("", *columns, box=None)
    for name, nats in facts["nats_per_token"].items():
        if nats is not None:
            which = 0 if name == "original" else 1
            kv_heads, n_bytes = facts["kv_heads"][which], facts["kv_bytes_per_token"][which]
            context = [f"{per_clip[which]:,}"] if per_clip else []
            result.add_row(name, str(kv_heads), f"{nats:.4f}", f"{n_bytes:,}", *context)
    return result
