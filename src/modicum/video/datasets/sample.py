"""What a data set is made of: videos or parts of them, each with its classes or captions."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from modicum.errors import UsageError
from modicum.video.read import Video


@dataclass(frozen=True)
class VideoSample:
    """A video, or the part of one from `start` to `end`, and what it shows."""

    path: Path
    targets: tuple[int, ...] = ()
    """A class per head, in the order of the data set's `heads`."""
    id: str = ""
    captions: tuple[str, ...] = ()
    start: float | None = None
    """Seconds after the first frame; None: from the beginning, `end` None: to the end."""
    end: float | None = None
    first: int | None = None
    """Of a folder of images: the numbers in the first and the last one's names, taken at `rate` images per second."""
    last: int | None = None
    rate: float | None = None

    @property
    def caption(self) -> str | None:
        """The first caption, if there is any."""
        return self.captions[0] if self.captions else None

    @property
    def place(self) -> str:
        """What tells it from all others: its path; for part of a video its id follows."""
        part = "" if self.end is None and self.first is None else f" ({self.id})"
        return f"{self.path}{part}"

    @contextmanager
    def opened(self, fps: float | None = 25.0, threads: str = "SLICE") -> Iterator[tuple[Video, range]]:
        """The video on a clock of `fps` ticks per second, and the ticks that are this sample's. See `Video`.

        Raises:
            VideoError: the video cannot be read, or ends before this part of it begins.
        """
        images = None
        if self.first is not None and self.last is not None:
            images = (self.first, self.last, self.rate or 25.0)
        start = self.start or 0.0
        part = None if self.end is None and not start else (start, self.end)
        with Video(self.path, fps, part=part, threads=threads, images=images) as video:
            yield video, video.ticks(start, self.end)


@dataclass(frozen=True)
class VideoDataset:
    """Samples, and what their targets mean.

    `heads` gives the number of classes by head, a single one being named ""; `labels` names the classes of all heads,
    one head after another, as a model's `labels` do. A data set of captions has neither.
    """

    name: str
    samples: list[VideoSample]
    heads: dict[str, int] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    """What the annotations list and could not be taken: (id, reason)."""

    def __post_init__(self) -> None:
        if not self.samples:
            listed = f"; of {len(self.missing)} that are listed the first is {self.missing[0]}" if self.missing else ""
            raise UsageError(
                f"{self.name} has no videos here{listed}: check the split, and give the folder that holds the videos"
            )

    def __len__(self) -> int:
        return len(self.samples)

    def per_caption(self) -> "VideoDataset":
        """A sample for each caption, its id followed by the caption's number from 0 on."""
        samples = [
            replace(sample, captions=(caption,), id=f"{sample.id}#{number}")
            for sample in self.samples
            for number, caption in enumerate(sample.captions)
        ]
        return replace(self, samples=samples)

    def labels_of(self, head: str = "") -> list[str]:
        """The names of one head's classes."""
        start = 0
        for name, n_classes in self.heads.items():
            if name == head:
                return self.labels[start : start + n_classes]
            start += n_classes
        raise UsageError(f"{self.name} has no head {head!r}: choose one of {', '.join(map(repr, self.heads))}")
