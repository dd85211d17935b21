"""`modicum classify` as a user runs it: files, failures, JSON, sheets and streams."""

import json
import sys

import pytest

import modicum
from modicum.cli import main
from tests.classification.small import small
from tests.video.clips import write_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model with labels, a clip and a broken file."""
    folder = tmp_path_factory.mktemp("classify")
    model = small()
    model.labels = ["jump", "run", "sit", "swim", "wave"]
    modicum.save(model, folder / "model")
    write_video(folder / "clip.mp4", 30)
    (folder / "broken.mp4").write_bytes(b"not a video")
    return folder


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["modicum", "classify", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main.run()
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


def test_names_what_a_video_shows(folder, monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, folder / "model", folder / "clip.mp4", "--top", 2)
    best = modicum.classify(modicum.load(folder / "model"), folder / "clip.mp4")[0]
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == str(folder / "clip.mp4")
    assert out.splitlines()[1].split() == [f"{best.score:.1%}", best.label]
    assert len(out.splitlines()) == 3


def test_json_is_a_list_per_video_and_null_where_one_failed(folder, monkeypatch, capsys):
    videos = [folder / name for name in ("clip.mp4", "broken.mp4", "clip.mp4")]
    code, out, err = run(monkeypatch, capsys, folder / "model", *videos, "--views", "2x3", "--top", 3, "--json")
    first, failed, again = json.loads(out)
    assert code == 1
    assert failed is None
    assert first == again
    assert [set(prediction) for prediction in first] == [{"label", "index", "score"}] * 3
    broken, count = err.splitlines()
    assert broken.startswith(f"modicum: {folder / 'broken.mp4'} is not a video")
    assert count == "modicum: 1 of 3 videos could not be read, the others were classified"


def test_a_sheet_shows_the_frames(folder, tmp_path, monkeypatch, capsys):
    sheet = tmp_path / "sheet.png"
    arguments = [folder / "model", folder / "clip.mp4", "--views", "2x3", "--frames-sheet", sheet]
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 0
    assert err.strip() == f"frames in {sheet}"
    assert sheet.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert "sheet.png exists: choose another" in err


def test_a_stream_is_a_line_per_window(folder, monkeypatch, capsys):
    stream = [folder / "model", "--stream", folder / "clip.mp4", "--every", 0.5, "--stride", 1]
    code, out, err = run(monkeypatch, capsys, *stream, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    # Half a second is 6 tubelets of 2 frames at 25 fps; a window has 6 frames and the clip 30.
    assert (code, err) == (0, "")
    assert [line["start"] for line in lines] == pytest.approx([0, 0.48, 0.96])
    assert [line["end"] for line in lines] == pytest.approx([0.2, 0.68, 1.16])
    code, out, _ = run(monkeypatch, capsys, *stream)
    label = lines[0]["predictions"][0]["label"]
    assert out.splitlines()[0].split()[:5] == ["0.00", "-", "0.20", "s", label]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["model", "clip.mp4", "--views", "4x"], "--views 4x is not temporal views x crops: write 4x1, or 4x3"),
        (["model", "clip.mp4", "--views", "4x2"], "2 spatial crops were asked for: choose 1 or 3"),
        (["model", "clip.mp4", "clip.mp4", "--stream"], "--stream reads one video and draws no sheet: give one"),
        (
            ["model", "clip.mp4", "clip.mp4", "--frames-sheet", "s.png"],
            "--frames-sheet draws one video and 2 were given",
        ),
        (["model", "clip.mp4", "--short-side", "20"], "a shorter side of 20 is less than the model's 48"),
        (["modicum-code-draft", "clip.mp4"], "Decoder is not a video classifier: give a ViViT"),
    ],
)
def test_refusals_are_one_line(arguments, sentence, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "")
    assert sentence in err
    assert len(err.splitlines()) == 1
