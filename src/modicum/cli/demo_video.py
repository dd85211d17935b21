"""The demo's second half: a small ViViT learns motions from clips it makes, then names those of fresh video files."""

import tempfile
import time
from pathlib import Path
from typing import Any

STEPS, BATCH, FILES, FRAMES = 250, 32, 16, 16


def watch(console: Any, quick: bool = False) -> None:
    """Train for some seconds, write fresh clips as mp4, classify the files."""
    import numpy as np

    from modicum import api
    from modicum.video.synthetic import MOTION_LABELS, labelled_clip, write_clip

    began = time.perf_counter()
    model = small_model(len(MOTION_LABELS))
    model.labels = MOTION_LABELS
    teach(model, steps=5 if quick else STEPS)
    size = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"\nA factorised ViViT of {size:,} parameters, trained for {time.perf_counter() - began:.0f} s on clips that only "
        "motion tells apart, reads fresh video files:"
    )
    generator, right = np.random.default_rng(1), 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(FILES):
            label = MOTION_LABELS[number % len(MOTION_LABELS)]
            path = Path(folder) / f"clip{number}.mp4"
            write_clip(path, labelled_clip(generator, label, FRAMES, 32))
            best = api.classify(model, path, views=(1, 1), stride=1, short_side=32, top=1)[0]
            right += best.label == label
            if number < len(MOTION_LABELS):
                console.print(f"  {path.name}, which {label + ':':<17} it {best.label} ({best.score:.0%})")
    console.print(f"  {right} of {FILES} right; chance is {FILES // len(MOTION_LABELS)}\n")


def small_model(num_classes: int) -> Any:
    """16 frames of 32 x 32 in tubelets of 2 x 8 x 8."""
    from modicum.config import VivitConfig
    from modicum.vivit.build import initialise
    from modicum.vivit.model import Vivit

    config = VivitConfig(
        variant="factorized_encoder",
        image_size=(32, 32),
        num_frames=FRAMES,
        tubelet_size=(2, 8, 8),
        dim=64,
        n_layers=2,
        n_heads=4,
        n_kv_heads=4,
        head_dim=16,
        ffn_dim=128,
        temporal_layers=1,
        num_classes=num_classes,
    )
    model = Vivit(config)
    initialise(model, seed=0)
    return model


def teach(model: Any, steps: int) -> None:
    """AdamW on clips that are made as they are needed."""
    import numpy as np
    import torch

    from modicum.video.synthetic import MOTION_LABELS, labelled_clip

    generator = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for _ in range(steps):
        classes = generator.integers(0, len(MOTION_LABELS), BATCH)
        clips = np.stack([labelled_clip(generator, MOTION_LABELS[i], FRAMES, 32) for i in classes])
        loss = torch.nn.functional.cross_entropy(model(torch.from_numpy(clips)), torch.from_numpy(classes))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
