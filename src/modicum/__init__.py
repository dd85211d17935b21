"""Transformers that watch, read and write, on a modicum of compute."""

from modicum.api import generate, load, read_checkpoint, save, write_checkpoint
