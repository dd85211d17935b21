"""The speculative loop with K chosen anew every time. Where drafting cannot pay it is plain decoding, the draft idle."""

from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import Any, NamedTuple

from modicum.decode.batch import Batch, Loop
from modicum.decode.loop import Engine, PlainEngine, open_cache
from modicum.decode.stats import add_seconds
from modicum.speculative.captured import CapturedEngine, can_capture
from modicum.speculative.costs import MeasuredCosts
from modicum.speculative.drafters.base import Drafter
from modicum.speculative.lookahead import Lookahead
from modicum.speculative.loop import SpeculativeEngine


class Past(NamedTuple):
    """A loop that is not over yet: taking its tokens, and whatever the caller does with them, belongs to its time."""

    began: float
    loop: Loop
    unread: int
    begun: bool


class AutoEngine(SpeculativeEngine):
    """`SpeculativeEngine`, but for K.

    A K that is settled before a loop draws anything leaves the text's distribution alone, because the loop's random
    numbers have addresses that no earlier loop has used. As times are measured, the same seed need not give the same text.
    """

    def __init__(self, target: Any, drafter: Drafter, lookahead: Lookahead, **options: Any) -> None:
        super().__init__(target, drafter, lookahead.max_k, **options)
        self.lookahead = lookahead
        self.plain = PlainEngine(target)
        # A drafter that is shown what the target makes of every token must not miss a loop.
        self.watched = hasattr(drafter, "observe")

    def start(self, batch: Batch) -> None:
        self.capacity = batch.tokens_BM.shape[1] + self.lookahead.max_k + 1
        self.num_draft_tokens = self.lookahead.max_k
        # Where reading the prompt has a price it is paid when drafting is to begin, which may be never.
        self.begun = self.watched or hasattr(self.drafter, "share") or not hasattr(self.drafter, "read_seconds")
        if self.begun:
            super().start(batch)
        else:
            counts = [length - 1 for length in batch.lengths]
            self.cache = open_cache(self.target, batch.sources, batch.tokens_BM, counts, self.capacity)
        self.plain.cache = self.cache
        self.unread = 0
        self.past: Past | None = None
        self.lookahead.begin(len(batch.rows), max(row.remaining for row in batch.rows))

    def step(self, batch: Batch) -> Loop:
        began = perf_counter()
        self._book(began)
        unread, begun = self.unread if self.begun else max(batch.lengths), self.begun
        k = self.lookahead.choose(lambda: self._limits(batch), unread, begun=begun)
        if k and not begun:
            self.drafter.start(batch, self.capacity)
        self.begun = begun or k > 0
        ahead = perf_counter() - began
        loop = self._loop(batch, k)
        # Choosing, looking for matches and reading what was missed are all for the draft's sake.
        loop = replace(loop, k=k, seconds={**loop.seconds, "draft": loop.seconds.get("draft", 0.0) + ahead})
        self.unread = 0 if k else self.unread + 1
        self.past = Past(began, loop, unread, begun)
        return loop

    def keep(self, rows: list[int], lengths: list[int]) -> None:
        self._book(perf_counter())
        self.lookahead.keep(rows)
        if self.begun:
            super().keep(rows, lengths)
        else:
            self.plain.keep(rows, lengths)

    def _loop(self, batch: Batch, k: int) -> Loop:
        if k == 0 and not self.watched:
            return self.plain.step(batch)
        self.num_draft_tokens = k
        return super().step(batch)

    def _limits(self, batch: Batch) -> list[int]:
        allowed = [min(self.lookahead.max_k, row.remaining - 1) for row in batch.rows]
        return self.drafter.offers(batch, allowed) if hasattr(self.drafter, "offers") else allowed

    def _book(self, now: float) -> None:
        """Tell the lookahead of the last loop, now that it is over."""
        if self.past is None:
            return
        began, loop, unread, begun = self.past
        self.past = None
        self.lookahead.record(
            loop.k or 0,
            loop.judged,
            loop.accepted,
            seconds=now - began,
            draft_seconds=loop.seconds["draft"],
            unread=unread,
            begun=begun,
        )


def make_engine(
    target: Any, drafter: Drafter | None, num_draft_tokens: int | str, *, capture: bool = False, **options: Any
) -> Callable[[int, dict[str, float]], Engine]:
    """What makes the engine for each batch of a call, given its number of rows. With "auto", batches learn from others.

    Measuring what a batch costs, once per machine and pair, is part of the call's time and of no prompt's: it is done
    before the batch begins, and added to the times by part that are given, as "calibrate". `capture` allows loops that the
    host sees nothing of but their tokens, where there are such.
    """
    if capture and not options["k_invariant"] and can_capture(target, drafter, num_draft_tokens):
        captured = CapturedEngine(target, drafter, num_draft_tokens, options["verification"])
        return lambda *_: captured
    if drafter is None:
        return lambda *_: PlainEngine(target)
    if isinstance(num_draft_tokens, int):
        return lambda *_: SpeculativeEngine(target, drafter, num_draft_tokens, **options)
    lookahead = Lookahead(MeasuredCosts(target, drafter))

    def new_engine(n_rows: int, by_part: dict[str, float]) -> Engine:
        seconds = lookahead.costs.prepare(n_rows)
        if seconds:
            add_seconds(by_part, {"calibrate": seconds})
        return AutoEngine(target, drafter, lookahead, **options)

    return new_engine
