"""Data sets without a published format: a folder per class, or a list of `path label`."""

import re
from collections.abc import Iterator
from pathlib import Path

from modicum.errors import UsageError
from modicum.video.datasets.find import SUFFIXES, existing, is_video
from modicum.video.datasets.labels import LabelMap, Labels, text_of
from modicum.video.datasets.sample import VideoDataset, VideoSample
from modicum.video.folder import SUFFIXES as IMAGES
from modicum.video.folder import natural


def read_folder(
    annotations: str | Path, root: str | Path | None = None, *, split: str | None = None, labels: Labels | None = None
) -> VideoDataset:
    """`root/[split/]label/video`, a video being a file, or a folder of images.

    Labels are the names of the folders, sorted, where none are given. What is neither video nor hidden is listed as
    missing.
    """
    root = existing(root or annotations)
    root = root if split is None else existing(root / split)
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise UsageError(f"{root} has no folders: give one that holds a folder of videos for each label")
    numbers = LabelMap(labels, (folder.name for folder in folders), root)
    samples, missing = [], []
    for folder in folders:
        target = (numbers.number(folder.name),)
        for path in sorted(folder.iterdir(), key=lambda path: natural(path.name)):
            name = path.relative_to(root).as_posix()
            if is_video(path.name) or (path.is_dir() and _holds_images(path)):
                samples.append(VideoSample(path, target, name))
            elif not path.name.startswith("."):
                missing.append((name, "neither a video by its suffix nor a folder of images"))
    return VideoDataset(str(root), samples, {"": len(numbers.names)}, numbers.names, missing)


def _holds_images(folder: Path) -> bool:
    return any(path.suffix.lower() in IMAGES for path in folder.iterdir())


# Up to a suffix, paths may hold spaces and commas, and so may labels after it.
_SUFFIXES = "|".join(suffix[1:] for suffix in sorted(SUFFIXES))
_QUOTED = re.compile(r'"((?:[^"]|"")+)"[\s,;]+(.+)')
_BY_SUFFIX = re.compile(rf"(.+?\.(?:{_SUFFIXES}))[\s,;]+(.+)", re.IGNORECASE)
_BY_LAST_WORD = re.compile(r"(.+?)[\s,;]+([^\s,;]+)")


def read_list(
    annotations: str | Path, root: str | Path | None = None, *, split: str | None = None, labels: Labels | None = None
) -> VideoDataset:
    """Lines of `path label`, separated by spaces, tabs, commas or semicolons.

    Paths are relative to `root`, or to the list's own folder. Labels are all numbers, or else names.
    """
    root = Path(annotations).parent if root is None else existing(root)
    rows = list(_rows(annotations))
    if all(label.isdecimal() for _, label in rows):
        n_classes = 1 + max((int(label) for _, label in rows), default=0)
        numbers = LabelMap([str(i) for i in range(n_classes)] if labels is None else labels, (), annotations)
        if n_classes > len(numbers.names):
            raise UsageError(f"{annotations} has the label {n_classes - 1}, and {len(numbers.names)} labels are given")
        targets = [int(label) for _, label in rows]
    else:
        numbers = LabelMap(labels, (label for _, label in rows), annotations)
        targets = [numbers.number(label) for _, label in rows]
    samples, missing = [], []
    for (name, _), target in zip(rows, targets, strict=True):
        path = root / name
        if path.exists():
            samples.append(VideoSample(path, (target,), name))
        else:
            missing.append((name, f"no such file in {root}"))
    return VideoDataset(str(annotations), samples, {"": len(numbers.names)}, numbers.names, missing)


def _rows(annotations: str | Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text_of(annotations).splitlines(), 1):
        if not line.strip():
            continue
        forms = (form.fullmatch(line.strip()) for form in (_QUOTED, _BY_SUFFIX, _BY_LAST_WORD))
        match = next((match for match in forms if match), None)
        if match is None:
            raise UsageError(f"{annotations}, line {number} is {line.strip()[:80]!r}: `path label` is expected")
        yield match[1].replace('""', '"') if line.strip().startswith('"') else match[1], match[2].strip().strip('"')
