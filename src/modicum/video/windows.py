"""Windows that slide over a long video: what they need is made once per tubelet, and no more is kept than one window."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Tubelet = tuple[list[float], Tensor]  # the seconds of its frames, and uint8 [t, height, width, 3]


class Window(NamedTuple):
    """A clip from its first frame to its last, in seconds of the file. `parts` are what its tubelets were made into, one
    after the other on the first axis."""

    start: float
    end: float
    parts: Tensor


def tubelets(frames: Iterable[tuple[float, Tensor]], size: int, crop: Callable[[Tensor], Tensor]) -> Iterator[Tubelet]:
    """Frames [H, W, 3] with their seconds, `size` at a time, each cropped as it passes. A rest is left out."""
    stamps: list[float] = []
    cropped: list[Tensor] = []
    for seconds, frame in frames:
        stamps.append(seconds)
        cropped.append(crop(frame[None]))
        if len(cropped) == size:
            yield stamps, torch.cat(cropped)
            stamps, cropped = [], []


def sliding_windows(
    pieces: Iterable[Tubelet], length: int, step: int, make: Callable[[Tensor], Tensor], *, to_the_end: bool = False
) -> Iterator[Window]:
    """Windows of `length` tubelets, the next one `step` further. Nothing at all from fewer.

    Args:
        make: of a tubelet what windows are to hold, such as its encoded vector [1, D]. It is called once for each, and
            never for one that lies between two windows.
        to_the_end: a last window ends where the video does, less than a step after the one before it. Where windows lie
            apart there is none.
    """
    held: deque[Tensor] = deque(maxlen=length)
    times: deque[tuple[float, float]] = deque(maxlen=length)
    until_next = length

    def window() -> Window:
        return Window(times[0][0], times[-1][1], torch.cat(list(held)))

    for stamps, pixels in pieces:
        until_next -= 1
        if until_next >= length:
            continue
        held.append(make(pixels))
        times.append((stamps[0], stamps[-1]))
        if not until_next:
            until_next = step
            yield window()
    if to_the_end and len(held) == length and until_next < step <= length:
        yield window()


def tubelets_per(seconds: float, fps: float | None, stride: int, size: int) -> int:
    """How many tubelets come closest to a time, at least one; without a clock at 25 frames per second."""
    return max(1, round(seconds * (fps or 25.0) / (stride * size)))
