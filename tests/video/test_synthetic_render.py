"""Scenes look like what their captions say, through the codec too."""

from pathlib import Path

import numpy as np
import pytest

from modicum.errors import UsageError
from modicum.video.read import Video
from modicum.video.synthetic import Event, Scene, draw_scene, render, write_clip
from modicum.video.synthetic.draw import Canvas
from modicum.video.synthetic.render import RGB
from modicum.video.synthetic.scenes import COLOURS, SHAPES


def shown(*events: Event, seed: int = 0, num_frames: int = 12, side: int = 48) -> np.ndarray:
    return render(Scene(events), np.random.default_rng(seed), num_frames, side).astype(float)


def lit(frames: np.ndarray) -> np.ndarray:
    """bool [T, H, W]: what is brighter in some channel than any backdrop."""
    return frames.max(axis=3) > 140


def middles(frames: np.ndarray) -> np.ndarray:
    return np.stack([np.argwhere(mask).mean(axis=0) for mask in lit(frames)])


def test_every_word_has_something_to_be_drawn_with() -> None:
    assert list(RGB) == COLOURS
    for shape in SHAPES:
        assert lit(shown(Event(1, "white", shape, "stays still"))).any(axis=(1, 2)).all()


@pytest.mark.parametrize(
    ("motion", "direction"),
    [
        ("moves left", (0, -1)),
        ("moves right", (0, 1)),
        ("moves up", (-1, 0)),
        ("moves down", (1, 0)),
        ("stays still", (0, 0)),
    ],
)
@pytest.mark.parametrize("count", [1, 3])
def test_objects_go_where_the_caption_says(motion: str, direction: tuple[int, int], count: int) -> None:
    for seed in range(4):
        way = np.diff(middles(shown(Event(count, "green", "square", motion), seed=seed))[[0, -1]], axis=0)[0]
        # Between 0.32 and 0.45 of the 42 pixels in the middle, and a shake of one pixel at either end.
        reach = way @ np.abs(direction) if any(direction) else 0
        assert np.abs(way - reach * np.abs(direction)).max() <= 2.6
        if any(direction):
            assert 0.32 * 42 - 2.6 <= reach * sum(direction) <= 0.45 * 42 + 2.6


@pytest.mark.parametrize(("motion", "first", "last"), [("grows", 0, -1), ("shrinks", -1, 0)])
def test_growing_and_shrinking_change_the_area_by_their_factor_squared(motion: str, first: int, last: int) -> None:
    areas = lit(shown(Event(2, "white", "square", motion), side=64)).sum(axis=(1, 2))
    assert areas[last] / areas[first] == pytest.approx(1 / 0.45**2, rel=0.35)
    middle = np.diff(middles(shown(Event(2, "white", "square", motion), side=64))[[0, -1]], axis=0)
    assert np.abs(middle).max() <= 4.5


@pytest.mark.parametrize(("num_frames", "on"), [(4, "1010"), (8, "11001100"), (12, "111000111000")])
def test_blinking_is_seen_twice_whatever_the_length(num_frames: int, on: str) -> None:
    frames = shown(Event(1, "yellow", "circle", "blinks"), num_frames=num_frames)
    assert "".join(str(int(mask.any())) for mask in lit(frames)) == on


def test_blinking_of_two_frames_is_seen_once() -> None:
    frames = shown(Event(1, "red", "bar", "blinks"), Event(1, "white", "bar", "blinks"), num_frames=4)
    assert [bool(mask.any()) for mask in lit(frames)] == [True, False, True, False]


def test_each_event_has_half_of_the_clip_to_itself() -> None:
    red, green = Event(1, "red", "circle", "moves left"), Event(2, "green", "square", "grows")
    for first, second, channel in ((red, green, 0), (green, red, 1)):
        frames = shown(first, second)
        strongest = [int(frame[mask].mean(axis=0).argmax()) for frame, mask in zip(frames, lit(frames), strict=True)]
        assert strongest == [channel] * 6 + [1 - channel] * 6
    halves = {
        int(np.argmax([frame[mask].mean(axis=0)[1] > 150 for frame, mask in zip(f, lit(f), strict=True)]))
        for f in (shown(red, green, seed=seed, num_frames=7) for seed in range(20))
    }
    assert halves == {3, 4}, "of an odd number of frames the same event always has the one that is over"


@pytest.mark.parametrize("side", [32, 48])
def test_objects_do_not_hide_each_other_and_stay_in_the_middle_that_crops_show(
    monkeypatch: pytest.MonkeyPatch, side: int
) -> None:
    painted: list[tuple[int, np.ndarray, np.ndarray]] = []

    def note(self: Canvas, *args: object) -> None:
        painted.append((int(str(args[6])), np.asarray(args[3]), np.asarray(args[4])))

    monkeypatch.setattr(Canvas, "paint", note)
    generator = np.random.default_rng(0)
    for i in range(300):
        painted.clear()
        render(draw_scene(generator, held_out=i % 2 == 0), generator, 8, side)
        for first, centre, radius in painted:
            edge = np.concatenate([centre - radius[:, None], centre + radius[:, None]])
            assert edge.min() > side / 16 - 1e-9
            assert edge.max() < side * 15 / 16 + 1e-9
            for other_first, other, other_radius in painted:
                if other is not centre and other_first == first:
                    # Outlines lie within a square of their radius: apart in a row or in a column.
                    gap = np.abs(other - centre).max(axis=1) - radius - other_radius
                    assert gap.min() > 0


@pytest.mark.parametrize("side", [32, 48])
def test_colours_are_nearest_to_their_own_name_after_the_codec(tmp_path: Path, side: int) -> None:
    names, means = list(RGB), np.array(list(RGB.values()), float)
    for seed, colour in enumerate(names * 3):
        shape = SHAPES[seed % len(SHAPES)]
        clip = shown(Event(1 + seed % 3, colour, shape, "moves down"), seed=seed, side=side).astype(np.uint8)
        write_clip(tmp_path / "clip.mp4", clip)
        with Video(tmp_path / "clip.mp4", fps=None) as video:
            frames = video.frames(range(len(clip))).numpy().astype(float)
        # The bright half of what is lit: at its edges an object mixes with the backdrop.
        pixels = frames[frames.max(axis=3) > 130]
        pixels = pixels[pixels.sum(axis=1) > np.median(pixels.sum(axis=1))]
        nearest = ((pixels[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
        assert (nearest == names.index(colour)).mean() > 0.8, (colour, shape)


def test_a_clip_is_a_function_of_scene_and_generator() -> None:
    event = Event(3, "purple", "ring", "moves up")
    np.testing.assert_array_equal(shown(event, seed=4), shown(event, seed=4))
    assert (shown(event, seed=4) != shown(event, seed=5)).any()
    assert render(Scene((event,)), np.random.default_rng(0), 5, 34).shape == (5, 34, 34, 3)


def test_a_clip_too_short_is_refused() -> None:
    with pytest.raises(UsageError, match="3 frames of 48 pixels"):
        shown(Event(1, "red", "bar", "grows"), num_frames=3)
