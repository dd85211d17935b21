"""From tensors by name to a ViViT."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modicum.checkpoint.scenic import read_scenic
from modicum.config import VivitConfig
from modicum.errors import CheckpointError
from modicum.vivit.model import Vivit


def assemble(
    config: VivitConfig, tensors: Iterable[tuple[str, Tensor]], device: str | torch.device, dtype: torch.dtype
) -> Vivit:
    """A model in evaluation mode with these weights, under the names of its parameters; each is copied, one at a time.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape than the configuration says.
    """
    with torch.device("meta"):
        model = Vivit(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, tensor in tensors:
        shape = shapes.pop(name, None)
        if shape is None or tensor.shape != shape:
            required = "nothing of that name" if shape is None else f"{list(shape)}"
            raise CheckpointError(
                f"the checkpoint's `{name}` has shape {list(tensor.shape)} and its configuration requires {required}: "
                "weights and configuration must belong together"
            )
        owner, _, leaf = name.rpartition(".")
        weight = torch.empty(shape, dtype=dtype, device=device).copy_(tensor)
        model.get_submodule(owner).register_parameter(leaf, nn.Parameter(weight))
    if shapes:
        more = f" and {len(shapes) - 1} more" if len(shapes) > 1 else ""
        raise CheckpointError(
            f"the checkpoint lacks `{next(iter(shapes))}`{more}: weights and configuration must belong together"
        )
    return model.eval()


def from_scenic(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, **settings: Any
) -> Vivit:
    """A model with the weights of one of the authors' own checkpoints, in evaluation mode.

    Args:
        path, settings: as `checkpoint.scenic.read_scenic`: num_frames, image_size, variant, attention_order, pooling,
            heads, sampled_frames.

    Raises:
        CheckpointError: the file is damaged or holds something else than such a model.
        UsageError: an argument that the file contradicts, or one that it does not answer.
    """
    config, state = read_scenic(path, **settings)
    # Each tensor is let go as it is copied, so that the model is not held twice.
    return assemble(config, ((name, state.pop(name)) for name in list(state)), device, dtype)
