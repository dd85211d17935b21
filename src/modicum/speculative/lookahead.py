"""How many tokens to draft, chosen for every loop by what they cost and how many are expected to stay; 0 included.

The rate of a loop that drafts K tokens for each of B rows is

    R(K) = sum over rows of tau(K) / (t_target(B (K + 1)) + T_draft(K, B)),    tau(K) = 1 + sum_i prod_{j <= i} a_j,

with a_j the acceptance at position j given that all before it were accepted. Costs and acceptances come from outside:
nothing here runs a model or reads a clock. A choice depends on loops that are over and on times, never on a token that was
drawn in the present loop: looking at a draw and dropping it would bias the text.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

MAX_K = 16  # the most tokens drafted per loop

# Acceptance. A draft that nothing is known of is believed to be good: only drafting can show that it is not.
PRIOR, PRIOR_WEIGHT = 0.7, 2.0
POSITION_WEIGHT = 3.0  # how many judgements of a position the other positions' word on it is worth
FORGET = 0.93  # of what a loop taught, what is left after one more: fourteen loops' memory
FORGET_ASLEEP = 0.975  # the same for a loop without a draft, which only makes what is known older
# A row's latest fortune, against what the positions promised: it notices a change long before every position has.
ROW_WEIGHT, FORGET_ROW = 4.0, 0.8

# Times. What was measured beforehand counts as two loops, scaled by how loops have fared against it.
TRUST = 2.0
FORGET_TIMES = 0.97
INTERRUPTED = 1.5  # a loop that took longer than this many times what it should was interrupted, and counts as so long

# Against plain decoding, drafting may lose this share of the time: of what has passed, or of as many tokens at the
# beginning, if they are as many.
SHARE = 0.025
HEAD_START = 96
STAKE = 0.5  # of what it may still lose, what one loop may
SAVINGS = 8.0  # plain loops: of what drafting has gained, what may be staked again
HORIZON = 64  # tokens over which reading what a draft has missed must pay
RECHECK = 4  # loops from one decision not to draft to the next
REFRESH = 64  # loops with a draft after which one without shows again what that takes


class Costs(Protocol):
    """What things take, in seconds, by a measurement beforehand. None: it was not measured."""

    def prepare(self, rows: int) -> float:
        """Called before a batch of `rows` rows, and rows only leave it. Returns the seconds spent on measuring."""
        ...

    def verify(self, rows: int, n_tokens: int) -> float:
        """One call of the target that scores `n_tokens` tokens of each row."""
        ...

    def draft(self, rows: int, n_tokens: int) -> float | None:
        """Proposing `n_tokens` for each row."""
        ...

    def read(self, rows: int, n_tokens: int) -> float:
        """What a drafter needs to read `n_tokens` of each row that were written without it, before it proposes."""
        ...


class Acceptances:
    """Running acceptance by draft position, and by how much each row is above or below the others."""

    def __init__(self, max_k: int) -> None:
        self.accepted, self.judged = [0.0] * max_k, [0.0] * max_k
        self.rows: list[list[float]] = []  # accepted, and how many would have been at the common rates

    def begin(self, n_rows: int) -> None:
        """New rows; what is known of the positions stands."""
        self.rows = [[0.0, 0.0] for _ in range(n_rows)]

    def keep(self, rows: list[int]) -> None:
        self.rows = [self.rows[row] for row in rows]

    def forget(self, n_loops: int, *, asleep: bool = False) -> None:
        left, of_row = (FORGET_ASLEEP if asleep else FORGET) ** n_loops, FORGET_ROW**n_loops
        self.accepted = [n * left for n in self.accepted]
        self.judged = [n * left for n in self.judged]
        self.rows = [[accepted * of_row, expected * of_row] for accepted, expected in self.rows]

    def record(self, judged: Sequence[int], accepted: Sequence[int]) -> None:
        """One loop: of each row's drafted tokens how many were judged, and how many of these stayed."""
        expected = [0.0, *accumulate(self.rates())]
        for row, n_judged, n_accepted in zip(self.rows, judged, accepted, strict=True):
            row[0] += n_accepted
            row[1] += expected[n_judged]
            for position in range(n_judged):
                self.judged[position] += 1
                self.accepted[position] += position < n_accepted

    def rates(self) -> list[float]:
        """Acceptance at each position; where little was judged, what the other positions say counts more."""
        all_accepted, all_judged = sum(self.accepted), sum(self.judged)
        rates = []
        for accepted, judged in zip(self.accepted, self.judged, strict=True):
            others = (all_accepted - accepted + PRIOR_WEIGHT * PRIOR) / (all_judged - judged + PRIOR_WEIGHT)
            rates.append((accepted + POSITION_WEIGHT * others) / (judged + POSITION_WEIGHT))
        return rates

    def expected(self, limits: Sequence[int]) -> list[float]:
        """Tokens that a loop yields for K = 0, 1, ... max(limits), over all rows; row b takes at most `limits[b]`."""
        rates = self.rates()
        gains = [0.0] * max(limits)
        for (accepted, usual), limit in zip(self.rows, limits, strict=True):
            factor = (accepted + ROW_WEIGHT) / (usual + ROW_WEIGHT)
            stays = 1.0
            for position in range(limit):
                stays *= min(1.0, factor * rates[position])
                gains[position] += stays
        return list(accumulate(gains, initial=float(len(limits))))


