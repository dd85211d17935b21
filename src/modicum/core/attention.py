"""Multi-head, grouped-query and multi-query attention: one class, told apart by `n_kv_heads`."""

from dataclasses import dataclass

from torch import Tensor, nn

from modicum.core.attend import Attend, sdpa
from modicum.core.cache import KVCache
from modicum.core.linear import Linear, Projections
from modicum.core.positions import Rotate


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
    """project -> rotate -> write cache -> attend -> merge."""

    def __init__(self, config: AttentionConfig, layer: int = 0) -> None:
        super().__init__()
        self.head_dim, self.scale, self.layer = config.head_dim, config.scale, layer
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.project = Projections(config.dim, {"q": q_dim, "k": kv_dim, "v": kv_dim}, bias=config.qkv_bias)
        normed = config.qk_norm_eps is not None
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.qk_norm_eps) if normed else None
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.qk_norm_eps) if normed else None
        self.out = Linear(q_dim, config.dim, bias=config.out_bias)
        self.attend: Attend = sdpa

    def forward(
        self,
        x_BLD: Tensor,
        *,
        rotate: Rotate | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        cache: KVCache | None = None,
        positions_BL: Tensor | None = None,
    ) -> Tensor:
        """[B, L, D] -> [B, L, D]. `mask` and `causal` as in `core.attend`; with a cache, L new tokens see it too."""
        B, L, _ = x_BLD.shape
        q_BLHK, k_BLGK, v_BLGK = (heads.view(B, L, -1, self.head_dim) for heads in self.project(x_BLD))
        if self.q_norm is not None and self.k_norm is not None:
            q_BLHK, k_BLGK = self.q_norm(q_BLHK), self.k_norm(k_BLGK)
        if rotate is not None:
            q_BLHK, k_BLGK = rotate(q_BLHK), rotate(k_BLGK)
        if cache is None or positions_BL is None:
            k_BGMK, v_BGMK = k_BLGK.transpose(1, 2), v_BLGK.transpose(1, 2)
        else:
            k_BGMK, v_BGMK = cache.write(self.layer, positions_BL, k_BLGK, v_BLGK)
        o_BHLK = self.attend(q_BLHK.transpose(1, 2), k_BGMK, v_BGMK, mask, causal, self.scale)
        return self.out(o_BHLK.transpose(1, 2).reshape(B, L, -1))
