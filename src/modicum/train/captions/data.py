"""Captioned videos of a recipe, and captions as rows of tokens."""

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
