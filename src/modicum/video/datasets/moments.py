"""Moments in Time: one csv for each split, clips of three seconds in a folder per class."""

from pathlib import Path, PurePosixPath

from modicum.video.datasets.collect import Collection
from modicum.video.datasets.find import VideoTree
from modicum.video.datasets.labels import LabelMap, Labels, read_rows
from modicum.video.datasets.sample import VideoDataset, VideoSample

COLUMNS = ("path", "label")
_FOLDERS = {"train": "training", "val": "validation"}


def read_moments(
    annotations: str | Path, root: str | Path | None = None, *, split: str | None = None, labels: Labels | None = None
) -> VideoDataset:
    """Rows `path,label,votes,...`, with a header or without; `labels` is the published moments_categories.txt.

    `root` holds the folders `training` and `validation`, or is one of them. `split` chooses among files of one name.
    """
    rows = read_rows(annotations, COLUMNS, COLUMNS)
    numbers = LabelMap(labels, (row["label"] for row in rows), annotations)
    tree = VideoTree(Path(annotations).parent if root is None else root)
    found = Collection(str(annotations))
    for row in rows:
        name = PurePosixPath(row["path"].replace("\\", "/"))
        path = tree.find(name.stem, (*name.parts[:-1], split or "", _FOLDERS.get(split or "", "")))
        if path is None:
            found.miss(row["path"], f"no such video below {tree.root}")
        else:
            found.add(VideoSample(path, (numbers.number(row["label"]),), row["path"]))
    return found.labelled(numbers)
