"""`modicum convert`: a checkpoint with fewer key-value heads."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli import common
from modicum.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = """Examples:

modicum convert ./multi-head --report --calibration ./texts --plot losses.png

modicum convert ./multi-head ./gqa --kv-heads 8 --method merged --calibration ./texts

modicum convert ./multi-head ./mqa --kv-heads 1 --method mean

modicum convert ./multi-head ./draft --kv-heads 8 --method merged --keep-layers 0,1,14,15

modicum evaluate ./multi-head ./gqa ./mqa --data held-out.txt"""

# Families whose stock classes know no groups.
ONLY_HERE = ("gpt2", "gpt_neox", "t5", "captioner")
# Of a folder of calibration texts at least so many are read, a part of each.
TEXTS = 16


def convert(
    source: Annotated[str, typer.Argument(help="A model that ships with modicum, a local folder, or a hub id.")],
    destination: Annotated[Path | None, typer.Argument(help="The folder to write.")] = None,
    kv_heads: Annotated[
        int | None, typer.Option(help="Key-value heads afterwards; must divide those there are. 1: multi-query.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="mean: average each group's keys and values; first: keep its first head; random: start anew; aligned: "
            "average heads brought into one form; merged: closed forms and refits, which lose least."
        ),
    ] = "mean",
    calibration: Annotated[
        str | None,
        typer.Option(
            help="For aligned and merged: text like the model's own, a file, a folder, a pattern, or `stdlib`; without it "
            "the weights alone decide."
        ),
    ] = None,
    keep_layers: Annotated[
        str | None,
        typer.Option(
            help="Layers that stay, counted from 0, such as 0,2,4; with or without --kv-heads. What is left can draft for "
            "the whole once it is trained on (`modicum uptrain`, with the whole as teacher)."
        ),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Say what each layer would lose at each number of heads; write no model.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the report as heat maps into a PNG.")] = None,
    seed: Annotated[int, typer.Option(help="Of random.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that holds something.")] = False,
    as_json: common.Json = False,
) -> None:
    """Share key-value heads among query heads (2305.13245): a smaller cache, and less to read at every step.

    The text gets worse until the model is trained on for a few per cent of its steps: `modicum uptrain` does both.
    """
    from modicum import api, resources
    from modicum.checkpoint.hub import resolve

    if report or plot is not None:
        if plot is not None:
            common.check_writable(plot, force=force)
        before = api.read_checkpoint(resources.model_presets().get(source) or resolve(source))
        show_losses(source, before, texts_for(before, calibration), plot, as_json=as_json)
        return
    if destination is None or (kv_heads is None and keep_layers is None):
        raise UsageError(
            "a destination and --kv-heads are needed to write a model: add them, or see what there is to choose from "
            "with --report"
        )
    before = api.read_checkpoint(resources.model_presets().get(source) or resolve(source))
    whole = before
    if keep_layers is not None:
        before = pruned(whole, keep_layers)
    texts = texts_for(before, calibration)
    write(whole, before, destination, kv_heads, method, texts, seed, force=force, as_json=as_json)


def write(
    whole: Any,
    before: Any,
    destination: Path,
    kv_heads: int | None,
    method: str,
    calibration: Any,
    seed: int,
    *,
    force: bool,
    as_json: bool,
) -> None:
    """Convert what was kept of a whole checkpoint, write it, and say what changed."""
    from rich.console import Console
    from rich.progress import Progress

    from modicum import api
    from modicum.checkpoint.io import Checkpoint, check_goal
    from modicum.checkpoint.native import read_config
    from modicum.gqa.heads import places

    check_goal(destination, overwrite=force)
    config = read_config(before.config)
    kv_heads = config.n_kv_heads if kv_heads is None else kv_heads
    notes = Console(stderr=True, highlight=False)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        layers = bar.add_task("layers", total=len(list(places(config))), visible=calibration is not None)
        after = api.convert_to_gqa(before, kv_heads, method, calibration, seed, lambda: bar.advance(layers))
        task = bar.add_task("tensors", total=len(after.state_dict))
        watched = Watched(after.state_dict, lambda: bar.advance(task))
        api.write_checkpoint(Checkpoint(after.config, watched, after.files), destination, overwrite=force)
    facts = gather(read_config(whole.config), read_config(after.config), str(destination), method)
    if as_json:
        print(json.dumps(facts))
        return
    if method in ("aligned", "merged") and calibration is None:
        notes.print(f"{method} by the weights alone: --calibration TEXT loses less", soft_wrap=True)
    changes = [
        f"{facts[name][0]} -> {facts[name][1]} {title}"
        for name, title in (("layers", "layers"), ("kv_heads", f"key-value heads by {method}"))
        if facts[name][0] != facts[name][1] or (name == "kv_heads" and whole is before)
    ]
    print(
        f"{destination}: {', '.join(changes)}, keys and values "
        f"{facts['kv_numbers_per_token'][0]:,} -> {facts['kv_numbers_per_token'][1]:,} numbers per token"
    )
    if not facts["loads_in_transformers"]:
        notes.print("transformers has no grouped form of this family: the folder loads here alone", soft_wrap=True)


def pruned(checkpoint: Any, layers: str) -> Any:
    """The checkpoint with the layers that a text like "0,2,4" names."""
    from modicum.checkpoint.prune import keep_layers

    numbers = layers.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise UsageError(f"--keep-layers {layers} is not a list of layers: write numbers from 0 on, such as 0,2,4")
    return keep_layers(checkpoint, [int(number) for number in numbers])


def texts_for(checkpoint: Any, source: str | None) -> Any:
    """Calibration as `modicum.convert_to_gqa` takes it: None, one file, or tokens of the beginnings of several."""
    from modicum import api
    from modicum.checkpoint.tokenizer import Tokenizer
    from modicum.train.text import SUFFIXES, beginning, spread, texts_of

    if source is None or Path(source).is_file():
        return source
    tokenizer = Tokenizer.from_files(checkpoint.files, checkpoint.config)
    if tokenizer is None:
        raise UsageError("the checkpoint has no tokenizer files, so it cannot read calibration text: add them")
    texts = list(texts_of(source, SUFFIXES, ()).values())
    if not texts:
        raise UsageError(f"{source} holds no text: give a file, or a folder with {', '.join(SUFFIXES)} files")
    each = -(-api.CALIBRATION_TOKENS // min(TEXTS, len(texts)))
    return [tokens for path in spread(texts, TEXTS) if (tokens := beginning(path, tokenizer.encode, each))]


def show_losses(source: str, checkpoint: Any, calibration: Any, plot: Path | None, *, as_json: bool) -> None:
    """The report of `gqa.report`, as a table, JSON or heat maps."""
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from modicum import api
    from modicum.assembly import build
    from modicum.checkpoint.native import read_config
    from modicum.checkpoint.tokenizer import Tokenizer
    from modicum.gqa.heads import places
    from modicum.gqa.report import calibrated_report, weights_report
    from modicum.report.figures import load_pyplot

    if plot is not None:
        load_pyplot()
    config = read_config(checkpoint.config)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("layers", total=len(list(places(config))))
        if calibration is None:
            rows = weights_report(checkpoint, lambda: bar.advance(task))
        else:
            model = build(checkpoint, config, torch.device("cpu"), torch.float32)
            model.tokenizer = Tokenizer.from_files(checkpoint.files, checkpoint.config)
            batches = api.calibration_batches(model, calibration)
            rows = calibrated_report(model, batches, lambda: bar.advance(task))
    if not rows:
        raise UsageError(f"{source} has {config.n_kv_heads} key-value heads, and nothing is left to share")
    if plot is not None:
        from modicum.report.conversion import conversion_heat_map

        conversion_heat_map(rows, plot, f"{source}: what fewer key-value heads lose")
    if as_json:
        print(json.dumps(rows))
        return
    Console(highlight=False).print(losses_table(rows))
    notes = Console(stderr=True, highlight=False)
    if calibration is None:
        notes.print("by the weights alone: --calibration TEXT measures what the model's own text meets", soft_wrap=True)
    if plot is not None:
        notes.print(f"figure in {plot}")


def losses_table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Column, Table

    names = [name for name in ("keys", "values", "outputs") if rows[0][name] is not None]
    counts = sorted({row["kv_heads"] for row in rows}, reverse=True)
    title = f"lost, of {' / '.join(names)}, by number of key-value heads"
    heads = (Column(str(count), justify="right", no_wrap=True) for count in counts)
    table = Table(Column("layer", overflow="fold"), *heads, box=None, title=title)
    by_place = {(row["layer"], row["kv_heads"]): row for row in rows}
    for layer in dict.fromkeys(row["layer"] for row in rows):
        found = [by_place.get((layer, count)) for count in counts]
        table.add_row(layer, *("" if r is None else " / ".join(f"{r[name]:.1%}" for name in names) for r in found))
    return table


class Watched(Mapping[str, "Tensor"]):
    """A state dict that says when a tensor is read."""

    def __init__(self, inner: Mapping[str, "Tensor"], read: Any) -> None:
        self.inner, self.read = inner, read

    def __getitem__(self, name: str) -> "Tensor":
        self.read()
        return self.inner[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.inner)

    def __len__(self) -> int:
        return len(self.inner)


def gather(before: Any, after: Any, destination: str, method: str) -> dict[str, Any]:
    """What changed."""
    from modicum.gqa.heads import places

    # A token is either read or written: cross-attention keeps the former, self-attention the latter.
    numbers = [
        sum(2 * place.n_kv_heads * c.head_dim for place in places(c) if not place.cross) for c in (before, after)
    ]
    grouped = after.n_kv_heads != after.n_heads
    family = getattr(after, "family", "vivit")
    return {
        "destination": destination,
        "method": method,
        "family": family,
        "query_heads": after.n_heads,
        "layers": [before.n_layers, after.n_layers],
        "kv_heads": [before.n_kv_heads, after.n_kv_heads],
        "kv_numbers_per_token": numbers,
        "loads_in_transformers": not (grouped and family in (*ONLY_HERE, "vivit")),
    }
