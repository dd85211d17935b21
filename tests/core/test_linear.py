"""Packed weights: the same products, the same state, no training."""

import pytest
import torch

from modicum.core.linear import dense_state
from modicum.errors import UsageError
from tests.helpers import tiny


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


def test_a_packed_model_refuses_training():
    model = tiny().for_inference()
    with pytest.raises(UsageError, match="packed for inference and cannot be trained: load the checkpoint again"):
        model.train()
