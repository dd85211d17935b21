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

    def seconds(self, stamp: int) -> float:
        """Since the first frame."""
        return float((stamp - self.stamps[0]) * self.time_base)


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
