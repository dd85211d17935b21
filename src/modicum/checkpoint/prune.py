"""A checkpoint with some of its layers: what is left of a model may draft for the whole of it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from modicum.checkpoint.io import Checkpoint
from modicum.checkpoint.native import changed_checkpoint, read_config, read_tensors
from modicum.checkpoint.record import RECORD, Record
from modicum.config import CaptionerConfig, DecoderConfig, VivitConfig
from modicum.errors import UsageError


def keep_layers(ckpt: Checkpoint, layers: Sequence[int]) -> Checkpoint:
    """The same language model with these layers only, counted from 0, in this order; those of a decoder beside an encoder.

    Embeddings, final norm and head stay. Tensors are read when they are asked for.

    Raises:
        UsageError: a layer that the model does not have, one named twice or out of order, none, or a ViViT.
        CheckpointError: the checkpoint is of another family, or damaged.
    """
    config = read_config(ckpt.config)
    if isinstance(config, VivitConfig):
        raise UsageError("the checkpoint is a ViViT, whose layers cannot be left out: give a language model")
    held, kept = config.n_layers, list(layers)
    if not kept or kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < held:
        raise UsageError(
            f"layers {', '.join(map(str, kept)) or 'none'} cannot be kept: name some of 0 to {held - 1}, each once, in order"
        )
    stack = "blocks" if isinstance(config, DecoderConfig) else "decoder.blocks"
    tensors = KeptTensors(read_tensors(ckpt, config), stack, kept)
    files = {**ckpt.files, RECORD: Record.of(ckpt.files).pruned(kept)}
    return changed_checkpoint(ckpt, with_layers(config, kept), tensors, files)


def with_layers(config: Any, kept: list[int]) -> Any:
    """The same model with these layers."""
    if isinstance(config, CaptionerConfig):
        return replace(config, decoder=with_layers(config.decoder, kept))
    changes: dict[str, Any] = {"n_layers": len(kept)}
    if getattr(config, "windows", ()):
        changes["windows"] = tuple(config.windows[layer] for layer in kept)
    return replace(config, **changes)


class KeptTensors(Mapping[str, Tensor]):
    """A model's tensors under our names, the kept layers of a stack counted anew."""

    def __init__(self, source: Mapping[str, Tensor], stack: str, kept: list[int]) -> None:
        self.source, pattern = source, re.compile(rf"{re.escape(stack)}\.(\d+)\.(.+)")
        self.places: dict[str, str] = {}
        for name in source:
            match = pattern.fullmatch(name)
            if match is None:
                self.places[name] = name
            elif int(match[1]) in kept:
                self.places[f"{stack}.{kept.index(int(match[1]))}.{match[2]}"] = name

    def __getitem__(self, name: str) -> Tensor:
        return self.source[self.places[name]]

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
