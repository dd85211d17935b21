"""Stock checkpoint folders to (config, state_dict, files) and back: safetensors, mapped, never unpickled."""

import json
import os
import shlex
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modicum.errors import CheckpointError, UsageError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_CARRIED_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".md", ".tiktoken"}
_CARRIED_NAMES = ("LICENSE", "NOTICE")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass
class Checkpoint:
    """What a checkpoint folder holds: config.json as read, tensors by stock name, and the tokenizer and other files.

    A checkpoint that was read has a lazy `state_dict`: a tensor stays in the file until it is asked for, and then it is
    mapped, not copied. Reads of one tensor share memory, so copy before changing one in place; the file never changes.
    """

    config: dict[str, Any]
    state_dict: Mapping[str, Tensor]
    files: dict[str, bytes] = field(default_factory=dict)


class SafetensorsFiles(Mapping[str, Tensor]):
    """The tensors of one or more safetensors files. Files are opened, and their headers checked, at once.

    Only what the caller keeps stays referenced: the pages of a tensor that was dropped go back to the system.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._files = [_opened(path) for path in paths]
        self._where = {name: i for i, file in enumerate(self._files) for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        return self._files[self._where[name]].get_tensor(name)

    def __contains__(self, name: object) -> bool:
        # Mapping's own would read the tensor to find out.
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({error}): copy or download it again"
        ) from error


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a folder in the stock Hugging Face layout: config.json, one or several safetensors files, other files.

    Raises:
        CheckpointError: something is missing, damaged, or stored as a pickle.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}: give the folder that holds {CONFIG} and {WEIGHTS}")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}: give the folder of a checkpoint")
    config = read_json(folder / CONFIG)
    state_dict = SafetensorsFiles(_weight_files(folder, config))
    return Checkpoint(config, state_dict, {file.name: file.read_bytes() for file in _carried(folder)})


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: it cannot be read, or is not a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): repair it or download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__} instead of a JSON object: repair it")
    return value


def _weight_files(folder: Path, config: dict[str, Any]) -> list[Path]:
    if (folder / INDEX).is_file():
        return _shards(folder)
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        raise CheckpointError(
            f"{folder} holds its weights as pickles only, which can run code when read; convert them in place with: "
            f"{conversion_command(str(folder), str(folder), config)}"
        )
    raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {INDEX}: give a folder with safetensors weights")


def conversion_command(source: str, target: str, config: Mapping[str, Any]) -> str:
    """The command line that writes the weights at `source`, folder or hub id, as safetensors into `target`."""
    architectures = config.get("architectures") or [None]
    name = architectures[0]
    loader = name if isinstance(name, str) and name.isidentifier() else "AutoModelForCausalLM"
    code = f"import transformers as t; t.{loader}.from_pretrained({source!r}).save_pretrained({target!r})"
    return f"python -c {shlex.quote(code)}"


def _shards(folder: Path) -> list[Path]:
    """The files that the index names, in its order."""
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no `weight_map`: download it again")
    names = list(dict.fromkeys(weight_map.values()))
    for name in names:
        # A name with a folder in it could lead anywhere on the machine.
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{folder / INDEX} names {name!r} as a shard: names of files beside it are required")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / INDEX} names {name}, which is missing: download it again")
    held = {name: set(_opened(folder / name).keys()) for name in names}
    for tensor, name in weight_map.items():
        if tensor not in held[name]:
            raise CheckpointError(f"{folder / INDEX} looks for `{tensor}` in {name}, which lacks it: download it again")
    return [folder / name for name in names]


def _carried(folder: Path) -> list[Path]:
    """The small files that travel with a checkpoint: tokenizer, generation settings, licence, model card."""
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file()
        and file.name != CONFIG
        and not file.name.endswith(".index.json")
        and (file.suffix in _CARRIED_SUFFIXES or file.name.startswith(_CARRIED_NAMES))
    )


def write_checkpoint(
    ckpt: Checkpoint, path: str | Path, overwrite: bool = False, shard_bytes: int = 5_000_000_000
) -> None:
    """Write a stock folder, which appears whole or not at all. At most one shard is in memory at a time.

    Args:
        path: a new folder, or an empty one.
        overwrite: also accept one that holds something; the old one is removed once the new one is complete.
        shard_bytes: weights beyond this size are split over several files.

    Raises:
        UsageError: the folder is not empty and `overwrite` is False, or the path is a file.
        CheckpointError: it cannot be written.
    """

    def fill(folder: Path) -> None:
        _write_json(folder / CONFIG, ckpt.config)
        for name, content in ckpt.files.items():
            if Path(name).name != name or name in ("", "..", CONFIG, WEIGHTS, INDEX):
                raise UsageError(f"`files` holds {name!r}: give plain file names other than config and weights")
            (folder / name).write_bytes(content)
        _write_weights(ckpt.state_dict, folder, shard_bytes)

    write_folder(path, fill, overwrite=overwrite)


def write_folder(path: str | Path, fill: Callable[[Path], None], *, overwrite: bool = False) -> None:
    """Let `fill` write into a folder beside `path`, and put it in place when it is complete.

    Raises:
        UsageError, CheckpointError: as `write_checkpoint`.
    """
    goal = Path(path).expanduser().resolve()
    mark = uuid.uuid4().hex[:8]
    partial, old = goal.with_name(f".{goal.name}.{mark}.partial"), goal.with_name(f".{goal.name}.{mark}.old")
    try:
        check_goal(goal, overwrite=overwrite)
        partial.mkdir(parents=True)
        fill(partial)
        for file in partial.iterdir():
            # safetensors writes files that only their owner can read; a folder's own mode follows the umask.
            file.chmod(partial.stat().st_mode & 0o666)
        if goal.is_dir():
            goal.rename(old)
        _put_in_place(partial, goal, old)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{goal} cannot be written ({error}): give a folder on a disk with room") from error
    finally:
        # What is left here is incomplete, after a failure, or replaced, after a success.
        shutil.rmtree(partial, ignore_errors=True)
        if goal.exists():
            shutil.rmtree(old, ignore_errors=True)


def check_goal(goal: Path, *, overwrite: bool) -> None:
    """Refuse to write to a file, or into a folder that holds something unless `overwrite`."""
    if goal.exists() and not goal.is_dir():
        raise UsageError(f"{goal} is a file: give a folder to write to")
    if goal.is_dir() and any(goal.iterdir()) and not overwrite:
        raise UsageError(f"{goal} already holds files: give a new folder, or overwrite=True (--force) to replace it")


def _put_in_place(partial: Path, goal: Path, old: Path) -> None:
    try:
        partial.rename(goal)
    except BaseException:
        if old.exists():
            old.rename(goal)
        raise


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_weights(state_dict: Mapping[str, Tensor], folder: Path, shard_bytes: int) -> None:
    """One pass over the tensors. How many shards there are is known at the end, and so are their names."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal pending_bytes
        save_file(_unshared(pending), folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()
        pending_bytes = 0

    for name in state_dict:
        tensor = state_dict[name].detach()
        if pending and pending_bytes + tensor.nbytes > shard_bytes:
            flush()
        pending[name] = tensor
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    flush()
    if len(shards) == 1:
        os.replace(folder / "shard-0", folder / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"shard-{i}", folder / file)
        weight_map |= dict.fromkeys(names, file)
    _write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors with memory of their own: the format has no notion of two names for one tensor."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        place = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return result
