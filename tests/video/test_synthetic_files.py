"""Data sets of our own clips: whole or not at all, the same from any number of processes, used again if they are there."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import modicum.video.synthetic.files as files
from modicum.errors import UsageError
from modicum.video.read import Video
from modicum.video.synthetic import (
    CAPTIONS,
    LABELS,
    MOTION_LABELS,
    Event,
    Scene,
    facts_of,
    labelled_clip,
    write_captioned,
    write_clip,
    write_dataset,
)
from modicum.video.synthetic.scenes import COLOURS

SMALL: dict[str, Any] = {"per_class": {"train": 3, "held_out": 2}, "num_frames": 5, "side": 18}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def decoded(path: Path) -> np.ndarray:
    with Video(path, fps=None) as video:
        return video.frames(range(video.n_frames)).numpy()


def test_a_folder_per_split_and_class(tmp_path: Path) -> None:
    labels = ["moves up", "shows a 7"]
    folder = write_dataset(tmp_path / "new" / "clips", **SMALL, labels=labels, seed=3)
    assert folder == tmp_path / "new" / "clips"
    names = {
        f"{split}/{label}/{i:05d}.mp4" for split, n in SMALL["per_class"].items() for label in labels for i in range(n)
    }
    assert set(contents(folder)) == names | {"settings.json"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["clips"], "something was left beside it"
    with Video(folder / "train" / "moves up" / "00000.mp4") as video:
        assert (video.info.fps, video.n_frames, video.info.width, video.info.height) == (25.0, 5, 18, 18)


def test_no_two_clips_are_alike(tmp_path: Path) -> None:
    videos = [c for name, c in contents(write_dataset(tmp_path / "a", **SMALL)).items() if name.endswith("mp4")]
    assert len(set(videos)) == len(videos) == 5 * len(LABELS)


@pytest.mark.parametrize("side", [18, 32, 36])
def test_coding_is_the_same_every_time(tmp_path: Path, side: int) -> None:
    clip = labelled_clip(np.random.default_rng(0), "moves left", 16, side)
    coded = set()
    for _ in range(25):
        write_clip(tmp_path / "clip.mp4", clip)
        coded.add((tmp_path / "clip.mp4").read_bytes())
    assert len(coded) == 1


def test_what_is_read_is_what_was_drawn(tmp_path: Path) -> None:
    clip = labelled_clip(np.random.default_rng(0), "moves left", 16, 32)
    write_clip(tmp_path / "clip.mp4", clip)
    # Noise of 5 is what coding takes away first; every frame is nearest to itself all the same.
    read = decoded(tmp_path / "clip.mp4").astype(float)
    distances = np.abs(read[:, None] - clip).mean(axis=(2, 3, 4))
    assert distances.diagonal().max() < 8
    assert (distances.argmin(axis=1) == np.arange(16)).all()


def test_frames_may_come_one_by_one(tmp_path: Path) -> None:
    clip = labelled_clip(np.random.default_rng(0), "moves left", 6, 20)
    write_clip(tmp_path / "whole.mp4", clip)
    write_clip(tmp_path / "stream.mp4", (frame for frame in clip))
    assert (tmp_path / "whole.mp4").read_bytes() == (tmp_path / "stream.mp4").read_bytes()
    with pytest.raises(UsageError, match="was given no frames to hold"):
        write_clip(tmp_path / "none.mp4", [])


@pytest.mark.parametrize("captioned", [False, True])
def test_any_number_of_processes_writes_the_same(tmp_path: Path, captioned: bool) -> None:
    def write(folder: str, seed: int, workers: int) -> dict[str, bytes]:
        if captioned:
            return contents(
                write_captioned(
                    tmp_path / folder, {"train": 20, "held_out": 13}, num_frames=4, side=16, seed=seed, workers=workers
                )
            )
        return contents(
            write_dataset(tmp_path / folder, {"train": 3}, num_frames=4, side=16, seed=seed, workers=workers)
        )

    one, two, other = write("one", 0, 1), write("two", 0, 2), write("other", 1, 1)
    assert one == two
    assert one.keys() == other.keys()
    assert not any(one[name] == other[name] for name in one)


def test_a_clip_does_not_depend_on_what_else_is_written(tmp_path: Path) -> None:
    every = contents(write_dataset(tmp_path / "every", **SMALL))
    few = contents(write_dataset(tmp_path / "few", **SMALL | {"per_class": {"held_out": 1}}, labels=["moves right"]))
    name = "held_out/moves right/00000.mp4"
    assert few[name] == every[name]


def test_a_shuffled_control_has_the_same_frames_in_another_order(tmp_path: Path) -> None:
    settings = SMALL | {"per_class": {"train": 1}, "num_frames": 9, "side": 32}
    plain = write_dataset(tmp_path / "plain", **settings, labels=MOTION_LABELS)
    mixed = write_dataset(tmp_path / "mixed", **settings, labels=MOTION_LABELS, shuffled=True)
    orders = []
    for label in MOTION_LABELS:
        one, other = (decoded(f / "train" / label / "00000.mp4").astype(float) for f in (plain, mixed))
        nearest = np.abs(one[:, None] - other).mean(axis=(2, 3, 4)).argmin(axis=0)
        assert sorted(nearest) == list(range(9))
        orders.append(nearest.tolist())
    assert list(range(9)) not in orders


def test_what_is_there_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_dataset(tmp_path / "clips", **SMALL)
    before = contents(folder)
    monkeypatch.setattr(files, "write_clip", lambda *_: pytest.fail("it was written again"))
    assert write_dataset(folder, **SMALL) == folder
    assert contents(folder) == before


def test_progress_is_shown_on_a_terminal_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "quiet", **SMALL)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    write_dataset(tmp_path / "shown", **SMALL)
    out, err = capsys.readouterr()
    assert out == ""
    assert "clips for shown" in err
    assert "60/60" in err


def test_other_settings_are_refused_and_replaced_when_asked(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "clips", **SMALL)
    before = contents(folder)
    with pytest.raises(
        UsageError, match=r"was written with other settings \(side, seed\): give a new folder, or overwrite=True"
    ):
        write_dataset(folder, **SMALL | {"side": 20}, seed=9)
    assert contents(folder) == before
    write_dataset(folder, **SMALL | {"side": 20}, seed=9, overwrite=True)
    assert contents(folder).keys() == before.keys()
    assert decoded(folder / "train" / "moves up" / "00001.mp4").shape == (5, 20, 20, 3)


def test_an_incomplete_data_set_is_not_used(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "clips", **SMALL)
    before = contents(folder)
    (folder / "train" / "moves up" / "00001.mp4").unlink()
    with pytest.raises(UsageError, match="lacks 1 of its 60 clips"):
        write_dataset(folder, **SMALL)
    write_dataset(folder, **SMALL, overwrite=True)
    assert contents(folder) == before


def test_a_folder_of_someone_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday.mp4").write_bytes(b"dear")
    (tmp_path / "settings.json").write_text('["mine"]')
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="holds something other than clips made here: give a new folder"):
            write_dataset(tmp_path, **SMALL, overwrite=overwrite)
    assert (tmp_path / "holiday.mp4").read_bytes() == b"dear"
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="holds something other"):
        write_dataset(tmp_path / "file", **SMALL)
    (tmp_path / "empty").mkdir()
    assert contents(write_dataset(tmp_path / "empty", **SMALL))


@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_data_set_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    folder = tmp_path / "clips"
    if there:
        write_dataset(folder, **SMALL)
    before = contents(tmp_path)
    written: list[Path] = []

    def fail(path: Path, frames: np.ndarray) -> None:
        if len(written) == 17:
            raise KeyboardInterrupt
        written.append(path)
        write_clip(path, frames)

    monkeypatch.setattr(files, "write_clip", fail)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(folder, **SMALL, seed=1, overwrite=True)
    assert len(written) == 17
    assert contents(tmp_path) == before
    assert folder.exists() == there


def test_captions_are_laid_out_as_msrvtt(tmp_path: Path) -> None:
    folder = write_captioned(tmp_path / "scenes", {"train": 5, "held_out": 4}, num_frames=6, side=32, seed=2)
    document = json.loads((folder / CAPTIONS).read_text())
    assert list(document) == ["info", "videos", "sentences"]
    assert document["videos"][5] == {
        "id": 5,
        "video_id": "video5",
        "category": 0,
        "url": "",
        "start time": 0.0,
        "end time": 0.24,
        "split": "held_out",
    }
    assert [video["split"] for video in document["videos"]] == ["train"] * 5 + ["held_out"] * 4
    assert [s["video_id"] for s in document["sentences"]] == [f"video{i}" for i in range(9)]
    for sentence, video in zip(document["sentences"], document["videos"], strict=True):
        assert list(sentence) == ["sen_id", "video_id", "caption"]
        facts = facts_of(sentence["caption"])
        assert facts is not None
        assert scene_of(facts).held_out == (video["split"] == "held_out")
        assert decoded(folder / "videos" / f"{video['video_id']}.mp4").shape == (6, 32, 32, 3)


def scene_of(facts: dict[str, tuple[Any, ...]]) -> Scene:
    events = zip(*(facts[kind] for kind in ("count", "colour", "shape", "motion")), strict=True)
    return Scene(tuple(Event(*event) for event in events))


def test_captions_are_of_the_clips_they_stand_beside(tmp_path: Path) -> None:
    """The first objects are as blue, or as little, as the caption says."""
    folder = write_captioned(tmp_path / "scenes", {"train": 40}, num_frames=4, side=32)
    document = json.loads((folder / CAPTIONS).read_text())
    judged = set()
    for sentence in document["sentences"]:
        facts = facts_of(sentence["caption"])
        assert facts is not None
        clip = decoded(folder / "videos" / f"{sentence['video_id']}.mp4")[:2].astype(float).reshape(-1, 3)
        red, green, blue = clip[np.argsort(np.ptp(clip, axis=1) + clip.max(axis=1))[-10:]].mean(axis=0)
        found = {"red": red > 1.6 * max(green, blue), "green": green > 1.6 * max(red, blue)}
        colour = facts["colour"][0]
        if colour in ("red", "green"):
            assert found[colour], sentence["caption"]
        else:
            assert not found["red"], sentence["caption"]
            assert not found["green"], sentence["caption"]
        judged.add(colour)
    assert judged == set(COLOURS)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"side": 33}, "a side of 33 pixels was given: H.264 needs an even number"),
        ({"num_frames": 2}, "2 frames of 18 pixels"),
        ({"labels": ["moves left", "dances"]}, "there is no class 'dances'"),
        ({"labels": []}, "no classes were named"),
        ({"labels": ["moves left", "moves left"]}, "'moves left' was named twice"),
        ({"seed": -1}, "seed -1 was given"),
        ({"per_class": {}}, "name at least one split"),
        ({"per_class": {"train": 0}}, "each with at least one clip"),
        ({"per_class": {"../up": 1}}, "'../up' cannot be the name of a split"),
        ({"workers": 0}, "0 workers were asked for: give at least 1"),
    ],
)
def test_refusals(tmp_path: Path, changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence.replace(".", r"\.")):
        write_dataset(tmp_path / "clips", **SMALL | changed)
    assert not list(tmp_path.iterdir())
