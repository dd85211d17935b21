"""A checkpoint of any native kind, text or video: its configuration, and its tensors under our names."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from modicum.checkpoint.captioner_folder import captioner_checkpoint, is_captioner, read_captioner_config
from modicum.checkpoint.hf import NativeTensors, language_config, stock_config, to_stock
from modicum.checkpoint.io import Checkpoint
from modicum.checkpoint.vivit_folder import (
    MODEL_TYPES,
    native_tensors,
    read_vivit_config,
    stored_labels,
    vivit_checkpoint,
)
from modicum.config import AnyConfig, CaptionerConfig, VivitConfig


def read_config(stock: Mapping[str, Any]) -> AnyConfig:
    """What a config.json describes, by its `model_type`."""
    if is_captioner(stock):
        return read_captioner_config(stock)
    return read_vivit_config(stock) if stock.get("model_type") in MODEL_TYPES else language_config(stock)


def read_tensors(checkpoint: Checkpoint, config: AnyConfig) -> Mapping[str, Tensor]:
    """The checkpoint's tensors; but for a ViViT's they are read when they are asked for."""
    if isinstance(config, CaptionerConfig):
        return checkpoint.state_dict
    if isinstance(config, VivitConfig):
        return dict(native_tensors(checkpoint, config))
    return NativeTensors(checkpoint.state_dict, config)


def changed_checkpoint(
    before: Checkpoint, config: AnyConfig, native: Mapping[str, Tensor], files: Mapping[str, bytes] | None = None
) -> Checkpoint:
    """The checkpoint with another configuration of its own kind and other tensors, under our names.

    What its config.json says besides is carried through, and so are its files unless others are given.
    """
    files = dict(before.files if files is None else files)
    if isinstance(config, CaptionerConfig):
        return captioner_checkpoint(config, native, before.config, files)
    if isinstance(config, VivitConfig):
        labels = stored_labels(before.config, config.num_classes)
        return vivit_checkpoint(config, native, labels, before.config, files)
    return Checkpoint(stock_config(config, before.config), to_stock(native, config), files)
