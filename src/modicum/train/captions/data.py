"""Captioned videos of a recipe, and captions as rows of tokens."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from modicum.checkpoint.tokenizer import Tokenizer
from modicum.errors import UsageError
from modicum.train.captions.recipe import CaptionedSection
from modicum.train.tokenizer import tokenizer_files, train_tokenizer
from modicum.train.video.sources import check_apart
from modicum.video.datasets import VideoDataset, read_dataset
from modicum.video.synthetic import CAPTIONS, write_captioned

SYNTHETIC = "synthetic"
# What the loss leaves out: positions behind a caption's end.
PADDING = -100
# Names of splits that are not trained on, the first found being taken.
HELD_OUT = ("held_out", "validate", "val", "test")


def write_synthetic(data: CaptionedSection) -> None:
    """Write the clips of a recipe, unless they are there."""
    write_captioned(
        str(data.root),
        {"train": data.n_clips, "held_out": data.n_held_out},
        num_frames=data.clip_frames,
        side=data.clip_side,
        seed=data.clip_seed,
    )


def read_captioned(data: CaptionedSection) -> tuple[VideoDataset, VideoDataset]:
    """The videos to train on and those held out.

    Raises:
        UsageError: annotations that cannot be read, no videos, or videos that are in both.
    """
    if data.format == SYNTHETIC:
        scenes = str(Path(str(data.root)) / CAPTIONS)
        return (
            read_dataset("msrvtt", scenes, split="train"),
            read_dataset("msrvtt", scenes, split="held_out"),
        )
    training = read_dataset(data.format, data.annotations, data.root, split=data.split or None)
    annotations, root = data.held_out_annotations or data.annotations, data.held_out_root or data.root
    held_out = read_dataset(data.format, annotations, root, split=data.held_out or None)
    check_apart(training, held_out)
    return training, held_out


def find_captions(source: str | Path) -> tuple[str, Path]:
    """The format and the annotations of a data set, given its file, or the folder that has one such file.

    Raises:
        UsageError: no such file, or several.
    """
    path = Path(source)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    found = [(format, file) for file in files if (format := format_of(file)) is not None]
    if len(found) != 1:
        what = "no file of captions" if not found else f"{len(found)} files of captions, such as {found[0][1].name}"
        raise UsageError(f"{source} holds {what}: give one json file in the layout of MSR-VTT or VATEX, or its folder")
    return found[0]


def format_of(path: Path) -> str | None:
    """Whose layout a json file has; None if nobody's."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if isinstance(content, dict):
        return "msrvtt" if {"videos", "sentences"} <= set(content) else None
    listed = isinstance(content, list) and content and isinstance(content[0], dict) and "videoID" in content[0]
    return "vatex" if listed else None


def held_out_split(annotations: Path) -> str:
    """What a file in MSR-VTT's layout calls the videos that are not trained on.

    Raises:
        UsageError: none of the usual names.
    """
    videos = json.loads(annotations.read_text(encoding="utf-8"))["videos"]
    names = dict.fromkeys(video.get("split") for video in videos)
    usual = next((name for name in HELD_OUT if name in names), None)
    if usual is None:
        raise UsageError(f"{annotations} has the splits {', '.join(map(str, names))}: name the one that is held out")
    return usual


def judged_videos(source: str | Path, split: str | None = None) -> VideoDataset:
    """The held-out videos of a data set, or those of a split.

    Raises:
        UsageError: annotations that cannot be read, or no videos.
    """
    format, annotations = find_captions(source)
    if format == "msrvtt" and split is None:
        split = held_out_split(annotations)
    return read_dataset(format, annotations, split=split)


def training_captions(source: str | Path) -> list[str]:
    """What a data set says of the videos to train on, whether these are there or not; nothing where splits are files."""
    format, annotations = find_captions(source)
    if format != "msrvtt":
        return []
    content = json.loads(annotations.read_text(encoding="utf-8"))
    trained = {video["video_id"] for video in content["videos"] if video.get("split") == "train"}
    return [sentence["caption"] for sentence in content["sentences"] if sentence["video_id"] in trained]


def both_videos(source: str | Path, held_out: str | None = None) -> tuple[VideoDataset, VideoDataset]:
    """The videos of a data set that are to be trained on and those held out.

    Args:
        held_out: in MSR-VTT's layout the name of a split, in VATEX's another file.

    Raises:
        UsageError: annotations that cannot be read, no videos, or videos that are in both.
    """
    format, annotations = find_captions(source)
    if format == "msrvtt":
        training, judged = read_dataset(format, annotations, split="train"), judged_videos(annotations, held_out)
    elif held_out is None:
        raise UsageError(
            f"{annotations} has no splits, as VATEX has a file for each: give the other file with --held-out"
        )
    else:
        training, judged = read_dataset(format, annotations), judged_videos(held_out)
    check_apart(training, judged)
    return training, judged


def caption_tokenizer(dataset: VideoDataset, vocab_size: int, max_seq_len: int) -> dict[str, bytes]:
    """The files of a tokenizer trained on all captions of a data set, `vocab_size` tokens at most."""
    captions = (caption for sample in dataset.samples for caption in sample.captions)
    return tokenizer_files(train_tokenizer(captions, vocab_size), max_seq_len)


class CaptionRows:
    """Captions as what a captioner is given and what it is to say: the start token and the caption; the caption and its end.

    Args:
        max_tokens: a longer caption is cut off, and then has no end to predict.

    Raises:
        UsageError: a tokenizer without an end of text.
    """

    def __init__(self, tokenizer: Tokenizer, start: int, max_tokens: int) -> None:
        if not tokenizer.eos_ids:
            raise UsageError("the tokenizer names no end of text, which closes each caption: give one that does")
        # Where there are several, the plain end of a text comes before those of conversations.
        self.tokenizer, self.start, self.end, self.max_tokens = tokenizer, start, min(tokenizer.eos_ids), max_tokens

    def closed(self, captions: Sequence[str]) -> list[list[int]]:
        """Each caption's tokens with its end, what does not fit left out."""
        encoded = self.tokenizer.backend.encode_batch(list(captions), add_special_tokens=False)
        return [[*text.ids, self.end][: self.max_tokens + 1] for text in encoded]

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Inputs and targets of some captions, int64 [B, L] each: rows are padded, targets with `PADDING`."""
        rows = self.closed(captions)
        longest = max(map(len, rows))
        given_BL = torch.full((len(rows), longest), self.start)
        targets_BL = torch.full((len(rows), longest), PADDING)
        for number, row in enumerate(rows):
            given_BL[number, 1 : len(row)] = torch.tensor(row[:-1], dtype=torch.int64)
            targets_BL[number, : len(row)] = torch.tensor(row)
        return given_BL, targets_BL

    def mean_length(self, dataset: VideoDataset) -> float:
        """Targets of a caption on average, every video counting alike, as each is drawn as often."""
        means = []
        for sample in dataset.samples:
            lengths = [len(row) for row in self.closed(sample.captions)]
            means.append(sum(lengths) / len(lengths))
        return sum(means) / len(means)
