"""Augmentation: one draw per clip, decided by its key alone; windows and colours against numbers worked out by hand."""

import colorsys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from modicum.errors import UsageError
from modicum.video.augment import Augment, augment, cropped
from modicum.video.colour import Jitter, drop_colour, jitter

SIZE = (29, 23)
PLAIN = Augment(flip=0, scale_jitter=(1, 1), colour_jitter=0)
# Every part of it, each always.
EVERYTHING = Augment(
    flip=0.5,
    colour_jitter=1,
    colour_drop=0.5,
    randaugment_layers=2,
    randaugment_magnitude=9,
    randaugment_operations="all",
)
PARTS = {
    "crop": PLAIN,
    "scale": replace(PLAIN, scale_jitter=(0.9, 1.33)),
    "flip": replace(PLAIN, flip=0.5),
    "jitter": replace(PLAIN, colour_jitter=0.8),
    "drop": replace(PLAIN, colour_drop=0.5),
    "randaugment": replace(PLAIN, randaugment_layers=2),
    "geometry": replace(PLAIN, randaugment_layers=2, randaugment_operations="all"),
    "everything": EVERYTHING,
}


def random_clip(frames: int = 5, height: int = 41, width: int = 47, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, height, width, 3), generator=generator, dtype=torch.uint8)


def still(frames: int = 5) -> Tensor:
    """The same frame again and again."""
    return random_clip(1).expand(frames, -1, -1, -1)


def is_still(clip: Tensor) -> bool:
    return torch.equal(clip, clip[:1].expand_as(clip))


@pytest.mark.parametrize("settings", PARTS.values(), ids=PARTS)
def test_every_frame_of_a_clip_has_the_same_draw(settings):
    for index in range(6):
        view = augment(still(), SIZE, settings, (3, 1, index))
        assert view.dtype == torch.uint8
        assert view.shape == (5, *SIZE, 3)
        assert is_still(view)


@pytest.mark.parametrize("settings", PARTS.values(), ids=PARTS)
def test_a_draw_per_frame_would_be_noticed(settings):
    """What the test above must not pass: the same clip, each frame with a key of its own."""
    frames = [augment(still(1), SIZE, settings, (3, 1, index)) for index in range(6)]
    assert not is_still(torch.cat(frames))


@pytest.mark.parametrize("settings", PARTS.values(), ids=PARTS)
def test_frames_that_differ_are_changed_alike_too(settings):
    """A clip and the same clip with its frames in another order: the frames of the one are those of the other."""
    clip, order = random_clip(), [3, 0, 4, 1, 2]
    for index in range(4):
        view = augment(clip, SIZE, settings, (index,))
        torch.testing.assert_close(augment(clip[order], SIZE, settings, (index,)), view[order], rtol=0, atol=0)


@pytest.mark.parametrize("settings", PARTS.values(), ids=PARTS)
def test_the_key_alone_decides(settings):
    clip = random_clip()
    torch.manual_seed(0)
    np.random.seed(0)
    first = [augment(clip, SIZE, settings, (7, 2, index)) for index in range(6)]
    torch.rand(5)
    np.random.rand(5)
    again = [augment(clip, SIZE, settings, (7, 2, index)) for index in reversed(range(6))]
    assert all(torch.equal(one, other) for one, other in zip(first, reversed(again), strict=True))
    # Other clips, epochs and seeds are drawn anew.
    assert len({view.numpy().tobytes() for view in first}) > 1
    for keys in ([(7, epoch, 0) for epoch in range(9)], [(seed, 2, 0) for seed in range(9)]):
        assert len({augment(clip, SIZE, settings, key).numpy().tobytes() for key in keys}) > 1


def test_nothing_global_is_drawn_from():
    torch.manual_seed(5)
    np.random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    augment(random_clip(), SIZE, EVERYTHING, (1,))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]


