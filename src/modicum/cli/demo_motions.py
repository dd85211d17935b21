"""A ViViT that learns to tell four directions apart within seconds, and the clips that it learns from."""

from collections.abc import Callable
from typing import Any

FRAMES, SIDE = 8, 32
STEPS, BATCH = 250, 32
# Rows and columns that a shape moves per frame. Every start and every single frame is as likely in one class as in any.
DIRECTIONS = {"moves left": (0, -1), "moves right": (0, 1), "moves up": (-1, 0), "moves down": (1, 0)}
LABELS = list(DIRECTIONS)


def moving_shape(generator: Any, label: str, num_frames: int, side: int) -> Any:
    """A textured shape drifts over a noisy background, and what leaves at one edge comes back at the other: uint8
    [T, side, side, 3]."""
    import numpy as np

    down, right = DIRECTIONS[label]
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


def small_model() -> Any:
    """8 frames of 32 x 32 in tubelets of 2 x 8 x 8."""
    from modicum.config import VivitConfig
    from modicum.vivit.build import initialise
    from modicum.vivit.model import Vivit

    config = VivitConfig(
        variant="factorized_encoder",
        image_size=(SIDE, SIDE),
        num_frames=FRAMES,
        tubelet_size=(2, 8, 8),
        dim=64,
        n_layers=2,
        n_heads=4,
        n_kv_heads=4,
        head_dim=16,
        ffn_dim=128,
        temporal_layers=1,
        num_classes=len(LABELS),
    )
    model = Vivit(config)
    initialise(model, seed=0)
    model.labels = LABELS
    return model


def teach(model: Any, steps: int, advance: Callable[[], None]) -> None:
    """AdamW on clips that are made as they are needed."""
    import numpy as np
    import torch

    generator = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for _ in range(steps):
        classes = generator.integers(0, len(LABELS), BATCH)
        clips = np.stack([moving_shape(generator, LABELS[i], FRAMES, SIDE) for i in classes])
        loss = torch.nn.functional.cross_entropy(model(torch.from_numpy(clips)), torch.from_numpy(classes))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        advance()
    model.eval()
