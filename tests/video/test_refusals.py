"""What cannot be read is refused in one sentence, whoever asks for it."""

import os
import random
import subprocess
import sys

import av
import numpy as np
import pytest

from modicum.errors import MissingExtraError, ModicumError, UsageError
from modicum.video.pixels import check_size
from modicum.video.read import Video, VideoError, read_clip, stream_frames
from tests.video.clips import change_packets, numbers_of, write_image, write_sound, write_video

READERS = {
    "open": lambda path: Video(path),
    "by index": lambda path: Video(path, fps=None),
    "clip": lambda path: read_clip(path, 1),
    "stream": lambda path: next(stream_frames(path)),
}


def refusal(path, reader="open", error=VideoError):
    with pytest.raises(error) as raised:
        READERS[reader](path)
    message = str(raised.value)
    assert "\n" not in message
    assert str(path) in message
    return message.replace(str(path), "FILE")


def file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("reader", READERS)
def test_no_video(tmp_path, reader):
    folder = tmp_path / "folder"
    folder.mkdir()
    assert refusal(tmp_path / "missing.mp4", reader) == "FILE does not exist: give a video file or a folder of images"
    assert refusal(folder, reader).startswith("FILE is a folder without images: ")
    assert refusal(file(tmp_path, "empty.mp4", b""), reader) == "FILE is empty (0 bytes): copy or download it again"
    assert refusal(file(tmp_path, "notes.txt", b"some words\n" * 99), reader).startswith("FILE is a text file: ")
    assert refusal(write_sound(tmp_path / "sound.m4a"), reader).startswith("FILE has no video stream, only sound")


