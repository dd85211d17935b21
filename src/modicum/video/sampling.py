"""The part of a video that a training step sees, by the draws of a key: (seed, epoch, index of the sample)."""

from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from modicum.video.crops import resize, resized_shape
from modicum.video.datasets.sample import VideoSample
from modicum.video.read import Video

# What a draw is for. Streams that share a key must not share their numbers: a shorter key is one padded with zeros.
ORDER, START, CAPTION = 0x6F72646572, 0x7374617274, 0x63617074
_AT_ONCE = 8  # frames held at their full size


def epoch_order(n_samples: int, seed: int, epoch: int) -> np.ndarray:
    """All samples, each once: int64 [n_samples]."""
    return np.random.default_rng([seed, epoch, ORDER]).permutation(n_samples)


def training_ticks(n_ticks: int, num_frames: int, stride: int, key: tuple[int, ...]) -> list[int]:
    """`num_frames` ticks, `stride` apart, from one drawn evenly out of [0, max(1, n_ticks - (num_frames - 1) stride)).

    What is too short starts again from its beginning.
    """
    n_starts = max(1, n_ticks - (num_frames - 1) * stride)
    start = int(np.random.default_rng([*key, START]).integers(n_starts))
    return [(start + i * stride) % n_ticks for i in range(num_frames)]


def drawn_caption(sample: VideoSample, key: tuple[int, ...]) -> str | None:
    """One of a sample's captions, another in every epoch."""
    if not sample.captions:
        return None
    return sample.captions[int(np.random.default_rng([*key, CAPTION]).integers(len(sample.captions)))]


def reduced_frames(video: Video, ticks: Sequence[int], size: tuple[int, int], short_side: int) -> Tensor:
    """Frames as they are, or, where they are more than twice as large as needed, scaled to `short_side`, ready for a crop
    of `size`: uint8 [T, H, W, 3]. So few are held at a camera's full size, and what augments them has less to do.
    """
    remaining, parts = iter(ticks), []
    while some := list(islice(remaining, _AT_ONCE)):
        frames = video.frames(some)
        height, width = frames.shape[1:3]
        wanted = resized_shape(height, width, size, short_side)
        parts.append(resize(frames, *wanted) if height > 2 * wanted[0] else frames)
    return torch.cat(parts)
