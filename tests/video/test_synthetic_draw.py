"""What is painted lies where it should, at any size, and shakes with the backdrop."""

import numpy as np
import pytest

from modicum.video.synthetic.draw import OUTLINES, TEXTURES, Canvas

PLAIN = 1 + 0 * TEXTURES[0]
WHITE = np.array([240.0, 240.0, 240.0])


def still_canvas(num_frames: int, side: int, seed: int = 0) -> Canvas:
    """Black, and nothing moves."""
    canvas = Canvas(np.random.default_rng(seed), num_frames, side)
    canvas._pixels[:] = 0
    canvas._shake_T2[:] = 0
    return canvas


def grey(canvas: Canvas) -> np.ndarray:
    return canvas.film(noise=0)[..., 0].astype(float)


def test_a_circle_has_the_place_and_the_area_it_was_given() -> None:
    canvas = still_canvas(3, 47)
    centres = np.array([[11.0, 31.0], [20.25, 17.5], [35.5, 12.0]])
    radii = np.array([5.0, 7.5, 9.0])
    canvas.paint("circle", PLAIN, WHITE, centres, radii, np.array([1.0, 1.0, 0.5]))
    frames = grey(canvas)
    rows, columns = np.mgrid[:47, :47] + 0.5
    for frame, centre, radius, opacity in zip(frames, centres, radii, (1, 1, 0.5), strict=True):
        assert frame.max() == int(240 * opacity)
        mass = frame.sum() / (240 * opacity)
        assert mass == pytest.approx(np.pi * (0.95 * radius) ** 2, rel=0.03)
        middle = [(frame * rows).sum() / frame.sum(), (frame * columns).sum() / frame.sum()]
        np.testing.assert_allclose(middle, centre, atol=0.12)


@pytest.mark.parametrize("outline", OUTLINES)
def test_every_outline_fits_into_its_radius_and_is_seen(outline: str) -> None:
    canvas = still_canvas(1, 41)
    canvas.paint(outline, PLAIN, WHITE, np.array([[20.5, 20.5]]), np.array([10.0]), np.ones(1))
    (frame,) = grey(canvas)
    inside = np.abs(np.mgrid[:41, :41] + 0.5 - 20.5).max(axis=0) <= 11
    assert frame[~inside].max() == 0
    assert 60 < frame.sum() / 240 < 300


def test_no_two_outlines_are_alike() -> None:
    covers = np.stack([table < 0 for table in OUTLINES.values()]).reshape(len(OUTLINES), -1)
    differing = (covers[:, None] != covers[None]).mean(axis=2) + np.eye(len(OUTLINES))
    assert differing.min() > 0.02


@pytest.mark.parametrize("corner", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_what_touches_an_edge_does_not_come_back_at_the_other(corner: tuple[int, int]) -> None:
    side, radius = 37, 6.0
    centre = np.array([side - radius if far else radius for far in corner])
    canvas = Canvas(np.random.default_rng(0), 200, side)
    canvas._pixels[:] = 0
    canvas.paint("square", PLAIN, WHITE, np.tile(centre, (200, 1)), np.full(200, radius), np.ones(200))
    lit = grey(canvas).max(axis=0) > 0
    away = np.abs(np.mgrid[:side, :side] + 0.5 - centre[:, None, None]).max(axis=0) > radius + 2
    assert lit.any()
    assert not lit[away].any()


def test_the_camera_takes_backdrop_and_object_along() -> None:
    canvas = Canvas(np.random.default_rng(3), 50, 64)
    canvas.paint("cross", PLAIN, WHITE, np.full((50, 2), 32.0), np.full(50, 9.0), np.ones(50))
    shake = canvas._shake_T2
    assert np.ptp(shake, axis=0).tolist() == [4, 4]  # two pixels either way at this size
    frames = canvas.film(noise=0)
    for frame, (down, right) in zip(frames, shake, strict=True):
        back = np.roll(frame, (down, right), axis=(0, 1))[8:-8, 8:-8]
        still = np.roll(frames[0], tuple(shake[0]), axis=(0, 1))[8:-8, 8:-8]
        np.testing.assert_array_equal(back, still)


def test_shake_and_noise_tell_nothing_about_neighbours() -> None:
    """Were they to, frames could be put in order without looking at the objects."""
    canvas = Canvas(np.random.default_rng(0), 4000, 16)
    shake = canvas._shake_T2 - canvas._shake_T2.mean(axis=0)
    assert np.abs((shake[1:] * shake[:-1]).mean(axis=0) / shake.var(axis=0)).max() < 4 / np.sqrt(4000)


def test_noise_has_the_strength_it_was_given() -> None:
    canvas = still_canvas(5, 64)
    canvas._pixels[:] = 100
    assert canvas.film(noise=7).astype(float).std() == pytest.approx(7, rel=0.02)
