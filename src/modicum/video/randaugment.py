"""RandAugment (1909.13719) of a clip: operations drawn once and applied to all of its frames alike.

Operations are PIL's, which the paper took them from, with the levels of the ViViT authors' code. Their code stacks the
frames of a clip into one tall image, so that AutoContrast, Equalize and Contrast measure the whole clip: so do these, and
equal pixels stay equal in all frames. Clips are planes, uint8 [3, T, H, W]; the result of an operation is one too.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modicum.video.colour import chunks, grey, write

GREY = 128  # what geometry and Cutout leave behind
MAX_LEVEL = 10  # of the scale that magnitudes are read on; larger ones go on along it
# Cutout's half side and the shift at `MAX_LEVEL`, in pixels of the frames that they were chosen for.
CUTOUT, SHIFT, REFERENCE_SIDE = 40, 100, 224
VALUES = torch.arange(256)

Operation = Callable[[Tensor, float, np.random.Generator], Tensor]


def randaugment(planes: Tensor, layers: int, magnitude: float, operations: str, random: np.random.Generator) -> Tensor:
    """Apply `layers` operations, each drawn from a list that also holds doing nothing.

    Args:
        planes: uint8 [3, T, H, W].
        magnitude: how strong, the same for all operations. Above 10, Posterize and Solarize change ever less, and from
            20 and 10 on nothing, as in the authors' code.
        operations: "colour" or "all", which adds geometry.
    """
    names = list(OPERATIONS[operations])
    for choice in random.integers(len(names) + 1, size=layers):
        if choice < len(names):
            planes = OPERATIONS[operations][names[choice]](planes, magnitude / MAX_LEVEL, random)
    return planes


def autocontrast(planes: Tensor) -> Tensor:
    """Stretch each colour so that its darkest value in the clip becomes 0 and its brightest 255."""
    tables = []
    for plane in planes:
        low, high = (int(x) for x in torch.aminmax(plane))
        tables.append((VALUES - low) * 255 // (high - low) if high > low else VALUES)
    return looked_up(planes, torch.stack(tables))


def equalize(planes: Tensor) -> Tensor:
    """Make each colour's values, counted over the clip, as evenly spread as a table of values can."""
    tables = []
    for plane in planes:
        counts = torch.bincount(plane.flatten(), minlength=256)
        used = counts[counts > 0]
        step = int(used.sum() - used[-1]) // 255
        below = counts.cumsum(0) - counts
        tables.append((below + step // 2) // step if step else VALUES)
    return looked_up(planes, torch.stack(tables))


def invert(planes: Tensor) -> Tensor:
    return 255 - planes


def posterize(planes: Tensor, bits: int) -> Tensor:
    """Keep the highest `bits` bits."""
    return planes & (256 - (1 << (8 - min(bits, 8))))


def solarize(planes: Tensor, threshold: int) -> Tensor:
    """Invert values from `threshold` on."""
    return looked_up(planes, torch.where(VALUES.lt(threshold), VALUES, 255 - VALUES))


def solarize_add(planes: Tensor, addition: int) -> Tensor:
    """Add to values below 128."""
    return looked_up(planes, torch.where(VALUES.lt(128), VALUES + addition, VALUES))


def brightness(planes: Tensor, factor: float) -> Tensor:
    """0 is black, 1 the clip itself."""
    return looked_up(planes, VALUES * factor)


def contrast(planes: Tensor, factor: float) -> Tensor:
    """0 is the mean luminance of the clip, 1 the clip itself.

    PIL's. The authors' code divides a number of pixels by 256 where the mean should be, which is white for all but the
    smallest clips.
    """
    mean = int(grey(planes).double().mean() + 0.5)
    return looked_up(planes, mean + factor * (VALUES - mean))


def colour(planes: Tensor, factor: float) -> Tensor:
    """Saturation: 0 is grey, 1 the clip itself."""
    result = torch.empty_like(planes)
    for part, out in chunks(planes, result):
        pale = grey(part).float()
        write(out, [torch.lerp(pale, plane.float(), factor).clamp_(0, 255) for plane in part])
    return result


def sharpness(planes: Tensor, factor: float) -> Tensor:
    """0 is smoothed, by the mean of a pixel, weighing 5, and its eight neighbours; 1 is the clip itself. Borders stay."""
    result = planes.clone()
    for part, out in chunks(planes, result):
        x = part.to(torch.int16)
        columns = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
        weighed = columns[..., :-2] + columns[..., 1:-1] + columns[..., 2:] + 4 * x[..., 1:-1, 1:-1]
        smooth = weighed.float().div_(13).round_()
        out[..., 1:-1, 1:-1] = torch.lerp(smooth, x[..., 1:-1, 1:-1].float(), factor).clamp_(0, 255).to(torch.uint8)
    return result


def cutout(planes: Tensor, half: int, centre: tuple[int, int]) -> Tensor:
    """A grey square of side 2 * half about `centre` (row, column), as much of it as lies inside."""
    rows, columns = (slice(max(0, at - half), at + half) for at in centre)
    planes = planes.clone()
    planes[..., rows, columns] = GREY
    return planes


def affine(planes: Tensor, matrix: tuple[float, float, float, float, float, float]) -> Tensor:
    """Fetch each pixel (x, y) from (a x + b y + c, d x + e y + f), both at pixels' centres, nearest; grey from outside."""
    height, width = planes.shape[2:]
    a, b, c, d, e, f = matrix
    x, y = torch.arange(width, dtype=torch.float64) + 0.5, torch.arange(height, dtype=torch.float64)[:, None] + 0.5
    from_x, from_y = (a * x + b * y + c).floor().long(), (d * x + e * y + f).floor().long()
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    # One map of places serves every frame and colour; a pixel past the last one is the grey.
    places = torch.where(inside, from_y * width + from_x, height * width).flatten().int()
    frames = F.pad(planes.flatten(2), (0, 1), value=GREY).flatten(0, 1)
    # Frame by frame: PyTorch is slow where the selected axis is not the only one.
    return torch.stack([frame.index_select(0, places) for frame in frames]).view(planes.shape)


def shear_x(planes: Tensor, level: float) -> Tensor:
    """Fetch from `level` columns further right for every row further down."""
    return affine(planes, (1, level, 0, 0, 1, 0))


def shear_y(planes: Tensor, level: float) -> Tensor:
    return affine(planes, (1, 0, 0, level, 1, 0))


def translate_x(planes: Tensor, pixels: float) -> Tensor:
    """Fetch from `pixels` columns further right."""
    return affine(planes, (1, 0, pixels, 0, 1, 0))


def translate_y(planes: Tensor, pixels: float) -> Tensor:
    return affine(planes, (1, 0, 0, 0, 1, pixels))


def rotate(planes: Tensor, degrees: float) -> Tensor:
    """Counter-clockwise about the middle."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    y, x = (side / 2 for side in planes.shape[2:])
    return affine(planes, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))


def looked_up(planes: Tensor, tables: Tensor) -> Tensor:
    """Replace values by a table of 256, or one per colour; what lies outside 0 ... 255 is cut off, fractions too."""
    tables = tables.clamp(0, 255).to(torch.uint8).expand(3, 256)
    found = [table.index_select(0, plane.flatten().int()) for table, plane in zip(tables, planes, strict=True)]
    return torch.stack(found).view(planes.shape)


def signed(size: float, random: np.random.Generator) -> float:
    return size if random.random() < 0.5 else -size


def place(planes: Tensor, random: np.random.Generator) -> tuple[int, int]:
    height, width = planes.shape[2:]
    return int(random.integers(height)), int(random.integers(width))


def relative(pixels: float, side: int) -> float:
    """Pixels of a frame of 224 as pixels of this one; small frames would not survive them otherwise."""
    return pixels * side / REFERENCE_SIDE


def enhanced(operation: Callable[[Tensor, float], Tensor]) -> Operation:
    return lambda planes, level, random: operation(planes, 1.8 * level + 0.1)


# Level 1 is magnitude 10. Names and levels as in the authors' code.
COLOUR: dict[str, Operation] = {
    "AutoContrast": lambda planes, level, random: autocontrast(planes),
    "Equalize": lambda planes, level, random: equalize(planes),
    "Invert": lambda planes, level, random: invert(planes),
    "Posterize": lambda planes, level, random: posterize(planes, int(4 * level)),
    "Solarize": lambda planes, level, random: solarize(planes, int(256 * level)),
    "SolarizeAdd": lambda planes, level, random: solarize_add(planes, int(110 * level)),
    "Color": enhanced(colour),
    "Contrast": enhanced(contrast),
    "Brightness": enhanced(brightness),
    "Sharpness": enhanced(sharpness),
    "Cutout": lambda planes, level, random: cutout(
        planes, int(relative(CUTOUT * level, min(planes.shape[2:]))), place(planes, random)
    ),
}
GEOMETRY: dict[str, Operation] = {
    "ShearX": lambda planes, level, random: shear_x(planes, signed(0.3 * level, random)),
    "ShearY": lambda planes, level, random: shear_y(planes, signed(0.3 * level, random)),
    "TranslateX": lambda planes, level, random: translate_x(
        planes, signed(relative(SHIFT * level, planes.shape[3]), random)
    ),
    "TranslateY": lambda planes, level, random: translate_y(
        planes, signed(relative(SHIFT * level, planes.shape[2]), random)
    ),
    "Rotate": lambda planes, level, random: rotate(planes, signed(30 * level, random)),
}
OPERATIONS: dict[str, dict[str, Operation]] = {"colour": COLOUR, "all": COLOUR | GEOMETRY}
