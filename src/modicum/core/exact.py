"""Bits that do not depend on company: a token's logits, whichever other tokens stand in the same call.

Kernels choose how to add up by the shape of a call, so scoring five tokens at once rounds otherwise than one after another,
and a near-tie can go the other way. Here every sum has the same shape for every token:

- linear layers run in blocks of `ROWS` rows, the last padded; within a block oneDNN and cuBLAS treat rows alike, which
  is checked before it is relied on (`check_rows`);
- attention runs token by token, each over exactly the keys it sees;
- activations run row by row on a CPU, where a vector's remainder is computed by other code than the rest.

Norms, rotations and sums of two tensors give the same bits for any number of rows. Calls with more than `MANY` tokens, the
chunks of a long prompt, run as ever: they are the same with and without a draft.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modicum.core.attend import folded
from modicum.core.attention import Attention
from modicum.core.block import Block, FeedForward
from modicum.core.linear import ACTIVATIONS, FUSED, Linear, Packable, PackedLinear, Projections
from modicum.errors import UsageError

# About what a verified draft has; on a CPU this many rows take little longer than one.
ROWS = 8
# Calls up to this many tokens are made of blocks: K + 1 must not exceed it.
MANY = 64
# Slots of a cache, so that every head's keys begin at the same alignment, by which kernels choose as well.
SLOTS = 64


class FixedRows:
    """A packed weight that is only ever multiplied with `ROWS` rows at a time."""

    def __init__(self, packed: Any) -> None:
        self.packed = packed
        self.form = f"{packed.form}, {ROWS} rows at a time"

    def __call__(self, x: Tensor, activation: str | None = None) -> Tensor:
        rows_RD = x.reshape(-1, x.shape[-1])
        n_rows = len(rows_RD)
        if n_rows > MANY:
            return self.packed(x, activation)
        fused = activation if self.packed.blocked and activation in FUSED else None
        blocks = torch.nn.functional.pad(rows_RD, (0, 0, 0, -n_rows % ROWS)).split(ROWS)
        # Copies begin at the alignment of all tensors; parts of one need not.
        y = torch.cat([self.packed(block.clone(), fused) for block in blocks])[:n_rows]
        y = y if activation == fused else by_rows(ACTIVATIONS[str(activation)], y)
        return y.view(*x.shape[:-1], y.shape[-1])

    def dense(self) -> Any:
        return self.packed.dense()


def causal_alone(
    q_BHLK: Tensor, k_BGMK: Tensor, v_BGMK: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """`folded` token by token: of L tokens the last sees all M keys, the one before it M - 1, and so on. All rows alike."""
    L, M = q_BHLK.shape[2], k_BGMK.shape[2]
    if L > MANY:
        return folded(q_BHLK, k_BGMK, v_BGMK, mask, causal, scale)
    outputs = []
    for token in range(L):
        seen = M - L + 1 + token
        # Always a mask, because one token alone would come without and a window brings one.
        row = q_BHLK.new_zeros(1, 1, 1, seen) if mask is None else mask[..., token : token + 1, :seen].clone()
        q_BH1K = q_BHLK[:, :, token : token + 1].clone(memory_format=torch.contiguous_format)
        outputs.append(folded(q_BH1K, k_BGMK[:, :, :seen], v_BGMK[:, :, :seen], row, False, scale))
    return torch.cat(outputs, dim=2)


def context_alone(
    q_BHLK: Tensor, k_BGMK: Tensor, v_BGMK: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """`folded` token by token, each seeing what `mask` shows of a context."""
    if q_BHLK.shape[2] > MANY:
        return folded(q_BHLK, k_BGMK, v_BGMK, mask, causal, scale)
    tokens = [q.clone(memory_format=torch.contiguous_format) for q in q_BHLK.split(1, dim=2)]
    return torch.cat([folded(q_BH1K, k_BGMK, v_BGMK, mask, causal, scale) for q_BH1K in tokens], dim=2)


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` of each row alone, [..., F]: every element is then computed by the same code, however many rows."""
    if x.device.type != "cpu" or x.shape[-2] > MANY:
        return function(x)
    rows = [function(row.clone()) for row in x.reshape(-1, x.shape[-1]).unbind(0)]
    return torch.stack(rows).view(x.shape) if rows else x


def exact_view(model: Any) -> Any:
    """The same model on the same weights, computing as described above, for one row of text at a time.

    The model must have been packed (`for_inference`); it is not changed.

    Raises:
        UsageError: a model that does not run here, or whose weights this machine cannot multiply to the same bits.
    """
    if not isinstance(model, Packable):
        raise UsageError("bit_exact is not offered for models that run through transformers: leave it out")
    view = _view(model)
    new_cache = view.new_cache
    view.new_cache = lambda batch, capacity: new_cache(batch, capacity + -capacity % SLOTS)
    view.bit_exact = True
    return view


def _view(module: Any) -> Any:
    """A copy of `module` and all below it that shares its tensors, with other ways of computing put in."""
    view = copy.copy(module)
    # What an encoder reads is the same with and without a draft, so it may compute as ever.
    kept = {name: child for name, child in module._modules.items() if child is None or name == "encoder"}
    view._modules = {name: kept[name] if name in kept else _view(child) for name, child in module._modules.items()}
    # Sums of integers are exact: int8 products have the same bits as they are.
    if isinstance(view, Linear | Projections) and view.packed is not None and view.packed.int8 is None:
        first: Any = view if isinstance(view, Linear) else next(view.children())
        check_rows(view.packed, first.in_features)
        view.packed = FixedRows(view.packed)  # type: ignore[assignment]
    if isinstance(view, Attention):
        view.attend = causal_alone
    if isinstance(view, Block) and "cross" in view._modules:
        view.cross.attend = context_alone
    if isinstance(view, FeedForward):
        view.act = partial(by_rows, view.act)  # type: ignore[method-assign]
    return view


# Weights of one shape and type are multiplied by one kernel: asked once.
_checked: set[tuple[Any, ...]] = set()


def check_rows(packed: PackedLinear, in_features: int) -> None:
    """Raise UsageError if a row's product depends on where in a block of `ROWS` it stands.

    oneDNN's and cuBLAS's kernels add up alike for all rows of a block, but nobody promises it; so it is tried.
    """
    weight = packed.weight
    if weight.device.type == "cpu" and not packed.blocked:
        raise UsageError(
            f"bit_exact on this CPU needs weights that oneDNN lays out, float32 or bfloat16, and these are {weight.dtype}: "
            "load the model with another dtype, or leave bit_exact out"
        )
    key = (in_features, tuple(weight.shape), weight.dtype, weight.device, packed.bias is None, torch.get_num_threads())
    if key in _checked:
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, in_features, generator=generator).to(weight.device, weight.dtype)
    for activation in FUSED if packed.blocked else (None,):
        expected = packed(x, activation)
        for shift in range(1, ROWS):
            if not torch.equal(packed(x.roll(shift, 0), activation).roll(-shift, 0), expected):
                raise UsageError(
                    f"bit_exact cannot be kept here: a product with a weight of {in_features} inputs in {weight.dtype} "
                    f"rounds by the row it stands in on this {weight.device.type}: leave bit_exact out"
                )
    _checked.add(key)


def check_width(num_draft_tokens: Any) -> None:
    """Raise UsageError if a verified draft would have more tokens than are computed one like the other."""
    if isinstance(num_draft_tokens, int) and num_draft_tokens >= MANY:
        raise UsageError(f"bit_exact with num_draft_tokens={num_draft_tokens}: give at most {MANY - 1}")
