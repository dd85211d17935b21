"""What the demo's steps share: a heading, a bar, lines on the console, and a section of the report."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from modicum.report.html import Report, Section


class Story:
    """Steps in order, numbered. `quick` asks every step for as little as shows that it runs."""

    def __init__(self, report: Report, *, quick: bool) -> None:
        from rich.console import Console

        self.report, self.quick = report, quick
        self.console = Console(highlight=False, emoji=False)
        self.notes = Console(stderr=True, highlight=False, emoji=False)

    @contextmanager
    def step(self, title: str) -> Iterator["Step"]:
        """A step that lacks an optional dependency says so, on the console and in the report, and the next one begins."""
        from modicum.errors import MissingExtraError

        section = self.report.section(title)
        self.console.print(f"\n{len(self.report.sections)}  {title}", style="bold", markup=False)
        try:
            yield Step(self, section)
        except MissingExtraError as missing:
            self.say(str(missing))
            section.text(f"This step was left out: {missing}.", quiet=True)

    def say(self, line: str) -> None:
        self.console.print(f"   {line}", markup=False, soft_wrap=True)


class Step:
    """One step under way."""

    def __init__(self, story: Story, section: Section) -> None:
        self.story, self.section, self.quick, self.say = story, section, story.quick, story.say

    def headline(self, value: str, what: str, line: str | None = None) -> None:
        """The step's measured figure, for the report; and for the console, `line` where it says it in other words."""
        self.section.figure(value, what)
        self.say(line or f"{value} {what}")

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """A progress bar on stderr, where that is a terminal; yields what moves it on by one."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("  {task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        # Refreshed seldom: what is timed beneath it should have the processor for itself.
        hidden = not sys.stderr.isatty()
        with Progress(*columns, console=self.story.notes, disable=hidden, refresh_per_second=4) as progress:
            task = progress.add_task(what, total=total)
            yield lambda: progress.advance(task)


def timed(work: Any) -> tuple[float, Any]:
    """Seconds, and the result."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def tokens_seen(events: list[Any], row: int = 0) -> list[Any]:
    """A row's tokens for the report, of what `on_token` was called with."""
    from modicum.report.html import Token

    return [Token(event.text, event.source) for event in events if event.row == row]
