"""K by cost: the enumerated best, what loops have shown, a change in mid-text, and never much below plain decoding."""

import itertools
import random

import pytest

from modicum.speculative import lookahead
from modicum.speculative.lookahead import Acceptances, Lookahead, Times
from tests.speculative.tables import Table, linear


def knowing(costs, rates, n_rows, max_k):
    """A lookahead that is past its first loops, sure of its acceptances, and may lose anything."""
    chooser = Lookahead(costs, max_k)
    chooser.begin(n_rows, 1000)
    chooser.cold, chooser.since_plain, chooser.lost = False, 0, -1e9
    chooser.acceptances.judged = [1e9] * max_k
    chooser.acceptances.accepted = [1e9 * rate for rate in rates]
    return chooser


def expected_tokens(rates, k):
    """tau by its definition: each number of accepted tokens, times its probability, and one more."""
    total = 0.0
    for outcome in itertools.product((True, False), repeat=k):
        probability = 1.0
        for rate, accepted in zip(rates, outcome, strict=False):
            probability *= rate if accepted else 1 - rate
        n_accepted = (*outcome, False).index(False)
        total += probability * (1 + n_accepted)
    return total


def test_it_picks_the_enumerated_best_of_many_cost_tables():
    rng, max_k, chosen = random.Random(5), 5, set()
    for case in range(300):
        n_rows = rng.choice([1, 2, 3, 7])
        verify = [rng.uniform(0.8, 1.2)]
        for _ in range(max_k):  # a cliff now and then
            verify.append(verify[-1] + rng.choice([0.01, 0.03, 0.1, 0.8]) * rng.random())
        draft = list(itertools.accumulate(rng.choice([0.02, 0.1, 0.4]) * rng.random() for _ in range(max_k)))
        rates = [rng.random() ** rng.choice([0.1, 0.3, 1.0, 3.0]) for _ in range(max_k)]
        limits = [rng.randint(0, max_k) for _ in range(n_rows)]
        chooser = knowing(Table(verify, draft), rates, n_rows, max_k)

        def rate(k, limits=limits, rates=rates, verify=verify, draft=draft):
            tokens = sum(expected_tokens(rates, min(k, limit)) for limit in limits)
            return tokens / (verify[k] + (draft[k - 1] if k else 0.0))

        best = max(range(max(limits) + 1), key=rate)
        got = chooser.choose(lambda limits=limits: limits)
        assert rate(got) == pytest.approx(rate(best), rel=1e-6), case
        chosen.add(got)
    assert chosen == set(range(max_k + 1))
    # Positive control: the table is what decides. With the same acceptances, dear drafts are not asked for.
    assert knowing(linear(0.01, 0.01), [0.9] * 16, 1, 16).choose(lambda: [16]) > 8
    assert knowing(linear(0.01, 1.00), [0.9] * 16, 1, 16).choose(lambda: [16]) == 0


def test_the_yields_of_rows_are_summed():
    acceptances = Acceptances(3)
    acceptances.begin(2)
    acceptances.judged, acceptances.accepted = [1e9] * 3, [5e8, 2.5e8, 1e9]
    # 2 for the plain tokens, then 0.5 + 0.5, then 0.125, then 0.125 of the only row that may have so many.
    assert acceptances.expected([3, 1]) == pytest.approx([2.0, 3.0, 3.125, 3.25])


def test_acceptance_by_position_and_row():
    acceptances = Acceptances(3)
    acceptances.begin(2)
    for _ in range(200):
        acceptances.forget(1)
        acceptances.record([3, 1], [3, 0])
    first, second, third = acceptances.rates()
    # Half of what was judged at the first position stayed, everything behind it.
    assert first == pytest.approx(0.5, abs=0.05)
    assert second == third > 0.85
    good, bad = (acceptances.expected(limits)[1] - 2 for limits in ([1, 0], [0, 1]))
    assert good > bad + 0.2
    acceptances.keep([1])
    assert acceptances.expected([1])[1] - 1 == pytest.approx(bad)


def test_nothing_known_is_hopeful_and_forgotten_is_unknown():
    acceptances = Acceptances(2)
    acceptances.begin(1)
    assert acceptances.rates() == pytest.approx([0.7, 0.7])
    for _ in range(30):
        acceptances.record([1], [0])
    assert acceptances.rates()[0] < 0.1
    acceptances.forget(200)
    assert acceptances.rates() == pytest.approx([0.7, 0.7], abs=1e-3)


def test_what_loops_take_wins_over_what_was_measured():
    times = Times(4)
    assert times.estimate(3, 2.0) == 2.0
    for _ in range(60):
        times.record(0, 1.0, 1.5)
    # All is slower than measured, so K that were not tried are expected to be, too.
    assert times.scale == pytest.approx(1.5)
    assert times.estimate(3, 2.0) == pytest.approx(3.0)
    for _ in range(60):
        times.record(3, 2.0, 9.0)
    assert times.estimate(3, 2.0) == pytest.approx(9.0, rel=0.1)
    times.begin()
    assert times.estimate(0, 1.0) == pytest.approx(times.scale)


