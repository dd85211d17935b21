"""Modified rejection sampling, enumerated exactly in float64 through the product's own `accept`.

The outcome of a loop is piecewise constant in its uniforms, so points just inside both ends of every piece, weighted by
its length, give the induced distribution without sampling error; a rule whose pieces end elsewhere differs at one of them.
"""

import itertools
from collections import defaultdict

import pytest
import torch

from modicum.decode.random import Purpose
from modicum.decode.sampling import Sampler, SamplingParams
from modicum.speculative.accept import accept, accept_greedy

V, C = 3, 2


class Toy:
    """A next-token distribution for every prefix, drawn at random or given by a function of the prefix."""

    def __init__(self, make):
        self.make, self.known = make, {}

    def __call__(self, prefix):
        if prefix not in self.known:
            self.known[prefix] = self.make(prefix)
        return self.known[prefix]


def random_rows(seed, **sampling):
    """Random logits through the sampler's filters."""
    generator = torch.Generator().manual_seed(seed)

    def make(_):
        logits = torch.randn(1, V, generator=generator, dtype=torch.float64) * 2
        return Sampler([SamplingParams(**sampling)], torch.device("cpu")).probs(logits)[0]

    return Toy(make)


def fixed(*values):
    return Toy(lambda _: torch.tensor(values, dtype=torch.float64))


def joint(target, length):
    """The target's own distribution over texts of `length` tokens."""
    result = {}
    for text in itertools.product(range(V), repeat=length):
        probability = 1.0
        for i, token in enumerate(text):
            probability *= float(target(text[:i])[token])
        result[text] = probability
    return result


def residual_of(target, draft):
    rest = (target - draft).clamp(min=0)
    return rest if rest.sum() > 0 else target


def induced(target, draft, rule=accept, *, eos=None, point_mass=False):
    """The distribution of texts of C + 1 tokens: one loop of `rule`, continued by the target."""
    result = defaultdict(float)
    for drawn in itertools.product(range(V), repeat=C):
        # Drafting stops behind EOS; what the tensor holds there must not matter.
        n = next((i + 1 for i, token in enumerate(drawn) if token == eos), C)
        if any(drawn[n:]):
            continue
        draft_rows = [draft(drawn[:i]) for i in range(C)]
        weight = 1.0
        for i in range(n):
            weight *= float(draft_rows[i][drawn[i]])
        if weight == 0:
            continue
        targets = torch.stack([target(drawn[:i]) for i in range(C + 1)])
        for coins, length in coin_cells(targets, draft_rows, drawn, n):
            at = next((i for i in range(n) if not coins[i][1]), n)
            weights = targets[at] if at == n else residual_of(targets[at], draft_rows[at])
            for uniform, share in draw_cells(weights):
                noise = torch.full((1, C + 1, 4), 0.5, dtype=torch.float64)
                for i in range(n):
                    noise[0, i, Purpose.COIN] = coins[i][0]
                noise[0, at, Purpose.BONUS if at == n else Purpose.RESIDUAL] = uniform
                got = rule(
                    targets[None],
                    torch.tensor([drawn]),
                    None if point_mass else torch.stack(draft_rows)[None],
                    torch.tensor([n]),
                    noise,
                )
                assert got.valid_B.item()
                text = (*drawn[: int(got.n_accepted_B)], int(got.next_token_B))
                for ending in itertools.product(range(V), repeat=C + 1 - len(text)):
                    probability = weight * length * share
                    for i in range(len(ending)):
                        probability *= float(target(text + ending[:i])[ending[i]])
                    result[text + ending] += probability
    return result


def coin_cells(targets, draft_rows, drawn, n):
    """Every combination of coins below and above their thresholds: ((coin, accepted) per position, length)."""
    options = []
    for i in range(n):
        threshold = min(1.0, float(targets[i][drawn[i]] / draft_rows[i][drawn[i]]))
        below = [(coin, True, share) for coin, share in ends(0.0, threshold)]
        above = [(coin, False, share) for coin, share in ends(threshold, 1.0)]
        options.append(below + above)
    for cells in itertools.product(*options):
        length = 1.0
        for cell in cells:
            length *= cell[2]
        yield [cell[:2] for cell in cells], length


