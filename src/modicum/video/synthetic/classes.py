"""Labelled clips: classes that only motion tells apart, and classes that one frame suffices for.

A motion class is an order. Whatever the class, a clip begins as a set of pictures of one object, which stands once at
each point of a small square lattice. The label says in which of eight directions the lattice is then walked, line by
line; "moves left" is "moves right" reversed in time. A clip without its order therefore holds no evidence at all: the best
that can be done with shuffled frames is chance, 1 / len(MOTION_LABELS) over all motion classes and 1 / 2 within a pair.
This holds for all frames of a clip together; a part of them, or every second one, is another set for another class.
"""

import numpy as np

from modicum.errors import UsageError
from modicum.video.synthetic.draw import TEXTURES, Canvas

# Rows and columns per step. Neighbours are each other reversed in time.
_STEPS = {
    "moves left": (0, -1),
    "moves right": (0, 1),
    "moves up": (-1, 0),
    "moves down": (1, 0),
    "moves up left": (-1, -1),
    "moves down right": (1, 1),
    "moves up right": (-1, 1),
    "moves down left": (1, -1),
}
_SHOWN = {"shows a ring": "ring", "shows a cross": "cross", "shows a 4": "4", "shows a 7": "7"}
# What moves is never one of the objects that are classes of their own.
_MOVING = ["circle", "square", "triangle", "bar", "2", "5", "6", "8"]

MOTION_LABELS = list(_STEPS)
FRAME_LABELS = list(_SHOWN)
LABELS = MOTION_LABELS + FRAME_LABELS

MIN_FRAMES, MIN_SIDE = 4, 16
# In parts of the side: an object's radius, and what the lattice measures from its first point to its last.
_RADII, _SPANS = (0.14, 0.21), (0.22, 0.36)


def labelled_clip(generator: np.random.Generator, label: str, num_frames: int, side: int) -> np.ndarray:
    """One clip of a class: uint8 [T, side, side, 3], RGB.

    Sixteen frames fill a lattice of 4 x 4, so that each direction is walked in lines of the same lengths as its reverse.
    Of a lattice with more points than frames some are left out, whatever the class.

    Raises:
        UsageError: an unknown label, fewer than 4 frames or 16 pixels.
    """
    check_clip_size(num_frames, side)
    if label not in LABELS:
        raise UsageError(f"there is no class {label!r}: choose one of {', '.join(LABELS)}")
    points_T2 = _lattice(generator, num_frames)
    # A class that one frame suffices for is walked in no order.
    order_T = _walk(generator, points_T2, _STEPS[label]) if label in _STEPS else generator.permutation(num_frames)
    outline = _SHOWN.get(label) or _MOVING[generator.integers(len(_MOVING))]
    radius, span = side * generator.uniform(*_RADII), side * generator.uniform(*_SPANS)
    corner_2 = radius + generator.random(2) * (side - span - 2 * radius)
    colour = generator.uniform(60, 255, 3)
    # One channel at least stands well above the backdrop's.
    colour[generator.integers(3)] = generator.uniform(190, 255)
    texture = 1 + generator.uniform(0.1, 0.25) * TEXTURES[generator.integers(len(TEXTURES))]
    canvas = Canvas(generator, num_frames, side)
    centre_T2 = corner_2 + span * points_T2[order_T]
    canvas.paint(outline, texture, colour, centre_T2, np.full(num_frames, radius), np.ones(num_frames))
    return canvas.film()


def _lattice(generator: np.random.Generator, num_frames: int) -> np.ndarray:
    """float [T, 2]: distinct points of the smallest square lattice that has enough, rows and columns 0 to 1."""
    width = int(np.ceil(np.sqrt(num_frames)))
    points = np.stack(np.divmod(generator.permutation(width * width)[:num_frames], width), axis=1)
    return points / (width - 1)


def _walk(generator: np.random.Generator, points_T2: np.ndarray, step: tuple[int, int]) -> np.ndarray:
    """int [T]: the points in lines along `step`; on which side of the lattice the lines begin is drawn."""
    down, right = step
    along_T = points_T2 @ [down, right]
    line_T = points_T2 @ [-right, down] * generator.choice([-1, 1])
    # Points of one line have to agree in spite of rounding.
    return np.lexsort((along_T, line_T.round(6)))


def shuffle_frames(clip: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The same frames in random order: the control that takes away what only order tells."""
    return clip[generator.permutation(len(clip))]


def check_clip_size(num_frames: int, side: int) -> None:
    """Refuse clips too small to show what they are about.

    Raises:
        UsageError: fewer than 4 frames or 16 pixels.
    """
    if num_frames < MIN_FRAMES or side < MIN_SIDE:
        raise UsageError(
            f"{num_frames} frames of {side} pixels a side were asked for: give at least {MIN_FRAMES} and {MIN_SIDE}"
        )
