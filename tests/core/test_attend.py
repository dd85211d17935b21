"""The ways to compute attention agree, and with numbers computed by hand."""

import math

import pytest
import torch

from modicum.core import attend as attends
from modicum.core.attend import FEW_TOKENS, blocked, flex, fold, folded, heads_together, reference, sdpa, visibility

B, L, M, H, G, K = 3, 5, 13, 6, 2, 7


def inputs(dtype=torch.float64, n_slots=M):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, H, L, K, dtype=dtype, generator=generator)
    k, v = (torch.randn(B, G, n_slots, K, dtype=dtype, generator=generator) for _ in range(2))
    return q, k, v


@pytest.mark.parametrize("attend", [sdpa, folded, flex])
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


@pytest.mark.parametrize("attend", [sdpa, folded])
def test_groups_are_contiguous(attend):
    """Query heads 0-2 read key-value head 0 and 3-5 head 1: the same as an expanded copy, unlike a strided one."""
    q, k, v = inputs()
    grouped = attend(q, k, v, None, False, None)
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


def few(n_tokens, n_groups, dtype):
    """Queries, and keys and values as a cache returns them: part of a longer row. Masks of every shape beside them."""
    generator = torch.Generator().manual_seed(n_tokens)
    q = torch.randn(B, n_tokens, H, K, dtype=torch.float64, generator=generator).to(dtype).transpose(1, 2)
    k, v = (torch.randn(B, n_groups, M + 3, K, dtype=torch.float64, generator=generator).to(dtype) for _ in range(2))
    ends = torch.tensor([n_tokens - 1, M - 1, 9])
    positions = (ends[:, None] - torch.arange(n_tokens).flip(0)).clamp(min=0)
    bias = torch.randn(1, H, n_tokens, M, dtype=torch.float64, generator=generator).to(dtype)
    ragged = visibility(positions, M, None, dtype)
    padding = visibility(ends[:, None], M, None, dtype)
    masks = {
        "none": None,
        "ragged": ragged,
        "padding": padding,
        "bias": bias,
        "both": bias + ragged,
        "plain": bias[0, 0],
    }
    return q, k[:, :, :M], v[:, :, :M], masks


@pytest.mark.parametrize("threads", [1, 7, 64])
@pytest.mark.parametrize("n_groups", [1, 2, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_folded_heads_agree_with_the_reference(dtype, n_groups, threads, monkeypatch):
    monkeypatch.setattr(attends, "n_threads", lambda: threads)
    monkeypatch.setattr(attends, "TWO_ROWS", 0)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for n_tokens in range(1, FEW_TOKENS + 2):
        q, k, v, masks = few(n_tokens, n_groups, dtype)
        for name, mask in masks.items():
            scale = 0.7 if name in ("both", "plain") else None
            exact = None if mask is None else mask.double()
            expected = reference(q.double(), k.double(), v.double(), exact, False, scale)
            result = folded(q, k, v, mask, False, scale)
            assert result.shape == q.shape
            assert (result.double() - expected).abs().max() < tolerance, (n_tokens, name)


def test_folded_reads_each_key_once(monkeypatch):
    """PyTorch gets one head per key-value head, with the cache's own memory, where its own grouping gives it all six."""
    seen = []

    def spy(q, k, v, **settings):
        seen.append((tuple(q.shape), k.data_ptr(), v.data_ptr(), settings["enable_gqa"]))
        return original(q, k, v, **settings)

    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(attends.F, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(attends, "n_threads", lambda: 1)
    for n_tokens in (1, 5):
        q, k, v, masks = few(n_tokens, G, torch.float32)
        folded(q, k, v, masks["ragged"], False, None)
        assert seen.pop() == ((B, G, H // G * n_tokens, K), k.data_ptr(), v.data_ptr(), False)
        sdpa(q, k, v, masks["ragged"], False, None)
        assert seen.pop() == ((B, H, n_tokens, K), k.data_ptr(), v.data_ptr(), True)


def test_one_row_of_bfloat16_goes_as_two(monkeypatch):
    monkeypatch.setattr(attends, "TWO_ROWS", M * K)
    rows = []
    original = attends.sdpa
    monkeypatch.setattr(attends, "sdpa", lambda q, *rest: (rows.append(q.shape[2]), original(q, *rest))[1])
    for n_tokens, dtype in ((1, torch.bfloat16), (1, torch.float32), (1, torch.float16), (2, torch.bfloat16)):
        q, k, v, masks = few(n_tokens, H, dtype)
        assert folded(q, k, v, masks["both"], False, None).shape == q.shape
    assert rows == [2, 1, 1, 2]
    monkeypatch.setattr(attends, "TWO_ROWS", M * K + 1)
    q, k, v, _ = few(1, H, torch.bfloat16)
    folded(q, k, v, None, False, None)
    assert rows.pop() == 1


def test_many_tokens_and_triangles_are_left_alone():
    q, k, v, masks = few(FEW_TOKENS + 1, G, torch.float32)
    assert torch.equal(folded(q, k, v, masks["ragged"], False, None), sdpa(q, k, v, masks["ragged"], False, None))
    q, k, v = inputs(torch.float32, n_slots=L)
    assert torch.equal(folded(q, k, v, None, True, None), sdpa(q, k, v, None, True, None))


def test_heads_are_taken_together_as_far_as_threads_allow():
    """(groups over all rows, query heads of each, threads) -> heads at a time."""
    cases = {
        (2, 6, 1): 6,
        (2, 6, 2): 6,
        (2, 6, 3): 3,
        (2, 6, 8): 1,
        (1, 6, 5): 1,
        (1, 6, 3): 2,
        (1, 32, 2): 16,
        (9, 1, 99): 1,
    }
    assert {case: heads_together(*case) for case in cases} == cases


def test_folded_masks_by_hand():
    """Rows are heads first, then tokens: of heads 0-3 taken two at a time with tokens a, b: 0a 0b 1a 1b, 2a 2b 3a 3b."""
    mask = torch.arange(8).view(1, 4, 2, 1)
    assert fold(mask, 2, 2).squeeze(-1).tolist() == [[[0, 1, 2, 3], [4, 5, 6, 7]]]
    assert fold(mask[:, :1], 2, 2).squeeze(-1).tolist() == [[[0, 1, 0, 1]]]
    assert fold(mask[:, :, :1], 2, 2).squeeze(-1).tolist() == [[[0, 0, 2, 2], [4, 4, 6, 6]]]


def test_by_hand():
    """Scores ln 1 and ln 3 weigh the two values 1/4 and 3/4."""
    q, k = torch.tensor([[[[1.0]]]]), torch.tensor([[[[0.0], [math.log(3)]]]])
    v = torch.tensor([[[[4.0], [8.0]]]])
    for attend in (sdpa, folded, flex, reference):
        assert attend(q, k, v, None, False, 1.0).item() == pytest.approx(7.0)


def test_visibility():
    seen = visibility(torch.tensor([[2, 3]]), 6, None, torch.float32)[0, 0] == 0
    assert seen.int().tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    seen = visibility(torch.tensor([[2, 3]]), 6, 2, torch.float32)[0, 0] == 0
    assert seen.int().tolist() == [[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0]]
