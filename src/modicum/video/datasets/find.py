"""Where a data set's videos lie: found by name, whatever folders they were unpacked into."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from modicum.errors import UsageError

SUFFIXES = frozenset(
    (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp", ".ogv", ".gif")
)

_NO_PICTURES = ("flow", "flow_frames")  # they hold optical flow, under the names of the videos


def is_video(name: str) -> bool:
    """By its suffix; what a download left half done ends in .part or the like."""
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")


def existing(root: str | os.PathLike[str]) -> Path:
    """
    Raises:
        UsageError: not a folder.
    """
    path = Path(root)
    if not path.is_dir():
        raise UsageError(f"{path} is not a folder: give the one that holds the videos")
    return path


class VideoTree:
    """All video files below a folder, by name without suffix. One walk, for annotations name 100,000s of files.

    Args:
        folders: folders of such names are videos, frame by frame. They are not looked into: each may hold 100,000 images.
    """

    def __init__(self, root: str | os.PathLike[str], folders: re.Pattern[str] | None = None) -> None:
        self.root = existing(root)
        self._found: dict[str, list[str]] = {}
        frames: dict[str, list[str]] = {}
        for folder, subfolders, names in os.walk(self.root, followlinks=True):
            as_videos = [name for name in subfolders if folders is not None and folders.fullmatch(name)]
            for name in as_videos:
                frames.setdefault(name, []).append(os.path.join(folder, name))
            subfolders[:] = sorted(name for name in subfolders if name not in as_videos and name not in _NO_PICTURES)
            for name in sorted(filter(is_video, names)):
                self._found.setdefault(os.path.splitext(name)[0], []).append(os.path.join(folder, name))
        self._found = frames | self._found

    def find(self, stem: str, near: Iterable[str] = ()) -> Path | None:
        """The file of this name. Of several the one whose folders are named most like `near`: a split, a label."""
        found = self._found.get(stem, [])
        if len(found) < 2:
            return Path(found[0]) if found else None
        wanted = {word.casefold() for word in near}

        def alike(path: str) -> int:
            folders = Path(path).relative_to(self.root).parts[:-1]
            return sum(folder.casefold() in wanted for folder in folders)

        return Path(max(found, key=alike))  # the first of equals
