"""Video files, one after the other: a bar over them, and those that cannot be read named and passed over."""

import sys
from types import TracebackType
from typing import Any, Self

from modicum.errors import ModicumError


class SomeFailed(ModicumError):
    """Files that could not be read, after the others were done."""


class FileBar:
    """A bar on stderr that moves on with every file, where somebody watches it. `notes` is a rich console there."""

    def __init__(self, notes: Any, total: int) -> None:
        from rich.progress import Progress

        self.notes, self.total, self.n_failed = notes, total, 0
        self._bar = Progress(console=notes, transient=True, disable=not sys.stderr.isatty())
        self._task = self._bar.add_task("videos", total=total)

    def advance(self) -> None:
        """Another file is done."""
        self._bar.advance(self._task)

    def failed(self, error: ModicumError) -> None:
        """Another file could not be read: say which, and count it."""
        self.advance()
        self.n_failed += 1
        self.notes.print(f"modicum: {error}", soft_wrap=True, markup=False)

    def hide(self) -> None:
        """Leave the terminal to what is about to be written there."""
        self._bar.stop()

    def show(self) -> None:
        self._bar.start()

    def check(self, done: str) -> None:
        """Raise SomeFailed if some could not be read; the others were `done`."""
        if self.n_failed:
            raise SomeFailed(f"{self.n_failed} of {self.total} videos could not be read, the others were {done}")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._bar.stop()
