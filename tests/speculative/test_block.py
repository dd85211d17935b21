"""Block verification: enumerated exactly like the token-wise rule, never worse than it, and through the public call."""

from collections import Counter

import pytest
import torch

import modicum
from modicum.decode.random import Purpose
from modicum.speculative import block
from modicum.speculative.accept import accept, accept_greedy
from modicum.speculative.block import accept_block, prefix_weights
from tests.helpers import perturbed, prompts, tiny
from tests.speculative.enumeration import (
    Toy,
    block_points,
    distance,
    expected_accepted,
    fixed,
    induced,
    joint,
    random_rows,
)
from tests.speculative.test_accept import CASES, EXACT, C, V, batch_of, rows
from tests.speculative.test_generate import assert_greedy_equal, chi_square, limit, pair_probs


def error(target, draft, rule=accept_block, n_tokens=V, drafted=C, **options):
    """How far a rule's texts are from the target's, in the largest probability."""
    found = induced(target, draft, rule, n_tokens, drafted, points=block_points, **options)
    return distance(found, joint(target, n_tokens, drafted + 1))


@pytest.mark.parametrize("case", CASES)
def test_the_induced_distribution_is_the_targets(case):
    assert error(*CASES[case]) < EXACT


@pytest.mark.parametrize(("n_tokens", "drafted"), [(5, 1), (4, 2), (3, 3), (2, 4)])
def test_other_vocabularies_and_lengths(n_tokens, drafted):
    target, draft = random_rows(30, n_tokens, top_p=0.95), random_rows(31, n_tokens, min_p=0.02)
    assert error(target, draft, n_tokens=n_tokens, drafted=drafted) < EXACT


@pytest.mark.parametrize("eos", [0, 2])
def test_drafting_that_stops_at_eos(eos):
    assert error(rows(20), rows(21), drafted=3, eos=eos) < EXACT


@pytest.mark.parametrize("token", [0, 2])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.0}])
def test_a_point_mass_drafter(token, sampling):
    target = rows(22, **sampling)
    draft = Toy(lambda prefix: torch.eye(V, dtype=torch.float64)[(token + len(prefix)) % V])
    assert error(target, draft, drafted=3, point_mass=True) < EXACT
    # Written out as distributions, the same; and as many tokens as token by token.
    assert error(target, draft, drafted=3) < EXACT
    kept = expected_accepted(target, draft, accept_block, V, 3, point_mass=True, points=block_points)
    assert kept == pytest.approx(expected_accepted(target, draft, accept, V, 3, point_mass=True), abs=EXACT)


def stops_at_the_first_failure(target, tokens, draft, drafted, noise):
    """Tampered: a coin that fails hides those behind it, as in the token-wise loop."""
    noise = noise.clone()
    for first in range(tokens.shape[1] - 1):
        # Cut off behind a failure: what `accept_block` keeps of the prefix alone, with the prefix's own chances.
        kept = accept_block(target, tokens, draft, drafted, only(noise, first)).n_accepted_B == first + 1
        noise[~kept, first + 1 :, Purpose.COIN] = 1.0
    return accept_block(target, tokens, draft, drafted, noise)


def only(noise, position):
    """Coins that all fail but the one at `position`."""
    alone = torch.ones_like(noise)
    alone[:, position] = noise[:, position]
    return alone


def judges_prefixes_by_their_weight(target, tokens, draft, drafted, noise):
    """Tampered: h = P everywhere, which is right for the last drafted token only."""
    noise = noise.clone()
    at = tokens[..., None]
    weights = prefix_weights(target[:, : at.shape[1]].gather(-1, at)[..., 0], draft.gather(-1, at)[..., 0])[:, 1:]
    hits = noise[:, :-1, Purpose.COIN] < weights
    inner = torch.arange(at.shape[1]) + 1 < drafted[:, None]
    forced = torch.where(hits, 0.0, 1e30)
    noise[:, :-1, Purpose.COIN] = torch.where(inner, forced, noise[:, :-1, Purpose.COIN])
    return accept_block(target, tokens, draft, drafted, noise)


