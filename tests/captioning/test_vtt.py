"""Subtitles as files: by hand, and read back by a parser that is not ours."""

import html
import os

import pytest
import webvtt

from modicum.captioning.vtt import VttError, VttWriter, timestamp
from modicum.errors import UsageError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "captions.vtt"


def test_the_file_by_hand(path):
    with VttWriter(path) as vtt:
        assert path.read_text() == "WEBVTT\n"
        vtt.add(0, 1.28, "a red square grows")
        vtt.add(1.28, 3723.0042, "x < y && y > z")
    assert path.read_text() == (
        "WEBVTT\n\n"
        "00:00:00.000 --> 00:00:01.280\na red square grows\n\n"
        "00:00:01.280 --> 01:02:03.004\nx &lt; y &amp;&amp; y &gt; z\n"
    )


def test_times():
    assert timestamp(0) == "00:00:00.000"
    assert timestamp(59_999) == "00:00:59.999"
    assert timestamp(3_600_000 * 123 + 61_007) == "123:01:01.007"


HOSTILE = [
    "one\n\ntwo",
    "NOTE this is no comment",
    "00:00:00.000 --> 00:00:09.000",
    "\r\nWEBVTT\r\n\r\n",
    "<v Mary>Hello</v> &amp; \ttabs",
    "STYLE\n::cue { color: red }",
    "null \0 and half a pair \ud83d",
    "mañana ☀\N{LINE SEPARATOR}next",
]


def test_another_parser_reads_what_was_said(path):
    with VttWriter(path) as vtt:
        for second, text in enumerate(HOSTILE):
            vtt.add(second, second + 0.5, text)
        vtt.add(10, 11, " \n ")  # says nothing, and is no cue
    cues = webvtt.read(path)
    said = [" ".join(text.replace("\0", "\ufffd").replace("\ud83d", "?").split()) for text in HOSTILE]
    # The raw text keeps tags; the parser's own `text` would take `<v Mary>` out if it had not been escaped.
    assert [html.unescape(cue.raw_text) for cue in cues] == said
    assert [html.unescape(cue.text) for cue in cues] == said
    assert [(cue.start_in_seconds, cue.end_in_seconds) for cue in cues] == [(s, s) for s in range(len(HOSTILE))]
    assert cues[1].start == "00:00:01.000"
    assert cues[1].end == "00:00:01.500"


def test_the_other_parser_notices_a_cue_that_is_not_escaped(path):
    path.write_text(
        f"WEBVTT\n\n00:00:00.000 --> 00:00:01.000\n{HOSTILE[0]}\n\n00:00:01.000 --> 00:00:02.000\n{HOSTILE[4]}\n"
    )
    cues = webvtt.read(path)
    assert [cue.text for cue in cues] == ["one", "Hello &amp; \ttabs"]


def test_cues_never_overlap(path):
    with VttWriter(path) as vtt:
        vtt.add(0, 2.0, "first")
        vtt.add(0.5, 2.5, "second")  # the part that is new
        vtt.add(2.4, 2.5004, "third")  # within the last one, up to rounding
        with pytest.raises(UsageError, match=r"ends at 2\.0 s was given after one that ends at 2\.501 s"):
            vtt.add(0, 2.0, "again")
    times = [(cue.start, cue.end) for cue in webvtt.read(path)]
    assert times == [
        ("00:00:00.000", "00:00:02.000"),
        ("00:00:02.000", "00:00:02.500"),
        ("00:00:02.500", "00:00:02.501"),
    ]


@pytest.mark.parametrize("times", [(-1, 2), (2, 1), (0, float("nan")), (0, float("inf"))])
def test_times_that_are_none_are_refused(path, times):
    with VttWriter(path) as vtt, pytest.raises(UsageError, match="times must be positive"):
        vtt.add(*times, "text")
    assert path.read_text() == "WEBVTT\n"


def test_a_cue_is_one_write_and_half_of_one_is_taken_back(path, monkeypatch):
    writes = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, content: writes.append(content) or write(file, content))
    vtt = VttWriter(path)
    vtt.add(0, 1, "kept")
    assert writes == [b"WEBVTT\n", b"\n00:00:00.000 --> 00:00:01.000\nkept\n"]
    monkeypatch.setattr(os, "write", lambda file, content: write(file, content[:9]))
    with pytest.raises(VttError, match="the disk is full"):
        vtt.add(1, 2, "lost")
    monkeypatch.undo()
    vtt.add(1, 2, "found")
    vtt.close()
    vtt.close()
    assert [cue.text for cue in webvtt.read(path)] == ["kept", "found"]


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(VttError, match="cannot be written"):
        VttWriter(tmp_path)
