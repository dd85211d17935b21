from fractions import Fraction

import pytest

from modicum.errors import UsageError
from modicum.video.clock import Clock, as_rate, count_ticks, nearest, units_per_tick

MILLISECONDS = Fraction(1, 1000)


def ticks(stamps, end, fps, time_base=MILLISECONDS):
    clock = Clock(stamps, end, time_base, as_rate(fps))
    return [clock.stamp_at(i) for i in range(clock.n_ticks)]


def test_a_clock_by_hand():
    # Ticks at 0, 40, 80, 120 ms; 160 lies beyond the end. 80 is as near to 70 as to 90: the earlier one counts.
    assert ticks([0, 33, 70, 90, 125], 158, 25) == [0, 33, 70, 125]
    assert ticks([1000, 1033, 1070, 1090, 1125], 1158, 25) == [1000, 1033, 1070, 1125], "time starts at the first frame"
    assert ticks([0, 33, 70, 90, 125], 158, None) == [0, 33, 70, 90, 125]


def test_a_tie_goes_to_the_earlier_frame_and_a_hair_more_to_the_later():
    assert ticks([0, 30, 50], 70, 25) == [0, 30]
    assert ticks([0, 29, 50], 70, 25) == [0, 50]
    assert ticks([0, 30, 49], 69, 25) == [0, 49]


@pytest.mark.parametrize(
    ("length", "time_base", "fps", "n"),
    [
        (2000, MILLISECONDS, 25, 50),
        (2001, MILLISECONDS, 25, 50),  # a rounded stamp promises nothing
        (2002, MILLISECONDS, 25, 51),
        (50, Fraction(1, 25), 50, 100),
        (50, Fraction(1, 25), 100, 200),
        (50, Fraction(1, 25), 5, 10),
        (60 * 1001, Fraction(1, 30000), 25, 51),
        (1, MILLISECONDS, 25, 1),
        (0, MILLISECONDS, 25, 1),
        (10**9, Fraction(1, 90000), Fraction(30000, 1001), 333001),
    ],
)
def test_ticks_cover_the_frames_and_no_more(length, time_base, fps, n):
    assert count_ticks(length, units_per_tick(Fraction(fps), time_base)) == n


@pytest.mark.parametrize("fps", [1, 7.5, 24, 25, 30000 / 1001, 60, 333])
@pytest.mark.parametrize("stamps", [[0], [5, 6], [3, 40, 41, 90, 300, 301, 500], list(range(-70, 900, 33))])
def test_in_passing_and_by_index_agree(fps, stamps):
    end, rate = stamps[-1] + 20, as_rate(fps)
    passing = nearest([(stamp, str(stamp)) for stamp in stamps], units_per_tick(rate, MILLISECONDS), lambda: end)
    chosen = ticks(stamps, end, fps)
    assert list(passing) == [(stamp, str(stamp)) for stamp in chosen]
    start = stamps[0]
    for i, stamp in enumerate(chosen):
        moment = start + 1000 * Fraction(i) / rate
        assert stamp == min(stamps, key=lambda s: (abs(s - moment), s))


def test_rates():
    assert as_rate(29.97002997002997) == Fraction(30000, 1001)
    assert as_rate(23.976) == Fraction(2997, 125)
    assert as_rate(25) == 25
    assert as_rate(1e-9) > 0
    assert as_rate(None) is None


@pytest.mark.parametrize("fps", [0, -25, float("nan"), float("inf")])
def test_a_rate_that_no_clock_has_is_refused(fps):
    with pytest.raises(UsageError, match=r"^fps=.*: give a positive number"):
        as_rate(fps)
