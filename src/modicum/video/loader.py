"""Batches of training clips: numbered, in an order that a seed decides, decoded beside the training."""

import multiprocessing
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from modicum.errors import ModicumError, UsageError
from modicum.video.clock import as_rate
from modicum.video.crops import crops_of, usual_short_side
from modicum.video.datasets.sample import VideoDataset, VideoSample
from modicum.video.pixels import VideoError
from modicum.video.sampling import drawn_caption, epoch_order, reduced_frames, training_ticks

# (clip uint8 [T, H, W, 3], key) -> uint8 [T, h, w, 3]. With workers it is sent to them: no lambda.
Augmentation = Callable[..., Tensor]

_TRIES = 65  # videos in a row that cannot be read before the data set is given up
_DOUBTFUL = 0.5  # a share of broken videos that deserves a warning,
_COUNTED = 8  # once there are so many of them


@dataclass
class Clips:
    """A batch. `samples[i]` is what row i shows, `captions[i]` the one of its captions drawn for this epoch."""

    number: int
    video: Tensor
    """uint8 [B, T, h, w, 3], RGB."""
    targets: Tensor
    """int64 [B, heads]."""
    samples: list[VideoSample]
    captions: list[str | None]
    indices: list[int]
    """Of the samples in the data set."""
    broken: dict[int, str] = field(default_factory=dict)
    """Samples that could not be read, by index, and why: others stand in for them."""

    def pin_memory(self) -> "Clips":
        """In memory from which a GPU copies while it computes; the DataLoader asks for this."""
        return replace(self, video=self.video.pin_memory(), targets=self.targets.pin_memory())


@dataclass(frozen=True)
class _Request:
    """A batch to be read: the first `n` of `rows` (index, sample), the others being what may have to stand in."""

    number: int
    epoch: int
    n: int
    rows: list[tuple[int, VideoSample]]


@dataclass(frozen=True)
class _Failure:
    """No batch: so many videos in a row cannot be read, or something else was refused."""

    reasons: dict[int, str]
    refusal: str | None = None


@dataclass(frozen=True)
class _Reader(Dataset[Any]):
    """Turns requests into clips. It knows nothing of the data set, which may be too large to send to every worker."""

    num_frames: int
    stride: int
    fps: float | None
    size: tuple[int, int]
    short_side: int
    augment: Augmentation | None
    seed: int

    def __getitem__(self, request: _Request) -> Clips | _Failure:
        broken: dict[int, str] = {}
        clips, chosen, captions = [], [], []
        for slot in range(request.n):
            # The draws belong to the place in the batch: a stand-in is seen otherwise than in its own place.
            key = (self.seed, request.epoch, request.rows[slot][0])
            for index, sample in request.rows[slot : slot + _TRIES]:
                if index in broken:
                    continue
                try:
                    clips.append(self._clip(sample, key))
                except (VideoError, OSError) as error:
                    broken[index] = str(error)
                    continue
                except ModicumError as error:
                    return _Failure(broken, str(error))  # raised in a worker it would come with its traceback
                chosen.append((index, sample))
                captions.append(drawn_caption(sample, key))
                break
            else:
                return _Failure(broken)
        return Clips(
            request.number,
            torch.stack(clips),
            torch.tensor([sample.targets for _, sample in chosen], dtype=torch.int64),
            [sample for _, sample in chosen],
            captions,
            [index for index, _ in chosen],
            broken,
        )

    def _clip(self, sample: VideoSample, key: tuple[int, int, int]) -> Tensor:
        # A worker is one of many: its decoder starts no threads of its own.
        with sample.opened(self.fps, "SLICE" if get_worker_info() is None else "NONE") as (video, ticks):
            at = training_ticks(len(ticks), self.num_frames, self.stride, key)
            clip = reduced_frames(video, [ticks[i] for i in at], self.size, self.short_side)
        if self.augment is None:
            (clip,) = crops_of(clip, self.size, self.short_side, 1)
            return clip
        clip = self.augment(clip, key=key)
        expected = (self.num_frames, *self.size, 3)
        if tuple(clip.shape) != expected or clip.dtype != torch.uint8:
            raise UsageError(f"`augment` gave {clip.dtype} {list(clip.shape)}: it has to give uint8 {list(expected)}")
        return clip


