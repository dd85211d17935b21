"""Text data: files found, some held out whole, all tokenized once into a memory-mapped cache."""

import hashlib
import json
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from modicum.errors import UsageError

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "idlelib", "node_modules", ".git", ".venv"}


@dataclass(frozen=True)
class Corpus:
    """Files under one root, as paths relative to it; `held_out` are never trained on."""

    root: Path
    training: list[str]
    held_out: list[str]

    def read(self, path: str) -> str:
        # Not `read_text`, which would turn every kind of line end into one.
        return (self.root / path).read_bytes().decode("utf-8")


def find_corpus(source: str, suffixes: tuple[str, ...], exclude: tuple[str, ...], held_out: float) -> Corpus:
    """The text files of a folder, or of "stdlib", the running Python's own library.

    Whether a file is held out depends on its relative path alone, so that it is the same on every machine.

    Raises:
        UsageError: no such folder, or no text in it.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if source == "stdlib" else Path(source).expanduser()
    if not root.is_dir():
        raise UsageError(f"data source {source} is not a folder: give one with text files, or `stdlib`")
    training: list[str] = []
    kept_out: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS)
        for name in sorted(files):
            path = (Path(folder) / name).relative_to(root).as_posix()
            if not path.endswith(suffixes) or any(part in exclude for part in path.split("/")):
                continue
            if not readable(root / path):
                continue
            share = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8]) / 2**64
            (kept_out if share < held_out else training).append(path)
    if not training or not kept_out:
        raise UsageError(
            f"{source} gives {len(training)} files to train on and {len(kept_out)} to hold out: "
            "both are needed; check `suffixes`, `exclude` and `held_out`"
        )
    return Corpus(root, training, kept_out)


def readable(path: Path) -> bool:
    """Whether a file is UTF-8 text with something in it."""
    try:
        return bool(path.read_text(encoding="utf-8").strip())
    except (UnicodeDecodeError, OSError):
        return False


def tokenize(corpus: Corpus, paths: list[str], tokenizer: Tokenizer, cache: Path) -> np.ndarray:
    """All of `paths` as one row of token ids, each file closed by the end-of-text token, memory-mapped from `cache`.

    The cache is rebuilt when a file, its time, or the tokenizer has changed.
    """
    stamp = hashlib.sha256(tokenizer.to_str().encode())
    for path in paths:
        status = (corpus.root / path).stat()
        stamp.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    note = cache.with_suffix(".json")
    if cache.is_file() and note.is_file() and json.loads(note.read_text()).get("fingerprint") == stamp.hexdigest():
        return np.load(cache, mmap_mode="r")
    end = tokenizer.token_to_id("<|endoftext|>")
    encoded = tokenizer.encode_batch([corpus.read(path) for path in paths])
    ids = [np.array([*text.ids, end]) for text in encoded]
    kind = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_name(cache.name + ".partial.npy")
    np.save(partial, np.concatenate(ids).astype(kind))
    # The note goes last: a cache without its note is built again.
    note.unlink(missing_ok=True)
    os.replace(partial, cache)
    note.write_text(json.dumps({"fingerprint": stamp.hexdigest(), "files": len(paths)}))
    return np.load(cache, mmap_mode="r")


class Windows:
    """Windows of a token row in a shuffled order that is a pure function of (seed, step).

    Each pass over the data shifts the windows by another offset, so that a token meets other contexts.
    """

    def __init__(self, tokens: np.ndarray, length: int, batch: int, seed: int) -> None:
        self.tokens, self.length, self.batch, self.seed = tokens, length, batch, seed
        self.per_pass = (len(tokens) - 1 - length) // length
        if self.per_pass < batch:
            raise UsageError(
                f"{len(tokens)} tokens make {max(self.per_pass, 0)} windows of {length} and a batch needs {batch}: "
                "give more text, or a smaller batch"
            )

    def at(self, step: int) -> Tensor:
        """Inputs and targets of one step in one piece: int64 [batch, length + 1]."""
        starts = [self._start(step * self.batch + row) for row in range(self.batch)]
        rows = [self.tokens[start : start + self.length + 1].astype(np.int64) for start in starts]
        return torch.from_numpy(np.stack(rows))

    def _start(self, number: int) -> int:
        turn, place = divmod(number, self.per_pass)
        if getattr(self, "_turn", None) != turn:
            generator = np.random.default_rng((self.seed, turn))
            self._turn, self._offset = turn, int(generator.integers(self.length))
            self._order = generator.permutation(self.per_pass)
        return int(self._order[place]) * self.length + self._offset
