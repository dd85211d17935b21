"""Modified rejection sampling: enumerated exactly in float64 through the product's own `accept`; rows; validity."""

import pytest
import torch

from modicum.decode.random import Purpose
from modicum.speculative.accept import accept, accept_greedy
from tests.speculative.enumeration import Toy, distance, fixed, induced, joint, random_rows

V, C = 3, 2
EXACT = 1e-12


def rows(seed, **sampling):
    return random_rows(seed, V, **sampling)


CASES = {
    "random": (rows(0), rows(1)),
    "equal": (rows(0), rows(0)),
    "disjoint": (fixed(0.25, 0.75, 0.0), fixed(0.0, 0.0, 1.0)),
    "zeros": (fixed(0.5, 0.0, 0.5), fixed(0.2, 0.8, 0.0)),
    "one-hot target": (fixed(0.0, 1.0, 0.0), rows(3)),
    "one-hot draft": (rows(4), fixed(0.0, 0.0, 1.0)),
    "both one-hot": (fixed(0.0, 1.0, 0.0), fixed(1.0, 0.0, 0.0)),
    "nearly impossible draft": (rows(5), fixed(1e-300, 0.4, 0.6)),
    "nearly impossible on both": (fixed(1e-300, 0.3, 0.7), fixed(3e-300, 0.6, 0.4)),
    "top-k on both": (rows(6, top_k=2), rows(7, top_k=2)),
    "top-p on both": (rows(8, top_p=0.7), rows(9, top_p=0.7)),
    "min-p on both": (rows(10, min_p=0.3), rows(11, min_p=0.3)),
    "temperatures": (rows(12, temperature=0.4), rows(13, temperature=1.9)),
    "greedy target": (rows(14, temperature=0.0), rows(15)),
    "greedy draft": (rows(14), rows(15, temperature=0.0)),
    "target's vocabulary padded": (rows(16, padded=1), rows(17)),
    "draft's vocabulary padded": (rows(18), rows(19, padded=1)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_induced_distribution_is_the_targets(case):
    target, draft = CASES[case]
    assert distance(induced(target, draft, accept, V, C), joint(target, V, C + 1)) < EXACT


@pytest.mark.parametrize(("n_tokens", "drafted"), [(5, 1), (4, 2), (3, 3)])
def test_other_vocabularies_and_lengths(n_tokens, drafted):
    target, draft = random_rows(30, n_tokens, top_k=3, top_p=0.95), random_rows(31, n_tokens, top_k=3, min_p=0.02)
    found = induced(target, draft, accept, n_tokens, drafted)
    assert distance(found, joint(target, n_tokens, drafted + 1)) < EXACT


@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.7}, {"min_p": 0.3}])
def test_the_filtered_cases_keep_different_sets(filters):
    # Guards the cases above: with the same sets on both sides they would show nothing.
    first = {"top_k": 6, "top_p": 8, "min_p": 10}[next(iter(filters))]
    target, draft = rows(first, **filters), rows(first + 1, **filters)
    prefixes = [(), *[(token,) for token in range(V)]]
    assert any(not torch.equal(target(prefix) > 0, draft(prefix) > 0) for prefix in prefixes)


@pytest.mark.parametrize("eos", [0, 2])
def test_drafting_that_stops_at_eos(eos):
    # Rows with one and with two drafted tokens share the batch.
    target, draft = rows(20), rows(21)
    assert distance(induced(target, draft, accept, V, C, eos=eos), joint(target, V, C + 1)) < EXACT


@pytest.mark.parametrize("token", [0, 2])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.0}])
def test_a_point_mass_drafter(token, sampling):
    target = rows(22, **sampling)
    draft = Toy(lambda prefix: torch.eye(V, dtype=torch.float64)[(token + len(prefix)) % V])
    assert distance(induced(target, draft, accept, V, C, point_mass=True), joint(target, V, C + 1)) < EXACT


def without_residual(target, tokens, draft, drafted, noise):
    """Tampered: a rejected token is replaced by a draw from the target."""
    got = accept(target, tokens, draft, drafted, noise)
    each = torch.arange(len(tokens))
    weights, uniform = target[each, got.n_accepted_B], noise[each, got.n_accepted_B, Purpose.RESIDUAL]
    token = torch.searchsorted(weights.cumsum(-1), uniform[:, None], right=True)[:, 0].clamp(max=V - 1)
    return got._replace(next_token_B=torch.where(got.n_accepted_B < drafted, token, got.next_token_B))


def inverted_ratio(target, tokens, draft, drafted, noise):
    """Tampered: a token stays with probability draft / target; what follows is drawn as it should be."""
    at = tokens[..., None]
    ratio = (draft.gather(-1, at) / target[:, :C].gather(-1, at))[..., 0].clamp(max=1)
    stays = noise[:, :C, Purpose.COIN] < ratio
    noise = noise.clone()
    # Coins that make the true rule decide as the tampered one does; far above 1 it rejects whatever the target says.
    noise[:, :C, Purpose.COIN] = torch.where(stays, 0.0, 1e30)
    return accept(target, tokens, draft, drafted, noise)


def generous(target, tokens, draft, drafted, noise):
    """Tampered: coins are squared, so that the ratio is too kind."""
    noise = noise.clone()
    noise[..., Purpose.COIN] **= 2
    return accept(target, tokens, draft, drafted, noise)


