"""The sampling clock: which frame stands for which moment. Exact, in the integers that files count time in."""

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from modicum.errors import UsageError


def as_rate(fps: float | None) -> Fraction | None:
    """Ticks per second as a fraction: 29.97002997 is 30000/1001.

    Raises:
        UsageError: not a positive number.
    """
    if fps is None:
        return None
    if not (math.isfinite(fps) and fps > 0):
        raise UsageError(f"fps={fps}: give a positive number of frames per second, or None for the file's own frames")
    return max(Fraction(fps).limit_denominator(10_000), Fraction(1, 10_000))


@dataclass(frozen=True)
class Clock:
    """Ticks over frames that start at `stamps` (increasing) and end at `end`, in units of `time_base` seconds.

    Tick i is i / fps after the first frame, and stands for the frame whose stamp is nearest, of two equally near ones
    the earlier. Without `fps`, tick i is frame i.
    """

    stamps: Sequence[int]
    end: int
    time_base: Fraction
    fps: Fraction | None

    @property
    def n_ticks(self) -> int:
        """At least one."""
        if self.fps is None:
            return len(self.stamps)
        return count_ticks(self.end - self.stamps[0], units_per_tick(self.fps, self.time_base))

    def stamp_at(self, tick: int) -> int:
        """The stamp of the frame that stands for a tick."""
        if self.fps is None:
            return self.stamps[tick]
        moment = self.stamps[0] + tick * units_per_tick(self.fps, self.time_base)
        after = bisect_left(self.stamps, moment)
        if after == len(self.stamps) or (after and moment - self.stamps[after - 1] <= self.stamps[after] - moment):
            return self.stamps[after - 1]
        return self.stamps[after]

    def within(self, start: float, end: float | None) -> range:
        """The ticks at [start, end) seconds after the first frame, None being the end of the video: at least one, and none
        beyond that end, so that none is left where `start` lies beyond it.
        """
        if exact(start) >= (self.end - self.stamps[0]) * self.time_base:
            return range(0)
        first = min(self._tick_from(start), self.n_ticks - 1)
        stop = self.n_ticks if end is None else min(self._tick_from(end), self.n_ticks)
        return range(first, max(first + 1, stop))

    def _tick_from(self, seconds: float) -> int:
        """The first tick at or after a moment."""
        if self.fps is None:
            return bisect_left(self.stamps, self.stamps[0] + exact(seconds) / self.time_base)
        return math.ceil(exact(seconds) * self.fps)

    def seconds(self, stamp: int) -> float:
        """Since the first frame."""
        return float((stamp - self.stamps[0]) * self.time_base)


def exact(seconds: float) -> Fraction:
    """As written in microseconds: 0.28 s at 25 per second is tick 7, where its float lies past it."""
    return Fraction(round(max(0.0, seconds) * 1_000_000), 1_000_000)


def units_per_tick(fps: Fraction, time_base: Fraction) -> Fraction:
    return 1 / (fps * time_base)


def count_ticks(length: int, per_tick: Fraction) -> int:
    """Ticks that fall within `length` units. One that the rounding of a stamp may have let in does not count."""
    rounding = min(Fraction(1), per_tick / 4)
    return max(1, math.ceil((length - rounding) / per_tick))


def nearest(frames: Iterable[tuple[int, Any]], per_tick: Fraction, last: Any) -> Iterator[tuple[int, Any]]:
    """What `Clock` would choose for every tick, from frames that pass by once. `last()` is where the last one ends."""
    start = tick = 0
    before: tuple[int, Any] | None = None
    for frame in frames:
        if before is None:
            start = frame[0]
        else:
            while 2 * (start + tick * per_tick) <= before[0] + frame[0]:
                yield before
                tick += 1
        before = frame
    if before is not None:
        while tick < count_ticks(last() - start, per_tick):
            yield before
            tick += 1
