"""The ways to compute attention agree, and with numbers computed by hand."""

import math

import pytest
import torch

from modicum.core import attend as attends
from modicum.core.attend import blocked, flex, reference, sdpa, visibility

B, L, M, H, G, K = 3, 5, 13, 6, 2, 7


def inputs(dtype=torch.float64, n_slots=M):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, H, L, K, dtype=dtype, generator=generator)
    k, v = (torch.randn(B, G, n_slots, K, dtype=dtype, generator=generator) for _ in range(2))
    return q, k, v


@pytest.mark.parametrize("attend", [sdpa, flex])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_agree_with_the_reference(attend, scale):
    q, k, v = inputs()
    positions = torch.tensor([[4, 5, 6, 7, 8], [0, 1, 2, 3, 4], [8, 9, 10, 11, 12]])
    for mask in (None, visibility(positions, M, None, q.dtype), visibility(positions, M, 3, q.dtype)):
        expected = reference(q, k, v, mask, False, scale)
        torch.testing.assert_close(attend(q, k, v, mask, False, scale), expected, rtol=1e-12, atol=1e-12)
    q, k, v = inputs(n_slots=L)
    expected = reference(q, k, v, None, True, scale)
    torch.testing.assert_close(attend(q, k, v, None, True, scale), expected, rtol=1e-12, atol=1e-12)


def test_groups_are_contiguous():
    """Query heads 0-2 read key-value head 0 and 3-5 head 1: the same as an expanded copy, unlike a strided one."""
    q, k, v = inputs()
    grouped = sdpa(q, k, v, None, False, None)
    contiguous = sdpa(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), None, False, None)
    strided = sdpa(q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1), None, False, None)
    torch.testing.assert_close(grouped, contiguous)
    assert (grouped - strided).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_blocks_of_queries_agree_with_the_reference(dtype, scale, monkeypatch):
    monkeypatch.setattr(attends, "LONG_ROW", M)
    monkeypatch.setattr(attends, "QUERY_BLOCK", 2)
    q, k, v = inputs(torch.float32)
    # A row's queries are strided, as they come out of a projection.
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    expected = reference(q.double(), k.double(), v.double(), None, False, scale)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert (blocked(q, k, v, None, False, scale) - expected).abs().max() < tolerance
    # What it is not made for goes the usual way, bit for bit.
    mask = visibility(torch.arange(L).expand(B, L), M, None, dtype)
    assert torch.equal(blocked(q, k, v, mask, False, scale), sdpa(q, k, v, mask, False, scale))
    assert torch.equal(
        blocked(q, k[:, :, 1:], v[:, :, 1:], None, False, scale), sdpa(q, k[:, :, 1:], v[:, :, 1:], None, False, scale)
    )


def test_by_hand():
    """Scores ln 1 and ln 3 weigh the two values 1/4 and 3/4."""
    q, k = torch.tensor([[[[1.0]]]]), torch.tensor([[[[0.0], [math.log(3)]]]])
    v = torch.tensor([[[[4.0], [8.0]]]])
    for attend in (sdpa, flex, reference):
        assert attend(q, k, v, None, False, 1.0).item() == pytest.approx(7.0)


def test_visibility():
    seen = visibility(torch.tensor([[2, 3]]), 6, None, torch.float32)[0, 0] == 0
    assert seen.int().tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    seen = visibility(torch.tensor([[2, 3]]), 6, 2, torch.float32)[0, 0] == 0
    assert seen.int().tolist() == [[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0]]
