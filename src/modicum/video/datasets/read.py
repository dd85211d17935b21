"""One door to all formats."""

import csv
from collections.abc import Callable
from pathlib import Path

from modicum.errors import ModicumError, UsageError
from modicum.video.datasets.captioned import read_msrvtt, read_vatex, read_vatex_zh
from modicum.video.datasets.epic import read_epic
from modicum.video.datasets.kinetics import read_kinetics
from modicum.video.datasets.labels import Labels
from modicum.video.datasets.moments import read_moments
from modicum.video.datasets.plain import read_folder, read_list
from modicum.video.datasets.sample import VideoDataset
from modicum.video.datasets.something import read_something

_READERS: dict[str, Callable[..., VideoDataset]] = {
    "kinetics": read_kinetics,
    "moments": read_moments,
    "something": read_something,
    "epic": read_epic,
    "folder": read_folder,
    "list": read_list,
    "msrvtt": read_msrvtt,
    "vatex": read_vatex,
    "vatex-zh": read_vatex_zh,
}
FORMATS = tuple(_READERS)


def read_dataset(
    format: str,
    annotations: str | Path | None = None,
    root: str | Path | None = None,
    *,
    split: str | None = None,
    labels: Labels | None = None,
) -> VideoDataset:
    """A data set from its annotations and the folder of its videos.

    Args:
        format: one of `FORMATS`.
        annotations: the file that lists the videos; "folder" needs none.
        root: the folder that holds them, None being that of `annotations`.
        split: "train", "val", ...: the folder, or the rows, of this split. None: all. Where each split has a file of its own
            (list, something, epic, vatex) that file decides.
        labels: names in the order of their numbers, a dict of numbers, or a file that `read_labels` reads. None: those of
            the annotations, sorted. Give a training set's `labels` to what it is evaluated on.

    Raises:
        UsageError: an unknown format, annotations that are not in it, or no video that is here.
    """
    reader = _READERS.get(format)
    if reader is None:
        raise UsageError(f"{format!r} is not a format of video data sets: choose one of {', '.join(FORMATS)}")
    if annotations is None and format == "folder":
        annotations = root
    if annotations is None:
        raise UsageError(f"the format {format} needs `annotations`: give the file that lists the videos")
    try:
        return reader(annotations, root, split=split, labels=labels)
    except ModicumError:
        raise
    except (LookupError, TypeError, ValueError, csv.Error) as error:
        # One value out of 100,000s is not what its place is for: a time that is no number, an id without its parts.
        raise UsageError(
            f"{annotations}, or its labels, hold what the format {format} does not ({type(error).__name__}: {error}): "
            "give the files as published, or data in another format"
        ) from error
