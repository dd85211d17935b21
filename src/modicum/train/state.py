"""The state of a run on disk: weights, moments and counters. No pickles; a state appears whole or not at all.

The state before the last is kept, too: should a disk give back less of the last than was written, a run goes on from that.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from modicum.errors import CheckpointError


@dataclass
class Progress:
    """How far a run is. `seen` counts tokens, or clips; `notes` are figures of what it began with."""

    step: int = 0
    seen: int = 0
    seconds: float = 0.0
    fingerprint: str = ""
    notes: dict[str, float] = field(default_factory=dict)


def save_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    average: nn.Module | None = None,
    *,
    keep_previous: bool = False,
) -> None:
    """One file: weights, what any optimizer holds of each (tensors), by parameter name, and the counters in its header.

    It is on the disk, not only on its way there, before it takes the place of the one before.

    Args:
        average: the same model with averaged weights, saved beside them.
        keep_previous: the state that was there stays, under `previous_path`.
    """
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    if average is not None:
        tensors |= {f"average.{name}": parameter.detach() for name, parameter in average.named_parameters()}
    held = optimizer.state_dict()["state"]
    for index, name in enumerate(names_in(optimizer, model)):
        # A moment that has not begun is None in some optimizers.
        kept = {key: value for key, value in held.get(index, {}).items() if value is not None}
        tensors |= {f"optimizer.{name}.{key}": value for key, value in kept.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"progress": json.dumps(asdict(progress))})
    flush(partial)
    # A damaged one must not take the place of the one that was resumed from.
    if keep_previous and trouble_of(path) is None:
        os.replace(path, previous_path(path))
    os.replace(partial, path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Have what was written to a file, or the names in a folder, on the disk before anything else happens."""
    if path.is_dir() and os.name == "nt":  # whose folders cannot be opened
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def previous_path(path: Path) -> Path:
    """Where the state before the last is."""
    return path.with_name("previous." + path.name)


def trouble_of(path: Path) -> str | None:
    """Why a state cannot be read, None if it can; one that was cut off anywhere cannot."""
    try:
        saved_progress(path)
    except CheckpointError as error:
        return str(error)
    return None


def usable_state(path: Path) -> tuple[Path, str | None]:
    """The last state, or the one before it and why the last is of no use.

    Raises:
        CheckpointError: there is none, or neither can be read.
    """
    trouble, previous = trouble_of(path), previous_path(path)
    if trouble is None:
        return path, None
    if trouble_of(previous) is None:
        return previous, trouble
    raise CheckpointError(trouble)


def saved_progress(path: Path) -> Progress:
    """How far the run is whose state this is.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist, so there is nothing to resume: run without --resume first")
    try:
        # Opening checks that the file is as long as its header says.
        with safe_open(path, framework="pt") as file:
            return Progress(**json.loads(file.metadata()["progress"]))
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no whole state of a run ({error}): remove it, and begin again or restore it from a copy"
        ) from error


def load_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None = None
) -> None:
    """Put a saved state back, bit for bit.

    Raises:
        CheckpointError: it is another model's.
    """
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        held: dict[str, dict[str, torch.Tensor]] = {}
        for key in names:
            if key.startswith("optimizer."):
                name, _, kind = key.removeprefix("optimizer.").rpartition(".")
                # A copy: what the optimizer changes must not be a file's pages.
                held.setdefault(name, {})[kind] = file.get_tensor(key).clone()
        for prefix, module in (("model", model), ("average", average)):
            for name, parameter in () if module is None else module.named_parameters():
                if f"{prefix}.{name}" not in names:
                    raise CheckpointError(f"{path} has no weight `{prefix}.{name}`: it belongs to another recipe")
                with torch.no_grad():
                    parameter.copy_(file.get_tensor(f"{prefix}.{name}"))
    state = {index: held[name] for index, name in enumerate(names_in(optimizer, model)) if name in held}
    # The optimizer knows itself which of its tensors belong where their weights are.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def names_in(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """The names of an optimizer's parameters, in its own order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
