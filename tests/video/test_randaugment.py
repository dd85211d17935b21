"""RandAugment's operations: by hand, against PIL, and the same on every frame of a clip."""

import numpy as np
import pytest
import torch
from torch import Tensor

from modicum.video import randaugment as ops
from modicum.video.randaugment import COLOUR, GEOMETRY, OPERATIONS, randaugment

ALL = list(OPERATIONS["all"])


def random_planes(frames: int = 3, seed: int = 0, height: int = 11, width: int = 13) -> Tensor:
    """uint8 [3, T, H, W], of less than the full range so that stretching it does something."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(20, 220, (3, frames, height, width), generator=generator, dtype=torch.uint8)


def one_colour(*values: int) -> Tensor:
    """A frame of one row with these values in red, and green and blue without any."""
    row = torch.tensor(values, dtype=torch.uint8)
    return torch.stack([row, torch.full_like(row, 9), torch.full_like(row, 9)])[:, None, None]


def red(planes: Tensor) -> list[int]:
    return planes[0].flatten().tolist()


def test_autocontrast_stretches_each_colour():
    # (x - 50) * 255 / 100, cut off.
    stretched = ops.autocontrast(one_colour(50, 70, 150, 101))
    assert red(stretched) == [0, 51, 255, 130]
    assert stretched[1].unique().tolist() == [9]  # one value cannot be stretched


def test_equalize_by_hand():
    # 512 pixels, a quarter each of 10, 20, 30, 200: step (512 - 128) // 255 = 1, so 0, 128, 256 and 384 pixels below.
    quarters = [10] * 128 + [20] * 128 + [30] * 128 + [200] * 128
    assert red(ops.equalize(one_colour(*quarters))) == [0] * 128 + [128] * 128 + [255] * 256
    # Too few pixels for a step: nothing changes.
    assert red(ops.equalize(one_colour(10, 20, 30))) == [10, 20, 30]


@pytest.mark.parametrize(
    ("operation", "argument", "given", "expected"),
    [
        (ops.posterize, 3, (255, 100, 31, 32), [224, 96, 0, 32]),
        (ops.posterize, 0, (255, 3), [0, 0]),
        (ops.posterize, 11, (255, 3), [255, 3]),
        (ops.solarize, 100, (99, 100, 255, 0), [99, 155, 0, 0]),
        (ops.solarize, 300, (99, 255), [99, 255]),
        (ops.solarize_add, 110, (0, 127, 128, 255), [110, 237, 128, 255]),
        (ops.solarize_add, 220, (0, 127, 128), [220, 255, 128]),
        (ops.brightness, 0.5, (0, 101, 255), [0, 50, 127]),
        (ops.brightness, 1.9, (0, 101, 255), [0, 191, 255]),
    ],
)
def test_operations_on_values(operation, argument, given, expected):
    assert red(operation(one_colour(*given), argument)) == expected


def test_invert():
    assert red(ops.invert(one_colour(0, 100, 255))) == [255, 155, 0]


def test_contrast_is_about_the_mean_luminance():
    clip = torch.tensor([40, 80], dtype=torch.uint8).view(1, 2, 1, 1).expand(3, 2, 1, 1)  # a dark and a bright frame
    assert ops.contrast(clip, 0.0).flatten().tolist() == [60] * 6
    assert ops.contrast(clip, 0.5)[0].flatten().tolist() == [50, 70]
    assert ops.contrast(clip, 4.0)[0].flatten().tolist() == [0, 140]


def test_colour_moves_away_from_luminance():
    pixel = torch.tensor([200, 100, 50], dtype=torch.uint8).view(3, 1, 1, 1)
    # 0.299 * 200 + 0.587 * 100 + 0.114 * 50 = 124.2, rounded to 124.
    assert ops.colour(pixel, 0.0).flatten().tolist() == [124, 124, 124]
    assert ops.colour(pixel, 0.5).flatten().tolist() == [162, 112, 87]
    assert ops.colour(pixel, 1.9).flatten().tolist() == [255, 78, 0]  # 268.4, 78.4, -16.6


def test_sharpness_by_hand():
    plane = torch.zeros(3, 1, 4, 3, dtype=torch.uint8)
    plane[:, :, 1, 1] = 130
    # Inside are two pixels: 5/13 of 130 is left in one and 1/13 comes into the other; all else is border.
    smooth = ops.sharpness(plane, 0.0)
    assert smooth[0, 0].tolist() == [[0, 0, 0], [0, 50, 0], [0, 10, 0], [0, 0, 0]]
    assert torch.equal(ops.sharpness(plane, 1.0), plane)
    sharp = ops.sharpness(plane, 2.0)  # 50 + 2 * 80 and 10 - 2 * 10
    assert sharp[2, 0].tolist() == [[0, 0, 0], [0, 210, 0], [0, 0, 0], [0, 0, 0]]


def test_cutout_by_hand():
    cut = ops.cutout(torch.zeros(3, 2, 5, 7, dtype=torch.uint8), 2, (1, 6))
    expected = torch.zeros(5, 7, dtype=torch.uint8)
    expected[0:3, 4:7] = 128
    assert torch.equal(cut, expected.expand(3, 2, 5, 7))
    assert torch.equal(ops.cutout(cut, 0, (4, 4)), cut)


def numbered() -> Tensor:
    """Three rows of five pixels, numbered from 1."""
    return torch.arange(1, 16, dtype=torch.uint8).view(1, 1, 3, 5).expand(3, 2, 3, 5)


@pytest.mark.parametrize(
    ("operation", "argument", "rows"),
    [
        (ops.translate_x, 2, [[3, 4, 5, 128, 128], [8, 9, 10, 128, 128], [13, 14, 15, 128, 128]]),
        (ops.translate_x, -1, [[128, 1, 2, 3, 4], [128, 6, 7, 8, 9], [128, 11, 12, 13, 14]]),
        (ops.translate_y, 1, [[6, 7, 8, 9, 10], [11, 12, 13, 14, 15], [128] * 5]),
        # Rows' centres are at 0.5, 1.5 and 2.5: they shift by 0.4, 1.2 and 2 pixels, to the nearest.
        (ops.shear_x, 0.8, [[1, 2, 3, 4, 5], [7, 8, 9, 10, 128], [13, 14, 15, 128, 128]]),
        # Columns shift by 0.2, 0.6, 1, 1.4 and 1.8 pixels upwards.
        (ops.shear_y, 0.4, [[1, 7, 8, 9, 15], [6, 12, 13, 14, 128], [11, 128, 128, 128, 128]]),
        # About the middle, pixel 8: what was to the right of it is above it.
        (ops.rotate, 90, [[128, 4, 9, 14, 128], [128, 3, 8, 13, 128], [128, 2, 7, 12, 128]]),
        (ops.rotate, 180, [[15, 14, 13, 12, 11], [10, 9, 8, 7, 6], [5, 4, 3, 2, 1]]),
        (ops.rotate, 0, [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12, 13, 14, 15]]),
    ],
)
def test_geometry_by_hand(operation, argument, rows):
    moved = operation(numbered(), argument)
    assert torch.equal(moved, torch.tensor(rows, dtype=torch.uint8).expand(3, 2, 3, 5))


@pytest.mark.parametrize("seed", range(3))
def test_operations_agree_with_pil(seed):
    """An implementation of somebody else's, on one frame: not a bit of difference."""
    image_module = pytest.importorskip("PIL.Image")
    from PIL import ImageEnhance, ImageOps

    # A frame large enough that Equalize has a step.
    planes = random_planes(1, seed, 47, 31)
    image = image_module.fromarray(planes[:, 0].permute(1, 2, 0).contiguous().numpy())

    def same(ours: Tensor, theirs) -> bool:
        return np.array_equal(ours[:, 0].permute(1, 2, 0).numpy(), np.asarray(theirs))

    assert same(ops.autocontrast(planes), ImageOps.autocontrast(image))
    assert same(ops.equalize(planes), ImageOps.equalize(image))
    assert same(ops.invert(planes), ImageOps.invert(image))
    assert same(ops.posterize(planes, 3), ImageOps.posterize(image, 3))
    assert same(ops.solarize(planes, 77), ImageOps.solarize(image, 77))
    for factor in (0.1, 0.73, 1.9):
        assert same(ops.contrast(planes, factor), ImageEnhance.Contrast(image).enhance(factor))
        assert same(ops.brightness(planes, factor), ImageEnhance.Brightness(image).enhance(factor))
        assert same(ops.colour(planes, factor), ImageEnhance.Color(image).enhance(factor))
        assert same(ops.sharpness(planes, factor), ImageEnhance.Sharpness(image).enhance(factor))
    grey = (128, 128, 128)
    assert same(ops.rotate(planes, 17.0), image.rotate(17.0, fillcolor=grey))
    shear = (1, 0.21, 0, 0, 1, 0)
    assert same(
        ops.shear_x(planes, 0.21), image.transform(image.size, image_module.Transform.AFFINE, shear, fillcolor=grey)
    )


