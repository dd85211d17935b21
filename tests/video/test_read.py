"""Frame-exact reading: every frame of the clips shows its number."""

import gc
import inspect
import os
import random
import resource
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from modicum.errors import UsageError
from modicum.video.file import VideoFile
from modicum.video.read import Video, read_clip, stream_frames
from tests.video.clips import HEIGHT, WIDTH, change_packets, number_of, numbers_of, picture, write_image, write_video

NTSC = Fraction(30000, 1001)
needs_rotation = pytest.mark.skipif(
    not hasattr(av.video.stream.VideoStream, "set_display_matrix"), reason="this PyAV reads rotations, but writes none"
)


def nearest_numbers(fps, n_frames, n_ticks, clock=25):
    """By definition, in exact fractions: of two equally near frames the earlier."""
    rate = Fraction(fps)
    return [min(range(n_frames), key=lambda i: (abs(i / rate - Fraction(t, clock)), i)) for t in range(n_ticks)]


def test_the_pictures_tell_neighbouring_frames_apart(tmp_path):
    assert all(number_of(picture(n)) == n for n in range(256))
    path = write_video(tmp_path / "clip.mp4", 20)
    frames = read_clip(path, 20, stride=1)
    assert numbers_of(frames.roll(1, 0)) != list(range(20)), "a reader off by one frame would be noticed"
    with pytest.raises(AssertionError, match="not a picture"):
        number_of(frames[6].flip(0))


