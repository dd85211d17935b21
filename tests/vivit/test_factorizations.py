"""Attention factorised over space and time is full attention under a mask, with the same weights."""

import math

import pytest
import torch

from modicum.core import attend
from modicum.core.attention import Attention, AttentionConfig
from modicum.vivit.factorizations import FactorizedDotProduct, SelfAttentionBlock, SpatialAttention, TemporalAttention
from tests.vivit.tiny import M1, M3, M4, MODELS, S, T, clip, name_of, tiny_vivit

CONFIG = AttentionConfig(dim=24, n_heads=4, n_kv_heads=2, head_dim=7, qkv_bias=True, out_bias=True)
# Token i of T * S lies at time i // S and place i % S.
TIME, PLACE = torch.arange(T * S) // S, torch.arange(T * S) % S


def seen(same: torch.Tensor) -> torch.Tensor:
    """The additive mask with which tokens see each other where `same` has the same value."""
    return torch.zeros(T * S, T * S).masked_fill(same[:, None] != same, -math.inf)


SAME_FRAME, SAME_PLACE = seen(TIME), seen(PLACE)


def randomised(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    return module.eval()


def masked(weights: Attention, mask: torch.Tensor) -> Attention:
    """Full attention with the weights of `weights`, by the plain formula, under `mask`."""
    full = Attention(CONFIG)
    full.load_state_dict(weights.state_dict())
    full.attend = lambda q, k, v, _, causal, scale: attend.reference(q, k, v, mask, causal, scale)
    return full


def tokens(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, T, S, 24, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [(SpatialAttention, SAME_FRAME, SAME_PLACE), (TemporalAttention, SAME_PLACE, SAME_FRAME)],
)
def test_one_axis(kind, right, wrong):
    torch.manual_seed(0)
    module, x_BTSD = randomised(kind(CONFIG)), tokens()
    with torch.no_grad():
        ours = module(x_BTSD).flatten(1, 2)
        torch.testing.assert_close(ours, masked(module, right)(x_BTSD.flatten(1, 2)))
        assert not torch.allclose(ours, masked(module, wrong)(x_BTSD.flatten(1, 2)), atol=0.1)


@pytest.mark.parametrize("order", ["space_time", "time_space"])
def test_factorised_self_attention_is_two_masked_attentions_in_turn(order):
    torch.manual_seed(0)
    block = SelfAttentionBlock(
        CONFIG, norm_eps=1e-6, ffn_dim=31, activation="gelu_tanh", stochastic_depth=0.0, order=order
    )
    x = tokens()
    space = (block.space_norm, masked(randomised(block).space, SAME_FRAME))
    time = (block.time_norm, masked(block.time, SAME_PLACE))

    def by_hand(*axes):
        y = x.flatten(1, 2)
        for axis_norm, attention in axes:
            y = y + attention(axis_norm(y))
        return (y + block.ffn(block.ffn_norm(y))).unflatten(1, (T, S))

    with torch.no_grad():
        right, wrong = by_hand(space, time), by_hand(time, space)
        if order == "time_space":
            right, wrong = wrong, right
        torch.testing.assert_close(block(x), right)
        assert not torch.allclose(block(x), wrong, atol=0.1)


@pytest.mark.parametrize("n_kv_heads", [4, 2])
@pytest.mark.parametrize("inner", [attend.sdpa, attend.reference])
def test_factorised_dot_product_gives_the_first_half_of_the_heads_to_time(inner, n_kv_heads):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, T * S, 7), torch.randn(2, n_kv_heads, T * S, 7), torch.randn(2, n_kv_heads, T * S, 7)
    ours = FactorizedDotProduct(T, inner)(q, k, v, None, False, None)
    halves = torch.stack([SAME_PLACE, SAME_PLACE, SAME_FRAME, SAME_FRAME])[None]
    torch.testing.assert_close(ours, attend.reference(q, k, v, halves, False, None))
    swapped = attend.reference(q, k, v, halves.flip(1), False, None)
    assert not torch.allclose(ours, swapped, atol=0.1)


def test_model_4_is_model_1_under_a_mask():
    """Not one parameter more: the same state dict fits both."""
    factorised, full = tiny_vivit(variant=M4, pooling="gap"), tiny_vivit(1, variant=M1, pooling="gap")
    full.load_state_dict(factorised.state_dict())
    halves = torch.stack([SAME_PLACE, SAME_PLACE, SAME_FRAME, SAME_FRAME])[None]
    with torch.no_grad():
        assert not torch.allclose(full(clip()), factorised(clip()), atol=1e-2)
        for block in full.encoder.blocks:
            block.attention.attend = lambda q, k, v, _, causal, scale: attend.reference(q, k, v, halves, causal, scale)
        torch.testing.assert_close(full(clip()), factorised(clip()))


def test_the_whole_of_model_3_under_masks():
    model = tiny_vivit(variant=M3, pooling="gap", n_layers=3)
    with torch.no_grad():
        expected = model(clip())
        for block in model.encoder.blocks:
            for attention, mask in ((block.space, SAME_FRAME), (block.time, SAME_PLACE)):
                full = Attention(model._attention_config(4, 4))
                full.load_state_dict(attention.state_dict())
                full.attend = lambda q, k, v, _, causal, scale, mask=mask: attend.reference(
                    q, k, v, mask, causal, scale
                )
                attention.forward = lambda x, full=full: full(x.flatten(1, 2)).unflatten(1, (T, S))
        torch.testing.assert_close(model(clip()), expected)


@pytest.mark.parametrize("kind", MODELS, ids=name_of)
def test_grouped_queries_are_multi_head_with_repeated_keys_and_values(kind):
    grouped, multi, tiled = (tiny_vivit(n_kv_heads=n, n_heads=8, head_dim=3, **kind) for n in (2, 8, 8))

    def spread(name, tensor, repeat):
        if ".project.k." not in name and ".project.v." not in name:
            return tensor
        return repeat(tensor.unflatten(0, (2, 3))).flatten(0, 1)

    state = grouped.state_dict()
    multi.load_state_dict({n: spread(n, t, lambda x: x.repeat_interleave(4, dim=0)) for n, t in state.items()})
    tiled.load_state_dict({n: spread(n, t, lambda x: torch.cat([x] * 4)) for n, t in state.items()})
    with torch.no_grad():
        torch.testing.assert_close(grouped(clip()), multi(clip()))
        assert not torch.allclose(grouped(clip()), tiled(clip()), atol=1e-2)
