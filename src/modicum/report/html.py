"""A report as one HTML file: pictures inlined, no scripts, and a policy by which a browser loads nothing else."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from modicum.errors import MissingExtraError
from modicum.report.images import data_uri, png, svg

# The first bytes of a file that say it is a report, and may be replaced by the next one.
MARK = '<!doctype html>\n<html lang="en" data-made-by="modicum">'
LAYOUT = re.compile(r"(^ {2,}|[ \t]*\n\s*)")
SOURCES = {
    "draft": "proposed by the draft, accepted by the target",
    "target": "put there by the target itself",
    "plain": "written without a draft",
}


@dataclass(frozen=True)
class Text:
    """A paragraph; `code` between backticks. A quiet one says what is missing, or how something was measured."""

    kind: ClassVar = "text"
    text: str
    quiet: bool = False


@dataclass(frozen=True)
class Table:
    """Cells as they are to be read; all columns but the first are numbers, flush right, unless named in `words`."""

    kind: ClassVar = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    words: Sequence[int] = (0,)


@dataclass(frozen=True)
class Bar:
    """One line of a bar chart: `share` of the full width, 0 to 1, and `value` as it is to be read."""

    name: str
    share: float
    value: str


@dataclass(frozen=True)
class Bars:
    kind: ClassVar = "bars"
    bars: Sequence[Bar]
    caption: str


@dataclass(frozen=True)
class Plot:
    """Data URIs by (dark, narrow): for light paper and dark, for a desk and a telephone."""

    kind: ClassVar = "plot"
    drawn: dict[tuple[bool, bool], str]
    alt: str
    caption: str


@dataclass(frozen=True)
class Strip:
    """Data URIs of a clip's frames in order of time, and lines of (name, text or `Tokens`) under them."""

    frames: Sequence[str]
    alt: str
    lines: Sequence[tuple[str, Any]]


@dataclass(frozen=True)
class Strips:
    """Clips, two side by side where there is room; `wide` ones have the whole width."""

    kind: ClassVar = "strips"
    strips: Sequence[Strip]
    wide: bool


@dataclass(frozen=True)
class Token:
    """`source` as in a `TokenEvent`: draft | target | plain; or prompt, which was given."""

    text: str
    source: str


@dataclass(frozen=True)
class Tokens:
    """A text by where its tokens came from. `code` keeps its line breaks in a fixed-width font."""

    kind: ClassVar = "tokens"
    tokens: Sequence[Token]
    label: str
    code: bool = False

    @property
    def runs(self) -> list[Token]:
        """What is shown alike; line breaks of code, with the next line's indentation, carry no mark."""
        pieces = [
            Token(piece, "space" if number % 2 else token.source)
            for token in self.tokens
            for number, piece in enumerate(LAYOUT.split(token.text) if self.code else [token.text])
        ]
        return [piece for piece in pieces if piece.text]