class Times:
    """What a part of a loop takes by K: as measured beforehand, until loops themselves have shown it."""

    def __init__(self, max_k: int) -> None:
        self.n = max_k + 1
        self.took, self.predicted = 0.0, 0.0  # of all loops, whatever their K
        self.begin()

    def begin(self) -> None:
        """Another number of rows: the times of single K are void, how loops fare against what was measured is not."""
        self.loop = 0
        self.by_k: list[tuple[float, float, int]] = [(0.0, 0.0, 0)] * self.n  # seconds, loops, as of which loop

    def estimate(self, k: int, measured: float) -> float:
        seconds, loops, at = self.by_k[k]
        left = FORGET_TIMES ** (self.loop - at)
        return (TRUST * self.scale * measured + seconds * left) / (TRUST + loops * left)

    @property
    def scale(self) -> float:
        """How much longer than measured loops take: another machine load, longer texts, work around the models."""
        return self.took / self.predicted if self.predicted > 0 else 1.0

    def record(self, k: int, measured: float, seconds: float) -> None:
        self.loop += 1
        known, loops, at = self.by_k[k]
        left = FORGET_TIMES ** (self.loop - at)
        self.by_k[k] = (known * left + seconds, loops * left + 1, self.loop)
        self.took = self.took * FORGET_TIMES + seconds
        self.predicted = self.predicted * FORGET_TIMES + measured


