"""From a recipe's `[data]` to two data sets: one to train on, one to judge by."""

from pathlib import Path

from modicum.errors import UsageError
from modicum.train.video.recipe import VideosSection
from modicum.video.datasets import VideoDataset, read_dataset
from modicum.video.synthetic import FRAME_LABELS, LABELS, MOTION_LABELS, write_dataset

SYNTHETIC = "synthetic"
# What the accuracies of our own classes are averaged over, apart: those that need the order of frames, and the others.
GROUPS = {"motion": MOTION_LABELS, "frame": FRAME_LABELS}


def groups_of(data: VideosSection) -> dict[str, list[str]]:
    """Classes whose mean is worth knowing by itself, by a name."""
    return GROUPS if data.format == SYNTHETIC else {}


def shuffles(data: VideosSection) -> bool:
    """Whether frames are put in random order once they are decoded; those of synthetic clips are before."""
    return data.shuffle_frames and data.format != SYNTHETIC


def synthetic_root(data: VideosSection) -> Path:
    """Where the clips are. Shuffled ones are files of their own: what a coded frame takes from the one before would
    still tell which that was."""
    return Path(f"{data.root}{'-shuffled' if data.shuffle_frames else ''}")


def write_synthetic(data: VideosSection) -> None:
    """Write the clips of a recipe, unless they are there."""
    write_dataset(
        synthetic_root(data),
        {"train": data.per_class, "held_out": data.held_out_per_class},
        num_frames=data.clip_frames,
        side=data.clip_side,
        seed=data.clip_seed,
        shuffled=data.shuffle_frames,
    )


def read_videos(data: VideosSection) -> tuple[VideoDataset, VideoDataset]:
    """The videos to train on and those held out, with the same classes.

    Raises:
        UsageError: annotations that cannot be read, no videos or classes, or the same videos on both sides.
    """
    if data.format == SYNTHETIC:
        folder = synthetic_root(data)
        return (
            read_dataset("folder", root=folder, split="train", labels=LABELS),
            read_dataset("folder", root=folder, split="held_out", labels=LABELS),
        )
    training = read_dataset(data.format, data.annotations, data.root, split=data.split, labels=data.labels)
    annotations, root = data.held_out_annotations or data.annotations, data.held_out_root or data.root
    if not training.heads:
        raise UsageError(f"{training.name} has captions and no classes, which a classifier needs: give another format")
    # The classes of one are those of the other, in the same order.
    held_out = read_dataset(data.format, annotations, root, split=data.held_out, labels=training.labels)
    check_apart(training, held_out)
    return training, held_out


def check_apart(training: VideoDataset, held_out: VideoDataset) -> None:
    """Refuse to judge by what is trained on.

    Raises:
        UsageError: a video is in both.
    """
    shared = {(s.path, s.start, s.end, s.first) for s in training.samples} & {
        (s.path, s.start, s.end, s.first) for s in held_out.samples
    }
    if shared:
        raise UsageError(
            f"{len(shared)} videos are both trained on and held out, such as {next(iter(shared))[0]}: give data.held_out "
            "another split, or data.held_out_annotations another file"
        )
