"""A captioner's folder, which is ours alone: config.json, safetensors under our own names, tokenizer files.

config.json has `model_type` = modicum-captioner, the fields of `CaptionerConfig` and the token ids that end a text.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from modicum.checkpoint.io import Checkpoint
from modicum.config import CaptionerConfig
from modicum.errors import CheckpointError, UsageError

OWN_TYPE = "modicum-captioner"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def is_captioner(stock: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a captioner."""
    return stock.get("model_type") == OWN_TYPE


def read_captioner_config(stock: Mapping[str, Any]) -> CaptionerConfig:
    """The model that such a config.json describes.

    Raises:
        CheckpointError: a key or value that is not known.
    """
    try:
        return CaptionerConfig.from_dict(
            {key: value for key, value in stock.items() if key not in ("model_type", *TOKEN_IDS)}
        )
    except UsageError as error:
        raise CheckpointError(f"config.json: {error}") from error


def captioner_checkpoint(
    config: CaptionerConfig,
    tensors: Mapping[str, Tensor],
    base: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Checkpoint:
    """What is written for a captioner; `base` is the config.json that names its token ids."""
    ids = {key: base[key] for key in TOKEN_IDS if base is not None and base.get(key) is not None}
    return Checkpoint({"model_type": OWN_TYPE, **ids, **config.to_dict()}, tensors, dict(files or {}))