def test_a_part_that_is_switched_on_leaves_the_others_as_they_were():
    clip = random_clip()
    for index in range(8):
        plain = augment(clip, SIZE, replace(EVERYTHING, randaugment_layers=0, colour_jitter=0, colour_drop=0), (index,))
        grey = augment(clip, SIZE, replace(EVERYTHING, randaugment_layers=0, colour_jitter=0, colour_drop=1), (index,))
        assert torch.equal(drop_colour(plain.movedim(-1, 0)).movedim(0, -1), grey)


def test_the_window_by_hand():
    """A clip of 60 x 90 and a crop of 20 x 30: scaled to a shorter side of 40 it is 40 x 60, half of it each way.

    A window is 30 of 60 rows and 45 of 90 columns at factor 1; at 1.25, rows are 50 and the window 20/50 of 60, that is 24.
    """
    settings = Augment(short_side=40, scale_jitter=(1, 1.25))
    rows = torch.arange(60, dtype=torch.uint8)[:, None].expand(60, 90)
    columns = torch.arange(90, dtype=torch.uint8)[None].expand(60, 90)
    clip = torch.stack([rows, columns, rows], dim=-1).expand(2, -1, -1, -1)

    def window(*draws: float) -> tuple[float, float, float, float]:
        """Where the first and the last row and column of the view were, by their values."""
        view = cropped(clip, (20, 30), settings, *draws).float()
        return (*view[0, [0, -1], 7, 0].tolist(), *view[1, 9, [0, -1], 1].tolist())

    # Rows 0 to 29 in 20: the first lies between 0 and 1, at 0.25. Columns 45 to 89 from the right end.
    assert window(0, 0, 0, 0.999) == pytest.approx((0.25, 28.75, 45.25, 88.75), abs=0.5)
    # 24 rows from floor(0.5 * 37) = 18 on.
    assert window(0.9999, 0, 0.5, 0) == pytest.approx((18.1, 40.9, 0.25, 43.75), abs=0.5)
    # Height and width have factors of their own: 75 columns, so that 30 of them are 36 of 90.
    assert window(0, 0.9999, 0, 0) == pytest.approx((0.25, 28.75, 0.1, 34.9), abs=0.5)


def test_every_place_of_a_window_is_reached():
    """41 rows and a crop of 38, 47 columns and a crop of 43, unscaled: four rows and five columns to begin at."""
    clip = torch.zeros(1, 41, 47, 3, dtype=torch.uint8)
    clip[..., 0] = torch.arange(41, dtype=torch.uint8)[:, None]
    clip[..., 1] = torch.arange(47, dtype=torch.uint8)
    settings = replace(PLAIN, short_side=41)
    starts = {tuple(augment(clip, (38, 41), settings, (i,))[0, 0, 0, :2].tolist()) for i in range(400)}
    assert {row for row, _ in starts} == {0, 1, 2, 3}
    assert {column for _, column in starts} == {0, 1, 2, 3, 4, 5, 6}
    view = augment(clip, (38, 41), settings, (0,))
    row, column = view[0, 0, 0, :2].tolist()
    assert torch.equal(view, clip[:, row : row + 38, column : column + 41])


def test_scales_are_drawn_over_their_range():
    """A crop of 40 of a square of 160 scaled to 80: the window is 80 at factor 1, 89 at 0.9 and 60 at 1.33."""
    ramp = torch.arange(160, dtype=torch.uint8)
    clip = torch.stack([ramp[:, None].expand(160, 160), ramp.expand(160, 160), ramp.expand(160, 160)], -1)[None]
    settings = replace(PARTS["scale"], short_side=80)
    heights, widths = [], []
    for index in range(300):
        view = augment(clip, (40, 40), settings, (index,)).float()
        # From the first to the last of 40 rows are 39/40 of the window.
        heights.append((view[0, -1, 0, 0] - view[0, 0, 0, 0]).item() * 40 / 39)
        widths.append((view[0, 0, -1, 1] - view[0, 0, 0, 1]).item() * 40 / 39)
    for spans in (heights, widths):
        assert 59 <= min(spans) <= 61
        assert 87 <= max(spans) <= 90
    # Height and width apart: correlated at most by chance, of which 0.23 is four deviations.
    assert abs(np.corrcoef(heights, widths)[0, 1]) < 0.23