@pytest.mark.parametrize("rule", [without_residual, inverted_ratio, generous])
def test_the_enumeration_notices_a_broken_rule(rule):
    target, draft = CASES["random"]
    assert distance(induced(target, draft, rule, V, C), joint(target, V, C + 1)) > 1e-3


def test_the_enumeration_notices_drafts_scored_with_what_they_were_not_drawn_from():
    """Greedy drafts handed over with soft probabilities: the classic mistake."""
    target, soft = rows(23), rows(24)
    drawn = Toy(lambda prefix: torch.eye(V, dtype=torch.float64)[soft(prefix).argmax()])

    def mistaken(targets, tokens, _, drafted, noise):
        wrong = torch.stack([torch.stack([soft(tuple(row[:i])) for i in range(C)]) for row in tokens.tolist()])
        return accept(targets, tokens, wrong, drafted, noise)

    assert distance(induced(target, drawn, accept, V, C), joint(target, V, C + 1)) < EXACT
    assert distance(induced(target, drawn, mistaken, V, C), joint(target, V, C + 1)) > 1e-3


def batch_of(seed, B=64, n_tokens=7):
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(B, C + 1, n_tokens, generator=generator, dtype=torch.float64) ** 4
    draft = torch.rand(B, C, n_tokens, generator=generator, dtype=torch.float64) ** 4
    target, draft = (x / x.sum(-1, keepdim=True) for x in (target, draft))
    tokens = torch.randint(0, n_tokens, (B, C), generator=generator)
    drafted = torch.randint(0, C + 1, (B,), generator=generator)
    return target, tokens, draft, drafted, torch.rand(B, C + 1, 4, generator=generator, dtype=torch.float64)


def test_rows_do_not_influence_each_other():
    inputs = batch_of(0)
    together = accept(*inputs)
    for row in range(64):
        alone = accept(*(x[row : row + 1] for x in inputs))
        assert all(torch.equal(a, b[row : row + 1]) for a, b in zip(alone, together, strict=True))


def test_what_stands_behind_the_drafted_tokens_is_never_accepted():
    # Every draft agrees with the target and every coin accepts, so only the number of drafted tokens ends a row.
    drafted, best = torch.tensor([0, 1, 2]), torch.tensor([[3, 1, 4]] * 3)
    probs = torch.eye(5, dtype=torch.float64)[best]
    noise = torch.zeros(3, C + 1, 4, dtype=torch.float64)
    for got in (
        accept(probs, best[:, :C], probs[:, :C], drafted, noise),
        accept(probs, best[:, :C], None, drafted, noise),
        accept_greedy(best, best[:, :C], drafted),
    ):
        assert got.n_accepted_B.tolist() == [0, 1, 2]
        assert got.next_token_B.tolist() == [3, 1, 4]
        assert got.valid_B.all()


def test_greedy_is_the_one_hot_case():
    target, tokens, _, drafted, noise = batch_of(1)
    best = target.argmax(-1)
    # Half of the drafts agree with the target.
    tokens = torch.where(torch.rand(64, C) < 0.7, best[:, :C], tokens)
    one_hot = torch.zeros_like(target).scatter_(-1, best[..., None], 1.0)
    draft = torch.zeros_like(target[:, :C]).scatter_(-1, tokens[..., None], 1.0)
    short = accept_greedy(best, tokens, drafted)
    for draft_probs in (draft, None):
        assert all(
            torch.equal(a, b) for a, b in zip(short, accept(one_hot, tokens, draft_probs, drafted, noise), strict=True)
        )


def test_invalid_rows_are_marked():
    target, tokens, draft, drafted, noise = batch_of(2)
    drafted[:] = C
    draft[0, 0, tokens[0, 0]] = 0  # a drafted token that could not have been drawn
    target[1] = float("nan")
    target[2] = 0
    assert accept(target, tokens, draft, drafted, noise).valid_B[:4].tolist() == [False, False, False, True]


def test_a_nan_anywhere_in_the_needed_row_is_noticed():
    nothing, none = torch.zeros(1, 0, dtype=torch.int64), torch.tensor([0])
    noise = torch.full((1, 1, 4), 0.5, dtype=torch.float64)
    assert not accept(torch.tensor([[[0.2, float("nan"), 0.8]]]), nothing, None, none, noise).valid_B.item()
    assert accept(torch.tensor([[[0.2, 0.0, 0.8]]]), nothing, None, none, noise).valid_B.item()


def test_a_rejection_of_equal_distributions_falls_back_to_the_target():
    probs = torch.tensor([[[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]])
    # The draft's probability is a rounding above the target's, so that the coin can reject; nothing is left over.
    draft = probs[:, :1] * (1 + 2**-20)
    noise = torch.full((1, 2, 4), 1 - 2**-53, dtype=torch.float64)
    got = accept(probs, torch.tensor([[1]]), draft, torch.tensor([1]), noise)
    assert (got.n_accepted_B.item(), got.next_token_B.item(), got.valid_B.item()) == (0, 1, True)


def test_low_precision_is_widened_before_the_rule():
    target, tokens, draft, drafted, noise = batch_of(3)
    low = accept(target.bfloat16(), tokens, draft.bfloat16(), drafted, noise)
    same = accept(target.bfloat16().float(), tokens, draft.bfloat16().float(), drafted, noise)
    assert all(torch.equal(a, b) for a, b in zip(low, same, strict=True))