class ClipLoader:
    """Batches of clips for training, each from one random moment of a video.

    Batch b of epoch e holds the samples at places b * batch ... (b + 1) * batch - 1 of that epoch's order. The last
    samples that do not fill a batch sit this epoch out; they are others in the next. Of `world` processes, rank r gets
    the r-th of `world` equal shares of each batch, so that together they see the batch that a single one would. With
    `parts`, a batch comes in so many equal parts one after another, each shared like this, and the numbers count parts.

    What is drawn for a sample depends on (seed, epoch, sample) alone, so that a batch is the same whatever the number
    of workers, and whether reached from the start or by a resumed run.

    A video that cannot be read is replaced by the next of the epoch's order, and noted in `broken`.

    Args:
        num_frames, stride, fps: of a clip; `stride` counts ticks of an `fps` clock, None being the file's own frames.
        size: height and width of the clips.
        augment: called as `augment(clip, key=key)` with uint8 [T, H, W, 3] and the (seed, epoch, index) that its draws are
            to be keyed by; gives uint8 [T, h, w, 3]. None: the central crop of the clip at `short_side`.
        batch: clips of all processes and parts together.
        workers: processes that decode; 0 decodes in this one, when a batch is asked for.
        short_side: None is 256 for a crop of 224, the paper's, and in this proportion for others. Where videos are more
            than twice as large, they are scaled down to it as they are read.
        prefetch: batches that each worker prepares ahead.
        pin_memory: None: where there is a CUDA device.

    Raises:
        UsageError: numbers that do not fit.
    """

    def __init__(
        self,
        dataset: VideoDataset,
        *,
        num_frames: int,
        stride: int,
        fps: float | None,
        size: tuple[int, int],
        augment: Augmentation | None = None,
        batch: int,
        seed: int,
        workers: int,
        rank: int = 0,
        world: int = 1,
        parts: int = 1,
        short_side: int | None = None,
        prefetch: int = 2,
        pin_memory: bool | None = None,
    ) -> None:
        least = {"num_frames": (num_frames, 1), "stride": (stride, 1), "batch": (batch, 1), "workers": (workers, 0)}
        least |= {
            "world": (world, 1),
            "parts": (parts, 1),
            "prefetch": (prefetch, 1),
            "height": (size[0], 1),
            "width": (size[1], 1),
        }
        for name, (value, lowest) in least.items():
            if value < lowest:
                raise UsageError(f"{name}={value}: give at least {lowest}")
        as_rate(fps)
        if not 0 <= rank < world:
            raise UsageError(f"rank={rank}: of {world} processes the ranks are 0 to {world - 1}")
        if batch % (world * parts):
            raise UsageError(
                f"a batch of {batch} cannot be shared by {world} processes in {parts} parts: give a multiple of "
                f"{world * parts}"
            )
        if len(dataset) < batch:
            raise UsageError(
                f"{dataset.name} has {len(dataset)} videos, fewer than a batch of {batch}: lower `batch` or add videos"
            )
        self.dataset, self.batch, self.seed, self.rank, self.world = dataset, batch, seed, rank, world
        self.parts, self.workers, self.prefetch = parts, workers, prefetch
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.short_side = usual_short_side(size) if short_side is None else short_side
        if self.short_side < min(size):
            raise UsageError(f"short_side={self.short_side} is less than the clips' {min(size)}: give at least that")
        self._reader = _Reader(num_frames, stride, fps, size, self.short_side, augment, seed)
        self.broken: dict[str, str] = {}
        """Why videos could not be read, by path; for part of a video its id follows."""
        self.waited_seconds = 0.0
        """How long the consumer of `iterate` has waited for batches."""
        self._read: set[int] = set()
        self._failed: set[int] = set()
        self._warned = False

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches, each of `parts` parts."""
        return len(self.dataset) // self.batch

    def iterate(self, start: int = 0) -> Iterator[Clips]:
        """Batches, or their parts, start, start + 1, ... without end. Workers stop when the iterator is closed or dropped.

        Raises:
            VideoError: no video out of many in a row can be read.
            ModicumError: a worker was killed.
        """
        with warnings.catch_warnings():
            # How many workers there are is for the caller to say.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            batches = iter(self._loader(start))
        while True:
            clips = self._next(batches)
            self._note(clips.indices, clips.broken)
            yield clips

    def report(self, listed: int = 10) -> str | None:
        """Which videos were broken, one a line, `listed` at most; None if there were none."""
        if not self.broken:
            return None
        lines = [f"{len(self._failed)} of {len(self._read | self._failed)} videos could not be read; others stood in:"]
        lines += [f"  {reason}" for _, reason in sorted(self.broken.items())[:listed]]
        if len(self.broken) > listed:
            lines.append(f"  and {len(self.broken) - listed} more")
        return "\n".join(lines)

    def requests(self, start: int) -> Iterator[_Request]:
        """What batches `start`, `start` + 1, ... consist of, on this rank."""
        samples, number, order_epoch, order = self.dataset.samples, start, -1, None
        share = self.batch // (self.world * self.parts)
        while True:
            epoch, place = divmod(number, self.batches_per_epoch * self.parts)
            if epoch != order_epoch or order is None:
                order_epoch, order = epoch, epoch_order(len(samples), self.seed, epoch)
            first = (place * self.world + self.rank) * share
            n_rows = share - 1 + min(_TRIES, len(samples))
            rows = [int(order[(first + i) % len(samples)]) for i in range(n_rows)]
            yield _Request(number, epoch, share, [(index, samples[index]) for index in rows])
            number += 1

    def _loader(self, start: int) -> DataLoader[Any]:
        return DataLoader(
            self._reader,
            sampler=_Requests(self, start),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self.workers,
            prefetch_factor=self.prefetch if self.workers else None,
            multiprocessing_context=worker_context() if self.workers else None,
            worker_init_fn=ignore_interrupts,
            pin_memory=self.pin_memory,
            # Its own, for it draws from it, and the model's random numbers must not depend on how data is read.
            generator=torch.Generator(),
        )

    def _next(self, batches: Iterator[Clips | _Failure]) -> Clips:
        started = time.perf_counter()
        try:
            clips = next(batches)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise ModicumError(
                f"a worker that decodes videos died, mostly for want of memory or of room in /dev/shm ({error}): use fewer "
                "workers, a smaller batch or a smaller `prefetch`"
            ) from error
        finally:
            self.waited_seconds += time.perf_counter() - started
        if isinstance(clips, _Failure):
            self._note([], clips.reasons)
            if clips.refusal is not None:
                raise UsageError(clips.refusal)
            raise VideoError(
                f"{self.dataset.name}: {len(clips.reasons)} videos in a row cannot be read; the first: "
                f"{next(iter(clips.reasons.values()))}"
            )
        return clips

    def _note(self, read: list[int], broken: dict[int, str]) -> None:
        self._read.update(read)
        for index, reason in broken.items():
            self._failed.add(index)
            self.broken[self.dataset.samples[index].place] = reason
        if self._warned or not broken or len(self._failed) < _COUNTED:
            return
        seen = len(self._read | self._failed)
        if len(self._failed) > _DOUBTFUL * seen:
            self._warned = True
            warnings.warn(
                f"{self.dataset.name}: {len(self._failed)} of the first {seen} videos cannot be read; the latest: "
                f"{next(reversed(broken.values()))}",
                stacklevel=3,
            )


class _Requests:
    """A sampler of requests."""

    def __init__(self, loader: ClipLoader, start: int) -> None:
        self._loader, self._start = loader, start

    def __iter__(self) -> Iterator[Any]:
        return self._loader.requests(self._start)


def _as_it_is(clips: Any) -> Any:
    return clips


def ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal, and the step that it interrupts needs its batches to finish."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def worker_context() -> Any:
    """Worker processes that inherit nothing from this one, whose threads and CUDA state do not survive a fork.

    Where there is a fork server, it imports what they need, once, and each starts within milliseconds.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["av", "modicum.video.loader"])
    return context
