"""Text data: files found, some held out whole, all tokenized once into a memory-mapped cache."""

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from modicum.errors import UsageError

# What a folder's files end in to be taken for text, where nobody says otherwise.
SUFFIXES = (".txt", ".md", ".py", ".rst")
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "idlelib", "node_modules", ".git", ".venv"}
FILES_AT_ONCE = 256


@dataclass(frozen=True)
class Corpus:
    """Files of text by name, the path relative to their source; `held_out` are never trained on."""

    training: dict[str, Path]
    held_out: dict[str, Path]


def find_corpus(
    sources: str | tuple[str, ...], suffixes: tuple[str, ...], exclude: tuple[str, ...], held_out: float | str
) -> Corpus:
    """The texts of one source or several: a folder, a file, a pattern such as `notes/**/*.txt`, or "stdlib", the running
    Python's own library.

    Args:
        suffixes: what a folder's files must end in to be taken; files and patterns are taken as they are.
        exclude: names of folders and files within a folder that are left out.
        held_out: a share of the files, decided by each name alone and so the same on every machine; or a source.

    Raises:
        UsageError: a source that does not exist, or no text on one side.
    """
    found: dict[str, Path] = {}
    for source in (sources,) if isinstance(sources, str) else sources:
        found |= texts_of(source, suffixes, exclude)
    if isinstance(held_out, str):
        kept_out = texts_of(held_out, suffixes, exclude)
        same = {path.resolve() for path in kept_out.values()}
        training = {name: path for name, path in found.items() if path.resolve() not in same}
    else:
        kept_out = {name: path for name, path in found.items() if share_of(name) < held_out}
        training = {name: path for name, path in found.items() if name not in kept_out}
    if not training or not kept_out:
        given = sources if isinstance(sources, str) else ", ".join(sources)
        raise UsageError(
            f"{given} gives {len(training)} files to train on and {len(kept_out)} to hold out, both are needed: check "
            "`suffixes` and `exclude`, raise `held_out`, or name a file as `held_out`"
        )
    return Corpus(training, kept_out)


def held_out_texts(folder: Path) -> list[str]:
    """The files that a model made by `modicum train` never saw, as its training.json names them; of the running Python's
    library, and only those that it has."""
    try:
        names = json.loads((folder / "training.json").read_text())["held_out"]
    except (OSError, KeyError):
        raise UsageError(
            f"{folder} has no training.json that names held-out files: give a model of `modicum train`"
        ) from None
    root = Path(sysconfig.get_paths()["stdlib"])
    return [read_text(root / name) for name in names if (root / name).is_file()]


def texts_of(source: str, suffixes: tuple[str, ...], exclude: tuple[str, ...]) -> dict[str, Path]:
    """The readable texts of one source, by name."""
    root = Path(sysconfig.get_paths()["stdlib"]) if source == "stdlib" else Path(source).expanduser()
    if root.is_dir():
        return {name: root / name for name in names_below(root, suffixes, exclude) if readable(root / name)}
    # A pattern's names are the paths themselves: what they match may lie anywhere.
    paths = [root] if root.is_file() else [Path(path) for path in sorted(glob.glob(str(root), recursive=True))]
    if not paths:
        raise UsageError(f"data source {source} does not exist: give a folder, a file, a pattern, or `stdlib`")
    return {path.as_posix(): path for path in paths if path.is_file() and readable(path)}


def names_below(root: Path, suffixes: tuple[str, ...], exclude: tuple[str, ...]) -> Iterator[str]:
    """Paths relative to `root`, in an order that is the same on every machine."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS)
        for name in sorted(files):
            path = (Path(folder) / name).relative_to(root).as_posix()
            if path.endswith(suffixes) and not any(part in exclude for part in path.split("/")):
                yield path


def share_of(name: str) -> float:
    """A number in [0, 1) that only the name decides."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64


def read_text(path: Path) -> str:
    """A file as it is: `Path.read_text` would turn every kind of line end into one."""
    return path.read_bytes().decode("utf-8")


def spread(paths: Iterable[Path], count: int) -> list[Path]:
    """At least `count` of the paths where there are so many, evenly from all of them."""
    every = list(paths)
    return every[:: max(1, len(every) // count)]


def beginning(path: Path, encode: Callable[[str], list[int]], n_tokens: int) -> list[int]:
    """The first tokens of a text; what is encoded is little more, as a token is rarely longer than eight characters."""
    return encode(read_text(path)[: 8 * n_tokens])[:n_tokens]


def readable(path: Path) -> bool:
    """Whether a file is UTF-8 text with something in it."""
    try:
        return bool(path.read_text(encoding="utf-8").strip())
    except (UnicodeDecodeError, OSError):
        return False


def tokenize(files: dict[str, Path], tokenizer: Tokenizer, end: int | None, cache: Path) -> np.ndarray:
    """All of `files` as one row of token ids, memory-mapped from `cache`.

    Each text begins as the tokenizer's template says and is closed by the token `end`. With None texts follow each other
    bare, as in T5's training.

    The cache is rebuilt when a file, its time, the tokenizer or `end` has changed.
    """
    stamp = hashlib.sha256(tokenizer.to_str().encode())
    stamp.update(f"{end}\n".encode())
    for name, path in files.items():
        status = path.stat()
        stamp.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    note = cache.with_suffix(".json")
    if cache.is_file() and note.is_file() and json.loads(note.read_text()).get("fingerprint") == stamp.hexdigest():
        return np.load(cache, mmap_mode="r")
    ids = np.concatenate([closed(text, end) for text in encoded(files, tokenizer, template=end is not None)])
    kind = np.uint16 if ids.max() < 1 << 16 else np.uint32
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_name(cache.name + ".partial.npy")
    np.save(partial, ids.astype(kind))
    # The note goes last: a cache without its note is built again.
    note.unlink(missing_ok=True)
    os.replace(partial, cache)
    note.write_text(json.dumps({"fingerprint": stamp.hexdigest(), "files": len(files)}))
    return np.load(cache, mmap_mode="r")


def encoded(files: dict[str, Path], tokenizer: Tokenizer, *, template: bool) -> Iterator[list[int]]:
    """Token ids file by file; of a large corpus only some files are in memory as text."""
    paths = list(files.values())
    for start in range(0, len(paths), FILES_AT_ONCE):
        texts = [read_text(path) for path in paths[start : start + FILES_AT_ONCE]]
        for text in tokenizer.encode_batch(texts, add_special_tokens=template):
            yield text.ids


def closed(ids: list[int], end: int | None) -> np.ndarray:
    # Some tokenizers' templates close a text themselves.
    return np.array(ids if end is None or ids[-1:] == [end] else [*ids, end], dtype=np.uint32)


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
