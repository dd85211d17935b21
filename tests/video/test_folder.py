import pytest
import torch

from modicum.video.folder import natural
from modicum.video.read import Video, VideoError, read_clip, stream_frames
from tests.video.clips import number_of, numbers_of, picture, write_image


def write_folder(folder, suffix="png", n=12):
    for i in range(n):
        write_image(folder / f"frame_{i}.{suffix}", picture(i))
    return folder


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPG", "bmp", "webp"])
def test_images_in_natural_order(tmp_path, suffix):
    with Video(write_folder(tmp_path, suffix)) as video:
        assert video.n_frames == 12
        assert numbers_of(video.frames([11, 2, 10, 2])) == [11, 2, 10, 2]


@pytest.mark.parametrize("fps", [25, 7, 29.97, None])
def test_an_image_is_a_tick_at_any_rate(tmp_path, fps):
    write_folder(tmp_path)
    with Video(tmp_path, fps) as video:
        assert video.n_frames == 12
        assert video.seconds_of(7) == pytest.approx(7 / (fps or 25))
        assert video.info.fps == pytest.approx(fps or 25)
        everything = video.frames(range(12))
    assert numbers_of(everything) == list(range(12))
    streamed = list(stream_frames(tmp_path, fps, 3))
    assert torch.equal(torch.stack([frame for _, frame in streamed]), everything[::3])
    assert [seconds for seconds, _ in streamed] == pytest.approx([i / (fps or 25) for i in range(0, 12, 3)])


def test_names_do_not_mislead(tmp_path):
    write_image(tmp_path / "b%d.png", picture(2))
    write_image(tmp_path / "a:1.png", picture(1))
    write_image(tmp_path / "c.jpg", picture(3), codec="png")
    write_image(tmp_path / ".hidden.png", picture(9))
    (tmp_path / "notes.txt").write_text("not an image")
    assert numbers_of(read_clip(tmp_path, 3, 1)) == [1, 2, 3]


def test_natural_order():
    names = ["frame_10.png", "Frame_2.png", "frame_1.png", "frame_02.png", "10.png", "9.png", "a.png", "frame_1b.png"]
    assert sorted(names, key=natural) == [
        "9.png",
        "10.png",
        "a.png",
        "frame_1.png",
        "frame_1b.png",
        "Frame_2.png",
        "frame_02.png",
        "frame_10.png",
    ]


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(VideoError, match="is a folder without images: give a video file, or a folder of png, jpg"):
        Video(tmp_path)


def test_images_of_different_sizes_are_refused(tmp_path):
    write_folder(tmp_path, n=3)
    write_image(tmp_path / "frame_3.png", picture(3)[:40, :30])
    with Video(tmp_path) as video:
        assert number_of(video.frames([2])[0]) == 2
        with pytest.raises(
            VideoError, match=r"frame_3.png is 30x40, other images in its folder are 64x48: .* one size$"
        ):
            video.frames([0, 3])


def test_a_file_that_is_no_image_is_named(tmp_path):
    write_folder(tmp_path, n=3)
    (tmp_path / "frame_1.png").write_bytes(b"nonsense")
    (tmp_path / "frame_2.png").write_bytes(b"")
    with Video(tmp_path) as video:
        for i in (1, 2):
            with pytest.raises(
                VideoError, match=rf"frame_{i}.png is not an image, or is damaged .*: replace or remove it$"
            ):
                video.frames([i])
