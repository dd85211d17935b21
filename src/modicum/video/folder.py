"""A folder of images as a video: each image lasts one tick of the clock."""

import os
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from modicum.video.clock import as_rate
from modicum.video.pixels import VideoError, check_size, import_av, to_rgb

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_DEFAULT_RATE = Fraction(25)
_NUMBERED = re.compile(r"(.*?)(\d+)(\.(?:png|jpe?g|bmp|webp))", re.IGNORECASE)


class ImageFolder:
    """The images of a folder in natural order (frame_2 before frame_10). Other files and hidden ones are passed over.

    The counterpart of `VideoFile`: stamps count images, and a frame is an image's path until it is turned into RGB.
    """

    may_hide_frames = False

    def __init__(self, path: Path, fps: Fraction | None) -> None:
        self.path = path
        self._files = self._found(path)
        self._av = import_av()
        self._converter = self._av.video.reformatter.VideoReformatter()
        self._shape: tuple[int, ...] | None = None
        self.stamps = range(len(self._files))
        self.end = len(self._files)
        self.time_base = 1 / (fps or _DEFAULT_RATE)

    def _found(self, path: Path) -> list[Path]:
        try:
            names = [file.name for file in path.iterdir()]
        except OSError as error:
            raise VideoError(f"{path} cannot be listed ({error.strerror}): allow reading it") from error
        names = [name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
        if not names:
            raise VideoError(
                f"{path} is a folder without images: give a video file, or a folder of png, jpg, bmp or webp images"
            )
        return [path / name for name in sorted(names, key=natural)]

    def index(self, by_decoding: bool = False) -> Path:
        """The first image; `stamps` are known already."""
        return self._files[0]

    def index_part(self, start: Fraction, end: Fraction | None) -> Path:
        """As `index`."""
        return self._files[0]

    def at(self, stamp: int) -> Path:
        return self._files[stamp]

    def passing(self) -> Iterator[tuple[int, Path]]:
        """(stamp, image) of every image, in order."""
        return iter(enumerate(self._files))

    def rgb(self, file: Path) -> np.ndarray:
        """uint8 [H, W, 3], upright.

        Raises:
            VideoError: the image is damaged, or its size differs from that of the first one read.
        """
        rgb = to_rgb(self._converter, self._decoded(file))
        self._shape = self._shape or rgb.shape
        if rgb.shape != self._shape:
            (height, width, _), (first_height, first_width, _) = rgb.shape, self._shape
            raise VideoError(
                f"{file} is {width}x{height}, other images in its folder are {first_width}x{first_height}: "
                "a folder that is read as a video needs images of one size"
            )
        return rgb

    def close(self) -> None:
        """Nothing is held open."""

    def _decoded(self, file: Path) -> Any:
        av = self._av
        try:
            # From an open file FFmpeg goes by the content; given the name, by the suffix, and a % would be a pattern.
            with file.open("rb") as content, av.open(content, metadata_errors="replace") as container:
                for stream in container.streams.video[:1]:
                    check_size(file, stream.codec_context.width, stream.codec_context.height)
                    for frame in container.decode(stream):
                        return frame
        except (av.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise VideoError(f"{file} is not an image, or is damaged ({reason}): replace or remove it") from error
        raise VideoError(f"{file} holds no image: replace or remove it")


class NumberedImages(ImageFolder):
    """The images from one number to another, both included, of a folder whose names end in one: frame_0000000001.jpg.

    The folder is not listed, for it may hold all the frames of an hour. `fps` is the rate that they were taken at, and
    the clock's own ticks choose among them.
    """

    def __init__(self, path: Path, first: int, last: int, fps: float) -> None:
        self._numbers = range(first, last + 1)
        super().__init__(path, as_rate(fps))

    def _found(self, path: Path) -> list[Path]:
        with os.scandir(path) as entries:
            named = (_NUMBERED.fullmatch(entry.name) for entry in entries)
            pattern = next((match for match in named if match), None)
        if pattern is None:
            raise VideoError(
                f"{path} has no images with numbers for names, such as frame_0000000001.jpg: extract it again"
            )
        before, digits, suffix = pattern.groups()
        files = [path / f"{before}{number:0{len(digits)}}{suffix}" for number in self._numbers]
        # A video may end before its last annotation does.
        while files and not files[-1].exists():
            files.pop()
        if not files:
            raise VideoError(
                f"{path} has no images from number {self._numbers[0]} to {self._numbers[-1]}: extract it again"
            )
        return files


def natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """A sorting key in which runs of digits count as numbers."""
    parts = re.findall(r"(\d+)|(\D+)", name)
    return [(0, int(digits), "") if digits else (1, 0, text.lower()) for digits, text in parts], name
