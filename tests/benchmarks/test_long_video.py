"""The benchmark of long videos runs at toy size, knows what its videos show, and notices memory that grows."""

import argparse
import sys

import pytest

import modicum
from benchmarks import long_video
from tests.captioning.watching import captioner


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "captioner"
    modicum.save(captioner(), folder)
    return folder


def test_runs_and_writes_the_table(model, tmp_path, capsys):
    out = tmp_path / "result.md"
    # Eleven windows of 12 frames in 5.28 s.
    sizes = ["--minutes", "0.088", "--stride", "2", "--max-new-tokens", "2"]
    long_video.main([str(model), *sizes, "--out", str(out)])
    text = out.read_text()
    assert capsys.readouterr().out == text
    ((*cells, early, peak),) = [line.split("|")[2:-1] for line in text.splitlines() if line.startswith("|")][2:]
    assert [cell.strip() for cell in cells[:3]] == ["132", "11", "0.0%"]
    assert 100 < float(early) <= float(peak)


def test_what_is_said_of_a_window_is_compared_with_its_scene(model, tmp_path, monkeypatch):
    video = tmp_path / "clip.mp4"
    long_video.write_video(video, 3, 6, 48)
    options = argparse.Namespace(model=model, draft=None, stride=1, every=None, max_new_tokens=2)
    first, _, third = (scene.caption for scene, _ in zip(long_video.scenes(), range(3), strict=False))
    said = iter([first, "something else", third])

    def told(*_, **__):
        for start in range(3):
            yield argparse.Namespace(start=start, end=start + 1, text=next(said))

    monkeypatch.setattr(long_video.api, "caption_windows", told)
    found = long_video.watch(options, video)
    assert (found["windows"], found["right"]) == (3, 2 / 3)
    assert video.with_suffix(".vtt").read_text().count("-->") == 3


def test_memory_that_grows_ends_the_run(model, monkeypatch, capsys):
    rows = [
        {"minutes": minutes, "frames": 1, "windows": 1, "seconds": 1, "early": 1, "right": None} for minutes in (30, 3)
    ]
    peaks = {3: 100, 30: 111}
    monkeypatch.setattr(long_video, "measure", lambda *_: ({**row, "peak": peaks[row["minutes"]]} for row in rows))
    with pytest.raises(SystemExit, match=r"30\.0 minutes take more memory than 3\.0"):
        long_video.main([str(model)])
    peaks[30] = 109
    long_video.main([str(model)])
    assert "| 30.0 | 1 | 1 |  | 1.0 |" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own record of the peak")
def test_the_peak_is_this_process_s_own():
    before = long_video.peak_bytes()
    held = bytearray(before + (64 << 20))
    held[::4096] = b"\1" * len(held[::4096])
    assert long_video.peak_bytes() >= before + (64 << 20)
