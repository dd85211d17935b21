"""Weights by name into a module that has no memory for them yet."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from modicum.errors import CheckpointError


def fill(
    model: nn.Module, tensors: Iterable[tuple[str, Tensor]], device: str | torch.device, dtype: torch.dtype
) -> None:
    """Give a module on the meta device its weights, under the names of its parameters; each is copied, one at a time.

    What has two names is filled under the first, and left to the caller to tie again.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape than the module's.
    """
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
        # A copy always: a view of the memory-mapped file would change, or fail, when the model is trained.
        weight = torch.empty(shape, dtype=dtype, device=device).copy_(tensor)
        model.get_submodule(owner).register_parameter(leaf, nn.Parameter(weight))
    if shapes:
        more = f" and {len(shapes) - 1} more" if len(shapes) > 1 else ""
        raise CheckpointError(
            f"the checkpoint lacks `{next(iter(shapes))}`{more}: weights and configuration must belong together"
        )
