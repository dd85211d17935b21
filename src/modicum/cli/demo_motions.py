"""A ViViT that learns to tell eight directions apart within half a minute."""

from collections.abc import Callable
from typing import Any

FRAMES, SIDE = 16, 32
STEPS, BATCH = 200, 32


def small_model() -> Any:
    """16 frames of 32 x 32 in tubelets of 2 x 8 x 8, with fresh weights."""
    from modicum.config import VivitConfig
    from modicum.video.synthetic import MOTION_LABELS
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
        num_classes=len(MOTION_LABELS),
    )
    model = Vivit(config)
    initialise(model, seed=0)
    model.labels = MOTION_LABELS
    return model


def teach(model: Any, steps: int, advance: Callable[[], None]) -> None:
    """AdamW on clips that are made as they are needed."""
    import numpy as np
    import torch

    from modicum.video.synthetic import MOTION_LABELS, labelled_clip

    generator = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for _ in range(steps):
        classes = generator.integers(0, len(MOTION_LABELS), BATCH)
        clips = np.stack([labelled_clip(generator, MOTION_LABELS[i], FRAMES, SIDE) for i in classes])
        loss = torch.nn.functional.cross_entropy(model(torch.from_numpy(clips)), torch.from_numpy(classes))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        advance()
    model.eval()