@pytest.mark.parametrize("fps", [24, 25, NTSC, 50])
@pytest.mark.parametrize(("gop", "b_frames"), [(5, 2), (250, 2), (12, 0)])
def test_frames_are_the_nearest_in_time(tmp_path, fps, gop, b_frames):
    path = write_video(tmp_path / "clip.mp4", 47, fps, gop=gop, b_frames=b_frames)
    with Video(path) as video:
        assert video.n_frames == -(-47 * 25 // Fraction(fps))
        expected = nearest_numbers(fps, 47, video.n_frames)
        frames = video.frames(range(video.n_frames))
        assert frames.shape == (video.n_frames, HEIGHT, WIDTH, 3)
        assert frames.dtype == torch.uint8
        assert numbers_of(frames) == expected
        assert [video.seconds_of(i) for i in (0, 3, 11)] == pytest.approx([expected[i] / fps for i in (0, 3, 11)])
        assert video.info.fps == pytest.approx(float(fps))
        assert video.info.seconds == pytest.approx(47 / fps)
        assert (video.info.width, video.info.height, video.info.n_frames) == (WIDTH, HEIGHT, video.n_frames)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_variable_frame_rate(tmp_path, codec):
    stamps = [0.0, 0.04, 0.05, 0.3, 0.34, 0.9, 0.91, 0.92, 1.0, 1.5]
    path = write_video(
        tmp_path / "clip.mp4", len(stamps), stamps=stamps, time_base=Fraction(1, 1000), codec=codec, b_frames=2, gop=4
    )
    with Video(path) as video:
        expected = [min(range(10), key=lambda i: (round(abs(stamps[i] - t / 25), 6), i)) for t in range(video.n_frames)]
        assert expected[:14] == [0, 1, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 4]
        assert numbers_of(video.frames(range(video.n_frames))) == expected
        assert video.seconds_of(5) == 0.3
    with Video(path, fps=None) as video:
        assert numbers_of(video.frames(range(video.n_frames))) == list(range(10))
        assert [video.seconds_of(i) for i in range(10)] == stamps


def test_the_same_content_at_25_and_50_frames_per_second_reads_the_same(tmp_path):
    slow = write_video(tmp_path / "slow.mp4", 30, 25, b_frames=2)
    fast = write_video(tmp_path / "fast.mp4", [i // 2 for i in range(60)], 50, b_frames=2)
    for stride in (1, 2, 3):
        clips = [numbers_of(read_clip(path, 10, stride)) for path in (slow, fast)]
        assert clips[0] == clips[1] == list(range(0, 10 * stride, stride))
    assert numbers_of(read_clip(fast, 5, 2, start=11, fps=50)) == [5, 6, 7, 8, 9]
    assert numbers_of(read_clip(fast, 5, 2, start=11, fps=None)) == [5, 6, 7, 8, 9]


CONTAINERS = {
    "h264.mp4": {"b_frames": 2},
    "fragments.mp4": {"b_frames": 2, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "open_gop.mp4": {"b_frames": 3, "options": {"x264-params": "open-gop=1"}},
    "h265.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none:pools=1:keyint=12:open-gop=1"}},
    "h264.mkv": {"b_frames": 2},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "vp8.webm": {"codec": "libvpx"},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mpeg4_b.avi": {"codec": "mpeg4", "b_frames": 2},
    "h264_b.avi": {"b_frames": 2},  # stores the order of decoding only
    "h264_b.ts": {"b_frames": 2},  # no index, and times that start at 0.08 s
    "mpeg2_b.mpg": {"codec": "mpeg2video", "b_frames": 2},  # times are off after a seek
    "raw_b.h264": {"b_frames": 2},  # no times at all
    "animation.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "intra.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "grey.mkv": {"codec": "ffv1", "pix_fmt": "gray"},
    "alpha.mkv": {"codec": "ffv1", "pix_fmt": "bgra"},
    "deep.mkv": {"codec": "ffv1", "pix_fmt": "yuv422p10le"},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_any_order_in_any_container(tmp_path, name):
    path = write_video(tmp_path / name, 49, 25, **CONTAINERS[name])
    draw = random.Random(0)
    indices = [draw.randrange(49) for _ in range(30)]
    with Video(path) as video:
        assert video.n_frames == 49
        sequential = video.frames(range(49))
        assert numbers_of(sequential) == list(range(49))
        assert torch.equal(video.frames(indices), sequential[indices])
        for i in indices:
            assert torch.equal(video.frames([i])[0], sequential[i])
        assert [video.seconds_of(i) for i in indices] == pytest.approx([i / 25 for i in indices], abs=1e-3)
    streamed = list(stream_frames(path))
    assert torch.equal(torch.stack([frame for _, frame in streamed]), sequential)
    assert [seconds for seconds, _ in streamed] == pytest.approx([i / 25 for i in range(49)], abs=1e-3)


def test_pixels_are_those_that_ffmpeg_gives_by_default(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 9)
    with av.open(str(path)) as container:
        plain = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert torch.equal(read_clip(path, 9, 1), torch.from_numpy(np.stack(plain)))


@pytest.mark.parametrize("movie_starts", [2, 5])
def test_frames_cut_off_by_an_edit_list_do_not_exist(tmp_path, movie_starts):
    stamps = [(i - movie_starts) / 25 for i in range(30)]
    path = write_video(
        tmp_path / "clip.mp4",
        30,
        stamps=stamps,
        time_base=Fraction(1, 12800),
        b_frames=2,
        container_options={"avoid_negative_ts": "disabled"},
    )
    with Video(path, fps=None) as video:
        assert numbers_of(video.frames(range(video.n_frames))) == list(range(movie_starts, 30))
        assert video.seconds_of(0) == 0
        assert numbers_of(video.frames([3, 0])) == [movie_starts + 3, movie_starts]


def test_an_edit_list_that_ends_early(tmp_path):
    content = bytearray(write_video(tmp_path / "clip.mp4", 30, gop=8).read_bytes())
    entry = content.index(b"elst") + 12  # type, version and flags, number of entries; then the length in 1/1000 s
    assert int.from_bytes(content[entry : entry + 4], "big") == 1200
    content[entry : entry + 4] = (800).to_bytes(4, "big")
    (tmp_path / "clip.mp4").write_bytes(content)
    with Video(tmp_path / "clip.mp4", fps=None) as video:
        assert numbers_of(video.frames(range(video.n_frames))) == list(range(20))
        assert video.info.seconds == 0.8
    with Video(tmp_path / "clip.mp4") as video:
        assert video.n_frames == 20
    assert [number_of(frame) for _, frame in stream_frames(tmp_path / "clip.mp4")] == list(range(20))


@pytest.mark.parametrize("b_frames", [0, 2])
def test_a_recording_that_starts_between_key_frames_starts_at_the_next(tmp_path, b_frames):
    path = write_video(tmp_path / "clip.ts", 60, gop=10, b_frames=b_frames, options={"sc_threshold": "0"})
    content, packet = path.read_bytes(), 188
    start = len(content) // 3 // packet * packet
    path.write_bytes(content[: 3 * packet] + content[start:])  # the tables stay
    with Video(path, fps=None) as video:
        numbers = numbers_of(video.frames(range(video.n_frames)))
        assert 10 <= numbers[0] <= 30
        assert numbers == list(range(numbers[0], 60))
        assert number_of(video.frames([5])[0]) == numbers[5]
        assert video.seconds_of(0) == 0
    assert [number_of(frame) for _, frame in stream_frames(path, fps=None)] == numbers


def hide(path, numbers):
    """Clear the bit `show_frame` of these packets: they are decoded, referred to, and never shown (RFC 6386, 9.1)."""
    return change_packets(path, numbers, lambda packet: bytes([packet[0] & ~0x10]) + packet[1:])


def test_packets_that_never_show_are_not_frames(tmp_path):
    path = write_video(tmp_path / "clip.webm", 30, codec="libvpx", options={"auto-alt-ref": "0"})
    path = hide(path, [7, 8, 20, 29])
    shown = [i for i in range(30) if i not in (7, 8, 20, 29)]
    expected = [min(shown, key=lambda i: (abs(i - t), i)) for t in range(30)]
    with Video(path) as video:
        assert numbers_of(video.frames([5, 6, 9])) == [5, 6, 9]
        assert numbers_of(video.frames(range(video.n_frames))) == expected[: video.n_frames]
        assert video.seconds_of(7) == 0.24
        assert numbers_of(video.frames([29, 8])) == [28, 9]
    with Video(path, fps=None) as video:
        assert numbers_of(video.frames(range(video.n_frames))) == shown
    assert [number_of(frame) for _, frame in stream_frames(path, fps=None)] == shown


# As stored -> on the screen. Degrees are counter-clockwise, as a player turns the picture.
TURNS = {None: lambda x: x, 90: lambda x: np.rot90(x, 1), 180: lambda x: np.rot90(x, 2), -90: lambda x: np.rot90(x, -1)}


def quadrants(image):
    """Brightness by corner: top left, top right, bottom left, bottom right."""
    grey = np.asarray(image, np.float32).mean(axis=2)
    (top, bottom), (left, right) = [(size // 4, size - 1 - size // 4) for size in grey.shape]
    return [round(float(grey[y, x]) / 80) for y in (top, bottom) for x in (left, right)]


def four_greys():
    return np.kron(np.array([[0, 80], [160, 240]], np.uint8), np.ones((24, 32), np.uint8))[..., None].repeat(3, axis=2)


@needs_rotation
@pytest.mark.parametrize("rotation", TURNS)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_rotation(tmp_path, rotation, suffix):
    path = write_video(tmp_path / f"clip.{suffix}", 3, rotation=rotation, pictures=[four_greys()] * 3)
    with Video(path) as video:
        frame = video.frames([1])[0]
        assert quadrants(four_greys()) == [0, 1, 2, 3]
        assert quadrants(frame) == quadrants(TURNS[rotation](four_greys()))
        assert (video.info.height, video.info.width, 3) == tuple(frame.shape)
        assert tuple(frame.shape) == TURNS[rotation](four_greys()).shape
    if rotation in (90, -90):
        assert quadrants(frame) == {90: [1, 3, 0, 2], -90: [2, 0, 3, 1]}[rotation], "written out by hand"
    assert quadrants(next(stream_frames(path))[1]) == quadrants(frame)


ONE = 1 << 16


@needs_rotation
@pytest.mark.parametrize(
    ("a", "b", "c", "d", "corners"),
    [
        (-1, 0, 0, 1, [1, 0, 3, 2]),  # mirrored, as front cameras do
        (1, 0, 0, -1, [2, 3, 0, 1]),
        (0, 1, 1, 0, [0, 2, 1, 3]),  # transposed
        (0, -1, -1, 0, [3, 1, 2, 0]),
    ],
)
def test_mirrored_display_matrices(tmp_path, a, b, c, d, corners):
    matrix = [a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, 0, 0, 1 << 30]
    path = write_video(tmp_path / "clip.mp4", 2, matrix=matrix, pictures=[four_greys()] * 2)
    assert quadrants(read_clip(path, 1)[0]) == corners


def test_frames_that_change_size_are_scaled_to_the_first(tmp_path):
    small = np.kron(picture(9)[8::16, 8::16], np.ones((8, 8, 1), np.uint8))
    content = b"".join(
        write_image(tmp_path / f"{i}.jpg", image).read_bytes()
        for i, image in enumerate([picture(5), small, picture(6)])
    )
    (tmp_path / "clip.mjpeg").write_bytes(content)
    with Video(tmp_path / "clip.mjpeg", fps=None) as video:
        assert numbers_of(video.frames([0, 1, 2])) == [5, 9, 6]


def test_indices_in_any_form(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 12)
    with Video(path) as video:
        assert numbers_of(video.frames(torch.tensor([3, 3, 1]))) == [3, 3, 1]
        assert numbers_of(video.frames(np.array([11, 0]))) == [11, 0]
        assert video.frames([]).shape == (0, HEIGHT, WIDTH, 3)
        for wrong in (-1, 12):
            with pytest.raises(UsageError, match=r"clip.mp4 was asked for, which has 12: give indices from 0 to 11$"):
                video.frames([0, wrong])
            with pytest.raises(UsageError, match="from 0 to 11"):
                video.seconds_of(wrong)


def test_a_single_frame_is_a_video(tmp_path):
    with Video(write_video(tmp_path / "clip.mp4", [17])) as video:
        assert (video.n_frames, number_of(video.frames([0])[0])) == (1, 17)
    with Video(write_image(tmp_path / "a 1:2.png", picture(18))) as video:
        assert (video.n_frames, number_of(video.frames([0])[0])) == (1, 18)


def test_a_name_is_no_protocol(tmp_path, monkeypatch):
    write_video(tmp_path / "clip.mp4", 3).rename(tmp_path / "concat:1.mp4")
    monkeypatch.chdir(tmp_path)
    assert numbers_of(read_clip("concat:1.mp4", 2)) == [0, 2]


def test_sound_beside_the_pictures_is_passed_over(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 20, audio=True)
    assert numbers_of(read_clip(path, 10)) == list(range(0, 20, 2))


def test_only_wanted_frames_are_converted_and_far_ones_are_sought(tmp_path, monkeypatch):
    path = write_video(tmp_path / "clip.mp4", 200, gop=10, b_frames=2)
    converted, decoded = [], []
    rgb, frames = VideoFile.rgb, VideoFile._decoded
    monkeypatch.setattr(VideoFile, "rgb", lambda self, frame: (converted.append(1), rgb(self, frame))[1])
    monkeypatch.setattr(
        VideoFile, "_decoded", lambda *args: (item for item in frames(*args) if not decoded.append(item[0]))
    )
    with Video(path) as video:
        converted.clear()
        decoded.clear()
        assert numbers_of(video.frames([195, 3, 100])) == [195, 3, 100]
    assert len(converted) == 3
    assert len(decoded) <= 3 * 10


@pytest.mark.parametrize(("fps", "stride"), [(25, 1), (25, 4), (50, 3), (None, 1), (None, 5)])
def test_streaming_equals_random_access(tmp_path, fps, stride):
    path = write_video(tmp_path / "clip.mkv", 53, NTSC, b_frames=2)
    streamed = list(stream_frames(path, fps, stride))
    with Video(path, fps) as video:
        indices = range(0, video.n_frames, stride)
        assert torch.equal(video.frames(indices), torch.stack([frame for _, frame in streamed]))
        assert [seconds for seconds, _ in streamed] == [video.seconds_of(i) for i in indices]


def test_streaming_is_lazy_and_closes_the_file(tmp_path, monkeypatch):
    path = write_video(tmp_path / "clip.mp4", 200)
    seen = []
    whole = VideoFile._whole_packets
    monkeypatch.setattr(VideoFile, "_whole_packets", lambda self: (p for p in whole(self) if not seen.append(p.pts)))
    frames = stream_frames(path)
    assert inspect.isgenerator(frames)
    assert not seen
    before = descriptors()
    for expected in range(5):
        assert number_of(next(frames)[1]) == expected
    assert len(seen) < 100
    frames.close()
    assert descriptors() <= before


def descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_a_thousand_reads_leak_nothing(tmp_path):
    good = write_video(tmp_path / "clip.mp4", 6)
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(good.read_bytes()[:-600])

    def read(times):
        for i in range(times):
            read_clip(good, 2, 2)
            if i % 4 == 0:
                Video(good).frames([1])  # left open: closed with its last reference
                next(stream_frames(good))
                with pytest.raises(Exception, match="bad.mp4"):
                    Video(bad)

    gc.disable()
    try:
        read(50)
        files, memory = descriptors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        read(1000)
        assert descriptors() <= files
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 64 * 1024, "KiB"
    finally:
        gc.enable()
