"""A checkpoint of any native kind, text or video: its configuration, and its tensors under our names."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from modicum.checkpoint.hf import NativeTensors, language_config
from modicum.checkpoint.io import Checkpoint
from modicum.checkpoint.vivit_folder import MODEL_TYPES, native_tensors, read_vivit_config
from modicum.config import LanguageConfig, VivitConfig


def read_config(stock: Mapping[str, Any]) -> LanguageConfig | VivitConfig:
    """What a config.json describes, by its `model_type`."""
    return read_vivit_config(stock) if stock.get("model_type") in MODEL_TYPES else language_config(stock)


def read_tensors(checkpoint: Checkpoint, config: LanguageConfig | VivitConfig) -> Mapping[str, Tensor]:
    """The checkpoint's tensors; a language model's are read when they are asked for."""
    if isinstance(config, VivitConfig):
        return dict(native_tensors(checkpoint, config))
    return NativeTensors(checkpoint.state_dict, config)
