"""From tensors by name to a ViViT."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from modicum.checkpoint.scenic import read_scenic
from modicum.config import Variant, VivitConfig
from modicum.core.weights import fill
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
    fill(model, tensors, device, dtype)
    return model.eval()


def from_scenic(
    path: str | Path,
    num_frames: int = 32,
    image_size: int | tuple[int, int] = (224, 224),
    variant: Variant | None = None,
    attention_order: Literal["space_time", "time_space"] = "space_time",
    pooling: str | None = None,
    heads: Mapping[str, int] | None = None,
    sampled_frames: int | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Vivit:
    """A model with the weights of one of the authors' own checkpoints, in evaluation mode.

    Args:
        path ... sampled_frames: as `checkpoint.scenic.read_scenic`.

    Raises:
        CheckpointError: the file is damaged or holds something else than such a model.
        UsageError: an argument that the file contradicts, or one that it does not answer.
    """
    config, state = read_scenic(path, num_frames, image_size, variant, attention_order, pooling, heads, sampled_frames)
    # Each tensor is let go as it is copied, so that the model is not held twice.
    return assemble(config, ((name, state.pop(name)) for name in list(state)), device, dtype)
