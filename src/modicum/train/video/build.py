"""The model of a video recipe: its weights as they begin, what it costs, and how it is made to need less memory."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from modicum import api, resources
from modicum.checkpoint.hub import resolve
from modicum.checkpoint.io import read_checkpoint
from modicum.checkpoint.native import read_config
from modicum.config import VivitConfig
from modicum.errors import CheckpointError
from modicum.train.video.recipe import VivitSection
from modicum.vivit.build import initialise
from modicum.vivit.flops import stacks
from modicum.vivit.initialization import init_from_image, init_from_video
from modicum.vivit.model import Encoder, Vivit


def fresh_model(config: VivitConfig, section: VivitSection, seed: int) -> Vivit:
    """A model as training begins with it, on the CPU, so that a seed gives the same on every device.

    Raises:
        CheckpointError: `start` cannot be read.
        UsageError: it does not fit the model.
    """
    model = Vivit(config)
    initialise(model, seed)
    if section.positions != 0.02:
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, Encoder):
                    module.positions.mul_(section.positions / 0.02)
    if section.start is not None:
        start_from(model, section, section.start)
    return model


def start_from(model: Vivit, section: VivitSection, start: str) -> None:
    """Copy everything but the head from a ViViT, or what there is from an image ViT."""
    name = resources.model_presets().get(start) or start
    if is_vivit(name):
        init_from_video(model, api.load(name, device="cpu", dtype="float32"))
    else:
        init_from_image(model, name, kernel=section.kernel, temporal=section.temporal)


def is_vivit(start: str | Path) -> bool:
    """Whether what a model starts from is a ViViT's folder; what is no checkpoint of ours is an image ViT's file."""
    local = Path(start).expanduser()
    if local.is_file():
        return False
    try:
        config = read_checkpoint(local if local.exists() else resolve(str(start))).config
        return isinstance(read_config(config), VivitConfig)
    except CheckpointError:
        return False


def hold_less(model: Vivit) -> None:
    """Keep of every block only its input while training; the rest is computed again when gradients need it."""
    encoders = [module for module in model.modules() if isinstance(module, Encoder)]
    for block in (block for encoder in encoders for block in encoder.blocks):
        block.forward = partial(_again, block.forward)


def _again(forward: Any, x: torch.Tensor) -> torch.Tensor:
    # What the block draws is drawn again, the same: checkpoint puts the random numbers back.
    return checkpoint(forward, x, use_reentrant=False) if torch.is_grad_enabled() else forward(x)


# Bytes that a block holds for its gradients, per token, in units of its width: two inputs of norms and what these give,
# queries, keys, values and what attention gives, twice; and of a feed-forward's width before and after its GELU.
# In float32; under bfloat16 matrix products hold half of theirs.
FULL = {"norms": 16, "attention": 24, "ffn": 8}
HALF = {"norms": 14, "attention": 12, "ffn": 4}


def activation_bytes(config: VivitConfig, clips: int, *, bf16: bool, checkpointing: bool) -> int:
    """About what a model holds between its forward and its backward pass for so many clips."""
    T, S = config.grid[0], config.grid[1] * config.grid[2]
    size = HALF if bf16 else FULL
    held, largest = 0, 0
    for stack in stacks(config, T, S):
        attention = stack.attentions * (size["norms"] // 2 * stack.dim + size["attention"] * stack.q_dim)
        block = stack.tokens * (attention + size["norms"] // 2 * stack.dim + size["ffn"] * stack.ffn_dim)
        held += stack.layers * (4 * stack.tokens * stack.dim if checkpointing else block)
        largest = max(largest, block)
    return clips * (held + (largest if checkpointing else 0))
