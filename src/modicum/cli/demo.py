"""`modicum demo`: what modicum does, as a story of steps on models that ship with it, and a report of what was measured."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.cli import common
from modicum.errors import UsageError

TARGET, DRAFT = "modicum-code-target", "modicum-code-draft"
LEAD = (
    "Three ways to spend less on a transformer without changing what it answers: attention factorised over space and time, "
    "keys and values shared between heads, and a draft that a large model only has to check. Every figure and picture on "
    "this page was made on the machine named at its end, when the page was."
)
# On files of one's own: a video, a checkpoint to shrink, a checkpoint to speed up.
COMMANDS = [
    ("modicum classify google/vivit-b-16x2-kinetics400 YOUR-VIDEO.mp4", "Name what a video shows, in 400 classes:"),
    (
        "modicum convert YOUR-CHECKPOINT GROUPED --kv-heads 8 --method merged --calibration YOUR-TEXT.txt",
        "Give a language model fewer key-value heads, and so a smaller cache:",
    ),
    (
        "modicum generate YOUR-CHECKPOINT --draft YOUR-SMALLER-ONE -k auto --prompt 'Once upon a time'",
        "Get the text of a large model faster, with a smaller one as its draft:",
    ),
]


def demo(
    out: Annotated[
        Path, typer.Option(help="Where the report goes: one HTML file. An earlier report there is replaced.")
    ] = Path("modicum-demo.html"),
    quick: Annotated[bool, typer.Option("--quick", help="As little of everything as shows that it runs.")] = False,
) -> None:
    """Make videos, name what moves in them, describe them, share a language model's keys and values, and write code with a
    draft; all of it measured now, and put into a report."""
    from modicum import resources
    from modicum.cli.demo_story import Story
    from modicum.report.html import Report

    presets = resources.model_presets()
    if TARGET not in presets or DRAFT not in presets:
        raise UsageError(f"{TARGET} and {DRAFT} are not in this installation: install modicum from its repository")
    check_report(out)
    began = time.perf_counter()
    story = Story(Report("Watch, read and write, on a modicum of compute", LEAD), quick=quick)
    tell(story)
    close(story, out, time.perf_counter() - began)


def tell(story: Any) -> None:
    """The steps."""
    from modicum import api
    from modicum.cli import demo_caption, demo_gqa, demo_text, demo_video

    model = demo_video.classifier()
    with demo_video.folder_of_clips(story, model) as clips:
        demo_video.watch(story, model, clips)
    captioner, draft = (api.load(name, dtype="float32") for name in (demo_caption.CAPTIONER, demo_caption.DRAFT))
    demo_caption.describe(story, captioner, draft)
    demo_gqa.share(story, TARGET)
    demo_text.write(story, TARGET, DRAFT)


def close(story: Any, out: Path, seconds: float) -> None:
    """The report, and what to try next."""
    from modicum import __version__
    from modicum.report.machine import machine

    report = story.report
    for command, what in COMMANDS:
        report.command(command, what)
    report.fact("Machine", machine())
    report.fact("Made by", f"modicum {__version__}, `modicum demo{' --quick' if story.quick else ''}`".replace("`", ""))
    report.fact("Time", f"{seconds:.0f} seconds in all")
    report.write(out)
    story.console.print(f"\nThe report: {out.absolute()}", markup=False, soft_wrap=True)
    story.console.print("On your own files:", markup=False)
    for command, _ in COMMANDS:
        story.console.print(f"  {command}", markup=False, soft_wrap=True)


def check_report(out: Path) -> None:
    """Refuse, before anything is done, to write where something other than a report is, or where nothing can be written."""
    from modicum.report.html import is_report

    if out.exists() and not is_report(out):
        raise UsageError(f"{out} exists and is not a report of modicum: choose another --out")
    common.check_writable(out, force=True)
