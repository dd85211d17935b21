"""What attention computes, softmax(q k^T scale + mask) v, several ways with one signature.

Grouped queries: G key-value heads serve H query heads, H a multiple of G. Query heads g*H/G ... (g+1)*H/G - 1 share
key-value head g (2305.13245, figure 2). No implementation here ever writes a repeated copy of the keys or values.
"""

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from modicum.core.linear import PackedLinear, can_block

# `blocked` pays from about this many keys on, with about this many queries at a time (benchmarks/vivit.py).
LONG_ROW = 512
QUERY_BLOCK = 256
# `folded` pays up to about this many tokens at a time: a decoded token, a verified draft (benchmarks/gqa_decode.py).
FEW_TOKENS = 8
# One row of bfloat16 queries takes PyTorch's kernel on a CPU more than twice as long as two; from about this many numbers
# of a head's keys on, that outweighs the copy of the row.
TWO_ROWS = 1 << 13

# (q_BHLK, k_BGMK, v_BGMK, mask, causal, scale) -> [B, H, L, K]. `mask` is additive, 0 where a key is seen and -inf where
# it is not (or any bias), broadcastable to [B, H, L, M]; `causal` is the lower triangle of a square L = M, without a mask.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float | None], Tensor]


def sdpa(
    q_BHLK: Tensor, k_BGMK: Tensor, v_BGMK: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """PyTorch's fused kernels."""
    grouped = q_BHLK.shape[1] != k_BGMK.shape[1]
    return F.scaled_dot_product_attention(
        q_BHLK, k_BGMK, v_BGMK, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def folded(
    q_BHLK: Tensor, k_BGMK: Tensor, v_BGMK: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """A few tokens against all they follow: query heads that share a key-value head are rows of one product.

    PyTorch's kernels take query heads one by one and read every key once for each; so each is read once for all. On a
    GPU they have, besides, no grouped heads under a mask, and copy the keys. Many tokens at once go to `sdpa`.
    """
    B, H, L, K = q_BHLK.shape
    G, M = k_BGMK.shape[1], k_BGMK.shape[2]
    R, on_cpu = H // G, q_BHLK.device.type == "cpu"
    # A batch of any size, as in an exported graph, cannot be shared out beforehand.
    if R > 1 and on_cpu and isinstance(B, int):
        R = heads_together(B * G, R, n_threads())
    if R * L == 1 and on_cpu and q_BHLK.dtype == torch.bfloat16 and M * K >= TWO_ROWS:
        return sdpa(q_BHLK.repeat(1, 1, 2, 1), k_BGMK, v_BGMK, mask, False, scale)[:, :, :1]
    if R == 1 or causal or L > FEW_TOKENS:
        return sdpa(q_BHLK, k_BGMK, v_BGMK, mask, causal, scale)
    if mask is not None and mask.shape[-3:-1] != (1, 1):
        mask = fold(mask.reshape((1,) * (4 - mask.dim()) + mask.shape), R, L)
    return sdpa(q_BHLK.reshape(B, H // R, R * L, K), k_BGMK, v_BGMK, mask, False, scale).reshape(B, H, L, K)


@torch.compiler.assume_constant_result  # torch.compile has no way of its own to ask
def n_threads() -> int:
    return torch.get_num_threads()


def heads_together(n_groups: int, per_group: int, n_threads: int) -> int:
    """How many of the query heads of a group to take at once: all `per_group`, or a divisor that leaves no thread idle.

    Threads share out rows and heads but never keys.
    """
    parts = min(per_group, -(-n_threads // n_groups))
    while per_group % parts:
        parts += 1
    return per_group // parts


def fold(mask: Tensor, R: int, L: int) -> Tensor:
    """A mask [1 or B, 1 or H, 1 or L, M] for query heads taken R at a time: [1 or B, 1 or H / R, R * L, M]."""
    by_head = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (-1, R))
    return by_head.expand(-1, -1, R, L, -1).flatten(2, 3)


def flex(
    q_BHLK: Tensor, k_BGMK: Tensor, v_BGMK: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """PyTorch's FlexAttention: generates a kernel for the mask when compiled, computes plainly when not."""
    from torch.nn.attention.flex_attention import flex_attention

    B, H, L, _ = q_BHLK.shape
    M = k_BGMK.shape[2]
    if causal:
        mask = triangle(L, M, q_BHLK)
    mask_BHLM = None if mask is None else mask.expand(B, H, L, M)

    def add_mask(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score if mask_BHLM is None else score + mask_BHLM[b, h, i, j]

    grouped = k_BGMK.shape[1] != H
    return flex_attention(q_BHLK, k_BGMK, v_BGMK, score_mod=add_mask, scale=scale, enable_gqa=grouped)  # type: ignore[return-value]


def blocked(
    q_BHLK: Tensor, k_BGMK: Tensor, v_BGMK: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """Long rows on a CPU: oneDNN's products over blocks of queries, with keys and values packed once per head.

    For inference, where every key is seen; anything else, short rows included, goes to `sdpa`.
    """
    B, H, L, K = q_BHLK.shape
    G, M = k_BGMK.shape[1], k_BGMK.shape[2]
    if mask is not None or causal or M < LONG_ROW or q_BHLK.requires_grad or not can_block(k_BGMK):
        return sdpa(q_BHLK, k_BGMK, v_BGMK, mask, causal, scale)
    o_BLHK = q_BHLK.new_empty(B, L, H, K)
    for b, g in itertools.product(range(B), range(G)):
        keys, values = PackedLinear(k_BGMK[b, g], None), PackedLinear(v_BGMK[b, g].T, None)
        for h, start in itertools.product(range(g * H // G, (g + 1) * H // G), range(0, L, QUERY_BLOCK)):
            q_QK = q_BHLK[b, h, start : start + QUERY_BLOCK] * (1 / math.sqrt(K) if scale is None else scale)
            o_BLHK[b, start : start + QUERY_BLOCK, h] = values(keys(q_QK).softmax(dim=-1))
    return o_BLHK.transpose(1, 2)


def reference(
    q_BHLK: Tensor, k_BGMK: Tensor, v_BGMK: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """The formula as written, for tests and for reading."""
    B, H, L, K = q_BHLK.shape
    G, M = k_BGMK.shape[1], k_BGMK.shape[2]
    if causal:
        mask = triangle(L, M, q_BHLK)
    q_BGRLK = q_BHLK.reshape(B, G, H // G, L, K)
    scores = q_BGRLK @ k_BGMK[:, :, None].mT * (1 / math.sqrt(K) if scale is None else scale)
    if mask is not None:
        scores = scores + mask.expand(B, H, L, M).reshape(B, G, H // G, L, M)
    return (scores.softmax(dim=-1) @ v_BGMK[:, :, None]).reshape(B, H, L, K)


def triangle(L: int, M: int, like: Tensor) -> Tensor:
    """The causal mask of a square L = M, [L, M], in the dtype and on the device of `like`."""
    return torch.full((L, M), -math.inf, dtype=like.dtype, device=like.device).triu(1)


def visibility(positions_BL: Tensor, n_slots: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Which cache slots each query sees: itself and what is before it, at most `window` of them. [B, 1, L, M], additive.

    Slots hold positions 0, 1, ... of their row, so that ragged rows, padding at the right and rejected drafts all fall
    out of the one comparison: whatever lies beyond a query's own position is not seen.
    """
    slots_M = torch.arange(n_slots, device=positions_BL.device)
    distance_BLM = positions_BL[..., None] - slots_M
    hidden = distance_BLM < 0 if window is None else (distance_BLM < 0) | (distance_BLM >= window)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, -math.inf)[:, None]
