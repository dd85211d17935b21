"""Labelled clips: classes that only motion tells apart, and classes that one frame suffices for.

A motion class is an order. Whatever the class, a clip begins as a set of pictures of one object, drawn in the same way:
across the set its column, row, size and opacity each run evenly through a range, in four unrelated orders. The label
says by which of the four the pictures are then sorted, and in which direction: "grows" is sorted by size, and "shrinks"
is that reversed. Without its order a clip therefore holds no evidence at all: over all motion classes, as within each
pair, the best that can be done with shuffled frames is chance, 1 / len(MOTION_LABELS) and 1 / 2.
"""

import numpy as np

from modicum.errors import UsageError
from modicum.video.synthetic.draw import TEXTURES, Canvas

_COLUMN, _ROW, _SIZE, _OPACITY = range(4)
_SORTED_BY = {
    "moves left": (_COLUMN, -1),
    "moves right": (_COLUMN, 1),
    "moves up": (_ROW, -1),
    "moves down": (_ROW, 1),
    "grows": (_SIZE, 1),
    "shrinks": (_SIZE, -1),
    "appears": (_OPACITY, 1),
    "disappears": (_OPACITY, -1),
}
_SHOWN = {"shows a ring": "ring", "shows a cross": "cross", "shows a 4": "4", "shows a 7": "7"}
# What moves is never one of the objects that are classes of their own.
_MOVING = ["circle", "square", "triangle", "bar", "2", "5", "6", "8"]

MOTION_LABELS = list(_SORTED_BY)
FRAME_LABELS = list(_SHOWN)
LABELS = MOTION_LABELS + FRAME_LABELS

MIN_FRAMES, MIN_SIDE = 4, 16
# The least and the greatest of column, row, size (a radius) and opacity; all but opacity in parts of the side.
_LOW, _HIGH = np.array([0.24, 0.24, 0.1, 0.3]), np.array([0.76, 0.76, 0.2, 1.0])
_CANDIDATES = 16


def labelled_clip(generator: np.random.Generator, label: str, num_frames: int, side: int) -> np.ndarray:
    """One clip of a class: uint8 [T, side, side, 3], RGB.

    Raises:
        UsageError: an unknown label, fewer than 4 frames or 16 pixels.
    """
    check_clip_size(num_frames, side)
    if label not in LABELS:
        raise UsageError(f"there is no class {label!r}: choose one of {', '.join(LABELS)}")
    state_T4 = _states(generator, num_frames)
    if label in _SHOWN:
        # One frame has to suffice: none is faint or tiny.
        state_T4[:, _SIZE:] = 0.6 * state_T4[:, _SIZE:] + 0.4 * _HIGH[_SIZE:]
        outline = _SHOWN[label]
    else:
        by, direction = _SORTED_BY[label]
        state_T4 = state_T4[np.argsort(state_T4[:, by])[::direction]]
        outline = _MOVING[generator.integers(len(_MOVING))]
    # A channel or two well above the backdrop's.
    colour = generator.uniform(60, 255, 3)
    colour[generator.integers(3)] = generator.uniform(190, 255)
    texture = 1 + generator.uniform(0.1, 0.25) * TEXTURES[generator.integers(len(TEXTURES))]
    canvas = Canvas(generator, num_frames, side)
    centre_T2 = side * state_T4[:, [_ROW, _COLUMN]]
    canvas.paint(outline, texture, colour, centre_T2, side * state_T4[:, _SIZE], state_T4[:, _OPACITY])
    return canvas.film()


def _states(generator: np.random.Generator, num_frames: int) -> np.ndarray:
    """float [T, 4]: column, row, size and opacity of each picture, in no order."""
    span = (_HIGH - _LOW) * generator.uniform(0.8, 1, 4)
    low = _LOW + (_HIGH - _LOW - span) * generator.random(4)
    steps = (np.arange(num_frames)[:, None] + generator.uniform(0.1, 0.9, (num_frames, 4))) / num_frames
    # Two that happen to run alike would make two labels true. Of a few draws the one in which they do least is kept;
    # the label has no part in this.
    orders_CT4 = generator.permuted(np.broadcast_to(np.arange(num_frames)[:, None], (_CANDIDATES, num_frames, 4)), axis=1)
    centred = orders_CT4 - (num_frames - 1) / 2
    alike_C44 = np.abs(centred.transpose(0, 2, 1) @ centred) * (1 - np.eye(4))
    order_T4 = orders_CT4[alike_C44.max(axis=(1, 2)).argmin()]
    return low + span * np.take_along_axis(steps, order_T4, axis=0)


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
