"""A long video as windows of a model's clips, in constant memory."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modicum.classification.predict import Protocol, read_views
from modicum.errors import UsageError
from modicum.video.crops import crops_of
from modicum.video.read import stream_frames
from modicum.video.windows import Window, sliding_windows, tubelets, tubelets_per


def file_windows(
    path: str | Path,
    config: Any,
    every: float | None,
    protocol: Protocol,
    make: Callable[[Tensor], Tensor] | None = None,
    *,
    to_the_end: bool = False,
) -> Iterator[Window]:
    """The central crops of a file's last `num_frames` frames again and again, `every` seconds apart, in whole tubelets.

    A video shorter than one window gives a single one, in which it starts again from its beginning.

    Args:
        every: None is as long as a window: each begins where the one before it ends.
        make: what a window's `parts` are to hold instead of its frames, [n t, h, w, 3] -> [n ..., D], for models that look
            at each tubelet apart. It is called once per tubelet.
        to_the_end: a last window shows the frames that would otherwise fill none, unless windows lie apart.

    Raises:
        UsageError: `every` is not positive, or the model samples frames within its window.
        VideoError: the file cannot be read.
    """
    if every is not None and not 0 < every < float("inf"):
        raise UsageError(f"`every` is {every}: give a positive number of seconds")
    if config.sampled_frames is not None:
        raise UsageError(
            "this model samples frames from its whole window and cannot share them: give it files instead of a stream"
        )
    length, t = config.grid[0], config.tubelet_size[0]
    step = length if every is None else tubelets_per(every, protocol.fps, protocol.stride, t)
    frames = stream_frames(path, fps=protocol.fps, stride=protocol.stride)
    pieces = tubelets(frames, t, lambda frame: next(crops_of(frame, config.image_size, protocol.short_side, 1)))
    shown = False
    sliding = sliding_windows(pieces, length, step, make or (lambda pixels: pixels), to_the_end=to_the_end)
    for window in sliding:
        shown = True
        yield window if make else window._replace(parts=_padded(window.parts, config.num_frames))
    if not shown:
        clip = read_views(path, config, Protocol(**{**vars(protocol), "views": (1, 1)}))[0]
        stamps = [seconds for seconds, _ in stream_frames(path, fps=protocol.fps)]
        yield Window(stamps[0], stamps[-1], make(clip[: length * t]) if make else clip)


def _padded(clip: Tensor, num_frames: int) -> Tensor:
    """Frames that fill no whole tubelet are never looked at; models only count them."""
    missing = num_frames - len(clip)
    return torch.cat([clip, clip[-1:].expand(missing, -1, -1, -1)]) if missing else clip
