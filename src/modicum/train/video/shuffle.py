"""The control of what a model owes to motion: the frames of a clip in an order that says nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from modicum.video.augment import Augment, augment

# Beside the draws of `augment`, which has the same keys.
SHUFFLE = 0x73687566


def in_random_order(clip: Tensor, key: Sequence[int]) -> Tensor:
    """The frames of [T, H, W, 3] in another order, which the key alone decides."""
    return clip[np.random.default_rng([*key, SHUFFLE]).permutation(len(clip))]


@dataclass(frozen=True)
class Augmentation:
    """What is done to every training clip; unlike a closure it can be sent to other processes."""

    settings: Augment
    size: tuple[int, int]
    shuffle: bool = False

    def __call__(self, clip: Tensor, key: tuple[int, ...]) -> Tensor:
        view = augment(clip, self.size, self.settings, key)
        return in_random_order(view, key) if self.shuffle else view
