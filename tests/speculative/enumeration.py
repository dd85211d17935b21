"""The distribution that a rule of acceptance induces, without sampling error.

A loop's outcome is piecewise constant in its uniforms. Points just inside both ends of every piece, weighted by its
length, give the distribution exactly, and a rule whose pieces end elsewhere differs at one of them. All points of a case
go through the rule as rows of one batch, with as many drafted tokens as each has.
"""

import itertools
from collections import defaultdict

import torch

from modicum.decode.random import Purpose
from modicum.decode.sampling import Sampler, SamplingParams


class Toy:
    """A next-token distribution for every prefix, whatever the order in which they are asked for."""

    def __init__(self, make):
        self.make, self.known = make, {}

    def __call__(self, prefix):
        if prefix not in self.known:
            self.known[prefix] = self.make(prefix)
        return self.known[prefix]


def random_rows(seed, n_tokens, padded=0, **sampling):
    """Random logits through the sampler's filters; the last `padded` ids belong to no token."""

    def make(prefix):
        address = seed * 10_000 + sum((token + 1) * 7**i for i, token in enumerate(prefix))
        generator = torch.Generator().manual_seed(address)
        logits = torch.randn(1, n_tokens, generator=generator, dtype=torch.float64) * 2
        logits[:, n_tokens - padded :] = -torch.inf
        return Sampler([SamplingParams(**sampling)], torch.device("cpu")).probs(logits)[0]

    return Toy(make)


def fixed(*values):
    return Toy(lambda _: torch.tensor(values, dtype=torch.float64))


def joint(target, n_tokens, length):
    """The target's own distribution over texts of `length` tokens."""
    texts = itertools.product(range(n_tokens), repeat=length)
    return {text: chance(target, (), text) for text in texts}


def chance(model, prefix, ending):
    """The probability that `model` continues `prefix` with `ending`."""
    probability = 1.0
    for i, token in enumerate(ending):
        probability *= float(model((*prefix, *ending[:i]))[token])
    return probability


def induced(target, draft, rule, n_tokens, C, *, eos=None, point_mass=False, points=None):
    """The distribution of texts of C + 1 tokens: one loop of `rule`, continued by the target."""
    result = defaultdict(float)
    for text, _, share in outcomes(target, draft, rule, n_tokens, C, eos, point_mass, points):
        for ending in itertools.product(range(n_tokens), repeat=C + 1 - len(text)):
            result[text + ending] += share * chance(target, text, ending)
    return result


def expected_accepted(target, draft, rule, n_tokens, C, *, point_mass=False, points=None):
    """How many drafted tokens a loop of `rule` keeps on average."""
    return sum(share * n for _, n, share in outcomes(target, draft, rule, n_tokens, C, None, point_mass, points))


def outcomes(target, draft, rule, n_tokens, C, eos, point_mass, pieces):
    """What a loop can yield: the text, how many of its tokens were drafted ones, and with what probability."""
    rows, shares = [], []
    for drawn in itertools.product(range(n_tokens), repeat=C):
        # Drafting stops behind EOS; what the tensor holds there must not matter.
        n = next((i + 1 for i, token in enumerate(drawn) if token == eos), C)
        weight = chance(draft, (), drawn[:n])
        if weight == 0 or any(drawn[n:]):
            continue
        targets = torch.stack([target(drawn[:i]) for i in range(C + 1)])
        drafts = torch.stack([draft(drawn[:i]) for i in range(C)])
        for noise, share in (pieces or points)(targets, drafts, drawn, n):
            rows.append((targets, torch.tensor(drawn), drafts, torch.tensor(n), noise))
            shares.append(weight * share)
    targets, tokens, drafts, drafted, noise = (torch.stack(column) for column in zip(*rows, strict=True))
    got = rule(targets, tokens, None if point_mass else drafts, drafted, noise)
    assert got.valid_B.all()
    columns = tokens.tolist(), got.n_accepted_B.tolist(), got.next_token_B.tolist(), shares
    return [((*drawn[:n], token), n, share) for drawn, n, token, share in zip(*columns, strict=True)]


