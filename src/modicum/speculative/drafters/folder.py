"""Trained drafters as folders: config.json with the target they are for, and safetensors."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from modicum.checkpoint.io import Checkpoint
from modicum.core.linear import refuse_training
from modicum.errors import CheckpointError, UsageError
from modicum.speculative.drafters.features import FeaturesDrafter, FeaturesNetwork
from modicum.speculative.drafters.heads import HeadsDrafter, HeadsNetwork
from modicum.speculative.drafters.parallel import ParallelDrafter, ParallelNetwork
from modicum.speculative.drafters.trained import DrafterConfig, Network, TrainedDrafter, decoder_of

MODEL_TYPE = "modicum-drafter"
KINDS: dict[str, tuple[type[Network], type[TrainedDrafter]]] = {
    "heads": (HeadsNetwork, HeadsDrafter),
    "features": (FeaturesNetwork, FeaturesDrafter),
    "parallel": (ParallelNetwork, ParallelDrafter),
}


def is_drafter(stock: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a trained drafter."""
    return stock.get("model_type") == MODEL_TYPE


def drafter_checkpoint(drafter: TrainedDrafter) -> Checkpoint:
    """What is written for a drafter."""
    stock = {"model_type": MODEL_TYPE, **drafter.config.to_dict()}
    return Checkpoint(stock, drafter.loaded.dense_state(), drafter.files)


def build_drafter(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> TrainedDrafter:
    """The drafter of a checkpoint.

    Raises:
        CheckpointError: an unknown key, or weights that are not those of its configuration.
    """
    try:
        config = DrafterConfig.from_dict(
            {key: value for key, value in checkpoint.config.items() if key != "model_type"}
        )
    except UsageError as error:
        raise CheckpointError(f"config.json: {error}") from error
    make_network, make_drafter = KINDS[config.kind]
    with torch.device("meta"):
        network = make_network(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    held = {name: tuple(tensor.shape) for name, tensor in checkpoint.state_dict.items()}
    wrong = sorted(name for name in wanted.keys() | held.keys() if wanted.get(name) != held.get(name))
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"the drafter's `{name}` has shape {held.get(name)} and its config.json asks for {wanted.get(name)}: "
            "copy the folder again"
        )
    # Copies: the network may be trained further, and the file must not change.
    state = {name: tensor.to(device, dtype, copy=True) for name, tensor in checkpoint.state_dict.items()}
    network.load_state_dict(state, assign=True)
    return make_drafter(network.eval(), checkpoint.files)


def new_network(target: Any, kind: str, num_draft_tokens: int, n_layers: int = 1, seed: int = 0) -> Network:
    """An untrained network for a target, on the CPU in float32; the seed decides what is not taken from the target.

    Raises:
        UsageError: the target was packed for inference, so that its weights cannot be read.
    """
    refuse_training(target)
    decoder = decoder_of(target)
    shape = dataclasses.replace(decoder.config, dtype="float32")
    config = DrafterConfig(
        kind=kind,  # type: ignore[arg-type]
        num_draft_tokens=num_draft_tokens,
        n_layers=n_layers,
        fingerprint=target.fingerprint,
        target=shape,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = KINDS[kind][0](config)
        network.begin(decoder)
    return network
