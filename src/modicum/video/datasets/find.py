"""Where a data set's videos lie: found by name, whatever folders they were unpacked into."""

import os
from collections.abc import Iterable
from pathlib import Path

from modicum.errors import UsageError

SUFFIXES = frozenset(
    (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp", ".ogv", ".gif")
)


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
    """All video files below a folder, by name without suffix. One walk, for annotations name 100,000s of files."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = existing(root)
        self._folders: dict[str, list[str]] = {}
        for folder, subfolders, names in os.walk(self.root, followlinks=True):
            subfolders.sort()
            for name in sorted(filter(is_video, names)):
                self._folders.setdefault(os.path.splitext(name)[0], []).append(os.path.join(folder, name))

    def find(self, stem: str, near: Iterable[str] = ()) -> Path | None:
        """The file of this name. Of several the one whose folders are named most like `near`: a split, a label."""
        found = self._folders.get(stem, [])
        if len(found) < 2:
            return Path(found[0]) if found else None
        wanted = {word.casefold() for word in near}

        def alike(path: str) -> int:
            folders = Path(path).relative_to(self.root).parts[:-1]
            return sum(folder.casefold() in wanted for folder in folders)

        return Path(max(found, key=alike))  # the first of equals
