"""Cross-attention: grouped against an expanded reference, uncached and cached, packed, with padding."""

import torch

from modicum.core.attention import Attention, AttentionConfig
from modicum.core.cache import ContextCache, KVCache
from modicum.core.linear import pack

B, L, M, D, E, H, G, K = 3, 5, 11, 24, 18, 6, 2, 7
LENGTHS = [11, 3, 8]


def cross(scale=1.0, **changes):
    torch.manual_seed(0)
    config = AttentionConfig(dim=D, n_heads=H, n_kv_heads=G, head_dim=K, scale=scale, **changes)
    return Attention(config, layer=1, context_dim=E).double().requires_grad_(False)


def inputs():
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(B, length, width, dtype=torch.float64, generator=generator) for length, width in ((L, D), (M, E))
    )


def expected(attention, x, context, lengths=None, scale=1.0):
    """Every query head with a copy of its group's keys and values, one row and head at a time."""
    q, k, v = (attention.project[name].weight for name in "qkv")
    result = torch.zeros(B, L, H, K, dtype=torch.float64)
    for b in range(B):
        seen = context[b, : (lengths or [M] * B)[b]]
        for h in range(H):
            rows, shared = slice(h * K, (h + 1) * K), slice(h // (H // G) * K, (h // (H // G) + 1) * K)
            scores = (x[b] @ q[rows].T) @ (seen @ k[shared].T).T * scale
            result[b, :, h] = scores.softmax(-1) @ (seen @ v[shared].T)
    return result.flatten(2) @ attention.out.weight.T


def hidden(lengths):
    beyond = torch.arange(M) >= torch.tensor(lengths)[:, None]
    return torch.zeros(B, 1, 1, M, dtype=torch.float64).masked_fill(beyond[:, None, None], -torch.inf)


def test_grouped_equals_expanded():
    x, context = inputs()
    for scale in (1.0, 0.3):
        attention = cross(scale)
        torch.testing.assert_close(attention(x, context=context), expected(attention, x, context, scale=scale))
    masked = attention(x, context=context, mask=hidden(LENGTHS))
    torch.testing.assert_close(masked, expected(attention, x, context, LENGTHS, scale))
    assert (masked - attention(x, context=context)).abs().max() > 1e-3


def test_self_attention_reads_a_context_too():
    """The same class: without packing, one that was made for its own input can be given another."""
    config = AttentionConfig(dim=D, n_heads=H, n_kv_heads=G, head_dim=K, qk_norm_eps=1e-6)
    attention = Attention(config).double()
    x, _ = inputs()
    torch.testing.assert_close(attention(x, context=x), attention(x))


def test_keys_and_values_are_made_once_and_never_expanded():
    attention = cross(qkv_bias=True)
    x, context = inputs()
    whole = attention(x, context=context, mask=hidden(LENGTHS))
    cache = KVCache(2, B, G, 9, K, dtype=torch.float64)
    cache.context = ContextCache(2, LENGTHS, G, K, dtype=torch.float64)
    # Rows come in any order and grouping, without their padding.
    for rows in ([1], [2], [0]):
        cache.context.write(1, torch.tensor(rows), *attention.keys_values(context[rows, : LENGTHS[rows[0]]]))
    assert cache.context.k_NBGMK.shape == cache.context.v_NBGMK.shape == (2, B, G, M, K)
    held = cache.context.read(1)
    torch.testing.assert_close(attention(x, context=held, mask=cache.context.mask), whole)
    torch.testing.assert_close(attention(x[:, 2:3], context=held, mask=cache.context.mask), whole[:, 2:3])
    # The longest row leaves; the slots that only it needed go with it.
    cache.keep([2, 1], known=[0, 0])
    assert cache.context.k_NBGMK.shape == (2, 2, G, 8, K)
    kept = attention(x[[2, 1]], context=cache.context.read(1), mask=cache.context.mask)
    torch.testing.assert_close(kept, whole[[2, 1]])
    # Rows of equal length need no mask.
    cache.keep([1])
    assert cache.context.mask is None
    torch.testing.assert_close(attention(x[[1]], context=cache.context.read(1)), whole[[1]])


def test_packed():
    attention = cross(qkv_bias=True).float()
    x, context = (tensor.float() for tensor in inputs())
    before = attention(x, context=context)
    pack(attention)
    torch.testing.assert_close(attention(x, context=context), before)
