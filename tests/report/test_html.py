"""The report: well-formed, escaped, complete in itself, and replaced only by its own kind."""

import base64
import re
import sys
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from modicum.report.html import Report, Section, Token, Tokens, is_report, strip
from modicum.report.images import png
from tests.report.pages import HOSTILE, clip, full_report

VOID = {"meta", "link", "img", "source", "br"}
LOADS = {"src", "srcset", "href", "action", "poster", "data", "formaction", "xlink:href"}


class Page(HTMLParser):
    """Elements in order, with their text; complains of those that are not closed in the order in which they were opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[int] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute of {tag} was given twice"
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_endtag(self, tag):
        assert self.open, f"{tag} was never opened"
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data):
        for place in self.open:
            self.texts[place] += data

    def of(self, tag):
        return [(attrs, text) for (name, attrs), text in zip(self.elements, self.texts, strict=True) if name == tag]


@pytest.fixture(scope="module")
def text():
    return full_report().render()


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_parser_finds_what_is_wrong():
    for broken in ("<p><b></p></b>", "<p>", "<p a=1 a=2></p>", "</p>"):
        with pytest.raises(AssertionError):
            Page(broken)


def test_nothing_is_loaded_and_nothing_runs(page, text):
    assert not page.of("script")
    assert not re.search(r"url\(|@import|<(iframe|object|embed|base)\b", text)
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in LOADS & set(attributes):
            assert re.match(r"data:image/|#", attributes[name] or ""), (tag, name)
    (policy,) = [attrs["content"] for attrs, _ in page.of("meta") if "http-equiv" in attrs]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_text_is_shown_as_given(page):
    shown = HOSTILE.replace("`", "")
    assert page.of("h1")[0][1] == f"A title {HOSTILE}"
    assert f"A paragraph. {shown}" in [text for _, text in page.of("p")]
    assert HOSTILE in [text for _, text in page.of("td")]
    assert HOSTILE in [text for _, text in page.of("dd")]
    assert [text for _, text in page.of("code")].count("code <b>") == 5
    assert f"Frames {HOSTILE}" in [attrs.get("aria-label") for attrs, _ in page.of("div")]


def test_structure(page):
    """Headings in order, links that lead somewhere, pictures that are described."""
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels == [1, 2, 2, 2]
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert "1-watch-read" in ids
    for attrs, _ in page.of("a"):
        assert attrs["href"][1:] in ids
    for _, attrs in page.elements:
        assert attrs.get("aria-labelledby", ids[0]) in ids
    assert all("alt" in attrs for attrs, _ in page.of("img"))
    assert [attrs["alt"] for attrs, _ in page.of("img") if attrs.get("class") == "plot"] == [f"A curve {HOSTILE}"]


def test_bars_are_in_proportion(page):
    assert [attrs["style"] for attrs, _ in page.of("span") if attrs.get("class") == "bar"] == [
        "width: 100.00%",
        "width: 40.00%",
    ]


def test_tokens_carry_their_source(page):
    found = [(attrs["class"], text) for attrs, text in page.of("span") if attrs.get("class", "").startswith("token ")]
    assert ("token draft", "two ") in found
    assert ("token target", "red ") in found
    # Code is marked but for line breaks and indentation, and in all it is what was written.
    code = [
        ("prompt", "def f():"),
        ("space", "\n    "),
        ("draft", "return"),
        ("space", "\n\n  "),
        ("target", "x" * 300),
    ]
    at = found.index(("token prompt", "def f():"))
    assert found[at : at + 5] == [(f"token {source}", piece) for source, piece in code]
    assert not [piece for _, piece in found if not piece]


def test_layout_of_code_loses_nothing():
    pieces = ["    x", "a\n\n   b", " c", "\t\n", "d  \n e", "  "]
    tokens = Tokens([Token(piece, "draft") for piece in pieces], "", code=True)
    assert "".join(run.text for run in tokens.runs) == "".join(pieces)
    assert [run.source for run in tokens.runs if run.text.strip()] == ["draft"] * 6
    assert [run.text for run in Tokens(tokens.tokens, "").runs] == pieces


def test_legend_explains_what_is_there():
    section = Section("", "")
    section.tokens([Token("a", "prompt"), Token("b", "draft")], "")
    assert list(section.sources) == ["draft"]
    section.strips([strip(clip(), "", [("written", [Token("c", "plain")])])])
    assert list(section.sources) == ["draft", "plain"]


def decoded(content: bytes) -> np.ndarray:
    """The pixels of a PNG as this project writes them, by the specification's own words: chunk by chunk, rows unfiltered."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    at, data, kinds = 8, b"", []
    while at < len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        assert int.from_bytes(content[at + 8 + length : at + 12 + length], "big") == zlib.crc32(kind + body)
        kinds.append(kind)
        if kind == b"IHDR":
            width, height = int.from_bytes(body[:4], "big"), int.from_bytes(body[4:8], "big")
            assert body[8:] == bytes([8, 2, 0, 0, 0])
        elif kind == b"IDAT":
            data += zlib.decompress(body)
        at += 12 + length
    assert kinds == [b"IHDR", b"IDAT", b"IEND"]
    rows = np.frombuffer(data, np.uint8).reshape(height, 1 + 3 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


@pytest.mark.parametrize("of", [np.asarray, torch.from_numpy])
def test_png(of):
    pixels = clip()[3]
    assert (decoded(png(of(pixels))) == pixels).all()
    for wrong in (pixels[..., :2], pixels.astype(np.float32)):
        with pytest.raises(ValueError, match="a picture is uint8"):
            png(of(wrong))


def test_png_is_read_by_others():
    image = pytest.importorskip("matplotlib.image")
    import io

    assert (np.round(255 * image.imread(io.BytesIO(png(clip()[2])))) == clip()[2]).all()


@pytest.mark.parametrize(("frames", "places"), [(7, [0, 2, 4, 6]), (4, [0, 1, 2, 3]), (2, [0, 1]), (1, [0])])
def test_strip_spreads_over_the_clip(frames, places):
    images = strip(clip(frames), "", [], most=4).frames
    first = [decoded(base64.b64decode(image.split(",")[1]))[0, 0, 0] for image in images]
    assert first == places


def test_plot_is_drawn_for_both_papers_and_widths():
    section = Section("", "")
    seen = []

    def draw(axis):
        seen.append((axis.xaxis.label.get_color(), axis.figure.get_figwidth()))
        axis.plot([1, 2])

    section.plot(draw, "", "")
    (plot,) = section.blocks
    assert len(set(seen)) == len(set(plot.drawn.values())) == 4
    again = Section("", "")
    again.plot(draw, "", "")
    assert again.blocks == section.blocks  # the same figures make the same page


def test_without_matplotlib_a_sentence_stands_in_its_place(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    section = Section("", "")
    section.plot(lambda axis: None, "", "")
    assert "pip install 'modicum[plot]'" in section.blocks[0].text


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    report = full_report()
    report.write(path)
    assert path.read_text() == report.render()
    assert is_report(path)
    monkeypatch.setattr(Report, "render", lambda self: "\ud800")  # cannot be encoded
    with pytest.raises(UnicodeEncodeError):
        report.write(path)
    assert is_report(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ["", "<!doctype html>\n<html lang=en>", "text"])
def test_other_files_are_no_reports(tmp_path, content):
    path = tmp_path / "page.html"
    assert not is_report(path)
    path.write_text(content)
    assert not is_report(path)
    assert not is_report(tmp_path)
