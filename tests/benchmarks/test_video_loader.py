"""The benchmark of the video loader runs at toy size, in this process and beside it."""

import pytest

from benchmarks import video_loader


def test_the_table():
    lines = video_loader.table([(0, 0, 12.34, 0.976, None), (2, 0.5, 16, 0.004, 345.6)])
    assert lines[2:] == ["| 0 | 0 | 12.3 | 98% |  |", "| 2 | 0.5 | 16.0 | 0% | 346 |"]


def test_it_measures(capsys):
    options = ["--videos", "3", "--seconds", "0.4", "--side", "48", "--size", "32", "--frames", "3", "--batch", "2"]
    video_loader.main([*options, "--batches", "3", "--workers", "0", "1", "--steps", "0", "0.05"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row[:2] for row in rows[2:]] == [["0", "0"], ["0", "0.05"], ["1", "0"], ["1", "0.05"]]
    assert all(float(row[2]) > 0 for row in rows[2:])
    assert float(rows[3][2]) < 2 / 0.05, "a step sleeps"
    with pytest.raises(SystemExit):
        video_loader.main(["--videos", "3"])
