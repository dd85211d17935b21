"""Memory and speed of captions of a long video, window by window, against its length.

    python benchmarks/long_video.py MODEL [--draft DRAFT] [--minutes 3 30] [--stride 1] [--every 1.0] [--out FILE.md]

Videos are written for it: synthetic scenes of one window each, one after the other, at 25 frames per second, so that every
window of a stream without --every shows exactly one scene, whose caption is known. Each is captioned by a process of its
own, to WebVTT; its memory is the peak of what it had resident, libraries included, beside the peak when the first ten
windows were done. A video's length may have no part in it: the run ends with an error if the longest takes more than a
tenth over the shortest.
"""

import argparse
import json
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from modicum import api
from modicum.captioning.vtt import VttWriter
from modicum.report.machine import machine
from modicum.video.synthetic import FPS, Scene, draw_scene, render, write_clip

EARLY = 10
TOLERANCE = 1.1


def scenes() -> Iterator[Scene]:
    """What the videos show, without end."""
    generator = np.random.default_rng(0)
    while True:
        yield draw_scene(generator, held_out=True)


def write_video(path: Path, count: int, frames: int, side: int) -> None:
    """One scene after the other; no more than one is in memory."""
    generator = np.random.default_rng(1)

    def pictures() -> Iterator[np.ndarray]:
        for scene in islice(scenes(), count):
            yield from render(scene, generator, frames, side)

    write_clip(path, pictures())


def peak_bytes() -> int:
    """The most that this process had resident."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux lets a process begin with its parent's peak in `getrusage`, but not here.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def watch(options: argparse.Namespace, video: Path) -> dict[str, Any]:
    """Caption one video in this process, subtitles beside it."""
    model = api.load(options.model)
    draft = {} if options.draft is None else {"draft": drafter(options.draft)}
    windows, right, early, began = 0, 0, 0, time.perf_counter()
    settings = {"stride": options.stride, "every": options.every, "max_new_tokens": options.max_new_tokens, **draft}
    with VttWriter(video.with_suffix(".vtt")) as subtitles:
        shown_and_true = zip(api.caption_windows(model, video, **settings), scenes(), strict=False)
        for windows, (shown, scene) in enumerate(shown_and_true, 1):
            subtitles.add(shown.start, shown.end, shown.text or "")
            right += shown.text == scene.caption
            early = peak_bytes() if windows == EARLY else early
    seconds = time.perf_counter() - began
    share = None if options.every is not None else right / windows
    return {"windows": windows, "seconds": seconds, "early": early, "peak": peak_bytes(), "right": share}


def drafter(name: str) -> Any:
    from modicum.speculative.drafters.make import is_named_drafter

    return name if is_named_drafter(name) else api.load(name)


def measure(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """By length: the video is written, then watched by a process of its own."""
    config = api.check_captioner(api.load(options.model)).config.encoder
    # Frames that fill no whole tubelet belong to no window.
    frames, side = config.kept_frames * options.stride, max(config.image_size) // 2 * 2
    for minutes in options.minutes:
        count, video = max(1, round(minutes * 60 * FPS / frames)), folder / f"{minutes:g}.mp4"
        print(f"writing {minutes:g} minutes", file=sys.stderr)
        write_video(video, count, frames, side)
        print(f"captioning {minutes:g} minutes", file=sys.stderr)
        command = [sys.executable, __file__, *options.command, "--only", str(video)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        yield {"minutes": count * frames / FPS / 60, "frames": count * frames, **json.loads(done.stdout)}
        video.unlink()


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown lines."""
    yield "| minutes | frames | windows | right | seconds | times real time | MB after ten windows | MB at most |"
    yield "|" + "---:|" * 8
    for row in rows:
        right = "" if row["right"] is None else f"{row['right']:.1%}"
        yield (
            f"| {row['minutes']:.1f} | {row['frames']:,} | {row['windows']:,} | {right} | {row['seconds']:.1f} "
            f"| {row['minutes'] * 60 / row['seconds']:.1f} | {row['early'] / 1e6:.0f} | {row['peak'] / 1e6:.0f} |"
        )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a captioner")
    parser.add_argument("--draft")
    parser.add_argument("--minutes", type=float, nargs="+", default=[3, 30])
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--every", type=float, help="seconds from window to window; as long as a window if not given")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, help="a markdown file to write as well")
    parser.add_argument("--only", type=Path, help="caption this video in this process, and print what it took as JSON")
    options = parser.parse_args(arguments, argparse.Namespace(command=arguments))
    if options.only:
        print(json.dumps(watch(options, options.only)))
        return
    if options.out and not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: there is no folder {options.out.parent}; make it first")
    with tempfile.TemporaryDirectory() as folder:
        rows = sorted(measure(options, Path(folder)), key=lambda row: row["minutes"])
    lines = [
        f"# Captions of long videos, {date.today()}",
        "",
        machine() + ".",
        "",
        f"`python benchmarks/long_video.py {shlex.join(options.command)}`",
        "",
        *table(rows),
    ]
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")
    if rows[-1]["peak"] > TOLERANCE * rows[0]["peak"]:
        raise SystemExit(f"{rows[-1]['minutes']:.1f} minutes take more memory than {rows[0]['minutes']:.1f}")


if __name__ == "__main__":
    main(sys.argv[1:])
