"""The demo's first steps: video files are made, and a small ViViT names what moves in them; four kinds of ViViT compared."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.cli.demo_story import timed
from modicum.config import Variant

FILES, FRAMES, SIDE = 12, 8, 32
STEPS, BATCH = 250, 32
# Models of one width and depth, large enough that attention over all of space and time costs what it does.
SIZE, COMPARED_FRAMES, COMPARED_SIDE, RUNS = "vivit-s/16x2", 16, 224, 2
VARIANTS: dict[Variant, str] = {
    "spacetime": "1, all of space-time",
    "factorized_encoder": "2, space, then time",
    "factorized_self_attention": "3, both in every layer",
    "factorized_dot_product": "4, split among heads",
}


@dataclass(frozen=True)
class Clip:
    """A video file and what is in it: frames uint8 [T, H, W, 3]."""

    path: Path
    label: str
    frames: Any


@contextmanager
def folder_of_clips(story: Any) -> Iterator[list[Clip]]:
    """Make the files for the steps that watch them; they go when these are done."""
    with tempfile.TemporaryDirectory() as folder:
        yield make(story, Path(folder))


def make(story: Any, folder: Path) -> list[Clip]:
    """Draw clips of every class and encode them as video files; none where PyAV is missing."""
    import numpy as np

    from modicum.video.synthetic import LABELS, moving_shape, write_clip

    clips: list[Clip] = []
    with story.step("Make videos") as step:
        generator, seconds, size = np.random.default_rng(1), 0.0, 0
        with step.bar("draw and encode", FILES) as advance:
            for number in range(FILES):
                label = LABELS[number % len(LABELS)]
                path = folder / f"clip{number}.mp4"
                drawn, frames = timed(lambda label=label: moving_shape(generator, label, FRAMES, SIDE))
                encoded, _ = timed(lambda path=path, frames=frames: write_clip(path, frames))
                seconds, size = seconds + drawn + encoded, size + path.stat().st_size
                clips.append(Clip(path, label, frames))
                advance()
        speed = f"{FILES / seconds:.0f}"
        line = f"{FILES} mp4 files, {size:,} bytes, {speed} a second"
        step.headline(f"{speed} clips/s", "drawn and encoded as video files", line)
        step.section.text(
            "A textured shape drifts over a noisy background. Every single frame is as likely in one class as in any other: "
            "only its motion tells the classes apart, so that a model has to watch, not to look."
        )
        for clip in clips[: len(LABELS)]:
            alt = f"A shape that {clip.label}, in frames from left to right"
            step.section.frames(clip.frames, alt, [(clip.path.name, clip.label)])
    return clips


def watch(story: Any, clips: list[Clip]) -> None:
    """Classify the files, and compare what the paper's four models cost."""
    with story.step("Name what moves in them") as step:
        if clips:
            name_motions(step, trained(step), clips)
        compare(step)


def name_motions(step: Any, model: Any, clips: list[Clip]) -> None:
    """The classes that any ViViT with labels gives these files."""
    from modicum import api

    views: Any = {"views": (1, 1), "stride": 1, "short_side": SIDE, "top": 1}
    best, seconds = [], 0.0
    with step.bar("classify files", len(clips)) as advance:
        for clip in clips:
            spent, named = timed(lambda path=clip.path: api.classify(model, path, **views)[0])
            best.append(named)
            seconds += spent
            advance()
    right = sum(named.label == clip.label for named, clip in zip(best, clips, strict=True))
    chance = f"where chance is {len(clips) / len({clip.label for clip in clips}):.0f}"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    each = 1e3 * seconds / len(clips)
    line = f"{right} of {len(clips)} right, {chance}; {each:.0f} ms a file"
    step.headline(f"{right} of {len(clips)}", f"motions named right, {chance}", line)
    step.section.text(
        f"A ViViT of {parameters:,} parameters reads the files as anyone's would be read: decoded, sampled, cropped, and "
        f"named, {each:.0f} ms each."
    )
    step.section.table(
        ("file", "shows", "is named", "with"),
        [
            (clip.path.name, clip.label, named.label, f"{named.score:.0%}")
            for named, clip in zip(best, clips, strict=True)
        ],
        "The score is the model's own probability.",
        words=(0, 1, 2),
    )