@pytest.mark.parametrize(
    "content",
    [b"some words\n" * 99, b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n" * 9, bytes(5000), random.Random(0).randbytes(50_000)],
)
def test_other_files_with_the_name_of_a_video(tmp_path, content):
    for reader in READERS:
        message = refusal(file(tmp_path, "clip.mp4", content), reader)
        assert message.startswith("FILE is not a video, or is damaged or incomplete (")
        assert message.endswith("): give a video file such as mp4, webm, mkv or avi, or a folder of images")


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    assert refusal(tmp_path / "pipe.mp4").startswith("FILE is neither a file nor a folder")


def test_a_file_that_may_not_be_read(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 2)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert "Permission denied" in refusal(path)


def test_a_video_without_frames(tmp_path):
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    noise = change_packets(write_video(tmp_path / "noise.mkv", 3), range(3), lambda packet: b"\xff" * len(packet))
    for reader in READERS:
        assert refusal(path, reader).startswith("FILE is not a video, or is damaged or incomplete (End of file): ")
        assert refusal(noise, reader).startswith("FILE has no frame that can be decoded: copy it again")


@pytest.mark.parametrize("reader", READERS)
def test_huge_frames_are_refused_by_their_header(tmp_path, reader):
    wide = np.zeros((16, 16_400, 3), np.uint8)
    expected = "FILE is 16400x16: frames of at most 16384 pixels a side, 268435456 in all, are read; scale it down"
    assert refusal(write_video(tmp_path / "clip.mkv", 1, codec="ffv1", pictures=[wide]), reader) == expected
    assert refusal(write_image(tmp_path / "image.png", wide), reader) == expected
    (tmp_path / "folder").mkdir()
    image = write_image(tmp_path / "folder" / "image.png", wide)
    with pytest.raises(VideoError, match=r"image.png is 16400x16: "):
        READERS[reader](image.parent)


def test_the_most_pixels_that_are_read():
    check_size("clip.mp4", 16_384, 16_384)
    for width, height in ((16_385, 1), (1, 16_385)):
        with pytest.raises(VideoError, match=rf"^clip.mp4 is {width}x{height}: "):
            check_size("clip.mp4", width, height)


def first_packet(path):
    with av.open(str(path)) as container:
        return next(container.demux(video=0)).pos


def test_truncated(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", 100, b_frames=2).read_bytes()
    assert "incomplete" in refusal(file(tmp_path, "no_index.mp4", whole[: len(whole) // 2]))
    path = write_video(tmp_path / "front.mp4", 100, b_frames=2, container_options={"movflags": "faststart"})
    content = path.read_bytes()
    start = first_packet(path)
    lengths = []
    for fraction in (0.5, 0.75, 0.97):
        cut = file(tmp_path, "cut.mp4", content[: start + int((len(content) - start) * fraction)])
        with Video(cut) as video:
            numbers = numbers_of(video.frames(range(video.n_frames)))
            assert numbers == pytest.approx(range(video.n_frames), abs=1), (
                "a frame in the air at the cut may be missing"
            )
            lengths.append(video.n_frames)
        assert len(list(stream_frames(cut))) == lengths[-1]
    assert 20 < lengths[0] < lengths[1] < lengths[2] < 100
    for suffix in ("mkv", "avi", "ts"):
        path = write_video(tmp_path / f"whole.{suffix}", 100, codec="mpeg4")
        cut = file(tmp_path, f"cut.{suffix}", path.read_bytes()[: (first_packet(path) + path.stat().st_size) // 2])
        with Video(cut) as video:
            assert numbers_of(video.frames(range(video.n_frames))) == list(range(video.n_frames))
            assert 20 < video.n_frames < 80


def damaged(tmp_path):
    """Frames 40 to 59 of 100 are noise; a key frame every 10."""
    path = write_video(tmp_path / "clip.mkv", 100, gop=10, options={"bf": "0"})
    draw = random.Random(0)
    return change_packets(path, range(40, 60), lambda packet: draw.randbytes(len(packet)))


def test_damage_is_told_where_it_is_and_elsewhere_frames_are_read(tmp_path):
    with Video(damaged(tmp_path)) as video:
        assert video.n_frames == 100
        assert numbers_of(video.frames([5, 39, 65, 99])) == [5, 39, 65, 99]
        with pytest.raises(VideoError, match=r"is damaged: the frame at 1.80 s cannot be decoded; copy the file again"):
            video.frames([45])
        assert numbers_of(video.frames([99, 3])) == [99, 3]


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_rates(tmp_path, fps):
    path = write_video(tmp_path / "clip.mp4", 3)
    for reader in (Video, stream_frames, lambda *args: read_clip(args[0], 1, fps=args[1])):
        with pytest.raises(UsageError, match="positive number of frames per second"):
            reader(path, fps)


def test_numbers_that_make_no_clip(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 10)
    for arguments, name in (((0,), "num_frames=0"), ((1, 0), "stride=0"), ((1, 1, -1), "start=-1")):
        with pytest.raises(UsageError, match=f"^{name}: give at least"):
            read_clip(path, *arguments)
    with pytest.raises(UsageError, match="stride=0: give at least 1"):
        stream_frames(path, stride=0)
    with pytest.raises(
        UsageError, match=r"frame 10 of .*clip.mp4 was asked for, which has 10: give indices from 0 to 9"
    ):
        read_clip(path, 6, 2)


def test_a_closed_video(tmp_path):
    video = Video(write_video(tmp_path / "clip.mp4", 3))
    video.close()
    video.close()
    with pytest.raises(UsageError, match="clip.mp4 was closed: open it again"):
        video.frames([0])


def test_without_pyav(tmp_path, monkeypatch):
    path = write_video(tmp_path / "clip.mp4", 3)
    monkeypatch.setitem(sys.modules, "av", None)
    for reader in READERS.values():
        with pytest.raises(MissingExtraError, match=r"^reading a video needs `av`, .*pip install 'modicum\[video\]'"):
            reader(path)


def test_importing_needs_no_pyav_and_reading_prints_nothing(tmp_path):
    code = """
import sys
from modicum.errors import ModicumError
from modicum.video.pixels import check_size
from modicum.video.read import Video, stream_frames
assert "av" not in sys.modules
for path in sys.argv[1:]:
    try:
        Video(path).frames([45])
    except ModicumError:
        pass
    list(stream_frames(path))
import av
assert av.logging.get_level() is None
"""
    arguments = [sys.executable, "-W", "error", "-c", code, str(damaged(tmp_path))]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_refusal_is_a_modicum_error_with_exit_code_1():
    assert issubclass(VideoError, ModicumError)
    assert VideoError.exit_code == 1
