"""Packed weights: the same products, the same state, no training."""

import pytest
import torch

from modicum.core.linear import ACTIVATIONS, Projections, dense_state
from modicum.errors import UsageError
from tests.helpers import tiny, tiny_t5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tied", [False, True])
def test_packing_changes_nothing_but_the_layout(dtype, tied):
    model = tiny(tie_embeddings=tied, qkv_bias=True, ffn_bias=True).to(dtype)
    ids = torch.randint(0, 29, (3, 7))
    with torch.no_grad():
        before, state = model(ids), {name: t.clone() for name, t in model.dense_state().items()}
        packed = model.for_inference()
        scale = before.abs().max()
        assert (packed(ids) - before).abs().max() <= scale * (2e-2 if dtype == torch.bfloat16 else 1e-5)
    assert state.keys() == packed.dense_state().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in packed.dense_state().items())
    assert ("head.weight" in state) != tied
    # Packing twice is packing once.
    assert dense_state(packed.for_inference()).keys() == dense_state(packed).keys()


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_activation_within_the_product_is_the_activation(activation, dtype):
    torch.manual_seed(0)
    layers = Projections(11, {"one": 7, "two": 5}, bias=True).to(dtype)
    x = torch.randn(3, 13, 11, dtype=dtype)
    with torch.no_grad():
        expected = [ACTIVATIONS[activation](y.double()) for y in layers(x)]
        plain = layers(x, activation)
        layers.pack()
        packed = layers(x, activation)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
    for outputs in (plain, packed):
        assert all((y - wanted).abs().max() < tolerance for y, wanted in zip(outputs, expected, strict=True))
    # The two kinds of GELU differ, and so would the results if one were taken for the other.
    assert (ACTIVATIONS["gelu"](x.float()) - ACTIVATIONS["gelu_tanh"](x.float())).abs().max() > 1e-4


@pytest.mark.parametrize("tied", [False, True])
def test_an_encoder_decoder_is_packed_likewise(tied):
    model = tiny_t5(tie_embeddings=tied, gated=not tied)
    ids, text = torch.randint(0, 29, (3, 7)), torch.randint(0, 29, (3, 5))
    with torch.no_grad():
        before, state = model(ids, text), {name: t.clone() for name, t in model.dense_state().items()}
        packed = model.for_inference()
        assert (packed(ids, text) - before).abs().max() <= before.abs().max() * 1e-5
    assert state.keys() == packed.dense_state().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in packed.dense_state().items())
    with pytest.raises(UsageError, match="packed for inference"):
        model.train()


def test_a_packed_model_refuses_training():
    model = tiny().for_inference()
    with pytest.raises(UsageError, match="packed for inference and cannot be trained: load the checkpoint again"):
        model.train()
