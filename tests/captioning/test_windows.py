"""Long videos window by window: the same words as about each window alone, and no more memory than one window takes."""

import gc

import pytest
import torch

import modicum
from modicum import api
from modicum.captioning.windows import memory_windows, stride_of
from modicum.classification import windows
from modicum.classification.predict import Protocol
from modicum.errors import UsageError
from modicum.video.read import Video
from modicum.video.windows import sliding_windows, tubelets, tubelets_per
from tests.captioning.watching import captioner, draft_for
from tests.classification.small import FRAMES
from tests.video.clips import write_video

# A window is 6 frames, 3 tubelets of 2; a stride of 1 makes it 0.24 s long at 25 frames per second.
CLOCK = {"stride": 1, "short_side": 48}
KINDS = [
    {},
    {"temporal_layers": 0},
    {"memory": "patches"},
    {"variant": "spacetime"},
    {"variant": "spacetime", "memory": "patches"},
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clips") / "clip.mp4", 27)


@pytest.mark.parametrize("settings", KINDS)
def test_each_window_is_written_about_as_if_alone(clip, settings):
    model = captioner(**settings)
    shown = list(api.caption_windows(model, clip, every=0.16, max_new_tokens=9, ignore_eos=True, **CLOCK))
    starts = [0, 4, 8, 12, 16, 20]
    assert [window.start for window in shown] == pytest.approx([start / 25 for start in starts])
    assert [window.end for window in shown] == pytest.approx([(start + FRAMES - 1) / 25 for start in starts])
    with Video(clip) as video:
        clips = [video.frames(range(start, start + FRAMES))[:, :, 8:56] for start in starts]
    alone = modicum.caption(model, clips, max_new_tokens=9, ignore_eos=True)
    assert [window.tokens for window in shown] == alone.tokens
    assert [window.text for window in shown] == alone.texts
    assert len(set(alone.texts)) > 1  # it does look


def test_a_window_spans_the_seconds_that_it_was_asked_to(clip):
    # A stride of 3 frames: 18 ticks of 25 a second are 0.72 s. Of 27 frames 9 are read, a window and one tubelet more.
    shown = list(api.caption_windows(captioner(), clip, window=0.7, max_new_tokens=2))
    times = [(round(window.start * 25), round(window.end * 25)) for window in shown]
    assert times == [(0, 15), (6, 21)]
    assert stride_of(4.0, 6, 12.5) == 8
    for window, fps in ((0, 25.0), (float("nan"), 25.0), (1.0, None)):
        with pytest.raises(UsageError, match="give a positive time of at most 1e[+]09 s, and a clock"):
            stride_of(window, 6, fps)
    with pytest.raises(
        UsageError, match=r"holds 2\.5 frames at 25 fps and the model looks at 6: give at least 0\.24 s"
    ):
        stride_of(0.1, 6, 25.0)


def test_windows_follow_each_other_without_every(clip):
    shown = list(memory_windows(captioner(), clip, None, Protocol(**CLOCK)))
    assert [round(window.start * 25) for window in shown] == [0, 6, 12, 18, 20]  # the last ends with the video
    assert [window.parts.shape for window in shown] == [(3, 24)] * 5


@pytest.mark.parametrize(("every", "n_windows", "encoded"), [(0.08, 11, 13), (0.24, 5, 13), (0.4, 3, 9)])
def test_a_factorized_encoder_looks_at_each_tubelet_once_and_at_none_between_windows(
    clip, every, n_windows, encoded, monkeypatch
):
    model = captioner()
    seen = []
    encode = type(model).encode_frames
    monkeypatch.setattr(
        type(model), "encode_frames", lambda self, video: seen.append(video.shape[1]) or encode(self, video)
    )
    shown = list(memory_windows(model, clip, every, Protocol(**CLOCK)))
    # There are 13 tubelets of 2 frames, and windows of 3 begin at every one, every third or every
    # fifth; the last one has two in common with the one before it.
    assert len(shown) == n_windows
    assert seen == [2] * encoded


def test_a_draft_changes_no_word(clip):
    model = captioner()
    settings = {"every": 0.16, "max_new_tokens": 9, "ignore_eos": True, **CLOCK}
    plain = list(api.caption_windows(model, clip, **settings))
    drafted = list(api.caption_windows(model, clip, draft=draft_for(model), **settings))
    assert [window.tokens for window in drafted] == [window.tokens for window in plain]
    assert sum(window.stats.target_calls for window in drafted) < sum(window.stats.target_calls for window in plain)


def test_a_window_draws_from_its_own_stream(clip):
    model = captioner()
    settings = {"temperature": 1.5, "max_new_tokens": 9, "ignore_eos": True, **CLOCK}
    by_two = list(api.caption_windows(model, clip, every=0.16, seed=7, **settings))
    again = list(api.caption_windows(model, clip, every=0.16, seed=7, **settings))
    other = list(api.caption_windows(model, clip, every=0.16, seed=8, **settings))
    assert [window.tokens for window in by_two] == [window.tokens for window in again]
    assert [window.tokens for window in by_two] != [window.tokens for window in other]
    # The first one is the same, wherever the others begin.
    assert by_two[0].tokens == next(api.caption_windows(model, clip, seed=7, **settings)).tokens


def test_a_video_shorter_than_a_window_gives_one(tmp_path):
    path = write_video(tmp_path / "short.mp4", 4)
    for settings in ({}, {"variant": "spacetime"}):
        model = captioner(**settings)
        (shown,) = api.caption_windows(model, path, max_new_tokens=9, stride=1)
        assert shown.text == modicum.caption(model, path, max_new_tokens=9, stride=1).texts[0]
        assert (shown.start, shown.end) == (0.0, pytest.approx(3 / 25))


def made_frames(count):
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        yield number / 25, torch.randint(0, 256, (48, 48, 3), generator=generator, dtype=torch.uint8)


def live_tensors():
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("variant", ["factorized_encoder", "spacetime"])
def test_memory_does_not_grow_with_the_length(variant, monkeypatch):
    model = captioner(variant=variant)
    frames = made_frames(1200)
    monkeypatch.setattr(windows, "stream_frames", lambda *_, **__: frames)
    shown = memory_windows(model, "long.mp4", 0.24, Protocol(**CLOCK))
    next(shown)
    early = live_tensors()
    kept = [window for _, window in zip(range(150), shown, strict=False)]
    # Whoever holds on to windows holds their memories, and nothing else with them.
    assert live_tensors() <= early + 150
    del kept
    assert live_tensors() <= early
    assert len(list(shown)) == 200 - 151
    assert next(frames, None) is None


def test_sliding_by_hand():
    pieces = [([at, at + 0.5], torch.full((2, 1, 1, 3), at)) for at in range(8)]
    made = []

    def make(pixels):
        made.append(int(pixels[0, 0, 0, 0]))
        return pixels[:1, 0, 0, 0]

    def slide(length, step, **options):
        made.clear()
        shown = sliding_windows(iter(pieces), length, step, make, **options)
        return [(start, end, parts.tolist()) for start, end, parts in shown]

    assert slide(3, 2) == [(0, 2.5, [0, 1, 2]), (2, 4.5, [2, 3, 4]), (4, 6.5, [4, 5, 6])]
    assert made == list(range(8))
    assert slide(2, 5) == [(0, 1.5, [0, 1]), (5, 6.5, [5, 6])]
    assert made == [0, 1, 5, 6]
    assert slide(9, 1) == slide(9, 1, to_the_end=True) == []
    assert slide(3, 3, to_the_end=True) == [(0, 2.5, [0, 1, 2]), (3, 5.5, [3, 4, 5]), (5, 7.5, [5, 6, 7])]
    assert len(slide(4, 2, to_the_end=True)) == len(slide(4, 2)) == 3  # nothing is left over
    assert len(slide(2, 5, to_the_end=True)) == 2  # 7 alone: between windows nothing is looked at


def test_frames_become_whole_tubelets():
    frames = [(at / 10, torch.full((4, 4, 3), at)) for at in range(7)]
    whole = list(tubelets(frames, 3, lambda frame: frame[:, :2, :1]))
    assert [stamps for stamps, _ in whole] == [[0, 0.1, 0.2], [0.3, 0.4, 0.5]]
    assert [pixels[:, 0, 0, 0].tolist() for _, pixels in whole] == [[0, 1, 2], [3, 4, 5]]
    assert whole[0][1].shape == (3, 2, 1, 3)
    assert [tubelets_per(*case) for case in ((1.0, 25.0, 2, 2), (0.01, 25.0, 1, 2), (1.0, None, 1, 5))] == [6, 1, 5]


def test_refusals(clip):
    with pytest.raises(UsageError, match="`every` is 0: give a positive number of seconds"):
        next(api.caption_windows(captioner(), clip, every=0))
    with pytest.raises(UsageError, match="`every` is inf: give a positive number of seconds"):
        next(api.caption_windows(captioner(), clip, every=float("inf")))
    for window, fps in ((float("inf"), 25.0), (1e300, 25.0), (1.0, 0.0), (1.0, float("inf"))):
        with pytest.raises(UsageError, match="give a positive time of at most 1e\\+09 s, and a clock"):
            next(api.caption_windows(captioner(), clip, window=window, fps=fps))
    with pytest.raises(UsageError, match="samples frames from its whole window"):
        next(api.caption_windows(captioner(sampled_frames=4), clip))
    with pytest.raises(UsageError, match="Vivit writes no captions: give a captioner"):
        next(api.caption_windows(captioner().encoder, clip))
