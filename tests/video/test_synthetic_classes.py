"""Motion classes: the same pictures in another order, and nothing else."""

from typing import Any

import numpy as np
import pytest

from modicum.errors import UsageError
from modicum.video.synthetic import FRAME_LABELS, LABELS, MOTION_LABELS, labelled_clip, shuffle_frames
from modicum.video.synthetic.draw import Canvas

STEP = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}


def step_of(label: str) -> np.ndarray:
    """Rows and columns per step, from the words."""
    return np.sum([STEP[word] for word in label.split()[1:]], axis=0)


@pytest.fixture
def centres(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function from label, seed and number of frames to where the object is in each frame, in steps of the lattice."""
    seen: list[np.ndarray] = []
    paint = Canvas.paint

    def spy(self: Canvas, *args: Any, **kwargs: Any) -> None:
        seen.append(args[3])
        paint(self, *args, **kwargs)

    monkeypatch.setattr(Canvas, "paint", spy)

    def walked(label: str, seed: int, num_frames: int = 16) -> np.ndarray:
        labelled_clip(np.random.default_rng(seed), label, num_frames, 32)
        places = seen.pop()
        unit = (places.max(axis=0) - places.min(axis=0)).max() / (np.ceil(np.sqrt(num_frames)) - 1)
        return ((places - places.min(axis=0)) / unit).round().astype(int)

    return walked


def test_labels_come_in_pairs_that_are_each_other_reversed() -> None:
    assert len(MOTION_LABELS) == 8
    assert len(FRAME_LABELS) == 4
    assert LABELS == MOTION_LABELS + FRAME_LABELS
    for one, other in zip(MOTION_LABELS[::2], MOTION_LABELS[1::2], strict=True):
        assert (step_of(one) == -step_of(other)).all()
    assert len({tuple(step_of(label)) for label in MOTION_LABELS}) == 8


@pytest.mark.parametrize("num_frames", [7, 11, 16])
def test_every_class_shows_the_same_set_of_places(centres: Any, num_frames: int) -> None:
    for seed in range(20):
        sets = {frozenset(map(tuple, centres(label, seed, num_frames).tolist())) for label in MOTION_LABELS}
        assert len(sets) == 1
        assert len(next(iter(sets))) == num_frames


@pytest.mark.parametrize("label", MOTION_LABELS)
def test_a_lattice_is_walked_line_by_line_along_the_label(centres: Any, label: str) -> None:
    lengths = {4: 4} if 0 in step_of(label) else {1: 2, 2: 2, 3: 2, 4: 1}
    begins = set()
    for seed in range(12):
        walk = centres(label, seed)
        steps = np.diff(walk, axis=0)
        ends = [-1, *np.flatnonzero((steps != step_of(label)).any(axis=1)), 15]
        found = np.diff(ends)
        assert dict(zip(*np.unique(found, return_counts=True), strict=True)) == lengths
        begins.add(tuple(walk[0]))
    assert len(begins) == 2, "lines are always begun on the same side"


@pytest.mark.parametrize(("one", "other"), list(zip(MOTION_LABELS[::2], MOTION_LABELS[1::2], strict=True)))
def test_a_class_reversed_in_time_is_its_partner(centres: Any, one: str, other: str) -> None:
    """As distributions over walks; a lattice can be walked in two ways by each class."""
    forward = {tuple(centres(one, seed).ravel()) for seed in range(12)}
    backward = {tuple(centres(other, seed)[::-1].ravel()) for seed in range(12)}
    assert forward == backward
    assert len(forward) == 2
    assert forward != {tuple(centres(other, seed).ravel()) for seed in range(12)}


def test_a_class_of_frames_is_walked_in_no_order(centres: Any) -> None:
    walks = {tuple(centres("shows a 4", seed).ravel()) for seed in range(20)}
    assert len(walks) == 20


def clips_of(labels: list[str], n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """float [n, 16, 32, 32] in grey, and the classes."""
    generator = np.random.default_rng(seed)
    classes = np.arange(n) % len(labels)
    clips = np.stack([labelled_clip(generator, labels[i], 16, 32) for i in classes])
    return clips.mean(axis=-1, dtype=np.float32), classes


def places(clips: np.ndarray) -> np.ndarray:
    """Row and column of the object in each frame: the middle of what is brighter than the backdrop."""
    ground = np.median(clips, axis=(1, 2, 3), keepdims=True)
    weights = (clips - ground - 25).clip(0)
    rows, columns = np.mgrid[: clips.shape[2], : clips.shape[3]]
    total = weights.sum(axis=(2, 3)) + 1e-6
    return (
        np.stack([(weights * rows).sum(axis=(2, 3)), (weights * columns).sum(axis=(2, 3))], axis=2) / total[..., None]
    )


def unordered(clips: np.ndarray) -> np.ndarray:
    """What no order of frames changes: moments over time of cells of 4 x 4 pixels, and how the object's places spread."""
    cells = clips.reshape(len(clips), -1, 8, 4, 8, 4).mean(axis=(3, 5)).reshape(len(clips), -1, 64)
    cells = cells - cells.mean(axis=(1, 2), keepdims=True)
    where = places(clips) - places(clips).mean(axis=1, keepdims=True)
    down, right = where[..., 0], where[..., 1]
    spread = np.stack([f.mean(axis=1) for f in (down**2, right**2, down * right, down**3, right**3)], axis=1)
    return np.concatenate([cells.mean(axis=1), cells.std(axis=1), cells.max(axis=1), spread], axis=1)


def ordered(clips: np.ndarray) -> np.ndarray:
    """The object's median step, which a shuffle does change."""
    return np.median(np.diff(places(clips), axis=1), axis=1)


def accuracy(train: np.ndarray, classes: np.ndarray, test: np.ndarray, truth: np.ndarray) -> float:
    """Of ridge regression onto the classes, with squares and products for few features."""
    scale = train.std(axis=0) + 1e-6

    def expand(features: np.ndarray) -> np.ndarray:
        features = (features - train.mean(axis=0)) / scale
        products = (
            (features[:, :, None] * features[:, None, :]).reshape(len(features), -1)
            if features.shape[1] < 8
            else features
        )
        return np.concatenate([np.ones((len(features), 1)), features, products], axis=1)

    inputs, goals = expand(train), np.eye(classes.max() + 1)[classes]
    weights = np.linalg.solve(inputs.T @ inputs + 10 * np.eye(inputs.shape[1]), inputs.T @ goals)
    return float(((expand(test) @ weights).argmax(axis=1) == truth).mean())


def test_motion_classes_are_chance_without_order_and_not_with_it() -> None:
    (train, classes), (test, truth) = clips_of(MOTION_LABELS, 800, 0), clips_of(MOTION_LABELS, 400, 1)
    # Four standard deviations of a guess above an eighth.
    bound = 1 / 8 + 4 * np.sqrt(1 / 8 * 7 / 8 / 400)
    assert accuracy(unordered(train), classes, unordered(test), truth) < bound
    assert accuracy(ordered(train), classes, ordered(test), truth) > 0.6
    generator = np.random.default_rng(2)
    shuffled = np.stack([shuffle_frames(clip, generator) for clip in test])
    assert accuracy(ordered(train), classes, ordered(shuffled), truth) < bound


def test_the_check_finds_classes_that_differ_without_order() -> None:
    """One line of the lattice, as of a clip cut short, gives its direction away, and only the sense is guessed."""
    (train, classes), (test, truth) = clips_of(MOTION_LABELS[:4], 400, 0), clips_of(MOTION_LABELS[:4], 200, 1)

    found = accuracy(unordered(train[:, :4]), classes, unordered(test[:, :4]), truth)
    assert 0.4 < found < 0.6
    whole = accuracy(unordered(train), classes, unordered(test), truth)
    assert abs(whole - 1 / 4) < 4 * np.sqrt(1 / 4 * 3 / 4 / 200)


def test_one_frame_shows_which_class_of_frames_a_clip_is_of() -> None:
    """A frame, cut out around its object and scaled, is nearest to the mean of its own class."""

    def first_frames(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        clips, classes = clips_of(FRAME_LABELS, n, seed)
        cut = []
        for frame in clips[:, 0]:
            weights = frame - np.median(frame)
            weights = (weights / np.percentile(weights, 98) - 0.45).clip(0, 0.3)
            rows, columns = np.nonzero(weights)
            top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
            at = np.ix_(
                np.linspace(top, bottom, 10).round().astype(int), np.linspace(left, right, 8).round().astype(int)
            )
            picture = weights[at].ravel()
            cut.append(picture / np.linalg.norm(picture))
        return np.stack(cut), classes

    (train, classes), (test, truth) = first_frames(200, 0), first_frames(200, 1)
    means = np.stack([train[classes == i].mean(axis=0) for i in range(len(FRAME_LABELS))])
    assert (((test[:, None] - means) ** 2).sum(axis=2).argmin(axis=1) == truth).mean() > 0.9


def test_a_clip_is_a_function_of_its_generator() -> None:
    one, same, other = (labelled_clip(np.random.default_rng(seed), "moves up", 9, 22) for seed in (5, 5, 6))
    assert one.dtype == np.uint8
    assert one.shape == (9, 22, 22, 3)
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_shuffling_keeps_every_frame() -> None:
    clip = np.arange(13, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    mixed = shuffle_frames(clip, np.random.default_rng(0))
    assert sorted(mixed[:, 0, 0, 0].tolist()) == list(range(13))
    assert (mixed != clip).any()


@pytest.mark.parametrize(
    ("label", "num_frames", "side", "sentence"),
    [
        ("moves sideways", 8, 32, "there is no class 'moves sideways': choose one of moves left"),
        ("moves left", 3, 32, "3 frames of 32 pixels a side were asked for: give at least 4 and 16"),
        ("moves left", 8, 15, "8 frames of 15 pixels"),
    ],
)
def test_refusals(label: str, num_frames: int, side: int, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        labelled_clip(np.random.default_rng(0), label, num_frames, side)
