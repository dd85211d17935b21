"""The demo's third step: scenes that the captioner was never shown, described plainly and with a draft, in equal words."""

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.cli.demo_story import timed, tokens_seen
from modicum.errors import GenerationError

CAPTIONER, DRAFT = "modicum-captioner", "modicum-caption-draft"
K = 4
SCENES, ROUNDS, MAX_TOKENS = 8, 3, 48


@dataclass(frozen=True)
class Written:
    """A video file of a scene, and what was written about it. `frames` uint8 [T, H, W, 3]; `tokens` for the report."""

    path: Path
    frames: Any
    scene: Any
    text: str
    tokens: list[Any]


def describe(story: Any, model: Any, draft: Any) -> None:
    """Write captions of fresh scenes with a captioner and a draft that shares its encoder; compare words and times."""
    with story.step("Describe them in words") as step, tempfile.TemporaryDirectory() as folder:
        scenes = made(step, model, Path(folder))
        size: Any = {"stride": 1, "short_side": min(model.config.encoder.image_size)}
        settings: Any = {"max_new_tokens": MAX_TOKENS, "temperature": 0.0, **size}
        written, plain_times, draft_times, stats = write(step, model, draft, scenes, settings)
        report_facts(step, written)
        report_speed(step, plain_times, draft_times, stats)


def made(step: Any, model: Any, folder: Path) -> list[tuple[Path, Any, Any]]:
    """(file, frames, scene) each: scenes whose company of words training never shows."""
    import numpy as np

    from modicum.video.synthetic import draw_scene, render, write_clip

    config, scenes = model.config.encoder, []
    n_scenes = 2 if step.quick else SCENES
    with step.bar("draw and encode", n_scenes) as advance:
        for number in range(n_scenes):
            generator = np.random.default_rng([3, number])
            scene = draw_scene(generator, held_out=True)
            frames = render(scene, generator, config.num_frames, config.image_size[0])
            path = folder / f"scene{number + 1}.mp4"
            write_clip(path, frames)
            scenes.append((path, frames, scene))
            advance()
    return scenes


def write(
    step: Any, model: Any, draft: Any, scenes: list[Any], settings: dict[str, Any]
) -> tuple[list[Written], list[float], list[float], list[Any]]:
    """What was written, seconds per file without and with the draft, and the draft's statistics.

    Raises:
        GenerationError: the words differ.
    """
    from modicum import api

    written, plain_times, draft_times, stats = [], [], [], []
    rounds = 1 if step.quick else ROUNDS
    with step.bar("plain and with draft", rounds * len(scenes)) as advance:
        for number in range(rounds):
            for path, frames, scene in scenes:
                events: list[Any] = []
                spent, plain = timed(lambda path=path: api.caption(model, path, **settings))
                plain_times.append(spent)
                drafting = {"draft": draft, "num_draft_tokens": K, "on_token": events.append}
                spent, fast = timed(
                    lambda path=path, drafting=drafting: api.caption(model, path, **drafting, **settings)
                )
                draft_times.append(spent)
                stats.append(fast.stats)
                if plain.tokens != fast.tokens:
                    raise GenerationError(
                        "speculative and plain captions differ: please report this with the output of `modicum demo`"
                    )
                if number == 0:
                    text = fast.texts[0] if fast.texts else ""
                    written.append(Written(path, frames, scene, text, tokens_seen(events)))
                advance()
    return written, plain_times, draft_times, stats


def report_facts(step: Any, written: list[Written]) -> None:
    """Each scene with what is true of it and what was written, and how many of the facts are right."""
    from modicum.report.html import strip
    from modicum.video.synthetic import FACTS, score_facts

    scores = [score_facts(each.scene, each.text) for each in written]
    exact = sum(each.text.strip() == each.scene.caption for each in written)
    counted = {kind: [score[kind] for score in scores if kind in score] for kind in FACTS}
    right = ", ".join(f"{kind} {sum(marks)} of {len(marks)}" for kind, marks in counted.items() if marks)
    for each in written[:3]:
        step.say(f"{each.path.name}: {each.text.strip()}")
    step.headline(
        f"{exact} of {len(written)}",
        "scenes described exactly, with a draft in the same words",
        f"{exact} of {len(written)} described exactly ({right}); with a draft in the same words",
    )
    section = step.section
    section.text(
        "The captioner watches a clip once and writes one sentence. It has met every one of these words, but in other "
        "company: each scene has a colour, a shape and a motion that it was never shown together. A smaller captioner, "
        "which reads what the same encoder saw, proposes the words."
    )
    section.strips(
        [
            strip(
                each.frames,
                f"Frames of a scene from left to right: {each.scene.caption}",
                [("shown", each.scene.caption), ("written", each.tokens)],
                most=8,
            )
            for each in written
        ],
        wide=True,
    )
    section.table(
        ("fact", "right", "of"),
        [(kind, sum(marks), len(marks)) for kind, marks in counted.items() if marks],
        "Facts of each kind that the captions have right. Order is that of two events, where there are two.",
    )


def report_speed(step: Any, plain_times: list[float], draft_times: list[float], stats: list[Any]) -> None:
    """Time per file, watching included, and what became of the drafted words."""
    plain, fast = (1e3 * statistics.median(times) for times in (plain_times, draft_times))
    judged = sum(each.accepted + each.rejected for each in stats)
    share = f"{sum(each.accepted for each in stats) / judged:.0%}" if judged else "none"
    per_call = sum(each.tokens for each in stats) / sum(each.target_calls for each in stats)
    step.say(f"plain {plain:.0f} ms a file, with draft {fast:.0f} ms, {share} of the drafted tokens accepted")
    step.section.bars(
        [("plain", plain, f"{plain:.0f} ms"), ("with draft", fast, f"{fast:.0f} ms")],
        f"Time per file, reading and watching included: the median of {len(stats)}. The words were the same every time.",
    )
    step.section.text(
        f"Of the drafted tokens {share} were accepted: a call of the captioner yielded {per_call:.2f} tokens on average, "
        "where without a draft it yields one."
    )
