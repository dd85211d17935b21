"""Norms, feed-forward layers and the pre-norm transformer block."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from modicum.core.attention import Attention, AttentionConfig, Context
from modicum.core.linear import ACTIVATIONS, Linear, Projections


def norm(kind: Literal["rms", "layer"], dim: int, eps: float) -> nn.Module:
    """RMSNorm (1910.07467) or LayerNorm with bias, over the last axis; both compute in at least float32."""
    return nn.RMSNorm(dim, eps=eps) if kind == "rms" else nn.LayerNorm(dim, eps=eps)


class FeedForward(nn.Module):
    """down(activation(up(x))), or with a gate (2002.05202) down(activation(gate(x)) * up(x)). [..., D] -> [..., D]."""

    def __init__(self, dim: int, hidden: int, activation: str, *, gated: bool, bias: bool) -> None:
        super().__init__()
        self.gated, self.activation = gated, activation
        self.project = Projections(dim, {"gate": hidden, "up": hidden} if gated else {"up": hidden}, bias=bias)
        self.down = Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            gate, up = self.project(x)
            return self.down(self.act(gate) * up)
        return self.down(*self.project(x, self.activation))

    def act(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](x)


class StochasticDepth(nn.Module):
    """Drops a residual branch (1603.09382), example by example: in training a row's branch is zero with probability
    `rate`, and never rescaled. [B, ...] -> [B, ...]; one draw per row, whatever axes follow."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return branch
        shape = (branch.shape[0],) + (1,) * (branch.dim() - 1)
        return branch * (torch.rand(shape, device=branch.device) >= self.rate)


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then + ffn(norm(that)); `parallel` lets both read x (GPT-NeoX).

    With `context_dim`, + cross(norm(that)) stands between the two: attention to a context of that width (1706.03762).
    """

    def __init__(
        self,
        attention: AttentionConfig,
        layer: int = 0,
        *,
        norm_kind: Literal["rms", "layer"],
        norm_eps: float,
        ffn_dim: int,
        activation: str,
        gated: bool,
        ffn_bias: bool,
        parallel: bool = False,
        stochastic_depth: float = 0.0,
        context_dim: int | None = None,
        along: type[Attention] = Attention,
    ) -> None:
        super().__init__()
        self.parallel = parallel
        self.attention_norm = norm(norm_kind, attention.dim, norm_eps)
        self.attention = along(attention, layer)
        if context_dim is not None:
            self.cross_norm = norm(norm_kind, attention.dim, norm_eps)
            self.cross = Attention(attention, layer, context_dim)
        self.ffn_norm = norm(norm_kind, attention.dim, norm_eps)
        self.ffn = FeedForward(attention.dim, ffn_dim, activation, gated=gated, bias=ffn_bias)
        self.drop = StochasticDepth(stochastic_depth)

    def forward(
        self, x_BLD: Tensor, *, context: Context | None = None, context_mask: Tensor | None = None, **attention: Any
    ) -> Tensor:
        attended_BLD = x_BLD + self.drop(self.attention(self.attention_norm(x_BLD), **attention))
        if context is not None:
            read_BLD = self.cross(self.cross_norm(attended_BLD), context=context, mask=context_mask)
            attended_BLD = attended_BLD + self.drop(read_BLD)
        return attended_BLD + self.drop(self.ffn(self.ffn_norm(x_BLD if self.parallel else attended_BLD)))
