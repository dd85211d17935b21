"""Kinetics-400, 600 and 700: one csv for each split, clips of ten seconds cut out of YouTube's videos."""

from pathlib import Path

from modicum.errors import UsageError
from modicum.video.datasets.collect import Collection, of_split, youtube_part
from modicum.video.datasets.find import VideoTree
from modicum.video.datasets.labels import LabelMap, Labels, read_rows
from modicum.video.datasets.sample import VideoDataset, VideoSample

COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split", "is_cc")


def read_kinetics(
    annotations: str | Path, root: str | Path | None = None, *, split: str | None = None, labels: Labels | None = None
) -> VideoDataset:
    """Rows `label,youtube_id,time_start,time_end,split[,is_cc]`, with this header or without.

    Files are `<youtube_id>_<time_start>_<time_end>`, six digits each, anywhere below `root`: flat, or by split and
    label. Where only `<youtube_id>` is there, uncut, it is that part of it.
    """
    rows = of_split(read_rows(annotations, COLUMNS, ("youtube_id", "time_start", "time_end")), split, annotations)
    if not all(row.get("label") for row in rows):
        raise UsageError(f"{annotations} has no labels, as published for test sets: give the csv of another split")
    numbers = LabelMap(labels, (row["label"] for row in rows), annotations)
    tree = VideoTree(Path(annotations).parent if root is None else root)
    found = Collection(str(annotations))
    for row in rows:
        label, youtube_id = row["label"], row["youtube_id"]
        start, end = float(row["time_start"]), float(row["time_end"])
        near = (label, label.replace(" ", "_"), row.get("split") or "")
        part = youtube_part(tree, youtube_id, start, end, near)
        id = f"{youtube_id}_{int(start):06d}_{int(end):06d}"
        if isinstance(part, str):
            found.miss(id, part)
        else:
            path, first, last = part
            found.add(VideoSample(path, (numbers.number(label),), id, start=first, end=last))
    return found.labelled(numbers)