def compare(step: Any) -> None:
    """Parameters, GFLOPs and time of Models 1 to 4 of 2103.15691, alike in width and depth, on one clip each."""
    import torch

    from modicum.vivit import build
    from modicum.vivit.flops import cost

    frames, side = (4, 32) if step.quick else (COMPARED_FRAMES, COMPARED_SIDE)
    clip, rows = torch.zeros(1, frames, side, side, 3, dtype=torch.uint8), []
    with step.bar("time four models", len(VARIANTS) * RUNS) as advance, torch.inference_mode():
        for variant, name in VARIANTS.items():
            model = build(SIZE, variant=variant, num_frames=frames, image_size=side)
            times = []
            for _ in range(RUNS):
                times.append(timed(lambda model=model: model(clip))[0])
                advance()
            rows.append((name, cost(model.config), 1e3 * min(times)))
    first, fastest = rows[0][2], min(rows, key=lambda row: row[2])
    step.say(f"{'model':<24} {'parameters':>11} {'GFLOPs':>7} {'ms':>7}")
    for name, price, milliseconds in rows:
        step.say(f"{name:<24} {price.parameters:>11,} {price.gflops:>7.1f} {milliseconds:>7.0f}")
    section = step.section
    section.text(
        f"Attention over every pair of patches in space and time is what makes a video transformer dear. The paper's four "
        f"models, here all of the size `{SIZE}`, differ in how they factorise it. On {frames} frames of {side} × {side} "
        f"model {fastest[0][0]} was the fastest, {first / fastest[2]:.1f} times as fast as model 1."
    )
    section.table(
        ("model", "parameters", "GFLOPs", "ms per clip"),
        [(name, f"{price.parameters / 1e6:.1f} M", f"{price.gflops:.1f}", f"{ms:,.0f}") for name, price, ms in rows],
        "Fresh weights: what they are does not change what they cost. GFLOPs in the paper's convention.",
    )
    section.plot(
        draw_growth, growth_in_words(), "What a clip costs by its length, counted from the models' configurations."
    )


def growth(variant: Variant) -> tuple[list[int], list[float]]:
    """Frames, and GFLOPs of a clip of so many."""
    from modicum.vivit.build import named_config
    from modicum.vivit.flops import cost

    lengths = [8, 16, 32, 64, 128]
    return lengths, [
        cost(named_config(SIZE, variant=variant, num_frames=frames, image_size=COMPARED_SIDE)).gflops
        for frames in lengths
    ]


def draw_growth(axis: Any) -> None:
    for variant, name in VARIANTS.items():
        axis.plot(*growth(variant), label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks([8, 16, 32, 64, 128], ["8", "16", "32", "64", "128"])
    axis.set_xlabel(f"frames of {COMPARED_SIDE} × {COMPARED_SIDE}")
    axis.set_ylabel("GFLOPs per clip")
    axis.legend()


def growth_in_words() -> str:
    last = {name: growth(variant)[1][-1] for variant, name in VARIANTS.items()}
    return "GFLOPs of a clip of 128 frames: " + "; ".join(
        f"model {name}, {gflops:,.0f}" for name, gflops in last.items()
    )


def trained(step: Any) -> Any:
    """A ViViT that learns these motions here and now, on other clips."""
    from modicum.video.synthetic import LABELS

    steps = 5 if step.quick else STEPS
    model = small_model(len(LABELS))
    model.labels = LABELS
    with step.bar("train a small ViViT", steps) as advance:
        seconds, _ = timed(lambda: teach(model, steps, advance))
    seen = f"{steps * BATCH:,} other clips"
    step.say(
        f"a ViViT of {sum(p.numel() for p in model.parameters()):,} parameters, trained for {seconds:.0f} s on {seen}"
    )
    step.section.text(f"The model was trained just now, for {seconds:.0f} seconds, on {seen}.")
    return model


def small_model(num_classes: int) -> Any:
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
        num_classes=num_classes,
    )
    model = Vivit(config)
    initialise(model, seed=0)
    return model


def teach(model: Any, steps: int, advance: Callable[[], None]) -> None:
    """AdamW on clips that are made as they are needed."""
    import numpy as np
    import torch

    from modicum.video.synthetic import LABELS, moving_shape

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
