"""Tiny grouped models of every family, and the same functions with many heads, each in a form of its own."""

from dataclasses import replace

import torch

from modicum.config import CaptionerConfig, EncoderDecoderConfig, RopeConfig, VivitConfig, with_kv_heads
from modicum.gqa.align import complex_matrix, gauge_keys, gauge_values, permuted, query_order
from modicum.gqa.heads import places, put, take
from tests.helpers import tiny, tiny_captioner, tiny_t5
from tests.vivit.tiny import clip, tiny_vivit

ROPE = RopeConfig(rotary_dim=10)
LAYERED = {"norm": "layer", "gated": False, "ffn_bias": True, "qkv_bias": True, "out_bias": True}
IDS = torch.tensor([[3, 17, 5, 24, 9, 2, 20, 11, 8], [1, 1, 28, 7, 23, 0, 12, 0, 6]])


def qwen3():
    """Two of five pairs have equal norm weights, in queries and keys: their phases are free, of the others a sign."""
    model = tiny(rope=ROPE, qk_norm=True)
    with torch.no_grad():
        for block in model.blocks:
            for norm in (block.attention.q_norm, block.attention.k_norm):
                norm.weight[[5, 8]] = norm.weight[[0, 3]]
    return model


def video(variant, **changes):
    return tiny_vivit(n_heads=12, n_kv_heads=4, head_dim=5, variant=variant, **changes)


# 6 query heads and 2 key-value heads; videos 12 and 4, so that halves can be grouped.
FAMILIES = {
    "llama": lambda: tiny(rope=ROPE),
    "llama-biases": lambda: tiny(rope=ROPE, qkv_bias=True, out_bias=True),
    "qwen2": lambda: tiny(rope=ROPE, qkv_bias=True),
    "qwen3": qwen3,
    "gpt2": lambda: tiny(rope=None, **LAYERED),
    "gpt_neox": lambda: tiny(rope=RopeConfig(rotary_dim=4), parallel=True, **LAYERED),
    "t5": tiny_t5,
    "captioner": lambda: tiny_captioner(),
    "captioner-gpt2": lambda: tiny_captioner(rope=None, **LAYERED),
    "vivit-1": lambda: video("spacetime"),
    "vivit-2": lambda: video("factorized_encoder", temporal_layers=2),
    "vivit-3": lambda: video("factorized_self_attention", pooling="gap"),
    "vivit-4": lambda: video("factorized_dot_product", pooling="gap"),
}
TEXT = [family for family in FAMILIES if not family.startswith("vivit")]


def logits(model):
    """What the model says about inputs that are always the same."""
    with torch.no_grad():
        if isinstance(model.config, VivitConfig):
            return model(clip().to(next(model.parameters()).dtype))
        return model(*inputs(model.config))


def inputs(config):
    if isinstance(config, CaptionerConfig):
        return memories(len(IDS)), IDS
    return (IDS, IDS.flip(1)[:, :7]) if isinstance(config, EncoderDecoderConfig) else (IDS,)


def memories(n, seed=4):
    """What a captioner's encoder may have made of n clips: of more vectors than a head is wide, or one could say it all."""
    return torch.randn(n, 13, 14, generator=torch.Generator().manual_seed(seed))


def examples(config, ids_NBL):
    """What a model is called with to be calibrated, of each of these token ids [B, L]."""
    if isinstance(config, CaptionerConfig):
        return [(memories(len(ids), seed), ids) for seed, ids in enumerate(ids_NBL)]
    both = isinstance(config, EncoderDecoderConfig)
    return [(ids, ids.flip(1)) if both else (ids,) for ids in ids_NBL]


def with_tensors(model, config, tensors):
    """A model of another configuration with these weights, in the dtype of `model`."""
    result = type(model)(config).to(next(model.parameters()).dtype).eval()
    result.load_state_dict(dict(tensors), strict=False)
    return result


def disguised(model, n_kv_heads, seed=0):
    """The same function with more key-value heads: every head in a gauge of its own, and their order shuffled."""
    generator = torch.Generator().manual_seed(seed)
    config = with_kv_heads(model.config, n_kv_heads)
    state = model.dense_state()
    shuffles = {}
    for before, after in zip(places(model.config), places(config), strict=True):
        w = take(state, before)
        copies = after.n_kv_heads // before.n_kv_heads
        w = replace(w, **{name: repeated(getattr(w, name), copies) for name in ("k", "v", "k_bias", "v_bias")})
        w = gauge_values(w, torch.stack([invertible(w.v.shape[1], generator) for _ in range(w.n_kv_heads)]))
        w = gauge_keys(w, key_gauges(w, generator))
        w = shifted(w, generator)
        # Layers that share a table of biases are shuffled alike.
        order = shuffles.setdefault(after.head_bias or after.prefix, shuffled(w.n_kv_heads, w.halves, generator))
        state |= put(permuted(w, order), after)
        if after.head_bias is not None:
            columns = query_order(order, w.n_heads // w.n_kv_heads)
            shuffles.setdefault("tables", {})[after.head_bias] = columns
    for table, columns in shuffles.get("tables", {}).items():
        state[table] = state[table][:, columns]
    return with_tensors(model, config, state)


def repeated(x, copies):
    return None if x is None else x.repeat_interleave(copies, 0)


def shifted(w, generator):
    """What else is free: with an output bias, constants in the values' biases; without rotation, in the keys'."""
    if w.v_bias is not None and w.o_bias is not None:
        constant = torch.randn(w.v_bias.shape, generator=generator, dtype=torch.float64)
        per_kv = w.n_heads // w.n_kv_heads
        moved = torch.einsum("dhk,hk->d", w.o, constant.repeat_interleave(per_kv, 0))
        w = replace(w, v_bias=w.v_bias + constant, o_bias=w.o_bias - moved)
    if w.k_bias is not None and w.rotary_dim < w.k.shape[1]:
        constant = torch.randn(w.k_bias.shape, generator=generator, dtype=torch.float64)
        constant[:, : w.rotary_dim] = 0
        w = replace(w, k_bias=w.k_bias + constant)
    return w


def key_gauges(w, generator):
    """A random exact gauge of every key head: [G, K, K]."""
    G, K, _ = w.k.shape
    half = w.rotary_dim // 2
    gauge = torch.zeros(G, K, K, dtype=torch.float64)
    turn = 7 * torch.rand(G, half, generator=generator, dtype=torch.float64)
    size = 0.5 + 1.5 * torch.rand(G, half, generator=generator, dtype=torch.float64)
    if w.k_norm is not None:
        free = (w.k_norm[:half] == w.k_norm[half:]) & (w.q_norm[:half] == w.q_norm[half:])
        assert free.any()
        turn = torch.where(free, turn, torch.pi * (turn > 3.5).double())
        size = torch.ones_like(size)
    gauge[:, : 2 * half, : 2 * half] = complex_matrix(torch.polar(size, turn))
    for g in range(G if 2 * half < K else 0):
        gauge[g, 2 * half :, 2 * half :] = invertible(K - 2 * half, generator)
    return gauge


def invertible(size, generator):
    """A random matrix whose singular values lie between 1/2 and 2: in float32 nothing is lost by it."""
    left, right = (torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0] for _ in "ab")
    return left @ torch.diag(0.5 + 1.5 * torch.rand(size, generator=generator, dtype=torch.float64)) @ right


def shuffled(n, halves, generator):
    if not halves:
        return torch.randperm(n, generator=generator).tolist()
    first, second = (torch.randperm(n // 2, generator=generator) for _ in "ab")
    return torch.cat([first, second + n // 2]).tolist()