def draws_the_residual_of_one_token(target, tokens, draft, drafted, noise):
    """Tampered: the residual of the token-wise rule, max(0, target - draft), whatever the prefix weighs."""
    got = accept_block(target, tokens, draft, drafted, noise)
    each = torch.arange(len(tokens))
    rest = (target[each, got.n_accepted_B] - draft[each, got.n_accepted_B.clamp(max=tokens.shape[1] - 1)]).clamp(min=0)
    edges = rest.cumsum(-1) / rest.sum(-1, keepdim=True)
    uniform = noise[each, got.n_accepted_B, Purpose.RESIDUAL]
    token = torch.searchsorted(edges, uniform[:, None], right=True)[:, 0].clamp(max=V - 1)
    return got._replace(next_token_B=torch.where(got.n_accepted_B < drafted, token, got.next_token_B))


@pytest.mark.parametrize(
    "rule", [stops_at_the_first_failure, judges_prefixes_by_their_weight, draws_the_residual_of_one_token, accept]
)
def test_the_enumeration_notices_a_broken_rule(rule):
    pairs = [(rows(seed), rows(seed + 100)) for seed in (60, 62)]
    assert max(error(*pair, rule, drafted=3) for pair in pairs) > 1e-3


def test_never_fewer_tokens_than_token_by_token():
    gains = []
    for seed in range(40, 46):
        target, draft = rows(seed), rows(seed + 100, temperature=0.5 + seed % 4)
        blockwise = expected_accepted(target, draft, accept_block, V, 3, points=block_points)
        tokenwise = expected_accepted(target, draft, accept, V, 3)
        gains.append(blockwise - tokenwise)
    assert min(gains) > -EXACT
    assert sum(gains) / len(gains) > 0.02
    # One drafted token is a block of its own: the same rule.
    one = expected_accepted(target, draft, accept_block, V, 1, points=block_points)
    assert one == pytest.approx(expected_accepted(target, draft, accept, V, 1), abs=EXACT)


def test_by_hand():
    """The paper's example (its section 3): target 1/3, 2/3, draft 2/3, 1/3, two tokens; 10/9 and 11/9 stay."""
    target, draft = fixed(1 / 3, 2 / 3), fixed(2 / 3, 1 / 3)
    assert expected_accepted(target, draft, accept, 2, 2) == pytest.approx(10 / 9, abs=EXACT)
    assert expected_accepted(target, draft, accept_block, 2, 2, points=block_points) == pytest.approx(11 / 9, abs=EXACT)
    assert error(target, draft, n_tokens=2) < EXACT


def test_rows_do_not_influence_each_other():
    inputs = batch_of(0)
    together = accept_block(*inputs)
    for row in range(64):
        alone = accept_block(*(x[row : row + 1] for x in inputs))
        assert all(torch.equal(a, b[row : row + 1]) for a, b in zip(alone, together, strict=True))
    # What stands behind a row's own tokens does not count either.
    target, tokens, draft, drafted, noise = inputs
    behind = torch.arange(C) >= drafted[:, None]
    other = accept_block(
        target, torch.where(behind, 3, tokens), draft.masked_fill(behind[..., None], 0), drafted, noise
    )
    assert all(torch.equal(a, b) for a, b in zip(other, together, strict=True))


def test_greedy_is_the_one_hot_case():
    target, tokens, _, drafted, noise = batch_of(1)
    best = target.argmax(-1)
    tokens = torch.where(torch.rand(64, C, generator=torch.Generator().manual_seed(0)) < 0.7, best[:, :C], tokens)
    one_hot = torch.zeros_like(target).scatter_(-1, best[..., None], 1.0)
    draft = torch.zeros_like(target[:, :C]).scatter_(-1, tokens[..., None], 1.0)
    short = accept_greedy(best, tokens, drafted)
    for probs in (draft, None):
        got = accept_block(one_hot, tokens, probs, drafted, noise)
        assert all(torch.equal(a, b) for a, b in zip(short, got, strict=True))


def test_invalid_rows_are_marked():
    target, tokens, draft, drafted, noise = batch_of(2)
    drafted[:] = C
    draft[0, 0, tokens[0, 0]] = 0
    target[1] = float("nan")
    target[2] = 0
    target[3, 0, tokens[3, 0]] = float("nan")
    assert accept_block(target, tokens, draft, drafted, noise).valid_B[:5].tolist() == [False] * 4 + [True]


