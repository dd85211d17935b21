"""What readers of published annotations have in common: splits by several names, repeats, and videos that are not here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modicum.errors import UsageError
from modicum.video.datasets.find import VideoTree
from modicum.video.datasets.labels import LabelMap
from modicum.video.datasets.sample import VideoDataset, VideoSample

_ALIASES = {"training": "train", "validate": "val", "validation": "val", "valid": "val", "testing": "test"}


def of_split(rows: Sequence[Mapping[str, Any]], split: str | None, origin: object) -> list[Mapping[str, Any]]:
    """The rows of a split, which some call `validate` and others `val`; all where rows name none.

    Raises:
        UsageError: none is of this split.
    """
    named = sorted({str(row["split"]) for row in rows if row.get("split")})
    if split is None or not named:
        return list(rows)
    chosen = [row for row in rows if row.get("split") and plain_split(row["split"]) == plain_split(split)]
    if not chosen:
        raise UsageError(f"{origin} has nothing of the split {split!r}: choose one of {', '.join(named)}")
    return chosen


def plain_split(name: str) -> str:
    name = name.strip().lower()
    return _ALIASES.get(name, name)


@dataclass
class Collection:
    """Samples as they are found."""

    origin: str
    samples: list[VideoSample] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    _seen: set[Any] = field(default_factory=set)

    def add(self, sample: VideoSample) -> None:
        """Once: a repeat is listed as missing. The same video under another label is another sample."""
        key = (sample.id, sample.targets, sample.start, sample.captions)
        if key in self._seen:
            self.missing.append((sample.id, "is listed twice, and taken once"))
        else:
            self._seen.add(key)
            self.samples.append(sample)

    def miss(self, id: str, reason: str) -> None:
        self.missing.append((id, reason))

    def labelled(self, numbers: LabelMap) -> VideoDataset:
        """With one head."""
        return VideoDataset(self.origin, self.samples, {"": len(numbers.names)}, numbers.names, self.missing)


def youtube_part(
    tree: VideoTree, youtube_id: str, start: float, end: float, near: Sequence[str] = ()
) -> tuple[Path, float | None, float | None] | str:
    """The clip from `start` to `end` seconds of a video: a file of its own, named `<id>_<start>_<end>` with six digits
    each, or that part of a file `<id>`. If there is neither, why."""
    stem = f"{youtube_id}_{int(start):06d}_{int(end):06d}"
    cut = tree.find(stem, near)
    if cut is not None:
        return cut, None, None
    whole = tree.find(youtube_id, near)
    if whole is not None:
        return whole, start, end
    return f"no video {stem} below {tree.root}"
