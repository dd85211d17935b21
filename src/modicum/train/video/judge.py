"""How good a video classifier is on held-out videos: top-1 and top-5, class by class, and what it takes for what."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from modicum.classification.predict import ACTION, Protocol, by_head, read_views
from modicum.config import VivitConfig
from modicum.errors import UsageError
from modicum.parallel.data import Processes, shares
from modicum.train.loop import console
from modicum.train.video.shuffle import in_random_order
from modicum.video.datasets import VideoDataset, VideoSample
from modicum.video.loader import ignore_interrupts, worker_context
from modicum.video.pixels import VideoError

TOPS = (1, 5)


@dataclass(frozen=True)
class VideoFigures:
    """What held-out videos say of a model.

    counts: by head int64 [V, V], videos by their class and by the class that the model names.
    hits: by head, and for two heads by "action" too, how many have theirs among the 1 or 5 best.
    loss: mean nats per video, over heads.
    broken: videos that could not be read, and why; they count nowhere.
    """

    loss: float
    counts: dict[str, Tensor]
    hits: dict[str, dict[int, int]]
    n: int
    broken: dict[str, str] = field(default_factory=dict)

    def accuracy(self, head: str = "", top: int = 1) -> float:
        return self.hits[head][top] / max(1, self.n)

    def per_class(self, head: str = "") -> Tensor:
        """The share of each class that is recognised, [V]; NaN for a class that no video shows."""
        counts_VV = self.counts[head].double()
        return counts_VV.diagonal() / counts_VV.sum(1)

    def words(self) -> str:
        shares = [
            f"{f'{head} ' if head else ''}top-1 {self.accuracy(head):.1%}, top-5 {self.accuracy(head, 5):.1%}"
            for head in self.hits
        ]
        return f"{'; '.join(shares)} of {self.n:,} videos, {self.loss:.4f} nats/clip"

    def logged(self) -> list[float | None]:
        return [self.loss, *(self.accuracy(head, top) for head in self.hits for top in TOPS)]

    def named(self) -> dict[str, float]:
        """By the names of the log's columns."""
        return dict(zip(measures_of(list(self.counts)), [value or 0.0 for value in self.logged()], strict=True))


def measures_of(heads: Sequence[str]) -> tuple[str, ...]:
    """What the columns of a log are called."""
    judged = [*heads, ACTION] if len(heads) == 2 else heads
    return ("val_loss", *(f"{head}_top{top}".lstrip("_") for head in judged for top in TOPS))


@dataclass(frozen=True)
class _Views(Dataset[Any]):
    """Reads all views of a sample: uint8 [views, frames, height, width, 3] and its index; or why it cannot."""

    samples: list[VideoSample]
    config: VivitConfig
    protocol: Protocol
    shuffle: tuple[int, ...] | None

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            # A worker is one of many: its decoder starts no threads of its own.
            threads = "SLICE" if get_worker_info() is None else "NONE"
            views = read_views(self.samples[index], self.config, self.protocol, threads)
        except (VideoError, OSError) as error:
            return index, str(error)
        if self.shuffle is not None:
            views = torch.stack([in_random_order(v, (*self.shuffle, index, i)) for i, v in enumerate(views)])
        return index, views


