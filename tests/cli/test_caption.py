"""`modicum caption` as a user runs it: files, failures, JSON, sheets, streams, subtitles, Ctrl-C."""

import json
import sys
from itertools import pairwise

import pytest
import webvtt

import modicum
from modicum.cli import main
from tests.captioning.watching import captioner, draft_for, writer
from tests.video.clips import write_video

SHORT = ["--max-new-tokens", 7]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A captioner, drafts for it, a classifier, clips and a broken file."""
    folder = tmp_path_factory.mktemp("caption")
    model = captioner()
    modicum.save(model, folder / "model")
    modicum.save(draft_for(model), folder / "draft")
    modicum.save(writer(1), folder / "text")
    modicum.save(captioner(seed=5), folder / "stranger")
    write_video(folder / "clip.mp4", 30)
    write_video(folder / "other.mp4", [200, 100] * 15)
    (folder / "broken.mp4").write_bytes(b"not a video")
    return folder


@pytest.fixture
def call(folder, monkeypatch, capsys):
    """Exit code, stdout and stderr of a command in that folder."""
    monkeypatch.chdir(folder)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["modicum", "caption", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main.run()
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return run


def line(text):
    """As it is printed where no one watches."""
    return " ".join(text.split())


def expected(folder, videos, **settings):
    return modicum.caption(modicum.load(folder / "model"), videos, max_new_tokens=7, **settings)


def test_one_video_is_a_line(folder, call):
    code, out, err = call("model", "clip.mp4", *SHORT)
    assert code == 0
    assert out == line(expected(folder, "clip.mp4").texts[0]) + "\n"
    assert "tokens/s" in err


def test_several_are_named_and_broken_ones_passed_over(folder, call):
    code, out, err = call("model", "clip.mp4", "broken.mp4", "other.mp4", *SHORT)
    first, second = expected(folder, ["clip.mp4", "other.mp4"]).texts
    assert code == 1
    assert first != second
    assert out == f"clip.mp4\n{line(first)}\nother.mp4\n{line(second)}\n"
    assert err.startswith("modicum: broken.mp4 is not a video")
    assert err.endswith("modicum: 1 of 3 videos could not be read, the others were captioned\n")


def test_json_has_an_entry_per_video(folder, call):
    code, out, err = call("model", "clip.mp4", "broken.mp4", "--stride", 3, "--fps", 12.5, "--json", *SHORT)
    first, broken = json.loads(out)
    alone = expected(folder, "clip.mp4", stride=3, fps=12.5)
    assert code == 1
    assert {key: first[key] for key in ("video", "text", "tokens")} == {
        "video": "clip.mp4",
        "text": alone.texts[0],
        "tokens": alone.tokens[0],
    }
    assert first["stats"]["tokens"] == len(alone.tokens[0])
    assert broken == {"video": "broken.mp4", "error": err.splitlines()[0].removeprefix("modicum: ")}


@pytest.mark.parametrize("draft", ["draft", "text", "ngram", "self:1"])
def test_every_draft_gives_the_same_words(call, draft):
    videos = ["clip.mp4", "other.mp4", "--json", *SHORT]
    plain = json.loads(call("model", *videos)[1])
    code, out, _ = call("model", *videos, "--draft", draft, "-k", 3)
    drafted = json.loads(out)
    assert code == 0
    assert [video["tokens"] for video in drafted] == [video["tokens"] for video in plain]
    assert sum(video["stats"]["draft_calls"] for video in drafted) > 0 or draft == "ngram"
    assert (call("model", *videos, "--draft", draft, "-k", "auto")[0]) == 0


def test_a_prompt_is_gone_on_with_and_a_seed_repeats(folder, call):
    code, out, _ = call("model", "clip.mp4", "--prompt", "a red", *SHORT)
    assert code == 0
    assert (
        out
        == line(expected(folder, "clip.mp4", prompt="a red").texts[0]) + "\n"
        != call("model", "clip.mp4", *SHORT)[1]
    )
    hot = ["model", "clip.mp4", "clip.mp4", "--temperature", 1.5, "--json", *SHORT]
    one, again, other = (json.loads(call(*hot, "--seed", seed)[1]) for seed in (4, 4, 5))
    assert [video["tokens"] for video in one] == [video["tokens"] for video in again]
    assert one[0]["tokens"] != one[1]["tokens"]  # each draws from a stream of its own
    assert one[0]["tokens"] != other[0]["tokens"]


def test_a_sheet_shows_frames_and_captions(call, tmp_path, monkeypatch):
    from modicum.report import figures

    drawn = []
    frames_sheet = figures.frames_sheet
    monkeypatch.setattr(
        figures, "frames_sheet", lambda *given, **named: drawn.append((given, named)) or frames_sheet(*given, **named)
    )
    sheet = tmp_path / "sheet.png"
    code, out, err = call("model", "clip.mp4", "broken.mp4", "other.mp4", "--sheet", sheet, *SHORT)
    assert code == 1
    assert f"frames in {sheet}" in err
    assert sheet.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    ((given, named),) = drawn
    assert given[0].shape == (2, 6, 48, 48, 3)
    assert named["captions"] == out.splitlines()[1::2]
    code, _, err = call("model", "clip.mp4", "--sheet", sheet)
    assert code == 2
    assert "sheet.png exists: choose another" in err


# 0.24 s are 6 frames of 25 a second, and the videos have 30.
STREAM = ["--window", 0.24, "--every", 0.48, *SHORT]


def test_a_stream_is_a_line_per_window(folder, call):
    code, out, _ = call("model", "clip.mp4", *STREAM)
    lines = out.splitlines()
    assert code == 0
    assert [entry[:22] for entry in lines] == [
        "    0.00 -     0.20 s ",
        "    0.48 -     0.68 s ",
        "    0.96 -     1.16 s ",
    ]
    code, out, err = call("model", "clip.mp4", "broken.mp4", *STREAM, "--json")
    first, broken = json.loads(out)
    assert code == 1
    assert [round(window["start"], 2) for window in first["windows"]] == [0, 0.48, 0.96]
    assert [line(window["text"]) for window in first["windows"]] == [entry[23:] for entry in lines]
    assert set(first["windows"][0]) == {"start", "end", "text", "tokens", "stats"}
    assert broken["windows"] == []
    assert broken["error"] in err


def test_subtitles_say_the_same_without_overlap(folder, call, tmp_path):
    subtitles = tmp_path / "clip.vtt"
    arguments = ["model", "clip.mp4", "--vtt", subtitles, "--stride", 1, "--hop", 0.16, *SHORT]
    code, out, _ = call(*arguments)
    assert code == 0
    cues = list(webvtt.read(subtitles))
    said = [entry[23:] for entry in out.splitlines()]
    assert len(said) == 7
    assert [cue.text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") for cue in cues] == [
        text for text in said if text
    ]
    assert [(cue.start, cue.end) for cue in cues][:2] == [
        ("00:00:00.000", "00:00:00.200"),
        ("00:00:00.200", "00:00:00.360"),  # the window begins at 0.16
    ]
    assert all(before.end <= after.start for before, after in pairwise(cues))
    assert "exists: choose another" in call(*arguments)[2]
    assert call(*arguments, "--force")[0] == 0


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_keeps_what_is_finished(call, tmp_path, monkeypatch, as_json):
    from modicum import api

    caption, calls = api.caption, []

    def interrupted(*given, **named):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return caption(*given, **named)

    monkeypatch.setattr(api, "caption", interrupted)
    subtitles = tmp_path / "clip.vtt"
    code, out, err = call("model", "clip.mp4", *STREAM[2:], "--vtt", subtitles, "--stride", 1, *["--json"] * as_json)
    assert code == 130
    assert err.endswith("modicum: interrupted\n")
    texts = [w["text"] for w in json.loads(out)[0]["windows"]] if as_json else [x[23:] for x in out.splitlines()]
    assert len(texts) == 2
    assert len(webvtt.read(subtitles)) == sum(line(text) != "" for text in texts)
    calls.clear()
    code, out, _ = call("model", "clip.mp4", "other.mp4", "clip.mp4", *SHORT, *["--json"] * as_json)
    assert code == 130
    assert len(json.loads(out) if as_json else out.splitlines()[1::2]) == 2


def test_a_terminal_sees_tokens_as_they_come(folder, call, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    code, out, err = call("model", "clip.mp4", "--draft", "draft", *SHORT)
    assert code == 0
    assert "\x1b[32m" in out or "\x1b[33m" in out
    assert "drafted and accepted" in err
    code, plain, _ = call("model", "clip.mp4", "--draft", "draft", "--no-color", *SHORT)
    assert "\x1b[3" not in plain
    assert plain == expected(folder, "clip.mp4").texts[0] + "\n"
    _, out, _ = call("model", "clip.mp4", "--no-color", *STREAM)
    assert out.startswith("    0.00 -     0.20 s  ")


def test_the_help_teaches(call):
    code, out, _ = call("--help")
    assert code == 0
    for word in ("--draft", "--vtt", "--stream", "Examples", "modicum caption ./captioner clip.mp4"):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["text", "clip.mp4"], "Decoder writes no captions: give a captioner"),
        (
            ["model", "clip.mp4", "other.mp4", "--vtt", "a.vtt"],
            "--vtt holds the subtitles of one video and 2 were given",
        ),
        (["model", "clip.mp4", "--window", "1", "--stride", "2"], "--window and --stride both say how long"),
        (["model", "clip.mp4", "--sheet", "s.png", "--stream"], "--sheet draws the frames of whole files"),
        (["model", *["clip.mp4"] * 25, "--sheet", "s.png"], "--sheet has room for 24 videos and 25 were given"),
        (["model", "clip.mp4", "--draft", "draft", "-k", "0"], "-k 0 drafts nothing"),
        (["model", "clip.mp4", "--draft", "stranger"], "the draft was trained on another encoder's output"),
        (["model", "clip.mp4", "--every", "0"], "`every` is 0.0: give a positive number of seconds"),
        (["model", "clip.mp4", "--window", "0.01"], "a window of 0.01 s holds 0.2 frames at 25 fps"),
        (["model", "clip.mp4", "--prompt", "", "--json"], "prompt 0 is empty"),
        (["model", "clip.mp4", "--every", "0", "--json"], "`every` is 0.0: give a positive number of seconds"),
        (["model", "clip.mp4", "--short-side", "20"], "a shorter side of 20 is less than the model's 48"),
    ],
)
def test_refusals_are_one_line(arguments, sentence, call):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert sentence in err
    assert len(err.splitlines()) == 1
