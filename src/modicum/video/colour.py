"""Colour jitter and colour drop of a clip, with one draw for all of its frames (2103.15691, table 7).

The sizes of the changes are those of the authors' pipeline, DMVR's `color_default_augm`: brightness, then saturation,
contrast and hue, cut off at black and white once, at the end. Pixels are planes here, uint8 [3, T, H, W]: colour by
colour, an operation meets memory in order.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BRIGHTNESS = 32.0  # of 255
FACTORS = (0.6, 1.4)
HUE = 0.2  # of a turn
# Floats of this many pixels stay in a processor's cache from one operation to the next.
CHUNK = 1 << 16
TINY = 1e-6  # stands for the difference of equal colours, by which nothing may be divided


@dataclass(frozen=True)
class Jitter:
    """One draw: added brightness (of 255), factors of saturation and contrast, and a part of a turn of hue."""

    brightness: float
    saturation: float
    contrast: float
    hue: float

    @classmethod
    def draw(cls, random: np.random.Generator) -> "Jitter":
        brightness, saturation, contrast, hue = random.random(4).tolist()
        low, high = FACTORS
        return cls(
            BRIGHTNESS * (2 * brightness - 1),
            low + (high - low) * saturation,
            low + (high - low) * contrast,
            HUE * (2 * hue - 1),
        )


def jitter(planes: Tensor, draw: Jitter) -> Tensor:
    """Change the colours of a clip: uint8 [3, T, H, W] -> uint8 [3, T, H, W], rounded.

    Saturation and hue are those of HSV. Contrast is about the mean of each colour over the whole clip, so that equal
    pixels stay equal in all frames; the authors' takes each frame's own mean, which changes from frame to frame.
    """

    def bright(part: Tensor) -> list[Tensor]:
        return saturated([plane.float().add_(draw.brightness) for plane in part], draw.saturation)

    result = torch.empty_like(planes)
    # Made twice rather than kept: as floats, a clip takes more time to write down and read than to make.
    sums = torch.tensor([[plane.double().sum() for plane in bright(part)] for part, _ in chunks(planes, result)])
    means = (sums.sum(0) / planes[0].numel()).tolist()
    for part, out in chunks(planes, result):
        contrasted = [x.sub_(mean).mul_(draw.contrast).add_(mean) for x, mean in zip(bright(part), means, strict=True)]
        write(out, [plane.round_().clamp_(0, 255) for plane in turn_hue(contrasted, draw.hue)])
    return result


def drop_colour(planes: Tensor) -> Tensor:
    """The clip in grey: uint8 [3, T, H, W] -> uint8 [3, T, H, W]."""
    return grey(planes).expand(3, -1, -1, -1)


def grey(planes: Tensor) -> Tensor:
    """Luminance (ITU-R 601), rounded as PIL does: uint8 [3, ...] -> uint8 [...]."""
    red, green, blue = planes.int()
    return (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(1 << 15).__rshift__(16).to(torch.uint8)


def saturated(colours: list[Tensor], factor: float) -> list[Tensor]:
    """Multiply HSV's saturation, at most to 1: three floats, red, green and blue. Hue and the brightest of them stay."""
    value, low = extremes(colours)
    # Saturation is (value - low) / value, and at 1 the darkest colour is black.
    factors = value.clamp(min=0).div_((value - low).clamp_(min=TINY)).clamp_(max=factor)
    return [value - (value - x).mul_(factors) for x in colours]


def turn_hue(colours: list[Tensor], turn: float) -> list[Tensor]:
    """Rotate HSV's hue by a part of a turn: three floats, red, green and blue."""
    red, green, blue = colours
    value, low = extremes(colours)
    chroma = value - low
    span = chroma.clamp(min=TINY)
    # In sixths of a turn: red is at 0, green at 2, blue at 4.
    # Masks as weights: `where` takes five times as long on pixels in no order.
    below_red = torch.lerp(
        (red - green).div_(span).add_(4), (blue - red).div_(span).add_(2), (value == green).to(value.dtype)
    )
    hue = torch.lerp(below_red, (green - blue).div_(span), (value == red).to(value.dtype))
    hue.add_(6 * turn)
    hue.sub_((hue / 6).floor_(), alpha=6)  # `remainder` takes ten times as long
    shares = (
        (hue - 3).abs_().sub_(1),
        (hue - 2).abs_().neg_().add_(2),
        (hue - 4).abs_().neg_().add_(2),
    )
    return [share.clamp_(0, 1).mul_(chroma).add_(low) for share in shares]


def extremes(colours: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The brightest and the darkest colour of each pixel."""
    red, green, blue = colours
    return torch.maximum(red, green).maximum(blue), torch.minimum(red, green).minimum(blue)


def chunks(source: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A few frames at a time of [3, T, H, W], of both as views."""
    n_frames = max(1, CHUNK // source[0, 0].numel())
    yield from zip(source.split(n_frames, dim=1), target.split(n_frames, dim=1), strict=True)


def write(target: Tensor, colours: list[Tensor]) -> None:
    """Colour by colour, because each is contiguous and the three together are not."""
    for plane, values in zip(target, colours, strict=True):
        plane.copy_(values)