def points(targets, drafts, drawn, n):
    """Uniforms for every piece of a loop's outcome, and the length of the piece they stand for."""
    kept = [min(1.0, float(targets[i][drawn[i]] / drafts[i][drawn[i]])) for i in range(n)]
    for at in range(n + 1):
        coins = [ends(0.0, kept[i]) for i in range(at)]
        weights = targets[at]
        if at < n:
            coins.append(ends(kept[at], 1.0))
            rest = (targets[at] - drafts[at]).clamp(min=0)
            weights = rest if rest.sum() > 0 else weights
        edges = [0.0, *(weights.cumsum(0) / weights.sum()).tolist()]
        draws = [cell for a, b in itertools.pairwise(edges) for cell in ends(a, b)]
        for cells in itertools.product(*coins, draws):
            # What a loop does not use is set to a value that would show if it did.
            noise = torch.full((len(targets), len(Purpose)), 0.37, dtype=torch.float64)
            noise[:, Purpose.COIN] = 0.0
            share = 1.0
            for i, (uniform, length) in enumerate(cells[:-1]):
                noise[i, Purpose.COIN] = uniform
                share *= length
            noise[at, Purpose.BONUS if at == n else Purpose.RESIDUAL] = cells[-1][0]
            yield noise, share * cells[-1][1]


def block_points(targets, drafts, drawn, n):
    """`points` of block verification (2403.10444): every coin counts, and the longest prefix below its `h` stays."""
    weights, stays = block_chances(targets, drafts, drawn, n)
    coins = [[(u, share, hit) for hit, piece in cut(h) for u, share in piece] for h in stays]
    for cells in itertools.product(*coins):
        at = max((i + 1 for i, (_, _, hit) in enumerate(cells) if hit), default=0)
        rest = (weights[at] * targets[at] - drafts[at]).clamp(min=0) if at < n else targets[at]
        rest = rest if rest.sum() > 0 else targets[at]
        edges = [0.0, *(rest.cumsum(0) / rest.sum()).tolist()]
        for uniform, length in (cell for a, b in itertools.pairwise(edges) for cell in ends(a, b)):
            noise = torch.full((len(targets), len(Purpose)), 0.37, dtype=torch.float64)
            share = length
            for i, (coin, part, _) in enumerate(cells):
                noise[i, Purpose.COIN] = coin
                share *= part
            noise[at, Purpose.BONUS if at == n else Purpose.RESIDUAL] = uniform
            yield noise, share


def block_chances(targets, drafts, drawn, n):
    """The weights P_0 ... P_n and the chances h_1 ... h_n, one by one as the paper writes them."""
    weights, stays = [1.0], []
    for i in range(n):
        weights.append(min(1.0, weights[-1] * float(targets[i][drawn[i]] / drafts[i][drawn[i]])))
    for i in range(1, n):
        surplus = sum(max(0.0, weights[i] * float(t) - float(d)) for t, d in zip(targets[i], drafts[i], strict=True))
        below = surplus + 1 - weights[i]
        stays.append(surplus / below if below > 0 else 1.0)
    return weights, [*stays, weights[n]] if n else []


def cut(at):
    """The pieces of a coin that hits below `at`: (whether it hits, its points)."""
    return [(True, ends(0.0, at)), (False, ends(at, 1.0))]


def ends(start, end):
    """A point just inside each end of a piece, standing for half of it; nothing for an empty piece."""
    inside = (end - start) * 1e-6
    return [(start + inside, (end - start) / 2), (end - inside, (end - start) / 2)] if end > start else []


def distance(first, second):
    return max(abs(first.get(text, 0.0) - second.get(text, 0.0)) for text in set(first) | set(second))
