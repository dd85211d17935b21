"""Flax checkpoints, MessagePack files of named arrays: read without JAX and without running anything they hold."""

import math
import mmap
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from modicum.errors import CheckpointError

# What an extension's type code means in flax.serialization.
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_CHUNKED = "__msgpack_chunked_array__"  # marks the pieces of an array too large for one extension
# First byte -> bytes before the content: of an extension, where the last of them is the type code, and of bytes.
_EXTENSION_HEADERS = {0xC7: 3, 0xC8: 4, 0xC9: 6} | dict.fromkeys(range(0xD4, 0xD9), 2)
_BYTES_HEADERS = {0xC4: 2, 0xC5: 3, 0xC6: 5, 0xD9: 2, 0xDA: 3, 0xDB: 5} | dict.fromkeys(range(0xA0, 0xC0), 1)
_DTYPES = re.compile(r"bfloat16|float(16|32|64)|u?int(8|16|32|64)|bool")
# What reading a damaged file can raise, wherever the damage is.
_DAMAGE = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, MemoryError, OverflowError),
    *(msgpack.OutOfData, msgpack.UnpackException),
)
_PREFIXES = ("optimizer/target/params/", "optimizer/target/", "params/params/", "params/", "")
_NOT_PARAMETERS = re.compile(r"(optimizer|opt_state|model_state|metadata|rng|global_step|step|accum_train_time)(/|$)")
_AUTOMATIC_NAME = re.compile(r"([A-Z]\w*)_(\d+)")


