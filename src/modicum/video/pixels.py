"""From a decoded frame to RGB, the right way up; and what every reader of frames needs to refuse one."""

from typing import Any

import numpy as np

from modicum.errors import MissingExtraError, ModicumError

MAX_SIDE = 16_384
MAX_PIXELS = 2**28


class VideoError(ModicumError):
    """A video that is missing, damaged, empty or of a kind that cannot be read."""


def import_av() -> Any:
    """PyAV, which brings its own FFmpeg. FFmpeg's own messages stay off, as PyAV leaves them.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("av", "video", "reading a video") from error
    return av


def check_size(what: object, width: int, height: int) -> None:
    """Refuse a frame that would take gigabytes, going by what its header says.

    Raises:
        VideoError: more than 16,384 pixels in a row or column, or more than 2**28 in all.
    """
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise VideoError(
            f"{what} is {width}x{height}: frames of at most {MAX_SIDE} pixels a side, {MAX_PIXELS} in all, are read; "
            "scale it down"
        )


def to_rgb(converter: Any, frame: Any, width: int | None = None, height: int | None = None) -> np.ndarray:
    """uint8 [H, W, 3] from a frame as decoded, scaled to width x height where given, then turned upright.

    `converter` is a `VideoReformatter`; frames of one video share one, because setting it up costs more than its work.
    """
    rgb = converter.reformat(frame, width=width, height=height, format="rgb24").to_ndarray()
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return rgb if matrix is None else _upright(rgb, np.frombuffer(bytes(matrix), np.int32))


def _upright(rgb: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Apply a display matrix, which maps a stored pixel (x, y) to (a x + c y, b x + d y) on the screen, y downwards.

    Cameras write turns by quarters and mirrorings, so all four numbers are 0 or +-1 and the map is at most a transpose
    and flips. A quarter turn clockwise, a phone held upright, is a = d = 0, b = 1, c = -1: what was the left column
    becomes the top row. FFmpeg's players do the same, and so does its command line unless told `-noautorotate`.
    """
    a, b, _, c, d = matrix[:5].tolist()
    x_from, y_from = a, d
    if abs(b) + abs(c) > abs(a) + abs(d):
        rgb = rgb.transpose(1, 0, 2)
        x_from, y_from = c, b
    return rgb[:: -1 if y_from < 0 else 1, :: -1 if x_from < 0 else 1]
