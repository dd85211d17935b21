"""Soft targets (2103.15691, equations 11 and 12): label smoothing and mixup, and the loss that reads them.

A model with several heads, as for EPIC-Kitchens' verbs and nouns, has its targets and logits in a dictionary by head.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modicum.config import require
from modicum.errors import UsageError
from modicum.vivit.tubelets import to_unit_range

MIXUP = 0x4D495855  # keeps this draw apart from others with the same key

Soft = TypeVar("Soft", Tensor, dict[str, Tensor])


def one_hot(targets: Tensor, heads: Mapping[str, int]) -> Tensor | dict[str, Tensor]:
    """Targets as distributions: int64 [B] or [B, heads] -> float32 [B, V], or by head where heads have names.

    Args:
        heads: the number of classes by name; {"": classes} for a model with one head.

    Raises:
        UsageError: a target that is no class, or another number of targets than heads.
    """
    targets_BH = targets[:, None] if targets.dim() == 1 else targets
    if targets_BH.shape[1] != len(heads):
        raise UsageError(f"{targets_BH.shape[1]} targets for {len(heads)} heads: give one per head")
    result = {}
    for column, (name, size) in zip(targets_BH.T, heads.items(), strict=True):
        if len(column) and not 0 <= int(column.min()) <= int(column.max()) < size:
            what = f"head `{name}`" if name else "the model"
            raise UsageError(
                f"targets lie in {int(column.min())} ... {int(column.max())} and {what} has {size} classes: "
                "they are counted from 0"
            )
        result[name] = F.one_hot(column, size).float()
    return result[""] if list(result) == [""] else result


def smooth(targets: Soft, rate: float) -> Soft:
    """Label smoothing (equation 11): (1 - rate) * targets + rate / V, in each head. [B, V] -> [B, V].

    Raises:
        UsageError: a rate outside 0 ... 1.
    """
    require(0 <= rate <= 1, "label_smoothing", rate, "give a share, from 0 to 1")
    return by_head(lambda targets_BV: (1 - rate) * targets_BV + rate / targets_BV.shape[-1], targets)


def mixup(video: Tensor, targets: Soft, alpha: float, key: Sequence[int]) -> tuple[Tensor, Soft]:
    """Mix every clip and its targets with those of its partner (equation 12): w * its own + (1 - w) * the partner's.

    As in the authors' code, w is one draw from Beta(alpha, alpha) for the whole batch, and the partner of the first clip
    is the last one, of the second the last but one. An alpha of 0 changes nothing.

    Args:
        video: uint8 or float in [-1, 1], [B, T, H, W, 3].
        targets: float [B, V], or by head.
        key: whole numbers from 0 on, such as (seed, step), which alone decide w.

    Returns:
        The video, float in [-1, 1] if anything was mixed, and the targets.

    Raises:
        UsageError: an alpha below 0.
    """
    require(0 <= alpha < float("inf"), "mixup", alpha, "give Beta's parameter, at least 0")
    if alpha == 0:
        return video, targets
    weight = mixing_weight(alpha, key)
    video = video if video.is_floating_point() else to_unit_range(video, torch.float32)
    return mixed(video, weight), by_head(lambda targets_BV: mixed(targets_BV, weight), targets)


def mixing_weight(alpha: float, key: Sequence[int]) -> float:
    """The w that `mixup` draws for this key."""
    return float(np.random.default_rng([*key, MIXUP]).beta(alpha, alpha))


def mixed(rows: Tensor, weight: float) -> Tensor:
    return torch.lerp(rows.flip(0), rows, weight)


def soft_cross_entropy(logits: Soft, targets: Soft) -> Tensor:
    """Cross entropy with distributions, the mean over the batch and then over the heads: [B, V] and [B, V] -> scalar.

    Raises:
        UsageError: heads of other names.
    """
    if isinstance(logits, Tensor) and isinstance(targets, Tensor):
        return F.cross_entropy(logits.float(), targets)
    given, required = ([""] if isinstance(x, Tensor) else list(x) for x in (targets, logits))
    if isinstance(logits, Tensor) or isinstance(targets, Tensor) or set(given) != set(required):
        raise UsageError(f"the targets are for heads {given} and the model has {required}: make them agree")
    return torch.stack([F.cross_entropy(logits[name].float(), targets[name]) for name in logits]).mean()


def by_head(function: Callable[[Tensor], Tensor], targets: Soft) -> Soft:
    if isinstance(targets, Tensor):
        return function(targets)
    return {name: function(targets_BV) for name, targets_BV in targets.items()}
