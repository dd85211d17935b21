"""What a video classifier is trained on: clips in numbered batches, their classes, and how both are blurred."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from modicum.lm.objective import draw_by
from modicum.parallel.data import Processes
from modicum.train.regularize import mixup, one_hot, smooth, soft_cross_entropy
from modicum.train.video.judge import Judge
from modicum.train.video.recipe import VideoRecipe
from modicum.video.loader import ClipLoader, Clips


class ClipsWork:
    """What all tasks on clips share: numbered batches out of a loader, judged by what is held out. See `Work`.

    Args:
        loader: of this process, in the recipe's parts.
        judge: of the held-out videos.
    """

    unit = "clips"

    def __init__(self, loader: ClipLoader, judge: Any, processes: Processes, seed: int) -> None:
        self.loader, self.judge, self.processes, self.seed = loader, judge, processes, seed
        self.per_batch = loader.batch // loader.parts
        self._clips: Iterator[Clips] | None = None
        self._next = -1

    @property
    def measures(self) -> tuple[str, ...]:
        return self.judge.measures

    @property
    def waited(self) -> float:
        return self.loader.waited_seconds

    def clips(self, number: int) -> Clips:
        """Batch `number` of this process; asked for one after another, they are read ahead."""
        if self._clips is None or number != self._next:
            self._clips = self.loader.iterate(number)
        self._next = number + 1
        return next(self._clips)

    def quality(self, model: Any, *, bf16: bool) -> Any:
        return self.judge(model, bf16=bf16)


class ClipsTask(ClipsWork):
    """A labelled data set, for the loop.

    Batch `number` of this process decides everything that is drawn for it, by the model as well: stochastic depth in
    one process differs from that in another, and is the same when a run is resumed.
    """

    def __init__(self, recipe: VideoRecipe, loader: ClipLoader, judge: Judge, processes: Processes) -> None:
        super().__init__(loader, judge, processes, recipe.run.seed)
        self.augment = recipe.augment

    def loss(self, model: Any, number: int) -> Tensor:
        """Mean nats per clip, over heads, of batch `number`."""
        clips, key = self.clips(number), (self.seed, number, self.processes.rank)
        draw_by(key)
        hard: Any = one_hot(clips.targets, self.loader.dataset.heads)
        targets = smooth(hard, self.augment.label_smoothing)
        video, targets = mixup(*placed(clips.video, targets, model.device), self.augment.mixup, key)
        return soft_cross_entropy(model(video), targets)

    def identity(self) -> dict[str, Any]:
        """The samples themselves: others would make another run of it."""
        return {"clips": samples_digest(self.loader.dataset), "held_out": samples_digest(self.judge.dataset)}


def placed(video: Tensor, targets: Any, device: torch.device) -> tuple[Tensor, Any]:
    """On the device that computes; from pinned memory without waiting."""
    if isinstance(targets, Tensor):
        return video.to(device, non_blocking=True), targets.to(device, non_blocking=True)
    return video.to(device, non_blocking=True), {name: t.to(device, non_blocking=True) for name, t in targets.items()}


def samples_digest(dataset: Any) -> str:
    """A hash of what is in a data set; where its folder stands does not matter."""
    rows = [[s.id, s.path.name, s.targets, s.start, s.end, s.first, s.last] for s in dataset.samples]
    return hashlib.sha256(json.dumps([rows, dataset.heads]).encode()).hexdigest()
