"""Second moments of what attention layers read, collected while a model reads text."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from modicum.core.attend import triangle
from modicum.core.attention import Attention
from modicum.gqa.merge import LayerStatistics

# Beyond this width the moments of averaged inputs are pooled over all groups: one matrix per layer instead of one per group.
POOLED_FROM = 2048


@torch.no_grad()
def collect(
    model: nn.Module,
    batches: Iterable[list[int]],
    n_kv_heads: int,
    on_batch: Callable[[], Any] | None = None,
) -> dict[str, LayerStatistics]:
    """Statistics of every attention layer, by the prefix of its name.

    Args:
        model: a decoder that is not packed; its own dtype is what it computes in, sums are in float64.
        batches: lists of token ids, each at most the model's context; at least ten tokens per unit of width are advised.
        n_kv_heads: into how many groups the query heads will be shared out.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
    sums = {name: _Sums(module, n_kv_heads) for name, module in layers.items()}
    handles = [module.register_forward_pre_hook(sums[name].add, with_kwargs=True) for name, module in layers.items()]
    device = next(model.parameters()).device
    try:
        for ids in batches:
            model(torch.tensor([ids], device=device))
            if on_batch is not None:
                on_batch()
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.result() for name, total in sums.items()}


class _Sums:
    """Running sums of one layer."""

    def __init__(self, attention: Attention, n_kv_heads: int) -> None:
        E = attention.out.out_features + 1
        self.n_kv_heads = n_kv_heads
        self.pooled = E > POOLED_FROM
        self.inputs = torch.zeros(E, E, dtype=torch.float64)
        self.averaged = torch.zeros(1 if self.pooled else n_kv_heads, E, E, dtype=torch.float64)
        self.n_tokens = 0

    def add(self, attention: Attention, args: tuple[Tensor, ...], settings: dict[str, Any]) -> None:
        (x_BLD,) = args
        x_BLE = torch.nn.functional.pad(x_BLD.double(), (0, 1), value=1.0).cpu()
        probs_BHLM = probabilities(attention, x_BLD, settings).double().cpu()
        self.n_tokens += x_BLE.shape[0] * x_BLE.shape[1]
        self.inputs += moment(x_BLE)
        for g, heads in enumerate(probs_BHLM.chunk(self.n_kv_heads, dim=1)):
            self.averaged[0 if self.pooled else g] += moment(heads @ x_BLE[:, None]) / heads.shape[1]

    def result(self) -> LayerStatistics:
        n_sums = self.n_tokens * (self.n_kv_heads if self.pooled else 1)
        averaged = (self.averaged / n_sums).expand(self.n_kv_heads, -1, -1)
        return LayerStatistics(self.inputs / self.n_tokens, averaged, self.n_tokens)


def moment(x: Tensor) -> Tensor:
    """Sum over all rows of x^T x: [..., E] -> [E, E]."""
    rows = x.flatten(0, -2)
    return rows.T @ rows


def probabilities(attention: Attention, x_BLD: Tensor, settings: dict[str, Any]) -> Tensor:
    """What the layer attends to, [B, H, L, L]: its own projections, norms, rotation and mask, without its fused kernel."""
    B, L, _ = x_BLD.shape
    q_BLHK, k_BLGK, _ = (heads.view(B, L, -1, attention.head_dim) for heads in attention.project(x_BLD))
    if attention.q_norm is not None and attention.k_norm is not None:
        q_BLHK, k_BLGK = attention.q_norm(q_BLHK), attention.k_norm(k_BLGK)
    rotate = settings.get("rotate")
    if rotate is not None:
        q_BLHK, k_BLGK = rotate(q_BLHK), rotate(k_BLGK)
    per_group = q_BLHK.shape[2] // k_BLGK.shape[2]
    k_BLHK = k_BLGK.repeat_interleave(per_group, dim=2)
    scale = attention.head_dim**-0.5 if attention.scale is None else attention.scale
    scores_BHLM = torch.einsum("blhk,bmhk->bhlm", q_BLHK, k_BLHK).float() * scale
    mask = triangle(L, L, scores_BHLM) if settings.get("causal") else settings.get("mask")
    return (scores_BHLM if mask is None else scores_BHLM + mask).softmax(-1)
