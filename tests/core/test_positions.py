"""Rotary frequencies and relative buckets against `transformers`, rotations and biases by hand."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.t5.modeling_t5 import T5Attention

from modicum.config import RopeConfig
from modicum.core.positions import RelativeBias, Rope, distance_buckets, frequencies

CASES = [
    {"scaling": "linear", "factor": 2.5},
    {
        "scaling": "llama3",
        "factor": 7.0,
        "original_max_seq_len": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    {"scaling": "yarn", "factor": 5.0, "original_max_seq_len": 4096},
    {"scaling": "yarn", "factor": 5.0, "original_max_seq_len": 4096, "truncate": False, "beta_fast": 17.0},
    {"scaling": "yarn", "factor": 5.0, "original_max_seq_len": 4096, "mscale": 0.7, "mscale_all_dim": 0.9},
    {"scaling": "yarn", "factor": 5.0, "original_max_seq_len": 4096, "attention_factor": 1.3},
]


@pytest.mark.parametrize("case", CASES)
def test_frequencies_equal_those_of_transformers(case):
    theirs_case = {key: value for key, value in case.items() if key not in ("scaling", "original_max_seq_len")}
    if "original_max_seq_len" in case:
        theirs_case["original_max_position_embeddings"] = case["original_max_seq_len"]
    rope = {"rope_type": case["scaling"], "rope_theta": 50_000.0, **theirs_case}
    config = LlamaConfig(
        hidden_size=4 * 22, num_attention_heads=4, max_position_embeddings=20_480, rope_parameters=rope
    )
    expected, magnitude = ROPE_INIT_FUNCTIONS[case["scaling"]](config, torch.device("cpu"))
    ours, our_magnitude = frequencies(RopeConfig(rotary_dim=22, theta=50_000.0, **case))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    assert our_magnitude == pytest.approx(magnitude)


def test_rotation_by_hand():
    """Two pairs, dimension i with i + 2: frequencies 1 and 1/10 at position 3; the last dimension passes through."""
    rotate = Rope(RopeConfig(rotary_dim=4, theta=100.0))(torch.tensor([[3]]), torch.float64)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64).view(1, 1, 1, 5)
    one, tenth = (math.cos(3), math.sin(3)), (math.cos(0.3), math.sin(0.3))
    expected = [
        1 * one[0] - 3 * one[1],
        2 * tenth[0] - 4 * tenth[1],
        3 * one[0] + 1 * one[1],
        4 * tenth[0] + 2 * tenth[1],
        5.0,
    ]
    assert rotate(x).flatten().tolist() == pytest.approx(expected, rel=1e-7)


def test_precision_does_not_follow_the_model():
    rope = Rope(RopeConfig(rotary_dim=8))
    before = rope.frequencies.clone()
    assert torch.equal(rope.to(torch.bfloat16).frequencies, before)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("n_buckets", "farthest"), [(32, 128), (8, 11), (7, 19), (4, 3), (5, 9), (64, 1000)])
def test_buckets_equal_those_of_transformers(n_buckets, farthest, bidirectional):
    distance = torch.arange(-farthest, farthest + 1 if bidirectional else 1)
    settings = {"bidirectional": bidirectional, "num_buckets": n_buckets, "max_distance": farthest}
    expected = T5Attention._relative_position_bucket(distance, **settings)
    ours = distance_buckets(n_buckets, farthest, bidirectional=bidirectional)
    assert torch.equal(ours, expected)
    # Whatever is farther shares the last bucket.
    beyond = T5Attention._relative_position_bucket(distance[[0, -1]] * 7, **settings)
    assert torch.equal(beyond, ours[[0, -1]])


def test_relative_bias_by_hand():
    """Six buckets up to distance 7: 0, 1, 2 have their own; 3 has the fourth, 4 and 5 the fifth, 6 and more the last."""
    bias = RelativeBias(2, 6, 7, bidirectional=False).requires_grad_(False)
    bias.weight.copy_(torch.arange(6.0)[:, None] + torch.tensor([0.0, 100.0]))
    # Two rows at their own positions; keys after a query are as if at its place, and hidden by whoever calls.
    got = bias(torch.tensor([[9, 10], [2, 3]]), 11)
    assert got.shape == (2, 2, 2, 11)
    assert got[0, 0, 0].tolist() == [5, 5, 5, 5, 4, 4, 3, 2, 1, 0, 0]
    assert got[0, 1, 1].tolist() == [105, 105, 105, 105, 105, 104, 104, 103, 102, 101, 100]
    assert got[1, 0, 0].tolist() == [2, 1] + [0] * 9
    # Both ways: keys ahead have the second half of the buckets.
    bias = RelativeBias(1, 4, 3, bidirectional=True).requires_grad_(False)
    bias.weight.copy_(torch.arange(4.0)[:, None])
    assert bias(torch.arange(4)[None], 4)[0, 0].tolist() == [[0, 3, 3, 3], [1, 0, 3, 3], [1, 1, 0, 3], [1, 1, 1, 0]]


def test_buckets_are_no_weights():
    bias = RelativeBias(2, 6, 7, bidirectional=False).to(torch.bfloat16)
    assert bias.buckets.dtype == torch.int64
    assert list(bias.state_dict()) == ["weight"]
