"""Multi-head, grouped-query and multi-query attention, to itself or to a context: one class."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from modicum.core.attend import Attend, folded
from modicum.core.cache import KVCache
from modicum.core.linear import Linear, Projections
from modicum.core.positions import Rotate

# What cross-attention reads: [B, M, D'], or its keys and values, [B, G, M, K] each, made once for many calls.
Context = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """`n_kv_heads` = n_heads: multi-head; fewer: grouped-query (2305.13245); 1: multi-query (1911.02150)."""

    dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm_eps: float | None = None  # None: queries and keys are not normalised
    scale: float | None = None  # None: 1 / sqrt(head_dim)


class Attention(nn.Module):
    """project -> rotate -> write cache -> attend -> merge.

    With `context_dim`, the width of what it reads besides its own input, it is cross-attention.
    """

    def __init__(self, config: AttentionConfig, layer: int = 0, context_dim: int | None = None) -> None:
        super().__init__()
        self.head_dim, self.scale, self.layer = config.head_dim, config.scale, layer
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        sizes = {"q": q_dim, "k": kv_dim, "v": kv_dim}
        if context_dim is None:
            self.project: Any = Projections(config.dim, sizes, bias=config.qkv_bias)
        else:
            widths = {"q": config.dim, "k": context_dim, "v": context_dim}
            self.project = nn.ModuleDict({x: Linear(widths[x], sizes[x], bias=config.qkv_bias) for x in sizes})
        normed = config.qk_norm_eps is not None
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.qk_norm_eps) if normed else None
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.qk_norm_eps) if normed else None
        self.out = Linear(q_dim, config.dim, bias=config.out_bias)
        self.attend: Attend = folded

    def forward(
        self,
        x_BLD: Tensor,
        *,
        context: Context | None = None,
        rotate: Rotate | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        cache: KVCache | None = None,
        positions_BL: Tensor | None = None,
    ) -> Tensor:
        """[B, L, D] -> [B, L, D]. `mask` and `causal` as in `core.attend`; with a cache, L new tokens see it too.

        With a `context` keys and values come from it instead, and positions, rotation and cache have no part in them.
        """
        B, L, _ = x_BLD.shape
        if context is not None:
            q_BLHK = self.by_head(self.project.q(x_BLD), self.q_norm)
            k_BGMK, v_BGMK = context if isinstance(context, tuple) else self.keys_values(context)
        else:
            q, k, v = self.project(x_BLD)
            q_BLHK, k_BLGK, v_BLGK = self.by_head(q, self.q_norm), self.by_head(k, self.k_norm), self.by_head(v)
            if rotate is not None:
                q_BLHK, k_BLGK = rotate(q_BLHK), rotate(k_BLGK)
            if cache is None or positions_BL is None:
                k_BGMK, v_BGMK = k_BLGK.transpose(1, 2), v_BLGK.transpose(1, 2)
            else:
                k_BGMK, v_BGMK = cache.write(self.layer, positions_BL, k_BLGK, v_BLGK)
        o_BHLK = self.attend(q_BLHK.transpose(1, 2), k_BGMK, v_BGMK, mask, causal, self.scale)
        return self.out(o_BHLK.transpose(1, 2).reshape(B, L, -1))

    def keys_values(self, context_BMD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a context, [B, G, M, K] each: what does not change while its readers write."""
        k, v = self.project.k(context_BMD), self.project.v(context_BMD)
        return self.by_head(k, self.k_norm).transpose(1, 2), self.by_head(v).transpose(1, 2)

    def by_head(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """[B, L, heads * K] -> [B, L, heads, K], normalised or not."""
        heads = x.view(*x.shape[:2], -1, self.head_dim)
        return heads if norm is None else norm(heads)
