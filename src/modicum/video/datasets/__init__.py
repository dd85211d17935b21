"""Data sets of labelled and captioned videos, read from their annotations as published."""

from modicum.video.datasets.labels import read_labels, write_labels
from modicum.video.datasets.read import FORMATS, read_dataset
from modicum.video.datasets.sample import VideoDataset, VideoSample

__all__ = ["FORMATS", "VideoDataset", "VideoSample", "read_dataset", "read_labels", "write_labels"]