def test_a_clip_is_never_scaled_below_the_crop():
    settings = Augment(short_side=20, scale_jitter=(0.5, 0.5), flip=0, colour_jitter=0)
    clip = random_clip(2, 20, 20)
    assert torch.equal(augment(clip, (20, 20), settings, (1,)), clip)


def test_small_clips_grow():
    assert augment(random_clip(2, 7, 5), SIZE, EVERYTHING, (1,)).shape == (2, *SIZE, 3)


def test_flips():
    clip = random_clip()
    settings = replace(PLAIN, short_side=41)
    straight = [augment(clip, (41, 41), settings, (i,)) for i in range(200)]
    flipped = [augment(clip, (41, 41), replace(settings, flip=1), (i,)) for i in range(200)]
    sometimes = [augment(clip, (41, 41), replace(settings, flip=0.5), (i,)) for i in range(200)]
    assert all(torch.equal(one.flip(2), other) for one, other in zip(straight, flipped, strict=True))
    n_flipped = sum(torch.equal(one, other) for one, other in zip(sometimes, flipped, strict=True))
    assert n_flipped + sum(torch.equal(one, other) for one, other in zip(sometimes, straight, strict=True)) == 200
    assert 72 <= n_flipped <= 128  # four deviations of 200 coins are 28


def test_colour_jitter_is_hsv_and_contrast_in_order():
    """Against Python's own HSV, pixel by pixel, and the mean over all frames."""
    clip = random_clip(2, 5, 7)
    draw = Jitter(brightness=14.0, saturation=1.37, contrast=0.71, hue=0.13)
    pixels = []
    for pixel in ((clip.reshape(-1, 3).double() + draw.brightness) / 255).tolist():
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        pixels.append(colorsys.hsv_to_rgb(hue, min(1.0, saturation * draw.saturation), value))
    x = np.array(pixels)
    x = (x - x.mean(0)) * draw.contrast + x.mean(0)
    turned = []
    for pixel in x.tolist():
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        turned.append(colorsys.hsv_to_rgb((hue + draw.hue) % 1, saturation, value))
    expected = (np.array(turned) * 255).round().clip(0, 255).reshape(clip.shape)
    result = jitter(clip.movedim(-1, 0), draw).movedim(0, -1)
    assert np.abs(result.numpy().astype(int) - expected).max() <= 1
    assert (result.numpy() == expected).mean() > 0.98


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        (Jitter(0, 1, 1, 0), [200, 100, 50]),
        (Jitter(20, 1, 1, 0), [220, 120, 70]),
        (Jitter(0, 0.6, 1, 0), [200, 140, 110]),  # 200 - 0.6 * (200 - x)
        (Jitter(0, 1.4, 1, 0), [200, 67, 0]),  # the saturation of 0.75 would be 1.05 and stops at 1, so 4/3
        (Jitter(0, 1, 0.6, 0), [200, 100, 50]),  # one pixel is its own mean
        (Jitter(0, 1, 1, 1 / 3), [50, 200, 100]),  # a third of a turn: red's part is green's now
        (Jitter(0, 1, 1, -1 / 3), [100, 50, 200]),
        (Jitter(0, 1, 1, 1 / 6), [150, 200, 50]),
    ],
)
def test_colour_jitter_by_hand(draw, expected):
    pixel = torch.tensor([200, 100, 50], dtype=torch.uint8).view(3, 1, 1, 1)
    assert jitter(pixel, draw).flatten().tolist() == expected


def test_contrast_measures_the_whole_clip():
    clip = torch.tensor([40, 80, 120], dtype=torch.uint8).view(1, 3, 1, 1).expand(3, 3, 5, 2)
    assert jitter(clip, Jitter(0, 1, 0.5, 0))[1, :, 0, 0].tolist() == [60, 80, 100]


