"""Data sets of clips that we make, as mp4 files: a folder per class, or captions in MSR-VTT's layout.

A data set is a function of its settings, whatever the number of processes that write it: each clip draws from a stream
of its own. It appears whole or not at all, and one that is there with the same settings is used as it is.
"""

import json
import os
import secrets
import shutil
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from modicum.errors import UsageError
from modicum.video.pixels import import_av
from modicum.video.synthetic.classes import LABELS, check_clip_size, labelled_clip, shuffle_frames
from modicum.video.synthetic.render import render
from modicum.video.synthetic.scenes import Scene, draw_scene

FPS = 25
SETTINGS = "settings.json"
CAPTIONS = "captions.json"
# To be raised with every change of what the same settings draw.
_VERSIONS = {"classes": 1, "captions": 3}
# x264's macroblock tree takes quality from what moves, and differs from run to run with pictures this small.
_CODING = {"crf": "18", "preset": "veryfast", "x264-params": "mbtree=0"}
# Below this many clips, starting processes takes longer than it saves.
_WORTH_PROCESSES = 200
_CHUNK = 16


def write_clip(path: str | PathLike[str], frames: Iterable[np.ndarray], fps: int = FPS) -> None:
    """Encode frames as an H.264 file, one after the other: uint8 [H, W, 3] each, RGB, even height and width.

    Raises:
        MissingExtraError: PyAV is not installed.
        UsageError: no frames.
    """
    av = import_av()
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise UsageError(f"{path} was given no frames to hold: give at least one")
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=_CODING)
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = "yuv420p"
        # Pictures this small are coded faster than threads are started.
        stream.thread_count = 1
        for frame in chain([first], frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def write_dataset(
    folder: str | PathLike[str],
    per_class: Mapping[str, int],
    *,
    num_frames: int = 16,
    side: int = 32,
    seed: int = 0,
    labels: Sequence[str] = LABELS,
    shuffled: bool = False,
    workers: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write labelled clips as `folder/<split>/<label>/<number>.mp4`, at 25 frames per second.

    Args:
        per_class: clips of each class by split, such as `{"train": 100, "held_out": 20}`.
        side: height and width in pixels, an even number.
        shuffled: write the frames of each clip in random order, as a control. Shuffling what is decoded from an ordered
            file leaves traces of the order in what the coding of one frame takes from another.
        workers: processes; None: one per core, or just this one for few clips.
        overwrite: replace a data set that was written with other settings.

    Returns:
        The folder.

    Raises:
        UsageError: settings that cannot be honoured, or a folder that holds something else.
        MissingExtraError: PyAV is not installed.
    """
    if not labels:
        raise UsageError(f"no classes were named: choose among {', '.join(LABELS)}")
    if unknown := [label for label in labels if label not in LABELS]:
        raise UsageError(f"there is no class {unknown[0]!r}: choose among {', '.join(LABELS)}")
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise UsageError(f"{twice[0]!r} was named twice: name each class once")
    settings = _settings("classes", per_class, num_frames, side, seed, shuffled) | {"labels": list(labels)}
    clips = [
        _Clip(f"{split}/{label}/{number:05d}.mp4", split, label, number)
        for split, count in per_class.items()
        for label in labels
        for number in range(count)
    ]
    return _write(Path(folder), clips, settings, {}, workers, overwrite)


def write_captioned(
    folder: str | PathLike[str],
    sizes: Mapping[str, int],
    *,
    num_frames: int = 16,
    side: int = 48,
    seed: int = 0,
    shuffled: bool = False,
    workers: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write captioned clips as `folder/videos/video<n>.mp4`, and `folder/captions.json` in MSR-VTT's layout.

    Args:
        sizes: clips by split. Those of "train" are drawn for training; every other split is held out, see `scenes`.

    The other arguments, what is returned and raised: as in `write_dataset`.
    """
    settings = _settings("captions", sizes, num_frames, side, seed, shuffled)
    named = [(split, number) for split, count in sizes.items() for number in range(count)]
    clips = [_Clip(f"videos/video{i}.mp4", split, None, number) for i, (split, number) in enumerate(named)]
    annotations = _msrvtt([(clip, _scene(clip, seed)[0].caption) for clip in clips], num_frames / FPS)
    return _write(Path(folder), clips, settings, {CAPTIONS: annotations}, workers, overwrite)


@dataclass(frozen=True)
class _Clip:
    """A clip to be written: without a label, one of a scene."""

    path: str
    split: str
    label: str | None
    number: int

    def generator(self, seed: int) -> np.random.Generator:
        # By name rather than by place: the same clip whichever other classes are written.
        return np.random.default_rng([seed, zlib.crc32(f"{self.split}/{self.label}".encode()), self.number])


def _scene(clip: _Clip, seed: int) -> tuple[Scene, np.random.Generator]:
    generator = clip.generator(seed)
    return draw_scene(generator, held_out=clip.split != "train"), generator


def _msrvtt(captioned: Sequence[tuple[_Clip, str]], seconds: float) -> dict[str, Any]:
    names = [Path(clip.path).stem for clip, _ in captioned]
    return {
        "info": {"description": "Synthetic scenes with exact captions", "version": str(_VERSIONS["captions"])},
        "videos": [
            {
                "id": i,
                "video_id": name,
                "category": 0,
                "url": "",
                "start time": 0.0,
                "end time": seconds,
                "split": clip.split,
            }
            for i, (name, (clip, _)) in enumerate(zip(names, captioned, strict=True))
        ],
        "sentences": [
            {"sen_id": i, "video_id": name, "caption": caption}
            for i, (name, (_, caption)) in enumerate(zip(names, captioned, strict=True))
        ],
    }


def _settings(
    kind: str, sizes: Mapping[str, int], num_frames: int, side: int, seed: int, shuffled: bool
) -> dict[str, Any]:
    check_clip_size(num_frames, side)
    if side % 2:
        raise UsageError(f"a side of {side} pixels was given: H.264 needs an even number")
    if seed < 0:
        raise UsageError(f"seed {seed} was given: give 0 or a positive integer")
    if not sizes or min(sizes.values()) < 1:
        raise UsageError(f"clips were asked for as {dict(sizes)}: name at least one split, each with at least one clip")
    if bad := [split for split in sizes if split in ("", ".", "..") or {"/", "\\"} & set(split)]:
        raise UsageError(f"{bad[0]!r} cannot be the name of a split: it becomes a folder's")
    return {
        "made_by": f"modicum {kind}",
        "version": _VERSIONS[kind],
        "sizes": dict(sizes),
        "num_frames": num_frames,
        "side": side,
        "seed": seed,
        "shuffled": shuffled,
        "fps": FPS,
    }


def _write(
    goal: Path,
    clips: Sequence[_Clip],
    settings: dict[str, Any],
    documents: Mapping[str, dict[str, Any]],
    workers: int | None,
    overwrite: bool,
) -> Path:
    if _is_there(goal, clips, settings, overwrite):
        return goal
    import_av()
    goal.parent.mkdir(parents=True, exist_ok=True)
    partial = goal.with_name(f"{goal.name}.{secrets.token_hex(4)}.partial")
    try:
        for parent in {(partial / clip.path).parent for clip in clips}:
            parent.mkdir(parents=True, exist_ok=True)
        _write_all(partial, clips, settings, workers, goal.name)
        for name, document in {**documents, SETTINGS: settings}.items():
            (partial / name).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        # Another process may have been faster.
        if not _is_there(goal, clips, settings, overwrite):
            if goal.exists():
                shutil.rmtree(goal)
            os.replace(partial, goal)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return goal


def _is_there(goal: Path, clips: Sequence[_Clip], settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether a data set is there already.

    Raises:
        UsageError: something else is.
    """
    if goal.is_dir() and not any(goal.iterdir()):
        return False
    if not os.path.lexists(goal):
        return False
    try:
        found = json.loads((goal / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or not str(found.get("made_by", "")).startswith("modicum "):
        raise UsageError(f"{goal} holds something other than clips made here: give a new folder")
    if found == settings:
        missing = sum(not (goal / clip.path).is_file() for clip in clips)
        if not missing:
            return True
        problem = f"lacks {missing} of its {len(clips)} clips"
    else:
        differing = [name for name in settings if found.get(name) != settings[name]]
        problem = f"was written with other settings ({', '.join(differing)})"
    if not overwrite:
        raise UsageError(f"{goal} {problem}: give a new folder, or overwrite=True to write it anew")
    return False


def _write_all(root: Path, clips: Sequence[_Clip], settings: dict[str, Any], workers: int | None, name: str) -> None:
    if workers is None:
        workers = 1 if len(clips) < _WORTH_PROCESSES else _cores()
    if workers < 1:
        raise UsageError(f"{workers} workers were asked for: give at least 1")
    chunks = [(root, clips[i : i + _CHUNK], settings) for i in range(0, len(clips), _CHUNK)]
    bar = Progress(
        TextColumn(f"clips for {name}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task(name, total=len(clips))
        if workers == 1:
            for chunk in chunks:
                bar.advance(task, _write_chunk(chunk))
            return
        # Forking a process that has computed on several threads may hang it.
        with ProcessPoolExecutor(min(workers, len(chunks)), mp_context=get_context("spawn")) as pool:
            try:
                for done in pool.map(_write_chunk, chunks):
                    bar.advance(task, done)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _cores() -> int:
    # Not every system can tell which cores are ours.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write_chunk(chunk: tuple[Path, Sequence[_Clip], dict[str, Any]]) -> int:
    root, clips, settings = chunk
    seed, num_frames, side = settings["seed"], settings["num_frames"], settings["side"]
    for clip in clips:
        if clip.label is None:
            scene, generator = _scene(clip, seed)
            frames = render(scene, generator, num_frames, side)
        else:
            generator = clip.generator(seed)
            frames = labelled_clip(generator, clip.label, num_frames, side)
        write_clip(root / clip.path, shuffle_frames(frames, generator) if settings["shuffled"] else frames)
    return len(clips)
