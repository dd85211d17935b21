"""EPIC-KITCHENS-100: actions in long videos, each a verb and a noun."""

import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from modicum.errors import UsageError
from modicum.video.datasets.collect import Collection
from modicum.video.datasets.find import VideoTree
from modicum.video.datasets.labels import Labels, in_order, read_labels, read_rows
from modicum.video.datasets.sample import VideoDataset, VideoSample

COLUMNS = (
    *("narration_id", "participant_id", "video_id", "narration_timestamp", "start_timestamp", "stop_timestamp"),
    *("start_frame", "stop_frame", "narration", "verb", "verb_class", "noun", "noun_class"),
    *("all_nouns", "all_noun_classes"),
)
_NEEDED = ("narration_id", "video_id", "start_timestamp", "stop_timestamp", "start_frame", "stop_frame")
# In the order of the authors' projection.
HEADS = {"noun": 300, "verb": 97}
_VIDEO_ID = re.compile(r"P\d+_\d+")


def read_epic(
    annotations: str | Path,
    root: str | Path | None = None,
    *,
    split: str | None = None,
    labels: Labels | Mapping[str, Labels] | None = None,
) -> VideoDataset:
    """Rows with the columns `COLUMNS`; a sample is the part from start to stop, known by its narration_id.

    A video is a file `<video_id>.MP4`, read by the time stamps, or a folder `<video_id>` of frame_0000000001.jpg and so
    on, read by the frames' numbers; either may lie anywhere below `root`, and the file is preferred.

    Args:
        labels: a folder with the published EPIC_100_noun_classes and EPIC_100_verb_classes, a dict of both heads, or the
            397 names of another data set. None: those files if they are beside the annotations, else the numbers.
    """
    rows = read_rows(annotations, COLUMNS, _NEEDED)
    if not all(row.get("verb_class") and row.get("noun_class") for row in rows):
        raise UsageError(f"{annotations} has no classes, as published for the test set: give the csv of another split")
    names = _names(labels, Path(annotations).parent)
    tree = VideoTree(Path(annotations).parent if root is None else root, folders=_VIDEO_ID)
    rates = _rates(rows)
    found = Collection(str(annotations))
    for row in rows:
        id, video_id = row["narration_id"], row["video_id"]
        targets = tuple(int(row[f"{head}_class"]) for head in HEADS)
        for target, (head, n_classes) in zip(targets, HEADS.items(), strict=True):
            if not 0 <= target < n_classes:
                raise UsageError(
                    f"{annotations}: {id} has the {head} {target}, of {n_classes}: give EPIC-KITCHENS-100's"
                )
        path = tree.find(video_id)
        if path is None:
            found.miss(id, f"no video or folder {video_id} below {tree.root}")
            continue
        captions = (row["narration"],) if row.get("narration") else ()
        if path.is_dir():
            # Counted from 1; the frame at which an action stops is no longer part of it.
            first = max(1, int(row["start_frame"]))
            last = max(first, int(row["stop_frame"]) - 1)
            part = VideoSample(path, targets, id, captions, first=first, last=last, rate=rates[video_id])
        else:
            start, end = seconds(row["start_timestamp"]), seconds(row["stop_timestamp"])
            part = VideoSample(path, targets, id, captions, start=start, end=end)
        found.add(part)
    return VideoDataset(found.origin, found.samples, dict(HEADS), names, found.missing)


def seconds(stamp: str) -> float:
    """Of hh:mm:ss.fff."""
    hours, minutes, rest = stamp.split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(rest)


def _rates(rows: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Frames per second by video: 50, 60 and a few others. Rows give both times and numbers; the latest is exactest."""
    latest: dict[str, tuple[int, float]] = {}
    for row in rows:
        stop = int(row["stop_frame"]), seconds(row["stop_timestamp"])
        latest[row["video_id"]] = max(stop, latest.get(row["video_id"], stop))
    return {
        video_id: round(frame / end, 2) if end > 0 and frame > 0 else 50.0 for video_id, (frame, end) in latest.items()
    }


def _names(labels: Labels | Mapping[str, Labels] | None, beside: Path) -> list[str]:
    """The names of all nouns, then of all verbs."""
    if labels is None or isinstance(labels, str | PathLike):
        by_head: Mapping[str, Labels] = _class_files(beside if labels is None else Path(labels))
    elif isinstance(labels, Mapping):
        by_head = {head: given for head, given in labels.items() if not isinstance(given, int)}
    else:
        return _checked(list(labels))
    if labels is not None and set(by_head) != set(HEADS):
        raise UsageError(
            f"labels of {', '.join(sorted(by_head)) or 'no head'} are given: give those of noun and of verb"
        )
    names: list[str] = []
    for head, n_classes in HEADS.items():
        given = by_head.get(head)
        if given is None:
            names += map(str, range(n_classes))
        else:
            names += read_labels(given) if isinstance(given, str | PathLike) else in_order(given, f"`labels` of {head}")
    return _checked(names)


def _class_files(folder: Path) -> dict[str, Labels]:
    found = {head: sorted(folder.glob(f"EPIC_100_{head}_classes*.csv")) for head in HEADS}
    return {head: paths[-1] for head, paths in found.items() if paths}


def _checked(names: list[str]) -> list[str]:
    if len(names) != sum(HEADS.values()):
        raise UsageError(f"{len(names)} labels are given: 300 nouns and 97 verbs are needed")
    return names
