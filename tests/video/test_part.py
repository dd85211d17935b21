"""Part of a long video: the same frames as from the whole, though only what lies around it is read."""

import random
from fractions import Fraction

import pytest

from modicum.video.datasets import VideoSample
from modicum.video.file import VideoFile
from modicum.video.read import Video, VideoError
from tests.video.clips import numbers_of, write_video

N = 240
CONTAINERS = {
    "plain.mp4": {},
    "h264.mp4": {"b_frames": 3},
    "fragments.mp4": {"b_frames": 2, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "open_gop.mp4": {"b_frames": 3, "options": {"x264-params": "open-gop=1"}},
    "h264.mkv": {"b_frames": 2},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "vp8.webm": {"codec": "libvpx"},  # may hide frames
    "mpeg4.avi": {"codec": "mpeg4"},
    "h264.ts": {"b_frames": 2},
    "mpeg2.mpg": {"codec": "mpeg2video", "b_frames": 2},
}
PARTS = [(0.0, 0.2), (0.01, 1.0), (3.0, 3.3), (4.44, 4.8), (5.01, 5.02), (9.0, 9.6), (9.3, None), (8.0, 99.0)]


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_part_shows_what_the_whole_shows_there(tmp_path, name):
    path = write_video(tmp_path / name, N, **CONTAINERS[name])
    for fps in (25, 10, 60):
        with Video(path, fps) as whole:
            expected = [numbers_of(whole.frames(whole.ticks(*part))) for part in PARTS]
        for part, numbers in zip(PARTS, expected, strict=True):
            with Video(path, fps, part=part) as video:
                assert numbers_of(video.frames(video.ticks(*part))) == numbers, (part, fps)
    assert expected[0][:1] == [0]
    assert len(expected[2]) == 18, "0.3 s at 60 per second"


def test_frames_that_come_when_they_like(tmp_path):
    draw = random.Random(3)
    stamps = [0.0]
    while len(stamps) < 90:
        stamps.append(round(stamps[-1] + draw.choice([0.01, 0.04, 0.2, 3.1]), 3))
    path = write_video(
        tmp_path / "clip.mp4", 90, stamps=stamps, time_base=Fraction(1, 1000), b_frames=2, gop=7, codec="libx264"
    )
    with Video(path) as whole:
        for _ in range(40):
            start = draw.uniform(0, stamps[-1])
            part = (start, start + draw.choice([0.1, 0.5, 4.0]))
            expected = numbers_of(whole.frames(whole.ticks(*part)))
            with Video(path, part=part) as video:
                assert numbers_of(video.frames(video.ticks(*part))) == expected, part


@pytest.fixture
def packets(monkeypatch):
    """The packets that are read, by presentation time."""
    seen = []
    whole = VideoFile._whole_packets
    monkeypatch.setattr(VideoFile, "_whole_packets", lambda self: (p for p in whole(self) if not seen.append(p.pts)))
    return seen


def test_only_what_lies_around_a_part_is_read(tmp_path, packets):
    path = write_video(tmp_path / "clip.mp4", 250, b_frames=2, options={"sc_threshold": "0"})
    with VideoSample(path, start=4.0, end=4.4).opened() as (video, ticks):
        assert numbers_of(video.frames(ticks)) == list(range(100, 110))
    n_part = len(packets)
    packets.clear()
    with Video(path) as video:
        assert numbers_of(video.frames(range(100, 110))) == list(range(100, 110))
    assert len(packets) > 250
    assert n_part < 100, "the first frame, a second beyond the part, and the part again for its pictures"


def test_a_part_beyond_the_end(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 100, b_frames=2)
    with (
        pytest.raises(
            VideoError, match=r"clip.mp4 lasts 4.00 s and was to be read from 4.00 s on: check its annotation"
        ),
        VideoSample(path, start=4.0, end=5.0).opened(),
    ):
        pass
    with VideoSample(path, start=3.99, end=5.0).opened() as (video, ticks):
        assert numbers_of(video.frames(ticks)) == [99]
