"""Drawing clips: outlines and textures kept as small tables, painted onto a noisy, shaken backdrop."""

from collections.abc import Callable

import numpy as np

# Tables cover coordinates -EXTENT ... EXTENT around an object whose radius is 1.
_CELLS, _EXTENT = 96, 1.3
_AXIS = np.linspace(-_EXTENT, _EXTENT, _CELLS, dtype=np.float32)
_RIGHT, _DOWN = _AXIS[None, :], _AXIS[:, None]

# The strokes of a seven-segment display: top, upper left, upper right, middle, lower left, lower right, bottom.
_STROKES = [
    ((-0.5, -0.8), (0.5, -0.8)),
    ((-0.5, -0.8), (-0.5, 0.0)),
    ((0.5, -0.8), (0.5, 0.0)),
    ((-0.5, 0.0), (0.5, 0.0)),
    ((-0.5, 0.0), (-0.5, 0.8)),
    ((0.5, 0.0), (0.5, 0.8)),
    ((-0.5, 0.8), (0.5, 0.8)),
]
_LIT = {
    "0": (0, 1, 2, 4, 5, 6),
    "1": (2, 5),
    "2": (0, 2, 3, 4, 6),
    "3": (0, 2, 3, 5, 6),
    "4": (1, 2, 3, 5),
    "5": (0, 1, 3, 5, 6),
    "6": (0, 1, 3, 4, 5, 6),
    "7": (0, 2, 5),
    "8": (0, 1, 2, 3, 4, 5, 6),
    "9": (0, 1, 2, 3, 5, 6),
}


def _box(half_width: float, half_height: float) -> np.ndarray:
    right, down = np.abs(_RIGHT) - half_width, np.abs(_DOWN) - half_height
    return np.hypot(np.maximum(right, 0), np.maximum(down, 0)) + np.minimum(np.maximum(right, down), 0)


def _stroke(start: tuple[float, float], end: tuple[float, float]) -> np.ndarray:
    (x, y), (dx, dy) = start, (end[0] - start[0], end[1] - start[1])
    along = ((_RIGHT - x) * dx + (_DOWN - y) * dy) / (dx * dx + dy * dy)
    along = np.clip(along, 0, 1)
    return np.hypot(_RIGHT - x - along * dx, _DOWN - y - along * dy) - 0.19


def _triangle() -> np.ndarray:
    # Base below, apex at (0, -0.95); the sides have the slope of 1.75 down for 0.95 across.
    side = (np.abs(_RIGHT) * 1.75 - (_DOWN + 0.95) * 0.95) / np.hypot(1.75, 0.95)
    return np.maximum(side, _DOWN - 0.8)


def _digit(lit: tuple[int, ...]) -> np.ndarray:
    return np.minimum.reduce([_stroke(*_STROKES[i]) for i in lit])


# Signed distances to the outline, negative inside: unlike pictures, they are scaled to any size with smooth edges.
OUTLINES: dict[str, np.ndarray] = {
    "circle": np.hypot(_RIGHT, _DOWN) - 0.95,
    "square": _box(0.82, 0.82),
    "triangle": _triangle(),
    "cross": np.minimum(_box(0.97, 0.3), _box(0.3, 0.97)),
    "ring": np.abs(np.hypot(_RIGHT, _DOWN) - 0.7) - 0.26,
    "bar": _box(0.97, 0.36),
    **{name: _digit(lit) for name, lit in _LIT.items()},
}
OUTLINES = {name: table.astype(np.float32) for name, table in OUTLINES.items()}

# Brightness -1 ... 1 of an object's surface, fixed to the object.
_PATTERNS: list[Callable[[], np.ndarray]] = [
    lambda: np.zeros((_CELLS, _CELLS)),
    lambda: np.sin(_RIGHT * 5.0) + 0 * _DOWN,
    lambda: np.sin(_DOWN * 5.0) + 0 * _RIGHT,
    lambda: np.sign(np.sin(_RIGHT * 4.0) * np.sin(_DOWN * 4.0)),
]
TEXTURES = [pattern().astype(np.float32) for pattern in _PATTERNS]


