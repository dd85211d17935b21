"""From videos to labels: views read and cropped, logits averaged, the best classes named."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from modicum.checkpoint.record import Record
from modicum.classification.views import temporal_views
from modicum.errors import UsageError
from modicum.video.crops import crops_of
from modicum.video.datasets.sample import VideoSample
from modicum.video.read import VideoError

ACTION = "action"


@dataclass(frozen=True)
class Prediction:
    """A class and its probability. `index` is a pair for an action, a combination of two heads' classes."""

    label: str
    index: int | tuple[int, ...]
    score: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# The best classes of one video, best first; of a model with several heads, by head.
Predictions = list[Prediction] | dict[str, list[Prediction]]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a video is looked at. `views` are (temporal, spatial); `stride` counts frames of an `fps` clock."""

    views: tuple[int, int] = (4, 1)
    stride: int = 2
    fps: float | None = 25.0
    short_side: int | None = None
    top: int = 5
    batch: int = 4  # clips per call of the model

    def __post_init__(self) -> None:
        for name, value in (("views", min(self.views)), ("stride", self.stride), ("top", self.top)):
            if value < 1:
                raise UsageError(f"`{name}` is {getattr(self, name)}: it must be at least 1")
        if self.views[1] not in (1, 3):
            raise UsageError(f"{self.views[1]} spatial crops were asked for: choose 1 or 3, as in 4x3")


# Frames per second; None counts a file's own frames, "auto" is as the model was trained.
Fps = float | Literal["auto"] | None


def clock_of(model: Any, fps: Fps) -> float | None:
    """The clock that is meant: "auto" is the one that a model was trained with, 25 per second where none is known."""
    if fps != "auto":
        return fps
    trained = Record.of(model.files or {}).section("clips").get("fps")
    return (trained or None) if isinstance(trained, int | float) else Protocol.fps


def protocol_for(
    model: Any, *, stride: int | None = None, fps: Fps = "auto", short_side: int | None = None, **others: Any
) -> Protocol:
    """How a model looks at a video: what is left open is as it was trained, by the training.json in its folder.

    Where there is none, strides are 2 and count 25 frames per second, as in the paper's comparisons, and the shorter side
    is in proportion.
    """
    config, record = getattr(model.config, "encoder", model.config), Record.of(model.files or {})
    trained_stride, trained_side = record.section("clips").get("stride"), record.section("augment").get("short_side")
    # What its accuracy was measured with goes first.
    trained_side = record.section("views").get("short_side") or trained_side
    if stride is None:
        stride = trained_stride if isinstance(trained_stride, int) else Protocol.stride
    # A model that was resized since is larger than what it was trained on.
    if short_side is None and isinstance(trained_side, int) and trained_side >= min(config.image_size):
        short_side = trained_side
    return Protocol(stride=stride, fps=clock_of(model, fps), short_side=short_side, **others)


def read_views(path: str | Path | VideoSample, config: Any, protocol: Protocol, threads: str = "SLICE") -> Tensor:
    """All views of a video file, or of a data set's part of one: uint8 [views, frames, height, width, 3], crops of one
    moment side by side. `threads` as for `Video`.

    Raises:
        VideoError: the file cannot be read.
    """
    sample = path if isinstance(path, VideoSample) else VideoSample(Path(path))
    with sample.opened(protocol.fps, threads) as (video, ticks):
        moments = temporal_views(len(ticks), config.num_frames, protocol.stride, protocol.views[0])
        wanted = sorted({index for moment in moments for index in moment})
        frames = video.frames([ticks[index] for index in wanted])
        place = {index: at for at, index in enumerate(wanted)}
    picked = (frames[[place[index] for index in moment]] for moment in moments)
    views = (crops_of(clip, config.image_size, protocol.short_side, protocol.views[1]) for clip in picked)
    return torch.stack([crop for crops in views for crop in crops])


@torch.inference_mode()
def logits_of(model: Any, views: Tensor, batch: int) -> dict[str, Tensor]:
    """Mean logits over views, [classes] by head; a single head's name is empty."""
    total: dict[str, Tensor] = {}
    for part in views.split(batch):
        for name, logits_BV in by_head(model(part.to(model.device))).items():
            summed = logits_BV.double().sum(0)
            total[name] = total[name] + summed if name in total else summed
    return {name: logits_V / len(views) for name, logits_V in total.items()}


def by_head(out: Any) -> dict[str, Tensor]:
    """What a model returned, by head; a single head's name is empty."""
    return out if isinstance(out, dict) else {"": out}


def best(logits: dict[str, Tensor], labels: Sequence[str] | None, top: int) -> Predictions:
    """The `top` classes of each head. Two heads give actions too: the pairs by the product of their probabilities."""
    probs = {name: logits_V.softmax(-1).cpu() for name, logits_V in logits.items()}
    if len(probs) == 1:
        return _named(next(iter(probs.values())), labels, top)
    start, results = 0, {}
    for name, probs_V in probs.items():
        own = None if labels is None else labels[start : start + len(probs_V)]
        results[name] = _named(probs_V, own, top)
        start += len(probs_V)
    if len(probs) == 2:
        results[ACTION] = _actions(probs, labels, top)
    return results


def _named(probs_V: Tensor, labels: Sequence[str] | None, top: int) -> list[Prediction]:
    scores, indices = probs_V.topk(min(top, len(probs_V)))
    return [
        Prediction(str(index) if labels is None else labels[index], index, score)
        for index, score in zip(indices.tolist(), scores.tolist(), strict=True)
    ]


def _actions(probs: dict[str, Tensor], labels: Sequence[str] | None, top: int) -> list[Prediction]:
    first, second = probs.values()
    joint = torch.outer(first, second)
    scores, places = joint.flatten().topk(min(top, joint.numel()))
    names = [str(i) for p in (first, second) for i in range(len(p))] if labels is None else labels
    pairs = [divmod(place, len(second)) for place in places.tolist()]
    return [
        Prediction(f"{names[a]} {names[len(first) + b]}", (a, b), score)
        for (a, b), score in zip(pairs, scores.tolist(), strict=True)
    ]


def classify_files(
    model: Any, paths: Iterable[str | Path], protocol: Protocol
) -> Iterator[tuple[Predictions, Tensor] | VideoError]:
    """Per file its predictions and the views they rest on, or why it could not be read; the others go on.

    The next file is decoded while the model looks at this one.
    """
    model.for_inference()
    for views in read_ahead(paths, lambda path: read_views(path, model.config, protocol)):
        if isinstance(views, VideoError):
            yield views
        else:
            yield best(logits_of(model, views, protocol.batch), model.labels, protocol.top), views


def read_ahead(paths: Iterable[str | Path], read: Callable[[str | Path], Tensor]) -> Iterator[Tensor | VideoError]:
    """What `read` makes of each file, or why it could not; the next is read while the caller looks at this one."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead: Future[Tensor] | None = None
        for path in paths:
            coming = reader.submit(read, path)
            if ahead is not None:
                yield _result(ahead)
            ahead = coming
        if ahead is not None:
            yield _result(ahead)


def _result(reading: Future[Tensor]) -> Tensor | VideoError:
    try:
        return reading.result()
    except VideoError as error:
        return error
