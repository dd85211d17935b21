"""Clips we make: a textured shape drifts over a noisy background, and only its motion tells the classes apart."""

from pathlib import Path

import numpy as np

from modicum.video.pixels import import_av

# Rows and columns that a shape moves per frame. Every start and every single frame is as likely in one class as in any.
MOTIONS = {"moves left": (0, -1), "moves right": (0, 1), "moves up": (-1, 0), "moves down": (1, 0)}
LABELS = list(MOTIONS)


def moving_shape(generator: np.random.Generator, label: str, num_frames: int, side: int) -> np.ndarray:
    """One clip: uint8 [T, side, side, 3]. What leaves at one edge comes back at the other."""
    down, right = MOTIONS[label]
    size, speed = int(generator.integers(side // 4, side // 2)), generator.uniform(0.04, 0.08) * side
    rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
    inside = np.hypot(rows, columns) <= size / 2 if generator.random() < 0.5 else np.full((size, size), True)
    background = generator.integers(0, 110, 3) + generator.integers(-20, 20, (side, side, 3))
    texture = generator.integers(130, 255, 3) + generator.integers(-25, 25, (size, size, 3))
    start = generator.integers(0, side, 2)
    clip = np.empty((num_frames, side, side, 3))
    for t in range(num_frames):
        top, left = start + np.round(t * speed * np.array([down, right])).astype(int)
        where = np.ix_((top + np.arange(size)) % side, (left + np.arange(size)) % side)
        clip[t] = background
        clip[t][where] = np.where(inside[..., None], texture, clip[t][where])
    noisy = clip + generator.normal(0, 6, clip.shape)
    return noisy.clip(0, 255).astype(np.uint8)


def write_clip(path: Path, frames: np.ndarray, fps: int = 25) -> None:
    """Encode frames as an H.264 file: uint8 [T, H, W, 3], RGB, even height and width.

    Raises:
        MissingExtraError: PyAV is not installed.
    """
    av = import_av()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
