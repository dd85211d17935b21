"""Scaling frames and cutting crops out of them, as the authors' pipeline does (2103.15691, section 4.1)."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from modicum.errors import UsageError


def usual_short_side(crop: tuple[int, int]) -> int:
    """What a video's shorter side is scaled to before cutting: 256 for a crop of 224, in this proportion for others."""
    return round(min(crop) * 256 / 224)


def resized_shape(height: int, width: int, crop: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Height and width after resizing: the shorter side becomes `short_side`, the other follows, rounded down.

    With a crop that is not square, "shorter" is the side that leaves the crop less room, and `short_side` is what the
    crop's shorter side is cut from.
    """
    crop_height, crop_width = crop
    if crop_height * width >= crop_width * height:
        new_height = crop_height * short_side // min(crop)
        return new_height, max(crop_width, width * new_height // height)
    new_width = crop_width * short_side // min(crop)
    return max(crop_height, height * new_width // width), new_width


def resize(frames: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, without antialiasing, cut off to whole values, as the authors' pipeline: uint8 [T, H, W, 3] -> uint8."""
    if frames.shape[1:3] == (height, width):
        return frames
    planes = frames.movedim(-1, 1).float()
    resized = F.interpolate(planes, size=(height, width), mode="bilinear", align_corners=False)
    return resized.movedim(1, -1).to(torch.uint8)


def crop_corners(height: int, width: int, crop: tuple[int, int], crops: int) -> list[tuple[int, int]]:
    """Top left corners (y, x) of one central crop, or of three along the longer side: left, centre and right, or top,
    middle and bottom. 256 x 340 and 224 give x = 0, 58, 116 at y = 16.

    Raises:
        UsageError: another number of crops.
    """
    room_y, room_x = height - crop[0], width - crop[1]
    centre = (-(-room_y // 2), -(-room_x // 2))
    if crops == 1:
        return [centre]
    if crops != 3:
        raise UsageError(f"{crops} spatial crops were asked for: choose 1, the centre, or 3 along the longer side")
    if height > width:
        return [(y, centre[1]) for y in (0, centre[0], room_y)]
    return [(centre[0], x) for x in (0, centre[1], room_x)]


def crops_of(frames: Tensor, crop: tuple[int, int], short_side: int | None, crops: int) -> Iterator[Tensor]:
    """Resize frames and cut out each crop: uint8 [T, H, W, 3] -> uint8 [T, crop height, crop width, 3] each.

    Args:
        short_side: None is 256 for a crop of 224, the paper's, and in this proportion for others.
    """
    if short_side is None:
        short_side = usual_short_side(crop)
    if short_side < min(crop):
        raise UsageError(f"a shorter side of {short_side} is less than the model's {min(crop)}: give at least that")
    height, width = resized_shape(frames.shape[1], frames.shape[2], crop, short_side)
    frames = resize(frames, height, width)
    for y, x in crop_corners(height, width, crop, crops):
        yield frames[:, y : y + crop[0], x : x + crop[1]]