class Text:
    """A text as a target and a draft would write it: acceptance by place, costs that may differ from the measured."""

    def __init__(self, costs, acceptance, n_tokens, *, seed=0, measured=None, noise=0.0):
        self.costs, self.acceptance, self.n_tokens, self.noise = costs, acceptance, n_tokens, noise
        self.chooser = Lookahead(costs if measured is None else measured)
        self.rng = random.Random(seed)

    def write(self):
        """Seconds, and (where a loop began, its K)."""
        self.chooser.begin(1, self.n_tokens)
        n, seconds, unread, begun, loops = 0, 0.0, 0, False, []
        while n < self.n_tokens:
            k = self.chooser.choose(lambda n=n: [self.n_tokens - n - 1], unread, begun=begun)
            accepted = 0
            while accepted < k and self.rng.random() < self.acceptance(n + accepted):
                accepted += 1
            slow = 1 + abs(self.rng.gauss(0, self.noise))
            verify = self.costs.verify(1, k + 1) * slow
            draft = (self.costs.draft(1, k) + self.costs.read(1, unread)) * slow if k else 0.0
            self.chooser.record(
                k,
                [min(accepted + 1, k)],
                [accepted],
                seconds=verify + draft,
                draft_seconds=draft,
                unread=unread,
                begun=begun,
            )
            loops.append((n, k))
            n, seconds = n + accepted + 1, seconds + verify + draft
            begun, unread = begun or k > 0, 0 if k or not begun else unread + 1
        return seconds, loops


@pytest.mark.parametrize("costs", [linear(0.01, 0.1, 0.005), linear(0.02, 0.25, 0.01), linear(0.1, 0.02)])
@pytest.mark.parametrize(("before", "after"), [(0.9, 0.05), (0.05, 0.9)])
def test_it_follows_a_change_in_mid_text(costs, before, after):
    """Within 40 loops, and in the median within 20."""
    delays = []
    for seed in range(15):
        text = Text(costs, lambda n: before if n < 400 else after, 900, seed=seed, noise=0.03)
        _, loops = text.write()
        later = [k for n, k in loops if n >= 400]
        right = [(k <= 2) if after < before else (k >= 3) for k in later]
        delays.append(right.index(True))
    assert max(delays) <= 40
    assert sorted(delays)[7] <= 20


def test_where_drafting_cannot_pay_it_is_not_done():
    seconds, loops = Text(linear(0.0, 1.1), lambda _: 1.0, 300).write()
    assert {k for _, k in loops} == {0}
    assert seconds == 300
    # Nor where a target call of two costs two: only that drafts of nothing are accepted, then, is learnt on the way.
    _, loops = Text(linear(1.0, 0.01), lambda _: 0.0, 300).write()
    assert sum(k > 0 for _, k in loops) < 10


@pytest.mark.parametrize("n_tokens", [128, 700])
def test_it_is_never_below_97_percent_of_plain(n_tokens):
    """Whatever draft and text: what drafting may lose is bounded, probing and reading included. There is no prompt here."""
    rng = random.Random(3)
    for case in range(120):
        slope, draft, read = rng.choice([0, 0.02, 0.3]), rng.choice([0.01, 0.1, 0.3, 0.7]), rng.choice([0, 0.01, 0.05])
        level, period = rng.random() ** 2, rng.choice([7, 50, 10_000])
        # The worst texts change when something was just learnt of them.
        text = Text(
            linear(slope, draft, read),
            lambda n, level=level, period=period: level if n // period % 2 else 0.0,
            n_tokens,
            seed=case,
        )
        seconds, _ = text.write()
        assert n_tokens / seconds > 0.97, (case, slope, draft, read, level, period)


def test_the_bound_is_what_keeps_it_there(monkeypatch):
    """Positive control: with the account open, a text that turns again and again costs more than 3 %."""
    monkeypatch.setattr(lookahead, "SHARE", 10.0)
    monkeypatch.setattr(lookahead, "FORGET", 0.5)
    monkeypatch.setattr(lookahead, "FORGET_ASLEEP", 0.5)
    seconds, _ = Text(linear(0.3, 0.3), lambda _: 0.0, 300).write()
    assert 300 / seconds < 0.95


def test_wrong_measurements_are_found_out():
    """Measured as if the draft were free and a call of two dear; loops show the opposite."""
    true, said = linear(0.0, 0.9), linear(0.0, 0.01)
    _, loops = Text(true, lambda _: 0.5, 600, measured=said).write()
    assert sum(k for n, k in loops if n > 300) / sum(n > 300 for n, _ in loops) < 0.3
    true, said = linear(0.01, 0.02), linear(0.01, 0.4)
    _, loops = Text(true, lambda _: 0.8, 600, measured=said).write()
    assert max(k for n, k in loops if n > 300) >= 4
    # A drafter that says nothing of its cost is timed.
    unknown = Table([1 + 0.01 * k for k in range(17)], None)
    _, loops = Text(true, lambda _: 0.8, 600, measured=unknown).write()
    assert max(k for n, k in loops if n > 300) >= 4


def test_an_interrupted_loop_says_little():
    chooser = knowing(linear(0.01, 0.1), [0.8] * 16, 1, 16)
    before = chooser.seconds(4)
    chooser.record(4, [4], [4], seconds=50.0, draft_seconds=25.0)
    assert chooser.seconds(4) <= 1.5 * before + 1e-9


def test_rows_without_an_offer_do_not_count_against_the_draft():
    chooser = knowing(linear(0.0, 0.0), [0.8] * 16, 2, 16)
    for _ in range(50):
        assert chooser.choose(lambda: [0, 0]) == 0
        chooser.record(0, [0, 0], [0, 0], seconds=1.0)
    assert chooser.choose(lambda: [0, 3]) == 3


def test_asleep_it_asks_for_nothing():
    chooser = Lookahead(linear(1.0, 1.0))
    chooser.begin(1, 1000)
    asked = []

    def limits():
        asked.append(True)
        return [9]

    for _ in range(80):
        assert chooser.choose(limits) == 0
        chooser.record(0, [0], [0], seconds=1.0)
    assert len(asked) <= 80 / lookahead.RECHECK + 1
