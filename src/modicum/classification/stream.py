"""A long video, window by window, in constant memory.

A factorized encoder (Model 2) encodes every tubelet once, because a frame's vector does not depend on other frames; only
the small temporal encoder runs for every window. Other variants pay for each window whole.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modicum.classification.predict import Predictions, Protocol, best, by_head, classify_files
from modicum.classification.views import crops_of
from modicum.errors import UsageError
from modicum.video.read import VideoError, stream_frames


@dataclass(frozen=True)
class Window:
    """What a window of a video shows: from its first frame to its last, in seconds of the file."""

    start: float
    end: float
    predictions: Predictions


@torch.inference_mode()
def classify_stream(model: Any, path: str | Path, every: float, protocol: Protocol) -> Iterator[Window]:
    """Classify the last `num_frames` frames again and again, `every` seconds apart, rounded to whole tubelets.

    Each window equals classifying its central crop afresh. A video shorter than one window gives a single one, in which
    it starts again from its beginning.

    Raises:
        UsageError: `every` is not positive, or the model samples frames within its window.
        VideoError: the file cannot be read.
    """
    config = model.config
    if not every > 0:
        raise UsageError(f"`every` is {every}: give a positive number of seconds")
    if config.sampled_frames is not None:
        raise UsageError(
            "this model samples frames from its whole window and cannot share them: classify files instead"
        )
    model.for_inference()
    shared = config.variant == "factorized_encoder"
    length, t = config.grid[0], config.tubelet_size[0]
    tubelets: deque[Tensor] = deque(maxlen=length)  # vectors [1, D], or pixels [t, h, w, 3]
    times: deque[tuple[float, float]] = deque(maxlen=length)
    step = max(1, round(every * (protocol.fps or 25.0) / (protocol.stride * t)))
    until_next, shown = length, False
    for stamps, frames in _tubelets(path, config, protocol):
        pixels = frames.to(model.device)
        tubelets.append(model.encode_frames(pixels[None])[0] if shared else pixels)
        times.append((stamps[0], stamps[-1]))
        until_next -= 1
        if until_next:
            continue
        until_next, shown = step, True
        clip = torch.cat(list(tubelets))[None]
        # Frames that fill no whole tubelet are never looked at; the model only counts them.
        out = model.classify_frames(clip) if shared else model(_padded(clip, config.num_frames))
        logits = {name: logits_BV[0].double() for name, logits_BV in by_head(out).items()}
        yield Window(times[0][0], times[-1][1], best(logits, model.labels, protocol.top))
    if not shown:
        yield from _short(model, path, protocol)


def _tubelets(path: str | Path, config: Any, protocol: Protocol) -> Iterator[tuple[list[float], Tensor]]:
    """Whole tubelets of the central crop with their frames' times: uint8 [t, height, width, 3]."""
    stamps: list[float] = []
    frames: list[Tensor] = []
    for seconds, frame in stream_frames(path, fps=protocol.fps, stride=protocol.stride):
        stamps.append(seconds)
        frames.extend(crops_of(frame[None], config.image_size, protocol.short_side, 1))
        if len(frames) == config.tubelet_size[0]:
            yield stamps, torch.cat(frames)
            stamps, frames = [], []


def _padded(clip: Tensor, num_frames: int) -> Tensor:
    missing = num_frames - clip.shape[1]
    return torch.cat([clip, clip[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1) if missing else clip


def _short(model: Any, path: str | Path, protocol: Protocol) -> Iterator[Window]:
    one = Protocol(**{**vars(protocol), "views": (1, 1)})
    (result,) = classify_files(model, [path], one)
    if isinstance(result, VideoError):
        raise result
    stamps = [seconds for seconds, _ in stream_frames(path, fps=protocol.fps, stride=1)]
    yield Window(stamps[0], stamps[-1], result[0])