@dataclass
class Section:
    """One step of the story. Blocks are shown in the order in which they were added."""

    title: str
    name: str
    headline: tuple[str, str] | None = None
    blocks: list[Any] = field(default_factory=list)

    def figure(self, value: str, what: str) -> None:
        """The one measured figure to remember, shown above the blocks and at the beginning of the page."""
        self.headline = (value, what)

    def text(self, text: str, *, quiet: bool = False) -> None:
        """A paragraph of plain text; what is between backticks is set as code."""
        self.blocks.append(Text(text, quiet))

    def table(
        self, columns: Sequence[str], rows: Iterable[Sequence[object]], caption: str, words: Sequence[int] = (0,)
    ) -> None:
        """Rows of cells. Columns in `words` are flush left, the others are numbers and flush right."""
        self.blocks.append(Table(columns, [[str(cell) for cell in row] for row in rows], caption, words))

    def bars(self, bars: Iterable[tuple[str, float, str]], caption: str) -> None:
        """(name, number, number as it is to be read) each, in proportion to the largest number."""
        given = list(bars)
        most = max(number for _, number, _ in given)
        self.blocks.append(Bars([Bar(name, number / most, value) for name, number, value in given], caption))

    def plot(self, draw: Callable[[Any], None], alt: str, caption: str) -> None:
        """What `draw` puts on a matplotlib axis; it is called for light paper and dark, for a desk and a telephone.

        Without matplotlib a sentence stands in its place.
        """
        try:
            drawn = {
                (dark, narrow): data_uri(svg(draw, dark=dark, narrow=narrow), "svg+xml")
                for dark in (False, True)
                for narrow in (False, True)
            }
        except MissingExtraError as missing:
            self.text(f"No plot here: {missing}.", quiet=True)
            return
        self.blocks.append(Plot(drawn, alt, caption))

    def strips(self, strips: Sequence[Strip], *, wide: bool = False) -> None:
        """Clips as frames, see `strip`; `wide` gives each the whole width."""
        self.blocks.append(Strips(strips, wide))

    def tokens(self, tokens: Sequence[Token], label: str, *, code: bool = False) -> None:
        """A text whose tokens are coloured and underlined by where they came from."""
        self.blocks.append(Tokens(tokens, label, code))

    @property
    def sources(self) -> dict[str, str]:
        """What a legend has to explain here."""
        texts = [block for block in self.blocks if block.kind == "tokens"]
        for strip in (strip for block in self.blocks if block.kind == "strips" for strip in block.strips):
            texts += [value for _, value in strip.lines if isinstance(value, Tokens)]
        used = {token.source for text in texts for token in text.tokens}
        return {source: meaning for source, meaning in SOURCES.items() if source in used}


class Report:
    """Sections, then commands to try, as one page.

    Args:
        lead: a sentence or two under the title.
    """

    def __init__(self, title: str, lead: str) -> None:
        self.title, self.lead = title, lead
        self.sections: list[Section] = []
        self.commands: list[tuple[str, str]] = []
        self.facts: list[tuple[str, str]] = []

    def section(self, title: str) -> Section:
        """A new section at the end; its name in the page's address is made of its title."""
        name = f"{len(self.sections) + 1}-{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}"
        self.sections.append(Section(title, name))
        return self.sections[-1]

    def command(self, command: str, what: str) -> None:
        """A command for the closing list, and what it does."""
        self.commands.append((command, what))

    def fact(self, name: str, value: str) -> None:
        """A line at the very end: how, where and when the page was made."""
        self.facts.append((name, value))

    def render(self) -> str:
        """The page."""
        import jinja2

        templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        templates.filters["prose"] = prose
        page = templates.get_template("report.html.jinja").render(report=self)
        return f"{MARK}\n{page}\n</html>\n"

    def write(self, path: Path) -> None:
        """Write the page; it appears whole or not at all, in place of whatever was there."""
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.write_text(self.render(), encoding="utf-8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def strip(clip: Any, alt: str, lines: Sequence[tuple[str, Any]], most: int = 6) -> Strip:
    """A clip, uint8 [T, H, W, 3], as at most `most` frames evenly spread, the first and the last among them.

    Args:
        lines: (name, text) each, set under the frames; a text may be a list of `Token`.
    """
    shown = min(most, len(clip))
    places = [round(at * (len(clip) - 1) / max(1, shown - 1)) for at in range(shown)]
    images = [data_uri(png(clip[place]), "png") for place in places]
    said = [(name, Tokens(text, name) if isinstance(text, list) else text) for name, text in lines]
    return Strip(images, alt, said)


def is_report(path: Path) -> bool:
    """Whether a file is a report that modicum wrote, and so may be replaced by another."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MARK)) == MARK.encode()


def prose(text: str) -> Any:
    """HTML of plain text, with what is between backticks as code."""
    from markupsafe import Markup, escape

    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if number % 2 else escape(part) for number, part in enumerate(parts)
    )