class Canvas:
    """A clip in the making: a dark, textured backdrop seen by a camera that shakes.

    The shake and the noise of a frame do not depend on those of the frames beside it: nothing but the objects tells
    which frames follow each other.
    """

    def __init__(self, generator: np.random.Generator, num_frames: int, side: int) -> None:
        self.generator, self.side = generator, side
        reach = max(1, side // 32)
        # Objects stay inside the picture; what their windows and the shake reach beyond it is painted and cut off.
        self._pad = reach + 3
        self._shake_T2 = generator.integers(-reach, reach + 1, (num_frames, 2))
        wide = side + 2 * (self._pad + reach)
        backdrop = _backdrop(generator, wide)
        rows_TS, columns_TS = (self._shake_T2.T[..., None] + reach + np.arange(side + 2 * self._pad)).astype(np.intp)
        self._pixels = backdrop[rows_TS[:, :, None], columns_TS[:, None, :]]

    def paint(
        self,
        outline: str,
        texture: np.ndarray,
        colour: np.ndarray,
        centre_T2: np.ndarray,
        radius_T: np.ndarray,
        opacity_T: np.ndarray,
        first: int = 0,
    ) -> None:
        """Paint one object onto frames `first` ... `first + T - 1`.

        Args:
            outline: a key of `OUTLINES`.
            texture: brightness by which the colour is multiplied, a table like those in `TEXTURES`.
            colour: RGB, 0 to 255.
            centre_T2: row and column in pixels. The object has to lie inside the picture.
            radius_T: in pixels.
            opacity_T: 0 to 1.
        """
        n = len(radius_T)
        width = int(np.ceil(2 * radius_T.max())) + 3
        # The camera's move to the right takes objects to the left, as it does with the backdrop.
        centre_T2 = centre_T2 - self._shake_T2[first : first + n] + self._pad
        corner_T2 = np.floor(centre_T2 - (width - 1) / 2).astype(np.intp)
        pixels_2TW = (corner_T2[..., None] + np.arange(width)).transpose(1, 0, 2)
        offset_2TW = (pixels_2TW + 0.5 - centre_T2.T[..., None]) / radius_T[:, None]
        cells_2TW = np.rint((offset_2TW / _EXTENT + 1) * ((_CELLS - 1) / 2)).clip(0, _CELLS - 1).astype(np.intp)
        rows, columns = cells_2TW[0][:, :, None], cells_2TW[1][:, None, :]
        distance_TWW = OUTLINES[outline][rows, columns] * radius_T[:, None, None].astype(np.float32)
        cover_TWW1 = ((0.5 - distance_TWW).clip(0, 1) * opacity_T[:, None, None].astype(np.float32))[..., None]
        surface = texture[rows, columns][..., None] * colour.astype(np.float32)
        where = (np.arange(first, first + n)[:, None, None], pixels_2TW[0][:, :, None], pixels_2TW[1][:, None, :])
        under = self._pixels[where]
        self._pixels[where] = under + cover_TWW1 * (surface - under)

    def film(self, noise: float = 5.0) -> np.ndarray:
        """The finished clip: uint8 [T, side, side, 3]."""
        inside = slice(self._pad, self._pad + self.side)
        clip = self._pixels[:, inside, inside]
        clip = clip + noise * self.generator.standard_normal(clip.shape, dtype=np.float32)
        return clip.clip(0, 255).astype(np.uint8)


def _backdrop(generator: np.random.Generator, wide: int) -> np.ndarray:
    """float32 [wide, wide, 3]: nearly grey blocks with grain, at most 100 bright."""
    block = int(generator.integers(3, 9))
    shade = generator.uniform(25, 65) + generator.uniform(-8, 8, 3)
    blocks = generator.uniform(-14, 14, (-(-wide // block), -(-wide // block), 1))
    coarse = blocks.repeat(block, axis=0).repeat(block, axis=1)[:wide, :wide]
    grain = generator.uniform(-8, 8, (wide, wide, 1))
    return (shade + coarse + grain).clip(5, 100).astype(np.float32)
