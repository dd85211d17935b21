"""How a weight is held: trainable, or packed once for the processor it runs on."""

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modicum.core.int8 import FORMS, Int8Linear
from modicum.errors import UsageError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
# What oneDNN computes on a product's way to memory: name, arguments, algorithm.
FUSED: dict[str | None, tuple[str, list[float], str]] = {
    None: ("none", [], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
    "relu": ("relu", [], ""),
}

# oneDNN lays a packed weight out for about this many rows: a verified draft, not a training batch.
PACKED_ROWS = 5


class Linear(nn.Linear):
    """A linear layer whose weight can be packed for inference. Shapes: [..., in_features] -> [..., out_features]."""

    packed: "PackedLinear | None" = None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) if self.packed is None else self.packed(x)

    def pack(self, weights: str | None = None) -> None:
        self.packed = PackedLinear(self.weight, self.bias, weights)
        self.weight = self.bias = None  # type: ignore[assignment]

    def dense(self) -> Iterator[tuple[str, Tensor]]:
        """The weight, and the bias if there is one, as they were before packing."""
        held = self if self.packed is None else self.packed.dense()
        yield "weight", held.weight
        if held.bias is not None:
            yield "bias", held.bias


class Projections(nn.Module):
    """Linear layers that read the same input: [..., in_features] -> one tensor [..., size] per name, in order.

    Packed, they become one product, because on small inputs the number of calls costs more than their arithmetic.
    """

    packed: "PackedLinear | None" = None

    def __init__(self, in_features: int, sizes: dict[str, int], *, bias: bool) -> None:
        super().__init__()
        self.sizes = sizes
        for name, size in sizes.items():
            self.add_module(name, Linear(in_features, size, bias=bias))

    def forward(self, x: Tensor, activation: str | None = None) -> tuple[Tensor, ...]:
        """`activation`, one of `ACTIVATIONS`, is applied to all outputs; packed, within the product where it can be."""
        if self.packed is not None:
            return self.packed(x, activation).split(list(self.sizes.values()), dim=-1)
        outputs = tuple(layer(x) for layer in self.children())
        return outputs if activation is None else tuple(map(ACTIVATIONS[activation], outputs))

    def pack(self, weights: str | None = None) -> None:
        layers = [layer for layer in self.children() if isinstance(layer, Linear)]
        held: list[Tensor] = [layer.weight for layer in layers]
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        self.packed = PackedLinear(torch.cat(held), torch.cat(biases) if biases else None, weights)
        for layer in layers:
            layer.weight = layer.bias = None  # type: ignore[assignment]

    def dense(self) -> Iterator[tuple[str, Tensor]]:
        """`name.weight` and `name.bias` of every layer, as they were before packing."""
        held = None if self.packed is None else self.packed.dense()
        start = 0
        for name, size in self.sizes.items():
            part = self.get_submodule(name) if held is None else held.part(start, start + size)
            yield f"{name}.weight", part.weight  # type: ignore[misc]
            if part.bias is not None:
                yield f"{name}.bias", part.bias  # type: ignore[misc]
            start += size


class PackedLinear:
    """A weight in the layout that is fastest to read: oneDNN's blocks for float32 and bfloat16 on a CPU, else as it was.

    With `weights`, one of `core.int8.FORMS`, it is rounded to bytes, and what it was is gone. Not a module, so that a packed
    model has no parameters an optimizer could pick up by mistake.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, weights: str | None = None) -> None:
        self.int8 = None if weights is None else Int8Linear(weight, bias, weights)
        if self.int8 is not None:
            return
        self.weight = weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.blocked = can_block(weight)
        if self.blocked:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, PACKED_ROWS)

    def __call__(self, x: Tensor, activation: str | None = None) -> Tensor:
        if self.int8 is not None:
            y = self.int8(x)
            return y if activation is None else ACTIVATIONS[activation](y)
        if self.blocked and activation in FUSED:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *FUSED[activation])
        y = self(x) if self.blocked else F.linear(x, self.weight, self.bias)
        return y if activation is None else ACTIVATIONS[activation](y)

    @property
    def form(self) -> str:
        """How the weight is held, in words: what a product with it costs depends on that."""
        if self.int8 is not None:
            return self.int8.form
        return f"{str(self.weight.dtype).removeprefix('torch.')} {'blocked' if self.blocked else 'plain'}"

    def dense(self) -> "DenseWeight":
        if self.int8 is not None:
            raise UsageError(
                "this model's weights were rounded to int8 and the ones they came from are gone: "
                "load the checkpoint again to save or change it"
            )
        return DenseWeight(self.weight.to_dense() if self.blocked else self.weight, self.bias)


class DenseWeight:
    """A weight and its bias in the plain layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def part(self, start: int, end: int) -> "DenseWeight":
        return DenseWeight(self.weight[start:end], None if self.bias is None else self.bias[start:end])


def can_block(weight: Tensor) -> bool:
    """Whether oneDNN's prepacked product exists for this weight on this machine."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def pack(model: nn.Module, weights: str | None = None) -> None:
    """Pack every linear layer of `model` in place, one after another, so that no weight is held twice for long.

    What is packed already stays as it is.

    Raises:
        UsageError: weights in a form that is not known or not for this machine, or packed in another form already.
    """
    if weights is not None and weights not in FORMS:
        raise UsageError(f"weights `{weights}` are not known: use {', '.join(FORMS)}, or leave it out")
    groups: list[Any] = [module for module in model.modules() if isinstance(module, Projections)]
    inside = {id(layer) for group in groups for layer in group.children()}
    layers = [m for m in model.modules() if isinstance(m, Linear) and id(m) not in inside]
    held = [module.packed for module in (*groups, *layers) if module.packed is not None]
    if weights is not None and any(packed.form != weights for packed in held):
        raise UsageError(
            f"this model is packed for inference already, not as {weights}: load it again and "
            f'call `for_inference(weights="{weights}")` before it is used'
        )
    for module in (*groups, *layers):
        if module.packed is None:
            module.pack(weights)
    model.requires_grad_(False)


class Packable(nn.Module):
    """A model whose weights can be packed, and which then refuses to be trained."""

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`.

        Raises:
            UsageError: the model was packed for inference.
        """
        if mode:
            refuse_training(self)
        return super().train(mode)


def refuse_training(model: nn.Module) -> None:
    """Raise UsageError if `model` was packed: a packed weight has no gradient."""
    if any(getattr(module, "packed", None) is not None for module in model.modules()):
        raise UsageError("this model is packed for inference and cannot be trained: load the checkpoint again")


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of `model` as if it had never been packed, in the order of its modules."""
    state: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Linear | Projections) and module.packed is not None:
            tensors = module.dense()
        else:
            tensors = iter([*module._parameters.items()])  # type: ignore[assignment]
        state.update((f"{prefix}.{name}" if prefix else name, t) for name, t in tensors if t is not None)
    return state
