"""WebVTT subtitles (W3C, https://www.w3.org/TR/webvtt1/), a cue as soon as it is known."""

import os
from pathlib import Path
from types import TracebackType
from typing import Self

from modicum.errors import ModicumError, UsageError

HEADER = "WEBVTT\n"
# `>` alone would be allowed, but three characters of text, "-->", would begin another cue.
ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "\0": "�"})


class VttError(ModicumError):
    """Subtitles that cannot be written."""


class VttWriter:
    """A file of subtitles to which cues are appended, one after the other, so that they never overlap.

    Each cue goes to the file in one write, whole or not at all: whenever the program ends, what it has finished is there
    and the file is valid.

    Args:
        path: written anew; what it held is lost.

    Raises:
        VttError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._end = 0  # of the last cue, in milliseconds
        try:
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
        except OSError as error:
            raise VttError(f"{self.path} cannot be written ({error.strerror}): give another place") from error
        self._append(HEADER)

    def add(self, start: float, end: float, text: str) -> None:
        """Show `text` from `start` to `end`, in seconds. What an earlier cue covers is left to it.

        A text becomes one line, since a blank line would end its cue, and an empty one no cue. A moment, such as the only
        frame of a picture, is shown for a millisecond.

        Raises:
            UsageError: a negative or reversed time, or a cue that ends before the one before it does.
            VttError: the file cannot be written.
        """
        if not 0 <= start <= end < float("inf"):
            raise UsageError(
                f"a cue from {start} to {end} s was given: times must be positive, and its end not before it"
            )
        first, last = round(start * 1000), round(end * 1000)
        first = max(first, self._end)
        if last < first:
            raise UsageError(
                f"a cue that ends at {end} s was given after one that ends at {self._end / 1000} s: give them in order"
            )
        line = " ".join(text.split()).translate(ESCAPES)
        if not line:
            return
        last = max(last, first + 1)
        self._append(f"\n{timestamp(first)} --> {timestamp(last)}\n{line}\n")
        self._end = last

    def _append(self, text: str) -> None:
        content = text.encode("utf-8", errors="replace")
        size = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, content)
            if written < len(content):
                # The disk is full, and half a cue would spoil the file.
                os.ftruncate(self._file, size)
                raise VttError(
                    f"{self.path} cannot be written (the disk is full): free some room, or give another place"
                )
        except OSError as error:
            raise VttError(f"{self.path} cannot be written ({error.strerror}): give another place") from error

    def close(self) -> None:
        """Let go of the file; closing twice is harmless."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def timestamp(milliseconds: int) -> str:
    """3723004 -> 01:02:03.004; hours grow beyond two digits."""
    seconds, milliseconds = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}.{milliseconds:03}"
