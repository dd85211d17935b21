"""A long video, window by window, in constant memory.

A factorized encoder (Model 2) encodes every tubelet once, because a frame's vector does not depend on other frames; only
the small temporal encoder runs for every window. Other variants pay for each window whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modicum.classification.predict import Predictions, Protocol, best, by_head
from modicum.classification.windows import file_windows


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
    model.for_inference()
    shared = model.config.variant == "factorized_encoder"

    def encode(pixels: Tensor) -> Tensor:
        return model.encode_frames(pixels[None].to(model.device))[0]

    for window in file_windows(path, model.config, every, protocol, encode if shared else None):
        clip = window.parts[None]
        out = model.classify_frames(clip) if shared else model(clip.to(model.device))
        logits = {name: logits_BV[0].double() for name, logits_BV in by_head(out).items()}
        yield Window(window.start, window.end, best(logits, model.labels, protocol.top))
