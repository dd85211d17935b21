"""Filters equal those of `transformers`, row by row; draws never hit a token of probability 0."""

import itertools
import math

import pytest
import torch
from transformers.generation import logits_process as theirs

from modicum.decode.sampling import Sampler, SamplingParams, draw, greedy, seen_prefixes
from modicum.errors import UsageError

V = 31
CPU = torch.device("cpu")


def sampler(*params):
    return Sampler(list(params), CPU)


def logits(rows=5, seed=0):
    # Rounded, so that there are ties.
    return (torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 8).round() / 4


def reference(scores, ids, p):
    """The same filters through `transformers`, in its order."""
    steps = []
    if p.repetition_penalty != 1:
        steps.append(theirs.RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    if p.temperature != 1:
        steps.append(theirs.TemperatureLogitsWarper(p.temperature))
    if p.top_k is not None:
        steps.append(theirs.TopKLogitsWarper(p.top_k))
    if p.top_p is not None and p.top_p < 1:
        steps.append(theirs.TopPLogitsWarper(p.top_p))
    if p.min_p is not None:
        steps.append(theirs.MinPLogitsWarper(p.min_p))
    for step in steps:
        scores = step(ids, scores)
    return scores.softmax(-1)


GRID = list(itertools.product([0.3, 1.0, 1.7], [None, 1, 7, 99], [None, 0.2, 0.83], [None, 0.11], [1.0, 1.3]))


def test_filters_equal_those_of_transformers():
    ids = torch.tensor([[3, 5, 3, 7]] * 5)
    seen = torch.zeros(5, V, dtype=torch.bool).scatter_(1, ids, True)
    for number, (temperature, top_k, top_p, min_p, penalty) in enumerate(GRID):
        p = SamplingParams(temperature, top_k, top_p, min_p, penalty)
        # Distinct values: which of two equal tokens a nucleus drops depends on an unstable sort there.
        scores = logits(seed=number) + torch.randperm(V) * 1e-3
        ours = sampler(*[p] * 5).probs(scores, seen)
        expected = reference(scores, ids, p)
        assert torch.equal(ours > 0, expected > 0), p
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_rows_have_their_own_settings():
    grid = [SamplingParams(*values) for values in GRID[::7]] + [SamplingParams(temperature=0)]
    scores = logits(len(grid))
    seen = torch.rand(len(grid), V, generator=torch.Generator().manual_seed(1)) < 0.3
    together = sampler(*grid).probs(scores, seen)
    for row, p in enumerate(grid):
        alone = sampler(p).probs(scores[row : row + 1], seen[row : row + 1])
        # To the last bit, or a neighbour's settings could change a row's text.
        assert torch.equal(together[row : row + 1], alone), p
    kept = sampler(*grid).select([4, 1])
    assert kept.params == [grid[4], grid[1]]


@pytest.mark.parametrize("top_k", [1, 2, 5, 30, 31, 99])
@pytest.mark.parametrize("min_p", [None, 0.2])
def test_ties_with_the_kth_token_are_kept(top_k, min_p):
    p, scores = SamplingParams(0.7, top_k, None, min_p), logits(200)
    expected = reference(scores, None, p)
    ours = sampler(*[p] * 200).probs(scores)
    assert torch.equal(ours > 0, expected > 0)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_a_nucleus_by_hand():
    # Exact in binary: the mass before a token reaches 0.75 at the third, which is therefore cut; so is one of equals.
    scores = torch.tensor([[0.125, 0.5, 0.25, 0.125]], dtype=torch.float64).log()
    assert (sampler(SamplingParams(top_p=0.75)).probs(scores) > 0).tolist() == [[False, True, True, False]]
    assert (sampler(SamplingParams(top_p=0.8)).probs(scores) > 0).tolist() == [[True, True, True, False]]
    assert (sampler(SamplingParams(top_p=1e-9)).probs(scores) > 0).tolist() == [[False, True, False, False]]


def test_nan_stays_visible_in_every_kind_of_row():
    scores = torch.zeros(3, V)
    scores[:, 4] = math.nan
    settings = [SamplingParams(0.0), SamplingParams(0.8, 3, 0.9, 0.1), SamplingParams()]
    assert sampler(*settings).probs(scores).isnan().any(-1).all()


def test_scored_positions_are_like_rows():
    p = SamplingParams(0.7, 9, 0.9)
    scores = logits(6).view(2, 3, V)
    torch.testing.assert_close(sampler(p, p).probs(scores).flatten(0, 1), sampler(*[p] * 6).probs(logits(6)))


def test_temperature_zero_is_one_hot_at_the_lowest_of_equals():
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    assert sampler(SamplingParams(0.0)).probs(scores).tolist() == [[0, 1, 0, 0]]
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert greedy(torch.zeros(3, 77, dtype=dtype)).tolist() == [0, 0, 0]
    seen = torch.tensor([[False, True, False, False]])
    assert sampler(SamplingParams(0.0, repetition_penalty=2.0)).greedy(scores, seen).tolist() == [2]


def test_low_precision_logits_are_cast_before_the_temperature():
    scores = logits().bfloat16()
    expected = (scores.float() / 0.3).softmax(-1)
    assert torch.equal(sampler(*[SamplingParams(0.3)] * 5).probs(scores), (expected))
    assert sampler(SamplingParams()).probs(scores[:1].double()).dtype == torch.float64


def test_impossible_tokens_stay_impossible():
    scores = torch.tensor([[0.0, -math.inf, 1.0]])
    for p in (SamplingParams(), SamplingParams(0.5, 2), SamplingParams(1.0, None, 0.99), SamplingParams(0.0)):
        assert sampler(p).probs(scores)[0, 1] == 0


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_draw_never_hits_a_weight_of_zero(uniform):
    weights = torch.tensor(
        [[0.0, 1e-300, 0.0, 0.1, 0.0], [0, 0, 3.0, 0, 0], [0.1, 0.2, 0.3, 0.4, 0.0]], dtype=torch.float64
    )
    drawn = draw(weights, torch.full((3,), uniform, dtype=torch.float64))
    assert (weights.gather(1, drawn[:, None]) > 0).all()


def test_draw_at_the_very_edges():
    weights = torch.rand(500, 97, generator=torch.Generator().manual_seed(2)) ** 20
    weights[torch.rand(500, 97, generator=torch.Generator().manual_seed(3)) < 0.5] = 0
    first, last = (
        ((weights > 0).int() * torch.arange(97, 0, -1)).argmax(1),
        ((weights > 0) * torch.arange(97)).argmax(1),
    )
    assert torch.equal(draw(weights, torch.zeros(500, dtype=torch.float64)), first)
    # Sums round, so the last id with weight can be too small to be hit; one without weight never is.
    high = draw(weights, torch.full((500,), 1 - 2**-53, dtype=torch.float64))
    assert (high <= last).all()
    assert (weights.gather(1, high[:, None]) > 0).all()


def test_draw_by_hand():
    weights = torch.tensor([[1.0, 0.0, 3.0]] * 4)
    assert draw(weights, torch.tensor([0.0, 0.2499, 0.25, 0.999])).tolist() == [0, 0, 2, 2]


def test_seen_prefixes():
    seen = torch.tensor([[True, False, False, False]])
    rows = seen_prefixes(seen, torch.tensor([[2, 3]]))[0].int().tolist()
    assert rows == [[1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"temperature": -0.1}, "temperature is -0.1: it must be 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0: it must be at least 1"),
        ({"top_k": 2.5}, "top_k is 2.5: it must be at least 1 and a whole number"),
        ({"temperature": 1e-31}, "temperature is 1e-31: below 1e-30 logits overflow; give 0 for greedy"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"min_p": math.nan}, "min_p is nan"),
        ({"repetition_penalty": math.nan}, "repetition_penalty is nan"),
        ({"top_p": 0.0}, "top_p is 0.0: it must be above 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": -1.0}, "min_p is -1.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ],
)
def test_refusals(settings, sentence):
    with pytest.raises(UsageError, match=sentence):
        SamplingParams(**settings)


