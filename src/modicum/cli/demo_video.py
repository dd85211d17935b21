"""The demo's first steps: video files are made, and a ViViT names what moves in them; four kinds of ViViT compared."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.cli.demo_story import timed
from modicum.config import Variant

CLASSIFIER = "modicum-motion-classifier"
FILES = 16
# Models of one width and depth, large enough that attention over all of space and time costs what it does.
SIZE, COMPARED_FRAMES, COMPARED_SIDE, RUNS = "vivit-s/16x2", 16, 224, 2
VARIANTS: dict[Variant, str] = {
    "spacetime": "1, all of space-time",
    "factorized_encoder": "2, space, then time",
    "factorized_self_attention": "3, both in every layer",
    "factorized_dot_product": "4, split among heads",
}
LENGTHS = [8, 16, 32, 64, 128]


@dataclass(frozen=True)
class Clip:
    """A video file and what is in it: frames uint8 [T, H, W, 3]."""

    path: Path
    label: str
    frames: Any


def classifier() -> Any:
    """The classifier that ships with modicum."""
    from modicum import api

    return api.load(CLASSIFIER, dtype="float32")


@contextmanager
def folder_of_clips(story: Any, model: Any) -> Iterator[list[Clip]]:
    """Make the files for the steps that watch them; they go when these are done."""
    with tempfile.TemporaryDirectory() as folder:
        yield make(story, model, Path(folder))


def make(story: Any, model: Any, folder: Path) -> list[Clip]:
    """Draw clips of each motion that a ViViT can name, of its size, and encode them as files; none where PyAV is missing."""
    import numpy as np

    from modicum.report.html import strip
    from modicum.video.synthetic import MOTION_LABELS, labelled_clip, write_clip

    clips: list[Clip] = []
    config = model.config
    labels = [label for label in model.labels if label in MOTION_LABELS]
    with story.step("Make videos") as step:
        generator, seconds, size = np.random.default_rng(1), 0.0, 0
        with step.bar("draw and encode", FILES) as advance:
            for number in range(FILES):
                label = labels[number % len(labels)]
                path = folder / f"clip{number + 1}.mp4"
                shape = (config.num_frames, config.image_size[0])
                drawn, frames = timed(lambda label=label, shape=shape: labelled_clip(generator, label, *shape))
                encoded, _ = timed(lambda path=path, frames=frames: write_clip(path, frames))
                seconds, size = seconds + drawn + encoded, size + path.stat().st_size
                clips.append(Clip(path, label, frames))
                advance()
        speed = f"{FILES / seconds:.0f}"
        line = f"{FILES} mp4 files, {size:,} bytes, {speed} a second"
        step.headline(f"{speed} clips/s", "drawn and encoded as video files", line)
        step.section.text(
            "An object stands once at each point of a small lattice, and the label says in which direction the lattice is "
            "walked, line by line. So neither one frame tells the classes apart, nor do all of them without their order: a "
            "model has to watch, not to look."
        )
        shown = [
            strip(clip.frames, f"All frames in order: something {clip.label}", [(clip.path.name, clip.label)], most=16)
            for clip in clips[: len(labels)]
        ]
        step.section.strips(shown)
    return clips


def watch(story: Any, model: Any, clips: list[Clip]) -> None:
    """Classify the files, and compare what the paper's four models cost."""
    with story.step("Name what moves in them") as step:
        if clips:
            name_motions(step, model, clips)
        compare(step)


def name_motions(step: Any, model: Any, clips: list[Clip]) -> None:
    """The classes that a ViViT gives these files, and what is left of that when their frames are shuffled."""
    import numpy as np

    from modicum import api
    from modicum.video.synthetic import shuffle_frames, write_clip
    from modicum.vivit.flops import cost

    # A clip has as many frames as the model reads, each of its size: all of it is one view.
    view: Any = {"views": (1, 1), "stride": 1, "short_side": min(model.config.image_size), "top": 1}
    generator, seconds = np.random.default_rng(2), 0.0
    named, shuffled = [], []
    with step.bar("classify files", len(clips)) as advance:
        for clip in clips:
            spent, found = timed(lambda path=clip.path: api.classify(model, path, **view)[0])
            named.append(found)
            seconds += spent
            control = clip.path.with_stem(f"{clip.path.stem}-shuffled")
            write_clip(control, shuffle_frames(clip.frames, generator))
            shuffled.append(api.classify(model, control, **view)[0])
            advance()
    labels = list(dict.fromkeys(clip.label for clip in clips))
    right, control_right = (
        sum(found.label == clip.label for found, clip in zip(given, clips, strict=True)) for given in (named, shuffled)
    )
    chance, each = f"{len(clips) / len(labels):.2g}", 1e3 * seconds / len(clips)
    line = (
        f"{right} of {len(clips)} right, {control_right} with shuffled frames, {chance} by chance; {each:.0f} ms a file"
    )
    step.headline(f"{right} of {len(clips)}", f"motions named right, where chance is {chance}", line)
    step.section.text(
        f"A ViViT of {cost(model.config).parameters:,} parameters reads the files as it would yours: they are decoded, "
        f"sampled, cropped and named, in {each:.0f} ms each. When the frames of each file are shuffled, {control_right} of "
        f"{len(clips)} are named right."
    )
    rows = []
    for label in labels:
        found = [one for one, clip in zip(named, clips, strict=True) if clip.label == label]
        score = sum(one.score for one in found) / len(found)
        rows.append((label, ", ".join(dict.fromkeys(one.label for one in found)), f"{score:.0%}"))
    caption = f"{len(clips) // len(labels)} files of each motion; the score is the model's own probability, on average."
    step.section.table(("what it shows", "what it is named", "score"), rows, caption, words=(0, 1))


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
    faster = "" if fastest is rows[0] else f", {first / fastest[2]:.1f} times as fast as model 1"
    section.text(
        f"Attention over every pair of patches in space and time is what makes a video transformer dear. The paper's four "
        f"models, here all of the size `{SIZE}`, differ in how they factorise it. On {frames} frames of {side} × {side} "
        f"model {fastest[0][0]} was the fastest{faster}."
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

    return LENGTHS, [
        cost(named_config(SIZE, variant=variant, num_frames=frames, image_size=COMPARED_SIDE)).gflops
        for frames in LENGTHS
    ]


def draw_growth(axis: Any) -> None:
    for variant, name in VARIANTS.items():
        axis.plot(*growth(variant), label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(LENGTHS, [str(frames) for frames in LENGTHS])
    axis.set_xlabel(f"frames of {COMPARED_SIDE} × {COMPARED_SIDE}")
    axis.set_ylabel("GFLOPs per clip")
    axis.legend()


def growth_in_words() -> str:
    last = {name: growth(variant)[1][-1] for variant, name in VARIANTS.items()}
    return "GFLOPs of a clip of 128 frames: " + "; ".join(
        f"model {name}, {gflops:,.0f}" for name, gflops in last.items()
    )
