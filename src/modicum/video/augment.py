"""What training changes about a clip (2103.15691, section 4.1 and table 7): every draw is one for all of its frames."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modicum.config import Section, require
from modicum.errors import UsageError
from modicum.video.colour import Jitter, drop_colour, jitter
from modicum.video.crops import resized_shape, usual_short_side
from modicum.video.randaugment import randaugment

MAX_MAGNITUDE = 30


class Purpose(IntEnum):
    """What a draw is for. Each has a stream of its own, so that switching one off leaves the others as they were."""

    CROP = 0x41554700  # far from the small numbers that keys end in
    FLIP = 0x41554701
    JITTER = 0x41554702
    DROP = 0x41554703
    RANDAUGMENT = 0x41554704


@dataclass(frozen=True, kw_only=True)
class Augment(Section):
    """Settings of `augment`, a recipe's `[augment]` section. The defaults are table 7's for Kinetics.

    `flip`, `colour_jitter` and `colour_drop` are probabilities; classes that know left from right need `flip` 0. The
    clip is scaled so that its shorter side is `short_side` (None: 256 for a crop of 224, in this proportion for others),
    then its height and its width each by a factor from `scale_jitter`; (1, 1) leaves them. `randaugment_layers` of 0
    switches RandAugment off; where it is on, the paper's recipes have no colour jitter.
    """

    flip: float = 0.5
    short_side: int | None = None
    scale_jitter: tuple[float, ...] = (0.9, 1.33)
    colour_jitter: float = 0.8
    colour_drop: float = 0.0
    randaugment_layers: int = 0
    randaugment_magnitude: float = 15
    randaugment_operations: Literal["colour", "all"] = "colour"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("flip", "colour_jitter", "colour_drop"):
            value = getattr(self, name)
            require(0 <= value <= 1, name, value, "give a probability, from 0 to 1")
        jitter = self.scale_jitter
        ordered = len(jitter) == 2 and 0 < jitter[0] <= jitter[1] < float("inf")
        require(ordered, "scale_jitter", jitter, "give the least and the largest factor, such as [0.9, 1.33]")
        side = self.short_side
        require(side is None or side >= 1, "short_side", side, "it must be at least 1")
        require(self.randaugment_layers >= 0, "randaugment_layers", self.randaugment_layers, "it must not be negative")
        magnitude = self.randaugment_magnitude
        require(0 <= magnitude <= MAX_MAGNITUDE, "randaugment_magnitude", magnitude, f"give 0 to {MAX_MAGNITUDE}")


def augment(clip: Tensor, size: tuple[int, int], settings: Augment, key: Sequence[int]) -> Tensor:
    """A training view of a clip: a random crop after scaling, a flip, and changes of colour.

    In this order: scaling and crop, flip, RandAugment, colour jitter, colour drop. Whatever is drawn is drawn once and
    done to all frames; what an operation measures, such as a mean, it measures over the whole clip.

    Args:
        clip: uint8 [T, H, W, 3].
        size: (height, width) of the crop.
        settings: what to do, and how often.
        key: whole numbers from 0 on, such as (seed, epoch, index of the sample), which alone decide what is drawn.

    Returns:
        uint8 [T, height, width, 3].

    Raises:
        UsageError: a clip, size or key of another kind; a `short_side` below the crop's.
    """
    check(clip, size, settings, key)
    scales = uniform(stream(key, Purpose.CROP), 4)
    view = cropped(clip, size, settings, *scales)
    if uniform(stream(key, Purpose.FLIP), 1)[0] < settings.flip:
        view = view.flip(2)
    random = stream(key, Purpose.JITTER)
    jittered = random.random() < settings.colour_jitter
    dropped = uniform(stream(key, Purpose.DROP), 1)[0] < settings.colour_drop
    if not (jittered or dropped or settings.randaugment_layers):
        return view.contiguous()
    planes = view.movedim(-1, 0).contiguous()
    if settings.randaugment_layers:
        planes = randaugment(
            planes,
            settings.randaugment_layers,
            settings.randaugment_magnitude,
            settings.randaugment_operations,
            stream(key, Purpose.RANDAUGMENT),
        )
    if jittered:
        planes = jitter(planes, Jitter.draw(random))
    if dropped:
        planes = drop_colour(planes)
    return planes.movedim(0, -1).contiguous()


def cropped(
    clip: Tensor, size: tuple[int, int], settings: Augment, scale_y: float, scale_x: float, at_y: float, at_x: float
) -> Tensor:
    """Cut a window out of a clip and scale it to `size`, bilinearly.

    The window is what a crop of `size` shows of the scaled clip, in whole pixels of the clip as it came: to scale all of
    it first would cost three times as much. The four numbers, in [0, 1), say where in their ranges the factors and the
    window's place lie. A clip is never scaled below the crop.
    """
    height, width = clip.shape[1:3]
    short_side = settings.short_side or usual_short_side(size)
    shape = resized_shape(height, width, size, short_side)
    low, high = settings.scale_jitter
    spans = []
    for side, scaled, crop, scale, at in zip(
        (height, width), shape, size, (scale_y, scale_x), (at_y, at_x), strict=True
    ):
        jittered = max(crop, int(scaled * (low + (high - low) * scale)))
        length = max(1, round(side * crop / jittered))
        start = int(at * (side - length + 1))
        spans.append(slice(start, start + length))
    window = clip[:, spans[0], spans[1]]
    if window.shape[1:3] == tuple(size):
        return window
    return F.interpolate(window.movedim(-1, 1), size=size, mode="bilinear", align_corners=False).movedim(1, -1)


def stream(key: Sequence[int], purpose: Purpose) -> np.random.Generator:
    """The random numbers of a sample for one purpose."""
    return np.random.default_rng([*key, purpose])


def uniform(random: np.random.Generator, count: int) -> list[float]:
    return random.random(count).tolist()


def check(clip: Any, size: tuple[int, int], settings: Augment, key: Sequence[int]) -> None:
    if not isinstance(clip, Tensor) or clip.dtype != torch.uint8 or clip.dim() != 4 or clip.shape[-1] != 3:
        found = f"{clip.dtype} {list(clip.shape)}" if isinstance(clip, Tensor) else type(clip).__name__
        raise UsageError(f"the clip is {found}: give a uint8 tensor of [frames, height, width, 3]")
    if min(clip.shape) < 1:
        raise UsageError(f"the clip is {list(clip.shape)}: it needs at least a frame and a pixel")
    if len(size) != 2 or min(size) < 1:
        raise UsageError(f"the crop is {size}: give its height and width, of at least 1")
    if settings.short_side is not None and settings.short_side < min(size):
        raise UsageError(
            f"a shorter side of {settings.short_side} is less than the crop's {min(size)}: give at least that"
        )
    if not key or any(isinstance(part, bool) or not isinstance(part, (int, np.integer)) or part < 0 for part in key):
        raise UsageError(f"the key is {key!r}: give whole numbers from 0 on, such as (seed, epoch, index)")
