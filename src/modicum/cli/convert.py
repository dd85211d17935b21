"""`modicum convert`: a checkpoint with fewer key-value heads."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli import common

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = """Examples:

modicum inspect ./multi-head

modicum convert ./multi-head ./gqa --kv-heads 8

modicum convert ./multi-head ./mqa --kv-heads 1 --method merged --calibration notes.txt

modicum evaluate ./multi-head ./gqa ./mqa --data held-out.txt"""

# Families whose stock classes know no groups.
ONLY_HERE = ("gpt2", "gpt_neox")


def convert(
    source: Annotated[str, typer.Argument(help="A model that ships with modicum, a local folder, or a hub id.")],
    destination: Annotated[Path, typer.Argument(help="The folder to write.")],
    kv_heads: Annotated[
        int, typer.Option(help="Key-value heads afterwards; must divide those there are. 1: multi-query.")
    ],
    method: Annotated[
        str,
        typer.Option(
            help="mean: average each group's keys and values; first: keep its first head; random: start anew; merged: "
            "closed forms that lose least."
        ),
    ] = "mean",
    calibration: Annotated[
        Path | None, typer.Option(help="For merged: text like the model's own; without it the weights alone decide.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that holds something.")] = False,
    as_json: common.Json = False,
) -> None:
    """Share key-value heads among query heads (2305.13245): a smaller cache, and less to read at every step.

    The text gets worse until the model is trained on for a few per cent of its steps: see `modicum evaluate`.
    """
    from rich.console import Console
    from rich.progress import Progress

    from modicum import api, resources
    from modicum.assembly import read_config
    from modicum.checkpoint.hub import resolve
    from modicum.checkpoint.io import Checkpoint

    folder = resources.model_presets().get(source) or resolve(source)
    before = api.read_checkpoint(folder)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        reading = bar.add_task("calibration", total=None, visible=calibration is not None)
        after = api.convert_to_gqa(before, kv_heads, method, calibration, seed, lambda: bar.advance(reading))
        task = bar.add_task("tensors", total=len(after.state_dict))
        watched = Watched(after.state_dict, lambda: bar.advance(task))
        api.write_checkpoint(Checkpoint(after.config, watched, after.files), destination, overwrite=force)
    facts = gather(read_config(before.config), read_config(after.config), str(destination), method)
    if as_json:
        print(json.dumps(facts))
        return
    if method == "merged" and calibration is None:
        note = "merged by the weights alone: --calibration TEXT loses less"
        Console(stderr=True, highlight=False).print(note, soft_wrap=True)
    print(
        f"{destination}: {facts['kv_heads'][0]} -> {facts['kv_heads'][1]} key-value heads by {method}, keys and values "
        f"{facts['kv_numbers_per_token'][0]:,} -> {facts['kv_numbers_per_token'][1]:,} numbers per token"
    )
    if not facts["loads_in_transformers"]:
        note = "transformers has no grouped form of this family: the folder loads here alone"
        Console(stderr=True, highlight=False).print(note, soft_wrap=True)


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

    numbers = [sum(2 * place.n_kv_heads * c.head_dim for place in places(c)) for c in (before, after)]
    grouped = after.n_kv_heads != after.n_heads
    family = getattr(after, "family", "vivit")
    return {
        "destination": destination,
        "method": method,
        "family": family,
        "query_heads": after.n_heads,
        "kv_heads": [before.n_kv_heads, after.n_kv_heads],
        "kv_numbers_per_token": numbers,
        "loads_in_transformers": not (grouped and family in (*ONLY_HERE, "vivit")),
    }
