"""Captions of a long video, window by window, in constant memory.

A factorized encoder looks at every tubelet once, however many windows show it: a frame's vector and its patches do not
depend on other frames, and only the temporal layers, if there are some, run for every window. Other variants pay for each
window whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modicum.captioning.model import Captioner
from modicum.classification.predict import Protocol
from modicum.classification.windows import file_windows
from modicum.decode.stats import GenerationStats
from modicum.errors import UsageError
from modicum.video.windows import Window


# Seconds of a window; a stride has to be a number of frames that can be counted.
LONGEST = 1e9


@dataclass(frozen=True)
class WindowCaption:
    """What was written about a window of a video: from its first frame to its last, in seconds of the file.

    `text` is None without a tokenizer.
    """

    start: float
    end: float
    text: str | None
    tokens: list[int]
    stats: GenerationStats

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**vars(self), "stats": self.stats.to_dict()}


@torch.inference_mode()
def memory_windows(model: Captioner, path: str | Path, every: float | None, protocol: Protocol) -> Iterator[Window]:
    """Windows of a video whose `parts` are what the decoder reads of them, [M, D'], as `Captioner.encode` makes it.

    Args:
        every: seconds from the beginning of one window to that of the next, rounded to whole tubelets; None is as long as a
            window. If that leaves no gaps between windows, the last one ends with the video, and may come sooner.

    Raises:
        UsageError: `every` is not positive, or the encoder samples frames within its window.
        VideoError: the file cannot be read.
    """
    model.for_inference()
    config = model.config.encoder
    shared, patches = config.variant == "factorized_encoder", model.config.memory == "patches"

    def look(pixels: Tensor) -> Tensor:
        video = pixels[None].to(model.device)
        return (model.encode(video) if patches else model.encode_frames(video))[0]

    for window in file_windows(path, config, every, protocol, look if shared else None, to_the_end=True):
        parts = window.parts[None].to(model.device)
        if not shared:
            parts = model.encode(parts)
        elif not patches:
            parts = model.memory_of_frames(parts)
        yield window._replace(parts=parts[0])


def stride_of(window: float, num_frames: int, fps: float | None) -> int:
    """The stride at which a clip of `num_frames` spans a window of so many seconds, as nearly as whole ticks allow.

    Raises:
        UsageError: the time is not positive, or too short, or there is no clock.
    """
    if fps is None or not (0 < window <= LONGEST and 0 < fps < float("inf")):
        raise UsageError(
            f"a window of {window} s was asked for at {fps} fps: give a positive time of at most {LONGEST:g} s, and a clock"
        )
    stride = round(window * fps / num_frames)
    if not stride:
        raise UsageError(
            f"a window of {window} s holds {window * fps:.1f} frames at {fps:g} fps and the model looks at {num_frames}: "
            f"give at least {num_frames / fps:.2f} s, or a faster clock"
        )
    return stride