@pytest.mark.parametrize("name", ALL)
def test_all_frames_are_changed_alike(name):
    """Equal frames stay equal; and what happens to a value or a place is the same in a frame that differs."""
    frame = random_planes(1)
    changed = OPERATIONS["all"][name](frame.expand(-1, 5, -1, -1), 0.7, np.random.default_rng(3))
    assert torch.equal(changed, changed[:, :1].expand_as(changed))
    # Magnitude 7 changes every one of these, or the test would show nothing.
    assert not torch.equal(changed[:, :1], frame)
    # Two frames, the second the first turned upside down: pixels are the same, so values go to the same values.
    if name in COLOUR and name not in ("Cutout", "Sharpness"):
        two = torch.cat([frame, frame.flip(2)], dim=1)
        changed = OPERATIONS["all"][name](two, 0.7, np.random.default_rng(3))
        assert torch.equal(changed[:, 0], changed[:, 1].flip(1))


@pytest.mark.parametrize("name", ["AutoContrast", "Equalize", "Contrast"])
def test_a_clip_is_measured_as_a_whole(name):
    """A dark and a bright frame: frame by frame, equal values would part."""
    clip = random_planes(2, height=40, width=40)
    clip[:, 0] = clip[:, 0] // 2
    clip[:, :, 0, 0] = 60
    operation = OPERATIONS["all"][name]
    whole = operation(clip, 0.7, np.random.default_rng(0))
    assert torch.equal(whole[:, 0, 0, 0], whole[:, 1, 0, 0])
    apart = torch.cat([operation(clip[:, t : t + 1], 0.7, np.random.default_rng(0)) for t in range(2)], dim=1)
    assert not torch.equal(apart[:, 0, 0, 0], apart[:, 1, 0, 0])