def test_jitters_are_drawn_over_their_ranges():
    draws = [Jitter.draw(np.random.default_rng(seed)) for seed in range(500)]
    for name, low, high in (
        ("brightness", -32, 32),
        ("saturation", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("hue", -0.2, 0.2),
    ):
        values = [getattr(draw, name) for draw in draws]
        margin = (high - low) / 50
        assert low <= min(values) < low + margin
        assert high - margin < max(values) <= high


def test_colour_is_dropped_and_jittered_as_often_as_asked():
    clip = still(1)
    settings = replace(PLAIN, short_side=41, scale_jitter=(1, 1))
    jittered = grey = 0
    for index in range(300):
        plain = augment(clip, (41, 41), settings, (index,))
        jittered += not torch.equal(augment(clip, (41, 41), replace(settings, colour_jitter=0.8), (index,)), plain)
        dropped = augment(clip, (41, 41), replace(settings, colour_drop=0.1), (index,))
        grey += torch.equal(dropped[..., 0], dropped[..., 2])
    assert 212 <= jittered <= 268  # 240, four deviations are 28
    assert 9 <= grey <= 51  # 30, and 21


def test_long_clips_are_jittered_in_pieces():
    """More frames than fit a processor's cache: no seams."""
    clip = random_clip(9, 101, 97)
    draw = Jitter(9.0, 0.8, 1.3, -0.1)
    order = [8, 3, 5, 0, 1, 7, 2, 6, 4]
    assert torch.equal(jitter(clip[order].movedim(-1, 0), draw), jitter(clip.movedim(-1, 0), draw)[:, order])


def test_settings_are_a_section_of_a_recipe():
    settings = Augment.from_dict({"flip": 0, "scale_jitter": [0.8, 1.2], "randaugment_operations": "all"})
    assert settings == Augment(flip=0, scale_jitter=(0.8, 1.2), randaugment_operations="all")
    assert Augment.from_dict(settings.to_dict()) == settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"filp": 0.5}, "Augment has no key `filp`: did you mean `flip`?"),
        ({"flip": True}, "`flip` is True: give a value of type float"),
        ({"flip": 1.5}, "`flip` is 1.5: give a probability"),
        ({"colour_jitter": float("nan")}, "`colour_jitter` is nan"),
        ({"scale_jitter": [1.33, 0.9]}, "`scale_jitter` is (1.33, 0.9): give the least and the largest factor"),
        ({"scale_jitter": [0.9]}, "`scale_jitter` is (0.9,)"),
        ({"scale_jitter": [0, 1]}, "`scale_jitter` is (0, 1)"),
        ({"short_side": 0}, "`short_side` is 0"),
        ({"randaugment_layers": -1}, "`randaugment_layers` is -1"),
        ({"randaugment_layers": 1.5}, "`randaugment_layers` is 1.5: give a value of type int"),
        ({"randaugment_magnitude": 31}, "`randaugment_magnitude` is 31: give 0 to 30"),
        ({"randaugment_operations": "colur"}, "`randaugment_operations` is 'colur': did you mean `colour`?"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(UsageError) as refusal:
        Augment.from_dict(values)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("clip", "size", "key", "message"),
    [
        (random_clip().float(), SIZE, (1,), "the clip is torch.float32 [5, 41, 47, 3]: give a uint8 tensor"),
        (random_clip()[0], SIZE, (1,), "the clip is torch.uint8 [41, 47, 3]"),
        (random_clip().numpy(), SIZE, (1,), "the clip is ndarray"),
        (random_clip()[:0], SIZE, (1,), "it needs at least a frame and a pixel"),
        (random_clip(), (0, 5), (1,), "the crop is (0, 5)"),
        (random_clip(), SIZE, (), "the key is (): give whole numbers from 0 on"),
        (random_clip(), SIZE, (1, -2), "the key is (1, -2)"),
        (random_clip(), SIZE, (1, 0.5), "the key is (1, 0.5)"),
        (random_clip(), (60, 60), (1,), "a shorter side of 41 is less than the crop's 60"),
    ],
)
def test_impossible_calls_are_refused(clip, size, key, message):
    with pytest.raises(UsageError) as refusal:
        augment(clip, size, Augment(short_side=41), key)
    assert message in str(refusal.value)