def draw_cells(weights):
    """Points in each token's piece of [0, 1), and the length that each stands for."""
    edges = [0.0, *(weights.cumsum(0) / weights.sum()).tolist()]
    return [cell for a, b in itertools.pairwise(edges) for cell in ends(a, b)]


def ends(start, end):
    """A point just inside each end of a piece, standing for half of it; nothing for an empty piece."""
    inside = (end - start) * 1e-6
    return [(start + inside, (end - start) / 2), (end - inside, (end - start) / 2)] if end > start else []


def distance(first, second):
    return max(abs(first.get(text, 0.0) - second.get(text, 0.0)) for text in set(first) | set(second))


CASES = {
    "random": (random_rows(0), random_rows(1)),
    "equal": (random_rows(0), random_rows(0)),
    "disjoint": (fixed(0.25, 0.75, 0.0), fixed(0.0, 0.0, 1.0)),
    "zeros": (fixed(0.5, 0.0, 0.5), fixed(0.2, 0.8, 0.0)),
    "one-hot target": (fixed(0.0, 1.0, 0.0), random_rows(3)),
    "one-hot draft": (random_rows(4), fixed(0.0, 0.0, 1.0)),
    "both one-hot": (fixed(0.0, 1.0, 0.0), fixed(1.0, 0.0, 0.0)),
    "nearly impossible draft": (random_rows(5), fixed(1e-300, 0.4, 0.6)),
    "top-k on both": (random_rows(6, top_k=2), random_rows(7, top_k=2)),
    "top-p on both": (random_rows(8, top_p=0.7), random_rows(9, top_p=0.7)),
    "min-p on both": (random_rows(10, min_p=0.3), random_rows(11, min_p=0.3)),
    "temperatures": (random_rows(12, temperature=0.4), random_rows(13, temperature=1.9)),
    "greedy target": (random_rows(14, temperature=0.0), random_rows(15)),
    "target's vocabulary padded": (fixed(0.3, 0.7, 0.0), random_rows(16)),
    "draft's vocabulary padded": (random_rows(17), fixed(0.6, 0.4, 0.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_induced_distribution_is_the_targets(case):
    target, draft = CASES[case]
    assert distance(induced(target, draft), joint(target, C + 1)) < 1e-12


@pytest.mark.parametrize("eos", [0, 2])
def test_drafting_that_stops_at_eos(eos):
    target, draft = random_rows(20), random_rows(21)
    assert distance(induced(target, draft, eos=eos), joint(target, C + 1)) < 1e-12


@pytest.mark.parametrize("token", [0, 2])
def test_a_point_mass_drafter(token):
    target, draft = random_rows(22), Toy(lambda prefix: torch.eye(V, dtype=torch.float64)[(token + len(prefix)) % V])
    assert distance(induced(target, draft, point_mass=True), joint(target, C + 1)) < 1e-12


def without_residual(target, tokens, draft, drafted, noise):
    """Tampered: a rejected token is replaced by a draw from the target."""
    got = accept(target, tokens, draft, drafted, noise)
    row = target[0, got.n_accepted_B]
    uniform = noise[0, got.n_accepted_B, Purpose.RESIDUAL]
    token = torch.searchsorted(row.cumsum(-1), uniform[:, None], right=True)[:, 0].clamp(max=V - 1)
    rejected = got.n_accepted_B < drafted
    return got._replace(next_token_B=torch.where(rejected, token, got.next_token_B))


def generous(target, tokens, draft, drafted, noise):
    """Tampered: coins are squared, so that the ratio is too kind."""
    noise = noise.clone()
    noise[..., Purpose.COIN] **= 2
    return accept(target, tokens, draft, drafted, noise)


@pytest.mark.parametrize("rule", [without_residual, generous])
def test_the_enumeration_notices_a_broken_rule(rule):
    target, draft = CASES["random"]
    assert distance(induced(target, draft, rule), joint(target, C + 1)) > 1e-3


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
