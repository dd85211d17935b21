"""Data sets of captions: MSR-VTT and VATEX."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from modicum.errors import UsageError
from modicum.video.datasets.collect import Collection, of_split, youtube_part
from modicum.video.datasets.find import VideoTree
from modicum.video.datasets.labels import Labels, read_json
from modicum.video.datasets.sample import VideoDataset, VideoSample

_VATEX = {"en": "enCap", "zh": "chCap"}


def read_msrvtt(
    annotations: str | Path, root: str | Path | None = None, *, split: str | None = None, labels: Labels | None = None
) -> VideoDataset:
    """`{"videos": [{"video_id", "split", ...}], "sentences": [{"video_id", "caption"}]}`: a sample per video, with all
    of its captions.

    Files are `<video_id>.mp4` below `root`: the published ones are cut already, and `start time` counts in what they
    were cut from.
    """
    _no_labels(labels, annotations)
    content = read_json(annotations)
    if not isinstance(content, dict) or not {"videos", "sentences"} <= set(content):
        raise UsageError(f"{annotations} has no `videos` and `sentences`: give a json file in MSR-VTT's layout")
    captions: dict[str, list[str]] = {}
    for sentence in content["sentences"]:
        captions.setdefault(sentence["video_id"], []).append(sentence["caption"])
    tree = VideoTree(Path(annotations).parent if root is None else root)
    found = Collection(str(annotations))
    for video in of_split(content["videos"], split, annotations):
        id = video["video_id"]
        path, spoken = tree.find(id, (split or "",)), _clean(captions.get(id, ()))
        if not spoken:
            found.miss(id, "has no captions")
        elif path is None:
            found.miss(id, f"no video {id} below {tree.root}")
        else:
            found.add(VideoSample(path, (), id, spoken))
    return VideoDataset(found.origin, found.samples, missing=found.missing)


def read_vatex(
    annotations: str | Path,
    root: str | Path | None = None,
    *,
    language: str = "en",
    split: str | None = None,
    labels: Labels | None = None,
) -> VideoDataset:
    """`[{"videoID": "<youtube id>_<start>_<end>", "enCap": [...], "chCap": [...]}]`: a sample per video, with all of its
    captions in a language, "en" or "zh". Files as those of Kinetics, which they are taken from.
    """
    _no_labels(labels, annotations)
    rows = read_json(annotations)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "videoID" in row for row in rows):
        raise UsageError(f"{annotations} is no list of videos with a `videoID`: give a json file of VATEX")
    tree = VideoTree(Path(annotations).parent if root is None else root)
    found = Collection(str(annotations))
    for row in rows:
        id = row["videoID"]
        youtube_id, start, end = id.rsplit("_", 2)  # its own part may hold underscores
        part = youtube_part(tree, youtube_id, int(start), int(end))
        captions = _clean(row.get(_VATEX[language]) or ())
        if not captions:
            found.miss(id, f"has no {_VATEX[language]}")
        elif isinstance(part, str):
            found.miss(id, part)
        else:
            found.add(VideoSample(part[0], (), id, captions, start=part[1], end=part[2]))
    return VideoDataset(found.origin, found.samples, missing=found.missing)


read_vatex_zh = partial(read_vatex, language="zh")


def _clean(captions: Iterable[Any]) -> tuple[str, ...]:
    """Without line breaks and runs of spaces, and without what is empty then."""
    cleaned = (" ".join(str(caption).split()) for caption in captions)
    return tuple(caption for caption in cleaned if caption)


def _no_labels(labels: Labels | None, annotations: str | Path) -> None:
    if labels is not None:
        raise UsageError(f"{annotations} has captions and no classes: give no `labels`")