class Judge:
    """Held-out videos, each looked at by the same views; processes share them out and know the sum.

    Args:
        batch: clips per call of the model.
        shuffle: key of the order into which frames are put, None leaves it.
    """

    def __init__(
        self,
        dataset: VideoDataset,
        config: VivitConfig,
        protocol: Protocol,
        *,
        workers: int,
        batch: int,
        processes: Processes,
        shuffle: tuple[int, ...] | None = None,
    ) -> None:
        self.dataset, self.protocol, self.processes = dataset, protocol, processes
        self.workers, self.batch = workers, batch
        self.views = _Views(dataset.samples, config, protocol, shuffle)
        self.measures = measures_of(list(dataset.heads))

    def __call__(self, model: Any, *, bf16: bool) -> VideoFigures:
        """Judge a model, whose mode is left as it was.

        Raises:
            UsageError: no video can be read.
        """
        training = model.training
        model.eval()
        tally = _Tally(self.dataset.heads)
        broken: dict[str, str] = {}
        for group in self.groups(broken):
            logits = self._logits(model, [views for _, views in group], bf16)
            targets_BE = torch.tensor([self.dataset.samples[index].targets for index, _ in group])
            tally.add(logits, targets_BE)
        model.train(training)
        for others in self.processes.gathered(broken):
            broken |= others
        figures = tally.figures(self.processes, broken)
        if not figures.n:
            raise UsageError(
                f"none of the {len(self.dataset)} held-out videos can be read; the first: {next(iter(broken.values()))}"
            )
        return figures

    def groups(self, broken: dict[str, str]) -> Iterator[list[tuple[int, Tensor]]]:
        """Videos of this process, as many together as make a batch of clips, while the next are read."""
        loader: DataLoader[Any] = DataLoader(
            self.views,
            sampler=shares(range(len(self.dataset)), self.processes),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self.workers,
            multiprocessing_context=worker_context() if self.workers else None,
            worker_init_fn=ignore_interrupts,
            generator=torch.Generator(),
        )
        group: list[tuple[int, Tensor]] = []
        quiet = not sys.stderr.isatty() or console.quiet
        for index, views in track(loader, "judging", console=console, transient=True, disable=quiet):
            if isinstance(views, str):
                broken[self.dataset.samples[index].place] = views
                continue
            group.append((index, views))
            if sum(len(v) for _, v in group) >= self.batch:
                yield group
                group = []
        if group:
            yield group

    @torch.no_grad()
    def _logits(self, model: Any, views: list[Tensor], bf16: bool) -> dict[str, Tensor]:
        """Mean logits over each video's views, float64 [B, V] by head, on the CPU."""
        parts: dict[str, list[Tensor]] = {}
        for clips in torch.cat(views).split(self.batch):
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                out = by_head(model(clips.to(model.device)))
            for name, logits_BV in out.items():
                parts.setdefault(name, []).append(logits_BV.double().cpu())
        lengths = [len(v) for v in views]
        return {
            name: torch.stack([video.mean(0) for video in torch.cat(logits).split(lengths)])
            for name, logits in parts.items()
        }


class _Tally:
    """Counts over videos."""

    def __init__(self, heads: dict[str, int]) -> None:
        self.loss = torch.zeros((), dtype=torch.float64)
        self.counts = {head: torch.zeros(size, size, dtype=torch.int64) for head, size in heads.items()}
        judged = [*heads, ACTION] if len(heads) == 2 else list(heads)
        self.hits = {head: torch.zeros(len(TOPS), dtype=torch.int64) for head in judged}

    def add(self, logits: dict[str, Tensor], targets_BE: Tensor) -> None:
        """Logits float64 [B, V] by head, classes int64 [B, heads]."""
        scores = {head: logits_BV.log_softmax(-1) for head, logits_BV in logits.items()}
        for (head, scores_BV), target_B in zip(scores.items(), targets_BE.unbind(1), strict=True):
            self.loss += F.nll_loss(scores_BV, target_B, reduction="sum") / len(scores)
            named_B = scores_BV.argmax(-1)
            V = len(self.counts[head])
            self.counts[head] += torch.bincount(target_B * V + named_B, minlength=V * V).view(V, V)
            self.hits[head] += hits(scores_BV, target_B)
        if len(scores) == 2:
            # An action is a pair; its probability the product of the two (the EPIC-Kitchens convention).
            first_BV, second_BV = scores.values()
            joint_BV = (first_BV[:, :, None] + second_BV[:, None]).flatten(1)
            self.hits[ACTION] += hits(joint_BV, targets_BE[:, 0] * second_BV.shape[1] + targets_BE[:, 1])

    def figures(self, processes: Processes, broken: dict[str, str]) -> VideoFigures:
        counts = {head: processes.sum(counts_VV) for head, counts_VV in self.counts.items()}
        n = int(next(iter(counts.values())).sum())
        totals = {head: processes.sum(hits).tolist() for head, hits in self.hits.items()}
        loss = processes.sum(self.loss).item() / max(1, n)
        return VideoFigures(
            loss, counts, {head: dict(zip(TOPS, total, strict=True)) for head, total in totals.items()}, n, broken
        )


def hits(scores_BV: Tensor, target_B: Tensor) -> Tensor:
    """How many rows have their class among the 1 and the 5 best, int64 [2]."""
    best_BX = scores_BV.topk(min(max(TOPS), scores_BV.shape[-1])).indices == target_B[:, None]
    return torch.stack([best_BX[:, :top].any(1).sum() for top in TOPS])


def _as_it_is(item: Any) -> Any:
    return item