def read_flax(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays and numbers of a Flax MessagePack file by name, the names of nested maps joined by "/".

    Arrays stay in the file until they are used; to write into one changes private memory, never the file. bfloat16,
    which NumPy lacks, becomes float32. Texts and empty maps are left out.

    Raises:
        CheckpointError: the file is missing, incomplete, not MessagePack or holds what no parameter is.
    """
    try:
        with Path(path).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            return dict(_Reader(file, mapped).leaves())
    except _DAMAGE as error:
        reason = str(error) or "it ends too early"
        raise CheckpointError(
            f"{path} is not a complete Flax checkpoint ({reason}): give its MessagePack file, or copy it again"
        ) from error


class _Reader:
    """Walks a file's maps with msgpack and takes the arrays straight from the mapped file."""

    def __init__(self, file: Any, mapped: mmap.mmap) -> None:
        self.mapped = mapped
        self.unpacker = msgpack.Unpacker(file, raw=False, strict_map_key=False, max_buffer_size=0)

    def leaves(self) -> Iterator[tuple[str, np.ndarray]]:
        if not self._at_map():
            raise ValueError("it does not begin with a map")
        yield from self._map("")
        # A pickle begins with the byte of an empty map.
        if self.unpacker.tell() != len(self.mapped):
            raise ValueError("something follows its map")

    def _map(self, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
        found: dict[str, np.ndarray] = {}
        for _ in range(self.unpacker.read_map_header()):
            name = f"{prefix}{self.unpacker.unpack()}"
            if self._at_map():
                found.update(self._map(f"{name}/"))
            elif (leaf := self._leaf()) is not None:
                found[name] = leaf
        if f"{prefix}{_CHUNKED}" in found:
            yield prefix.removesuffix("/"), _joined(found, prefix)
        else:
            yield from found.items()

    def _next_byte(self) -> int:
        position = self.unpacker.tell()
        if position >= len(self.mapped):
            raise ValueError("it ends too early")
        return self.mapped[position]

    def _at_map(self) -> bool:
        first = self._next_byte()
        return first >> 4 == 0x8 or first in (0xDE, 0xDF)

    def _leaf(self) -> np.ndarray | None:
        start, header = self.unpacker.tell(), _EXTENSION_HEADERS.get(self._next_byte())
        if header is None:
            value = self.unpacker.unpack()
            return np.asarray(value) if isinstance(value, int | float) else None
        self.unpacker.skip()
        return self._array(self.mapped[start + header - 1], start + header, self.unpacker.tell())

    def _array(self, code: int, start: int, end: int) -> np.ndarray:
        """An extension's payload: shape, dtype name and, last, the elements in C order."""
        if code not in (_ARRAY, _SCALAR):
            what = "complex numbers" if code == _COMPLEX else f"the unknown extension {code}"
            raise ValueError(f"it holds {what}")
        payload = msgpack.Unpacker(raw=True)
        payload.feed(self.mapped[start : min(end, start + 4096)])
        if payload.read_array_header() != 3:
            raise ValueError("an array has no shape, dtype and elements")
        shape, name = tuple(payload.unpack()), payload.unpack().decode()
        if not _DTYPES.fullmatch(name):
            raise ValueError(f"it holds an array of {name}")
        dtype = np.dtype(np.uint16 if name == "bfloat16" else name)
        start += payload.tell()
        start += _BYTES_HEADERS.get(self.mapped[start], 0)
        size = math.prod(shape)
        if min(shape, default=0) < 0 or end - start != size * dtype.itemsize:
            raise ValueError(f"an array of {name} {shape} does not hold its elements")
        array = np.frombuffer(self.mapped, dtype, size, start).reshape(shape)
        if name == "bfloat16":
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array


def _joined(found: Mapping[str, np.ndarray], prefix: str) -> np.ndarray:
    """The array whose flat pieces are `chunks/0`, `chunks/1`, ... and whose axes are `shape/0`, `shape/1`, ..."""

    def numbered(name: str) -> list[np.ndarray]:
        start = f"{prefix}{name}/"
        return [found[f"{start}{i}"] for i in range(sum(key.startswith(start) for key in found))]

    return np.concatenate(numbered("chunks")).reshape([int(size) for size in numbered("shape")])


def flax_file(path: str | Path) -> Path:
    """The checkpoint that a path stands for: a file as it is; in a folder `checkpoint_<step>` of the highest step, or else
    the only `checkpoint` or `*.msgpack`.

    Raises:
        CheckpointError: there is nothing there, no checkpoint in the folder, or no telling which.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: give a Flax checkpoint, or the folder that holds one")
    found = _candidates(path) if path.is_dir() else [path]
    if len(found) != 1:
        names = f"several: {', '.join(sorted(file.name for file in found))}" if found else "none"
        raise CheckpointError(f"{path} should hold one Flax checkpoint and holds {names}: give the file itself")
    return found[0]


def holds_flax(path: Path) -> bool:
    """Whether `path` is a folder with at least one file that is called like a Flax checkpoint."""
    return path.is_dir() and bool(_candidates(path))


def _candidates(folder: Path) -> list[Path]:
    files = [file for file in folder.iterdir() if file.is_file()]
    steps = {int(match[1]): file for file in files if (match := re.fullmatch(r"checkpoint_(\d+)", file.name))}
    others = [file for file in files if file.name == "checkpoint" or file.suffix == ".msgpack"]
    return others + [steps[step] for step in sorted(steps)[-1:]]


def flax_parameters(tree: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A model's parameters under the names of Linen, whatever the file's age.

    They lie under `optimizer/target/params`, `optimizer/target` (old), `params` (new) or bare; the optimizer's state, step
    and random key are dropped. Before Linen a block numbered its parts together (LayerNorm_0,
    MultiHeadDotProductAttention_1, LayerNorm_2, MlpBlock_3), since then each class by itself.
    """
    prefix = next(prefix for prefix in _PREFIXES if not prefix or any(key.startswith(prefix) for key in tree))
    bare = {key[len(prefix) :]: value for key, value in tree.items() if key.startswith(prefix)}
    if not prefix:
        bare = {key: value for key, value in bare.items() if not _NOT_PARAMETERS.match(key)}
    renamed = _linen_names(bare)
    return {"/".join(renamed[key]): value for key, value in bare.items()}


def _linen_names(keys: Mapping[str, Any]) -> dict[str, list[str]]:
    """Each key's parts, with automatic names (a class and a number) numbered class by class among their siblings."""
    numbers: dict[tuple[str, str], set[int]] = defaultdict(set)
    split = {key: key.split("/") for key in keys}
    for parts in split.values():
        for depth, part in enumerate(parts):
            if match := _AUTOMATIC_NAME.fullmatch(part):
                numbers["/".join(parts[:depth]), match[1]].add(int(match[2]))
    result = {}
    for key, parts in split.items():
        names = list(parts)
        for depth, part in enumerate(parts):
            if match := _AUTOMATIC_NAME.fullmatch(part):
                among = sorted(numbers["/".join(parts[:depth]), match[1]])
                names[depth] = f"{match[1]}_{among.index(int(match[2]))}"
        result[key] = names
    return result
