"""Something-Something v2: one json for each split, whose templates are the classes."""

import re
from pathlib import Path

from modicum.errors import UsageError
from modicum.video.datasets.collect import Collection
from modicum.video.datasets.find import VideoTree
from modicum.video.datasets.labels import LabelMap, Labels, read_json
from modicum.video.datasets.sample import VideoDataset, VideoSample

_BRACKETS = re.compile(r"[\[\]]")


def read_something(
    annotations: str | Path, root: str | Path | None = None, *, split: str | None = None, labels: Labels | None = None
) -> VideoDataset:
    """`[{"id", "label", "template", "placeholders"}, ...]`; `labels` is the published json of names and numbers.

    A class is a template without its brackets; the label, in which things have their names, becomes the caption. Files
    are `<id>.webm` below `root`, or converted to another container.
    """
    rows = read_json(annotations)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "id" in row for row in rows):
        raise UsageError(f"{annotations} is no list of videos with an `id`: give a json file of Something-Something v2")
    if not all(row.get("template") for row in rows):
        raise UsageError(f"{annotations} has no templates, as published for the test set: give another split")
    classes = [_BRACKETS.sub("", row["template"]) for row in rows]
    numbers = LabelMap(labels, classes, annotations)
    tree = VideoTree(Path(annotations).parent if root is None else root)
    found = Collection(str(annotations))
    for row, name in zip(rows, classes, strict=True):
        id = str(row["id"])
        path = tree.find(id)
        if path is None:
            found.miss(id, f"no video {id} below {tree.root}")
        else:
            captions = (row["label"],) if row.get("label") else ()
            found.add(VideoSample(path, (numbers.number(name),), id, captions))
    return found.labelled(numbers)