@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"])
def test_geometry_goes_either_way(name):
    frame = random_planes(1, height=21, width=23)
    results = {OPERATIONS["all"][name](frame, 0.7, np.random.default_rng(seed)).numpy().tobytes() for seed in range(12)}
    assert len(results) == 2


def test_cutouts_of_small_frames_are_small():
    # 40 pixels of 224 at magnitude 10 are 5 of 28: a square of 10 about some place.
    cut = COLOUR["Cutout"](torch.zeros(3, 1, 28, 28, dtype=torch.uint8), 1.0, np.random.default_rng(4))
    assert 25 <= (cut[0] == 128).sum() <= 100
    # 100 of 224 are 4.91 of 11.
    shifted = GEOMETRY["TranslateX"](torch.zeros(3, 1, 7, 11, dtype=torch.uint8), 1.0, np.random.default_rng(4))
    assert (shifted[0] == 128).sum() == 7 * 5


def test_operations_are_drawn_evenly_and_one_of_them_is_none():
    """Eleven operations and doing nothing, each a twelfth of the time; the list of 2103.15691's code."""
    assert ALL[:11] == list(COLOUR) == [
        *("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd"),
        *("Color", "Contrast", "Brightness", "Sharpness", "Cutout"),
    ]  # fmt: skip
    assert ALL[11:] == ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"]
    frame = random_planes(1, height=24, width=23)  # enough pixels for Equalize to change some
    unchanged = inverted = 0
    for seed in range(1200):
        result = randaugment(frame, 1, 7, "colour", np.random.default_rng(seed))
        unchanged += torch.equal(result, frame)
        inverted += torch.equal(result, 255 - frame)
    # A hundred of 1,200 each; four standard deviations are 38.
    assert 62 <= unchanged <= 138
    assert 62 <= inverted <= 138


def test_layers_follow_each_other():
    frame = random_planes(1)
    results = [randaugment(frame, layers, 9, "all", np.random.default_rng(1)) for layers in (0, 1, 2)]
    assert torch.equal(results[0], frame)
    assert not torch.equal(results[1], results[2])


def test_what_is_given_stays_as_it_is():
    frame = random_planes(2)
    before = frame.clone()
    for name in ALL:
        OPERATIONS["all"][name](frame, 0.7, np.random.default_rng(0))
    assert torch.equal(frame, before)
