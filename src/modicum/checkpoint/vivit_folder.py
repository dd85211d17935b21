"""A ViViT's folder: the stock layout where it can hold the model, else ours, in which tensors have our own names.

Ours is config.json with `model_type` = modicum-vivit, the fields of `VivitConfig` and `id2label`, beside safetensors.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from modicum.checkpoint import vivit_hf
from modicum.checkpoint.hf_fields import refuse
from modicum.checkpoint.io import Checkpoint
from modicum.config import VivitConfig
from modicum.errors import CheckpointError, UsageError

OWN_TYPE = "modicum-vivit"
MODEL_TYPES = (vivit_hf.MODEL_TYPE, OWN_TYPE)
_BESIDE = ("model_type", "id2label", "label2id")


def read_vivit_config(stock: Mapping[str, Any]) -> VivitConfig:
    """The model that a config.json of one of `MODEL_TYPES` describes.

    Raises:
        CheckpointError: a key or value that is not known or not implemented.
    """
    if stock.get("model_type") != OWN_TYPE:
        return vivit_hf.vivit_config(stock)
    try:
        return VivitConfig.from_dict({key: value for key, value in stock.items() if key not in _BESIDE})
    except UsageError as error:
        raise CheckpointError(f"config.json: {error}") from error


def native_tensors(ckpt: Checkpoint, config: VivitConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint under our names, one at a time."""
    if ckpt.config.get("model_type") == OWN_TYPE:
        return ((name, ckpt.state_dict[name]) for name in ckpt.state_dict)
    return vivit_hf.vivit_to_native(ckpt.state_dict, config)


def vivit_checkpoint(
    config: VivitConfig,
    native: Mapping[str, Tensor],
    labels: Sequence[str] | None = None,
    base: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Checkpoint:
    """What is written for a model: the stock layout if it can hold `config`, else ours.

    Args:
        labels: one name per class, in the order of the logits.
        base: the stock config.json that the model came from, whose other keys are carried through.

    Raises:
        UsageError: another number of labels than classes.
    """
    if labels is not None and len(labels) != config.num_classes:
        raise UsageError(
            f"{len(labels)} labels were given for {config.num_classes} classes: give one per class, in order"
        )
    stock = vivit_hf.stock_vivit_config(config, base)
    state: Mapping[str, Tensor] = native
    if stock is None:
        stock = {"model_type": OWN_TYPE, **config.to_dict()}
    else:
        state = vivit_hf.vivit_to_stock(native, config)
    if labels is not None:
        stock["id2label"] = {str(index): label for index, label in enumerate(labels)}
        stock["label2id"] = {label: index for index, label in enumerate(labels)}
    return Checkpoint(stock, state, dict(files or {}))


def stored_labels(stock: Mapping[str, Any], num_classes: int) -> list[str] | None:
    """The class names of a config.json; None where it has none, or those `transformers` makes up (LABEL_0, ...).

    Raises:
        CheckpointError: `id2label` does not name every class once.
    """
    given = stock.get("id2label")
    if given is None:
        return None
    if not isinstance(given, dict) or set(given) != {str(index) for index in range(num_classes)}:
        raise refuse("id2label", given, f'a name for each of "0" to "{num_classes - 1}"')
    labels = [str(given[str(index)]) for index in range(num_classes)]
    return None if labels == [f"LABEL_{index}" for index in range(num_classes)] else labels
