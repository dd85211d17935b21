"""The state of a run on disk: weights, moments and counters. No pickles; a state appears whole or not at all."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from modicum.errors import CheckpointError


@dataclass
class Progress:
    """How far a run is. `notes` are figures of what it began with."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    fingerprint: str = ""
    notes: dict[str, float] = field(default_factory=dict)


def save_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """One file: weights, what any optimizer holds of each (tensors), by parameter name, and the counters in its header."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    held = optimizer.state_dict()["state"]
    for index, name in enumerate(names_in(optimizer, model)):
        tensors |= {f"optimizer.{name}.{key}": value for key, value in held.get(index, {}).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"progress": json.dumps(asdict(progress))})
    os.replace(partial, path)


def saved_progress(path: Path) -> Progress:
    """How far the run is whose state this is.

    Raises:
        CheckpointError: there is none.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist, so there is nothing to resume: run without --resume first")
    with safe_open(path, framework="pt") as file:
        return Progress(**json.loads(file.metadata()["progress"]))


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
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
        for name, parameter in model.named_parameters():
            if f"model.{name}" not in names:
                raise CheckpointError(f"{path} has no weight `{name}`: it belongs to another recipe")
            with torch.no_grad():
                parameter.copy_(file.get_tensor(f"model.{name}"))
    state = {index: held[name] for index, name in enumerate(names_in(optimizer, model)) if name in held}
    # The optimizer knows itself which of its tensors belong where their weights are.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def names_in(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """The names of an optimizer's parameters, in its own order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