class Lookahead:
    """Chooses K, loop by loop, for a batch and then for the next: `begin`, then `choose` and `record` in turns."""

    def __init__(self, costs: Costs, max_k: int = MAX_K) -> None:
        self.costs, self.max_k = costs, max_k
        self.acceptances = Acceptances(max_k)
        self.verify_times, self.draft_times = Times(max_k), Times(max_k)
        self.plain_seconds = 0.0  # what the tokens so far would have taken without a draft
        self.lost = 0.0  # by drafting, against that; negative: gained
        self.since_plain = REFRESH  # the first loop of all shows what one without a draft takes

    def begin(self, n_rows: int, planned: int) -> None:
        """A new batch, whose longest row will write `planned` tokens."""
        self.acceptances.begin(n_rows)
        self.planned = self.left = planned
        self.asleep = self.unseen = 0
        self.cold = True
        self._resize(n_rows)

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows."""
        self.acceptances.keep(rows)
        self._resize(len(rows))

    def _resize(self, n_rows: int) -> None:
        self.n_rows = n_rows
        self.verify_times.begin()
        self.draft_times.begin()
        self.verify_costs = [self.costs.verify(n_rows, k + 1) for k in range(self.max_k + 1)]
        drafts = [self.costs.draft(n_rows, k) for k in range(1, self.max_k + 1)]
        # A drafter that says nothing of its cost takes a tenth of a target call per token until it has been seen.
        guess = self.verify_costs[0] / 10
        self.draft_costs = [0.0, *(guess * k if cost is None else cost for k, cost in enumerate(drafts, start=1))]

    def seconds(self, k: int) -> float:
        """What a loop with K = `k` is expected to take."""
        seconds = self.verify_times.estimate(k, self.verify_costs[k])
        return seconds + self.draft_times.estimate(k, self.draft_costs[k]) if k else seconds

    @property
    def allowance(self) -> float:
        """How much drafting may have lost by now, in seconds."""
        return SHARE * max(self.plain_seconds, min(self.planned, HEAD_START) * self.seconds(0))

    def choose(self, limits: Callable[[], Sequence[int]], unread: int = 0, *, begun: bool = True) -> int:
        """K for the next loop.

        Args:
            limits: gives the most tokens that each row can be offered. Not asked while nothing is drafted.
            unread: tokens of a row that the drafter has to read first.
            begun: whether it has been used for this batch. Where it has not, reading the prompt is weighed against what
                drafting promises, but is not held against it afterwards.
        """
        if self.asleep:
            self.asleep -= 1
            self.unseen += 1
            return 0
        if self.cold or self.since_plain >= REFRESH:
            return 0
        at_most = limits() if self.lost < self.allowance else []
        if at_most and not max(at_most):
            return 0  # nothing to offer is no verdict on what was offered
        self.acceptances.forget(self.unseen, asleep=True)
        self.unseen = 0
        k = self._best([min(n, self.max_k) for n in at_most], unread, begun) if at_most else 0
        if k == 0:
            self.asleep, self.unseen = RECHECK - 1, 1
        return k

    def _best(self, limits: list[int], unread: int, begun: bool) -> int:
        yields = self.acceptances.expected(limits)
        reading, plain = self._reading(unread), self.seconds(0)
        staked = self.allowance - self.lost - (reading if begun else 0.0)
        best, best_rate = 0, self.n_rows / plain
        for k in range(1, len(yields)):
            seconds = self.seconds(k)
            # Should every draft be rejected, the loop is worth a plain one.
            if seconds - plain > STAKE * staked:
                continue
            loops = min(self.left, HORIZON) * self.n_rows / yields[k]
            rate = yields[k] / (seconds + reading / loops)
            if rate > best_rate:
                best, best_rate = k, rate
        return best

    def record(
        self,
        k: int,
        judged: Sequence[int],
        accepted: Sequence[int],
        *,
        seconds: float,
        draft_seconds: float = 0.0,
        unread: int = 0,
        begun: bool = True,
    ) -> None:
        """What the loop after `choose` did: per row as in `Loop`, the time of all of it and what of that drafting took.

        `draft_seconds` of a loop without a draft are those spent on deciding so.
        """
        n_tokens = sum(accepted) + len(accepted)
        plain = self.seconds(0) * n_tokens / self.n_rows
        reading = self._reading(unread) if k else 0.0
        expected = self.seconds(k) + reading
        share = min(1.0, INTERRUPTED * expected / seconds) if seconds > 0 else 1.0
        drafted, verified = share * draft_seconds, share * (seconds - draft_seconds)
        if k:
            paid = drafted if begun else self.draft_times.estimate(k, self.draft_costs[k])
            self._charge(verified + paid - plain)
            self.acceptances.forget(1)
            self.acceptances.record(judged, accepted)
            if not reading:
                self.draft_times.record(k, self.draft_costs[k], drafted)
        else:
            self._charge(drafted)
        if self.cold:
            self.cold = False  # a batch's first loop waits for memory and kernels that the others find ready
        else:
            self.verify_times.record(k, self.verify_costs[k], verified)
            self.since_plain = self.since_plain + 1 if k else 0
        self.plain_seconds += plain
        self.left = max(1, self.left - n_tokens // self.n_rows)

    def _charge(self, seconds: float) -> None:
        self.lost = max(self.lost + seconds, -SAVINGS * self.seconds(0))

    def _reading(self, unread: int) -> float:
        return self.costs.read(self.n_rows, unread) * self.draft_times.scale if unread else 0.0
