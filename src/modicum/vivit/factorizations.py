"""Attention factorised over space and time (2103.15691, section 3.3): plain attention around fold and unfold.

Tokens are [B, T, S, D]: T tubelets in time, S in space. Spacetime attention (Model 1) sees them as one row of T * S; what
is here sees one axis at a time, with the other as part of the batch.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from modicum.core.attend import Attend
from modicum.core.attention import Attention, AttentionConfig
from modicum.core.block import FeedForward, StochasticDepth, norm


class SpatialAttention(Attention):
    """Every frame's tokens attend to each other: [B, T, S, D] -> [B, T, S, D]."""

    def forward(self, x_BTSD: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        B, T = x_BTSD.shape[:2]
        return super().forward(x_BTSD.flatten(0, 1)).unflatten(0, (B, T))


class TemporalAttention(Attention):
    """Tokens at the same place attend to each other over time: [B, T, S, D] -> [B, T, S, D]."""

    def forward(self, x_BTSD: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        B, S = x_BTSD.shape[0], x_BTSD.shape[2]
        return super().forward(x_BTSD.transpose(1, 2).flatten(0, 1)).unflatten(0, (B, S)).transpose(1, 2)


class SelfAttentionBlock(nn.Module):
    """Factorised self-attention (Model 3, equations 4 to 6): over space, over time, then the feed-forward.

    The paper finds that the order of the two does not matter; each axis has a norm and weights of its own.
    """

    def __init__(
        self,
        attention: AttentionConfig,
        *,
        norm_eps: float,
        ffn_dim: int,
        activation: str,
        stochastic_depth: float,
        order: Literal["space_time", "time_space"],
    ) -> None:
        super().__init__()
        self.order = order
        self.space_norm = norm("layer", attention.dim, norm_eps)
        self.space = SpatialAttention(attention)
        self.time_norm = norm("layer", attention.dim, norm_eps)
        self.time = TemporalAttention(attention)
        self.ffn_norm = norm("layer", attention.dim, norm_eps)
        self.ffn = FeedForward(attention.dim, ffn_dim, activation, gated=False, bias=True)
        self.drop = StochasticDepth(stochastic_depth)

    def forward(self, x_BTSD: Tensor) -> Tensor:
        axes = [(self.space_norm, self.space), (self.time_norm, self.time)]
        for axis_norm, attention in axes if self.order == "space_time" else reversed(axes):
            x_BTSD = x_BTSD + self.drop(attention(axis_norm(x_BTSD)))
        return x_BTSD + self.drop(self.ffn(self.ffn_norm(x_BTSD)))


class FactorizedDotProduct:
    """Factorised dot-product attention (Model 4) as a plug for `Attention.attend`: tokens are one row of T * S.

    The first half of the heads sees the tokens at the same place over time, the second half those of the same frame
    (the paper writes space first; its authors' checkpoints have time first). Parameters are those of full attention.
    """

    def __init__(self, n_frames: int, inner: Attend) -> None:
        self.n_frames, self.inner = n_frames, inner

    def __call__(
        self, q_BHLK: Tensor, k_BGMK: Tensor, v_BGMK: Tensor, mask: Tensor | None, causal: bool, scale: float | None
    ) -> Tensor:
        (q_time, q_space), (k_time, k_space), (v_time, v_space) = (x.chunk(2, dim=1) for x in (q_BHLK, k_BGMK, v_BGMK))
        fold = self._along_time
        over_time = self.inner(fold(q_time), fold(k_time), fold(v_time), None, False, scale)
        fold = self._along_space
        over_space = self.inner(fold(q_space), fold(k_space), fold(v_space), None, False, scale)
        B, T = q_BHLK.shape[0], self.n_frames
        over_time = over_time.unflatten(0, (B, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        over_space = over_space.unflatten(0, (B, T)).transpose(1, 2).flatten(2, 3)
        return torch.cat([over_time, over_space], dim=1)

    def _along_time(self, x_BHLK: Tensor) -> Tensor:
        """[B, H, T * S, K] -> [B * S, H, T, K]"""
        return x_BHLK.unflatten(2, (self.n_frames, -1)).permute(0, 3, 1, 2, 4).flatten(0, 1)

    def _along_space(self, x_BHLK: Tensor) -> Tensor:
        """[B, H, T * S, K] -> [B * T, H, S, K]"""
        return x_BHLK.unflatten(2, (self.n_frames, -1)).transpose(1, 2).flatten(0, 1)
