"""Rotary frequencies against `transformers`, and rotations by hand."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from modicum.config import RopeConfig
from modicum.core.positions import Rope, frequencies

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