@pytest.mark.parametrize("drafter", ["model", "ngram"])
def test_sampled_distribution_is_the_targets(drafter):
    """Texts of three tokens through the public call, two drafted at a time: their joint distribution, chi-square."""
    target = tiny(vocab_size=4, scale=0.5)
    draft = perturbed(target, 9, 0.3) if drafter == "model" else "ngram"
    n, prompt, settings = (20_000 if drafter == "model" else 8_000), [1, 3, 1, 3], {"temperature": 0.8, "top_p": 0.95}
    call = {"draft": draft, "num_draft_tokens": 2, "max_new_tokens": 3, **settings}
    out = modicum.generate(target, [prompt] * n, verification="block", seed=12, **call)
    probs = pair_probs(target, prompt, **settings)
    counts = Counter(map(tuple, out.tokens))
    statistic, freedom = chi_square(counts, probs, n)
    assert statistic < limit(freedom)
    assert 0.2 < out.stats.acceptance_rate < 0.98


def test_the_distribution_test_notices_a_broken_rule(monkeypatch):
    whole = block.prefix_weights
    # Weights that are not cut at 1 on the way: a surplus of one token then pays for any other.
    monkeypatch.setattr(block, "prefix_weights", lambda t, d: whole(t * 1.5, d))
    target = tiny(vocab_size=5, scale=0.5)
    call = {"draft": perturbed(target, 9, 0.3), "num_draft_tokens": 2, "max_new_tokens": 3, "seed": 2}
    out = modicum.generate(target, [[1, 3]] * 6_000, verification="block", **call)
    statistic, freedom = chi_square(Counter(map(tuple, out.tokens)), pair_probs(target, [1, 3]), 6_000)
    assert statistic > limit(freedom)


def test_more_tokens_per_call_through_the_public_call():
    target = tiny(scale=0.4)
    call = {"draft": perturbed(target, 5, 0.1), "num_draft_tokens": 5, "max_new_tokens": 60, "seed": 3}
    token, blockwise = (
        modicum.generate(target, [[1, 2]] * 100, verification=rule, **call).stats for rule in ("token", "block")
    )
    assert token.tokens_per_target_call * 1.02 < blockwise.tokens_per_target_call
    for stats in (token, blockwise):
        # Every loop emits the accepted tokens and one of the target's, but where a text ends within them.
        assert stats.tokens - 100 <= stats.accepted + stats.target_calls <= stats.tokens + 100
        assert len(stats.acceptance_by_position) == 5


@pytest.mark.parametrize("drafter", ["model", "ngram"])
def test_greedy_rows_among_sampled_ones(drafter):
    target = tiny()
    draft = perturbed(target, 5, 0.1) if drafter == "model" else "ngram"
    given = prompts([5, 1, 17, 9])
    greedy = modicum.generate(target, given, temperature=0, max_new_tokens=19).tokens
    call = {"draft": draft, "num_draft_tokens": 4, "max_new_tokens": 19, "seed": 42, "verification": "block"}
    mixed = modicum.generate(target, given, temperature=[0.0, 0.9, 0.0, 1.2], **call).tokens
    assert_greedy_equal(target, given[::2], greedy[::2], mixed[::2])
    assert_greedy_equal(target, given, greedy, modicum.generate(target, given, temperature=0, **call).tokens)
    for index in (1, 3):
        alone = modicum.generate(
            target, [given[index]], temperature=[0.9, 1.2][index // 2], **{**call, "seed": [(42, index)]}
        )
        assert alone.tokens[0] == mixed[index]


def test_a_draft_that_is_the_target_is_always_accepted():
    target = tiny()
    out = modicum.generate(
        target, prompts([3, 11, 7]), draft=target, num_draft_tokens=3, max_new_tokens=40, seed=1, verification="block"
    )
    assert out.stats.tokens_per_target_call == 4


def test_eos_inside_an_accepted_block_ends_the_text_there():
    target = tiny(vocab_size=5, scale=0.2)
    target.eos_ids = frozenset({3})
    call = {"draft": perturbed(target, 9, 0.2), "num_draft_tokens": 4, "max_new_tokens": 12, "seed": 5}
    out = modicum.generate(target, [[1, 2]] * 200, verification="block", **call)
    assert "eos" in out.finish_reasons
    for tokens, reason in zip(out.tokens, out.finish_reasons, strict=True):
        assert (3 in tokens) == (reason == "eos")
        assert 3 not in tokens[:-1]
