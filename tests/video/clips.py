"""Clips written for a test, in which every frame shows its own number as black and white blocks."""

from collections.abc import Callable, Collection, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from torch import Tensor

BLOCK = 16
COLUMNS, ROWS = 4, 3
WIDTH, HEIGHT = COLUMNS * BLOCK, ROWS * BLOCK


def picture(number: int) -> np.ndarray:
    """uint8 [48, 64, 3]: two rows of blocks for the eight bits of a number, and a third that checks them."""
    high, low = divmod(number, 16)
    bits = [[nibble >> bit & 1 for bit in range(COLUMNS)] for nibble in (high, low, _check(high, low))]
    return np.kron(np.array(bits, np.uint8) * 255, np.ones((BLOCK, BLOCK), np.uint8))[..., None].repeat(3, axis=2)


def _check(high: int, low: int) -> int:
    return (3 * high + 5 * low + 9) % 16


def number_of(frame: Tensor | np.ndarray) -> int:
    """The number that a frame shows, whatever its size."""
    grey = np.asarray(frame, np.float32).mean(axis=2)
    height, width = grey.shape
    centres = grey[height // 6 :: height // 3, width // 8 :: width // 4]
    high, low, check = ((centres > 128) << np.arange(COLUMNS)).sum(axis=1).tolist()
    assert check == _check(high, low), "this is not a picture of a number"
    return high * 16 + low


def numbers_of(frames: Tensor) -> list[int]:
    return [number_of(frame) for frame in frames]


def write_video(
    path: Path,
    numbers: Sequence[int] | int,
    fps: Fraction | float = 25,
    *,
    codec: str = "libx264",
    stamps: Sequence[float] | None = None,
    time_base: Fraction | None = None,
    gop: int = 12,
    b_frames: int = 0,
    rotation: int | None = None,
    matrix: Sequence[int] | None = None,
    pix_fmt: str = "yuv420p",
    pictures: Sequence[np.ndarray] | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    audio: bool = False,
) -> Path:
    """Encode pictures of `numbers` (an int: 0 ... n - 1). `stamps` are seconds; otherwise frames come at `fps`.

    `rotation` is counter-clockwise, in degrees; `matrix` are the nine integers of a display matrix.
    """
    if pictures is None:
        pictures = [picture(number) for number in (range(numbers) if isinstance(numbers, int) else numbers)]
    rate = Fraction(fps).limit_denominator(10_000)
    unit = time_base or 1 / rate
    with av.open(str(path), "w", container_options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = unit
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = b_frames
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if matrix is not None:
            stream.set_display_matrix(matrix)
        sound = container.add_stream("aac", rate=8000) if audio else None
        for i, image in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = i if stamps is None and time_base is None else round((stamps[i] if stamps else i / rate) / unit)
            frame.time_base = unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            container.mux(sound.encode(_silence()))
            container.mux(sound.encode(None))
    return path


def write_sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        container.mux(stream.encode(_silence()))
        container.mux(stream.encode(None))
    return path


def _silence() -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
    frame.sample_rate, frame.pts = 8000, 0
    return frame


def write_image(path: Path, image: np.ndarray, codec: str | None = None) -> Path:
    """One picture as png, jpg, bmp or webp, by the path's suffix."""
    codec = codec or {".png": "png", ".jpg": "mjpeg", ".bmp": "bmp", ".webp": "libwebp"}[path.suffix.lower()]
    pix_fmt = {"mjpeg": "yuvj420p", "bmp": "bgr24", "libwebp": "yuv420p"}.get(codec, "rgb24")
    context = av.CodecContext.create(codec, "w")
    context.height, context.width = image.shape[:2]
    context.pix_fmt, context.time_base = pix_fmt, Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pix_fmt)
    frame.pts = 0
    path.write_bytes(b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)]))
    return path


def change_packets(path: Path, numbers: Collection[int], change: Callable[[bytes], bytes]) -> Path:
    """Rewrite these packets of a file in place, each to as many bytes as it had."""
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    content, place = bytearray(path.read_bytes()), 0
    for number, packet in enumerate(packets):
        place = content.index(packet, place)
        if number in numbers:
            content[place : place + len(packet)] = change(packet)
        place += len(packet)
    path.write_bytes(content)
    return path
