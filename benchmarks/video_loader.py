"""How fast training clips are decoded, by number of workers, and what share of a step is spent waiting for them.

    python benchmarks/video_loader.py [--workers 0 1 2 4] [--steps 0 0.5] [--videos 24] [--seconds 10] [--side 256]

Clips of `--frames` at `--stride` are cut at random moments out of H.264 files that it writes itself, and augmented as for
Kinetics (table 7 of 2103.15691) unless `--plain`. A step of 0 asks for the next batch at once, so that clips per second are
what the workers can do; a step of s seconds sleeps that long, as a GPU would compute, and "waiting" is the share of a step
that is lost. "MB" is what all workers hold beyond what they share, at the end; with 0 workers, this process.
"""

import argparse
import os
import re
import tempfile
import time
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from rich.progress import track

from modicum.report.machine import machine
from modicum.video.augment import Augment, augment
from modicum.video.datasets import VideoDataset, VideoSample
from modicum.video.loader import ClipLoader
from modicum.video.synthetic import FPS, LABELS, labelled_clip, write_clip

WARM = 2  # batches, in which workers start


def write_videos(folder, options):
    """Files of moving things on textured ground."""
    samples = []
    for i in track(range(options.videos), description="writing videos"):
        path = Path(folder) / f"{i}.mp4"
        generator = np.random.default_rng([0, i])
        write_clip(path, labelled_clip(generator, LABELS[i % len(LABELS)], round(options.seconds * FPS), options.side))
        samples.append(VideoSample(path, (i % len(LABELS),), str(i)))
    return VideoDataset("synthetic", samples, {"": len(LABELS)}, list(LABELS))


def private_megabytes(pids):
    """Anonymous memory of processes; None where the system does not tell."""
    found = [re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()) for pid in pids if _told(pid)]
    return sum(int(match[1]) for match in found) / 1024 if found and all(found) else None


def _told(pid):
    return Path(f"/proc/{pid}/status").exists()


def with_pid(clip, key, settings, size):
    """Augmented, or cut from a corner; and signed by its process, in the last pixels."""
    height, width = size
    clip = clip[:, :height, :width].clone() if settings is None else augment(clip, size, settings, key)
    clip[-1, -1, -4:, 0] = clip.new_tensor(list(os.getpid().to_bytes(4, "little")))
    return clip


def measured(dataset, options, workers, step):
    """(clips per second, share of the time spent waiting, MB)."""
    size = (options.size, options.size)
    signed = partial(with_pid, settings=None if options.plain else Augment(), size=size)
    loader = ClipLoader(
        dataset,
        num_frames=options.frames,
        stride=options.stride,
        fps=25,
        size=size,
        augment=signed,
        batch=options.batch,
        seed=0,
        workers=workers,
    )
    batches, pids = loader.iterate(0), set()
    for _ in islice(batches, max(WARM, 2 * workers)):
        pass  # until what was read ahead before the clock began is used up
    began, waited = time.perf_counter(), loader.waited_seconds
    for clips in islice(batches, options.batches):
        pids |= {int.from_bytes(bytes(row.tolist()), "little") for row in clips.video[:, -1, -1, -4:, 0]}
        time.sleep(step)
    took = time.perf_counter() - began
    megabytes = private_megabytes(pids)
    batches.close()
    return options.batches * options.batch / took, (loader.waited_seconds - waited) / took, megabytes


def table(rows):
    """A line for each (workers, step, clips per second, share, MB)."""
    lines = ["| workers | step (s) | clips/s | waiting | MB |", "|---|---|---|---|---|"]
    for workers, step, rate, share, megabytes in rows:
        held = "" if megabytes is None else f"{megabytes:.0f}"
        lines.append(f"| {workers} | {step:g} | {rate:.1f} | {share:.0%} | {held} |")
    return lines


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--steps", type=float, nargs="+", default=[0, 0.5], help="seconds that a step computes")
    parser.add_argument("--videos", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=10, help="length of each")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--stride", type=int, default=2)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--batches", type=int, default=12, help="that are measured")
    parser.add_argument("--plain", action="store_true", help="without augmentation")
    options = parser.parse_args(arguments)
    if options.videos < options.batch or options.size > options.side:
        parser.error("--videos must be at least --batch, and --size at most --side")
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_videos(folder, options)
        settings = [(workers, step) for workers in options.workers for step in options.steps]
        rows = [(*pair, *measured(dataset, options, *pair)) for pair in track(settings, description="reading")]
    print(
        f"{options.frames}x{options.size}x{options.size} at stride {options.stride} from {options.seconds:g} s of "
        f"{options.side}x{options.side} H.264, batch {options.batch}, {'plain' if options.plain else 'augmented'}, "
        f"{machine()}\n"
    )
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
