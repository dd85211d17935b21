"""Reading clips out of videos: frames sampled by time, from files that FFmpeg reads or from folders of images."""

import operator
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from modicum.errors import UsageError
from modicum.video.clock import Clock, as_rate, exact, nearest, units_per_tick
from modicum.video.file import HiddenFrameError, VideoFile
from modicum.video.folder import ImageFolder, NumberedImages
from modicum.video.pixels import VideoError

__all__ = ["Video", "VideoError", "VideoInfo", "read_clip", "stream_frames"]


@dataclass(frozen=True)
class VideoInfo:
    """What a video is. `width` and `height` are those on the screen, after any rotation that the file asks for."""

    path: Path
    width: int
    height: int
    seconds: float
    fps: float
    """Average frames per second of the file itself."""
    n_frames: int
    """Ticks of the sampling clock."""


class Video:
    """An opened video, sampled by a clock.

    Tick i of the clock is i / fps seconds after the first frame, and stands for the frame whose time stamp is nearest,
    of two equally near ones the earlier: what is read depends on when things happen, not on a file's frame rate. A
    folder of images is a video too; each image is one tick, whatever `fps`.

    Args:
        path: a video file (its first video stream), or a folder of png, jpg, bmp or webp images in natural order.
        fps: ticks per second. The default is that of the data in ViViT (section 4.1). None: frames by index.
        part: seconds after the first frame from which and up to which ticks will be asked for, see `ticks`; of a long file
            little else is read then. `n_frames` and `info` may end with the part.
        threads: FFmpeg's, of one decoder: "SLICE", "AUTO", or "NONE" where others decode beside it.
        images: of a folder, only those numbered from `first` to `last`, taken at `rate` images per second.

    Raises:
        UsageError: `fps` is not a positive number.
        VideoError: the path is missing, or not a video that can be read.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        fps: float | None = 25.0,
        *,
        part: tuple[float, float | None] | None = None,
        threads: str = "SLICE",
        images: tuple[int, int, float] | None = None,
    ) -> None:
        rate = as_rate(fps)
        self._source = _open_source(path, rate, threads, images)
        try:
            # By number, every frame counts; by time, one that never shows matters only where it would be the nearest.
            if part is None or rate is None:
                first = self._source.index(by_decoding=rate is None and self._source.may_hide_frames)
            else:
                first = self._source.index_part(exact(part[0]), None if part[1] is None else exact(part[1]))
            self._height, self._width, _ = self._source.rgb(first).shape
        except BaseException:
            self._source.close()
            raise
        self._closed = False
        self._set_clock(rate)
        self.n_frames = self._clock.n_ticks

    def _set_clock(self, rate: Fraction | None) -> None:
        self._clock = Clock(self._source.stamps, self._source.end, self._source.time_base, rate)

    @property
    def info(self) -> VideoInfo:
        """Size, length and rates."""
        stamps, end = self._clock.stamps, self._clock.end
        seconds = self._clock.seconds(end)
        fps = len(stamps) / seconds
        return VideoInfo(self._source.path, self._width, self._height, seconds, fps, self.n_frames)

    def frames(self, indices: Sequence[int]) -> Tensor:
        """The frames at these ticks, in any order, repeats included: uint8 [T, H, W, 3], RGB.

        Raises:
            UsageError: a tick outside 0 ... n_frames - 1.
            VideoError: a frame cannot be decoded.
        """
        if self._closed:
            raise UsageError(f"{self._source.path} was closed: open it again to read from it")
        ticks = [self._checked(index) for index in indices]
        try:
            return self._gathered(ticks)
        except HiddenFrameError:
            # Ticks between the frames that do show keep theirs: a frame nearest among more is nearest among fewer.
            self._source.index(by_decoding=True)
            self._set_clock(self._clock.fps)
            return self._gathered([min(tick, self._clock.n_ticks - 1) for tick in ticks])

    def _gathered(self, ticks: list[int]) -> Tensor:
        rows: dict[int, list[int]] = {}
        for row, tick in enumerate(ticks):
            rows.setdefault(self._clock.stamp_at(tick), []).append(row)
        frames = torch.empty(len(ticks), self._height, self._width, 3, dtype=torch.uint8)
        for stamp in sorted(rows):
            frames[rows[stamp]] = _as_tensor(self._source.rgb(self._source.at(stamp)))
        return frames

    def ticks(self, start: float = 0.0, end: float | None = None) -> range:
        """The ticks from `start` seconds after the first frame up to `end`, None being the video's own. At least one;
        what reaches beyond the video is cut off.

        Raises:
            VideoError: `start` lies beyond the end of the video.
        """
        ticks = self._clock.within(start, end)
        if not ticks:
            raise VideoError(
                f"{self._source.path} lasts {self.info.seconds:.2f} s and was to be read from {start:.2f} s on: check its "
                "annotation, or copy the file again"
            )
        return ticks

    def seconds_of(self, index: int) -> float:
        """The time stamp of the frame that stands for a tick, in seconds after the first frame.

        Raises:
            UsageError: a tick outside 0 ... n_frames - 1.
        """
        tick = min(self._checked(index), self._clock.n_ticks - 1)
        return self._clock.seconds(self._clock.stamp_at(tick))

    def _checked(self, index: Any) -> int:
        tick = operator.index(index)
        if not 0 <= tick < self.n_frames:
            raise UsageError(
                f"frame {tick} of {self._source.path} was asked for, which has {self.n_frames}: give indices from 0 to "
                f"{self.n_frames - 1}"
            )
        return tick

    def close(self) -> None:
        """Let go of the file; closing twice is harmless."""
        self._closed = True
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        # An exception in __init__ leaves no source behind.
        if hasattr(self, "_source"):
            self._source.close()


def read_clip(
    path: str | PathLike[str], num_frames: int, stride: int = 2, start: int = 0, fps: float | None = 25.0
) -> Tensor:
    """`num_frames` frames from tick `start` on, `stride` ticks apart: uint8 [T, H, W, 3], RGB. See `Video`.

    Raises:
        UsageError: a number out of range, or a clip that reaches beyond the video's end.
        VideoError: the video cannot be read.
    """
    for name, value, least in (("num_frames", num_frames, 1), ("stride", stride, 1), ("start", start, 0)):
        if value < least:
            raise UsageError(f"{name}={value}: give at least {least}")
    with Video(path, fps) as video:
        return video.frames(range(start, start + num_frames * stride, stride))


def stream_frames(
    path: str | PathLike[str], fps: float | None = 25.0, stride: int = 1
) -> Iterator[tuple[float, Tensor]]:
    """Every `stride`-th tick's frame, read once through in constant memory: (seconds, uint8 [H, W, 3] RGB). See `Video`.

    Nothing is opened before the first frame is asked for. Frames that cannot be decoded are passed over.

    Raises:
        UsageError: `fps` or `stride` is not positive.
        VideoError: the video cannot be read.
    """
    if stride < 1:
        raise UsageError(f"stride={stride}: give at least 1")
    return _streamed(path, as_rate(fps), stride)


def _streamed(path: str | PathLike[str], rate: Fraction | None, stride: int) -> Iterator[tuple[float, Tensor]]:
    # All frames are wanted in order here, so that cores can work on several at once.
    with closing(_open_source(path, rate, threads="AUTO")) as source:
        ticks: Iterator[tuple[int, Any]] = source.passing()
        if rate is not None:
            ticks = nearest(ticks, units_per_tick(rate, source.time_base), lambda: source.end)
        start = None
        for stamp, frame in islice(ticks, 0, None, stride):
            start = stamp if start is None else start
            yield float((stamp - start) * source.time_base), _as_tensor(source.rgb(frame))
        if start is None:
            raise VideoError(f"{path} has no frame that can be decoded: copy it again, or convert it to H.264 in mp4")


def _open_source(
    path: str | PathLike[str],
    rate: Fraction | None,
    threads: str = "SLICE",
    images: tuple[int, int, float] | None = None,
) -> VideoFile | ImageFolder:
    path = Path(path)
    if path.is_dir():
        if images is not None:
            return NumberedImages(path, *images)
        return ImageFolder(path, rate)
    if not path.exists():
        raise VideoError(f"{path} does not exist: give a video file or a folder of images")
    if not path.is_file():
        raise VideoError(f"{path} is neither a file nor a folder: give a video file or a folder of images")
    if not path.stat().st_size:
        raise VideoError(f"{path} is empty (0 bytes): copy or download it again")
    return VideoFile(path, threads)


def _as_tensor(rgb: np.ndarray) -> Tensor:
    # Flips are views, and PyAV's arrays may lie in a frame's own memory.
    return torch.from_numpy(rgb.copy())
