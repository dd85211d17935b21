"""Scenes drawn as clips."""

import numpy as np

from modicum.video.synthetic.classes import check_clip_size
from modicum.video.synthetic.draw import TEXTURES, Canvas
from modicum.video.synthetic.scenes import Event, Scene

# Far enough apart to be told after H.264's halving of colour resolution, and brighter than any backdrop.
RGB = {
    "red": (230, 45, 40),
    "green": (45, 190, 60),
    "blue": (60, 95, 250),
    "yellow": (240, 215, 45),
    "purple": (195, 70, 220),
    "white": (240, 240, 240),
}
_STEPS = {"moves left": (0, -1), "moves right": (0, 1), "moves up": (-1, 0), "moves down": (1, 0)}
# Events happen in the part of the frame that the usual central crop shows, 224 of 256 pixels, whoever reads the clip.
_ROOM = 224 / 256
# In parts of that. Three objects side by side take 3.24 diameters with the gaps between them.
_RADII, _GAP = (0.125, 0.145), 1.12
_TRAVEL = (0.32, 0.45)
_SMALL, _FAINT = 0.45, 0.1


def render(scene: Scene, generator: np.random.Generator, num_frames: int, side: int) -> np.ndarray:
    """A clip of a scene: uint8 [T, side, side, 3], RGB.

    Of two events each has half of the clip to itself: shuffled frames show both, and not which came first.

    Raises:
        UsageError: fewer than 4 frames or 16 pixels.
    """
    check_clip_size(num_frames, side)
    canvas = Canvas(generator, num_frames, side)
    if len(scene.events) == 1:
        _paint(canvas, scene.events[0], 0, num_frames)
        return canvas.film()
    # Of an odd number of frames either event may have the one that is over.
    half = (num_frames + int(generator.integers(2))) // 2
    _paint(canvas, scene.events[0], 0, half)
    _paint(canvas, scene.events[1], half, num_frames - half)
    return canvas.film()


def _paint(canvas: Canvas, event: Event, first: int, n: int) -> None:
    """Paint an event's objects onto frames `first` ... `first + n - 1`."""
    generator, side = canvas.generator, canvas.side * _ROOM
    largest = side * generator.uniform(*_RADII)
    radius_T, opacity_T, path_T2 = np.full(n, largest), np.ones(n), np.zeros((n, 2))
    if event.motion in _STEPS:
        travel = side * generator.uniform(*_TRAVEL)
        path_T2 = (np.linspace(-0.5, 0.5, n) * travel)[:, None] * _STEPS[event.motion]
    elif event.motion in ("grows", "shrinks"):
        size_T = np.linspace(_SMALL, 1, n)
        radius_T = largest * (size_T if event.motion == "grows" else size_T[::-1])
    elif event.motion == "blinks":
        # Twice, where there are frames for it, however many there are and whichever share of them is read.
        quarter_T = ((np.arange(n) + 0.5) / max(n, 4) * 4).astype(int)
        opacity_T = np.where(quarter_T % 2, _FAINT, 1.0)
    colour = np.array(RGB[event.colour]) * generator.uniform(0.88, 1)
    texture = 1 + generator.uniform(0.05, 0.12) * TEXTURES[generator.integers(len(TEXTURES))]
    for centre_2 in _places(generator, event, largest, np.ptp(path_T2, axis=0), side):
        centre_T2 = (canvas.side - side) / 2 + centre_2 + path_T2
        canvas.paint(event.shape, texture, colour, centre_T2, radius_T, opacity_T, first)


def _places(
    generator: np.random.Generator, event: Event, radius: float, travel_2: np.ndarray, side: float
) -> np.ndarray:
    """Where each object is in the middle of its way, row and column: [count, 2].

    They go side by side, in lanes of their own, so that none hides another.
    """
    across = int(generator.integers(2)) if not travel_2.any() else int(travel_2[0] == 0) ^ 1
    free_2 = side - 2 * radius - travel_2
    gap = 2 * radius * _GAP
    places = radius + travel_2 / 2 + generator.random((event.count, 2)) * free_2
    slack = free_2[across] - gap * (event.count - 1)
    places[:, across] = radius + np.sort(generator.random(event.count)) * slack + gap * np.arange(event.count)
    return places