def nucleus_by_sorting(scores, p):
    """The definition: in falling order, the lower id first of equals, a token stays while the mass before it is < p."""
    ordered, ids = scores.sort(stable=True, descending=True)
    mass = ordered.double().softmax(-1)
    inside = mass.cumsum(-1) - mass < p
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, ids, inside)


@pytest.mark.parametrize("vocab_size", [3, 127, 131, 2500, 5003])
@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])
def test_the_nucleus_is_the_one_that_sorting_finds(vocab_size, scale):
    generator = torch.Generator().manual_seed(vocab_size)
    ps = [0.05, 0.41, 0.93]
    scores = torch.randn(3, 4, vocab_size, generator=generator, dtype=torch.float64) * scale
    # Two decimals at most: plenty of equal scores, at the edge of the nucleus too.
    scores = torch.cat([scores, (scores * 2).round() / 2], dim=1)
    batch = Sampler([SamplingParams(top_p=p) for p in ps], torch.device("cpu"))
    kept = batch.probs(scores) > 0
    for row, p in enumerate(ps):
        assert torch.equal(kept[row], nucleus_by_sorting(scores[row], p))
        # Alone, whatever its neighbours made the batch look through.
        assert torch.equal(sampler(SamplingParams(top_p=p)).probs(scores[row][None])[0], batch.probs(scores)[row])
