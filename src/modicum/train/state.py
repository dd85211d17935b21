"""The state of a run on disk: weights, moments and counters. No pickles; a state appears whole or not at all."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from modicum.errors import CheckpointError


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    fingerprint: str = ""


def save_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """One file: weights, AdamW's moments by parameter name, and the counters in its header."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"progress": json.dumps(asdict(progress))})
    os.replace(partial, path)


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Put a saved state back, bit for bit.

    Raises:
        CheckpointError: there is none, or it is another model's.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist, so there is nothing to resume: run without --resume first")
    with safe_open(path, framework="pt") as file:
        progress = Progress(**json.loads(file.metadata()["progress"]))
        names = set(file.keys())
        for name, parameter in model.named_parameters():
            if f"model.{name}" not in names:
                raise CheckpointError(f"{path} has no weight `{name}`: it belongs to another recipe")
            with torch.no_grad():
                parameter.copy_(file.get_tensor(f"model.{name}"))
            prefix = f"optimizer.{name}."
            keys = [key for key in names if key.startswith(prefix)]
            # Moments belong where their weights are.
            moments = {key[len(prefix) :]: file.get_tensor(key).to(parameter.device, copy=True) for key in keys}
            optimizer.state[parameter] = moments
    return progress
