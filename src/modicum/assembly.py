"""From (config, state_dict) to a module: the only place where a checkpoint becomes one."""

from typing import Any

import torch

from modicum.captioning.model import Captioner
from modicum.checkpoint.hf import to_native
from modicum.checkpoint.io import Checkpoint
from modicum.checkpoint.vivit_folder import native_tensors, stored_labels
from modicum.config import CaptionerConfig, EncoderDecoderConfig, LanguageConfig, VivitConfig
from modicum.core.weights import fill
from modicum.errors import UsageError
from modicum.lm.decoder import Decoder
from modicum.lm.encoder_decoder import EncoderDecoder
from modicum.lm.language_model import LanguageModel
from modicum.vivit.load import assemble
from modicum.vivit.model import Vivit


def build(checkpoint: Checkpoint, config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """(config, state_dict) -> module. Weights are read one at a time; none is held twice."""
    builders: dict[type, Any] = {VivitConfig: build_vivit, CaptionerConfig: build_captioner}
    make = builders.get(type(config), build_language_model)
    model = make(checkpoint, config, device, dtype)
    model.stock_config, model.files = checkpoint.config, checkpoint.files
    return model.eval()


def build_vivit(checkpoint: Checkpoint, config: VivitConfig, device: torch.device, dtype: torch.dtype) -> Vivit:
    model = assemble(config, native_tensors(checkpoint, config), device, dtype)
    model.labels = stored_labels(checkpoint.config, config.num_classes)
    return model


def build_captioner(
    checkpoint: Checkpoint, config: CaptionerConfig, device: torch.device, dtype: torch.dtype
) -> Captioner:
    model = empty(config)
    fill(model, ((name, checkpoint.state_dict[name]) for name in checkpoint.state_dict), device, dtype)
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    if dtype == torch.float16 and not config.shares_encoder:
        # A draft knows its target's encoder by bfloat16 numbers, which float16 on the way there would round otherwise.
        stored = checkpoint.state_dict
        model.remember_encoder({name[8:]: stored[name] for name in stored if name.startswith("encoder.")})
    return model.to(device)  # what is left elsewhere are tables of positions


def empty(config: LanguageConfig | CaptionerConfig) -> Any:
    """A language model of that shape, without memory for its weights."""
    with torch.device("meta"):
        if isinstance(config, CaptionerConfig):
            return Captioner(config)
        return EncoderDecoder(config) if isinstance(config, EncoderDecoderConfig) else Decoder(config)


def build_language_model(
    checkpoint: Checkpoint, config: LanguageConfig, device: torch.device, dtype: torch.dtype
) -> LanguageModel:
    model = empty(config)
    for name, tensor in to_native(checkpoint.state_dict, config):
        owner, _, leaf = name.rpartition(".")
        # A copy always: a view of the memory-mapped file would change, or fail, when the model is trained.
        weight = torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)
        model.get_submodule(owner).register_parameter(leaf, torch.nn.Parameter(weight))
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    return model.to(device)  # what is left elsewhere are tables of positions


def pick_device(device: str | torch.device) -> torch.device:
    """ "auto" -> a GPU if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UsageError(f"`{device}` is not a device: use auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device `{device}` asks for a GPU and PyTorch sees none: use `cpu` or `auto`")
    return chosen


def pick_dtype(dtype: str | torch.dtype, checkpoint: Checkpoint) -> torch.dtype:
    """ "auto" -> what the checkpoint's weights are stored in."""
    if isinstance(dtype, torch.dtype):
        return dtype
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if dtype == "auto":
        # Some checkpoints store masks, as bytes, beside the weights.
        return next(tensor.dtype for tensor in checkpoint.state_dict.values() if tensor.is_floating_point())
    if dtype not in known:
        raise UsageError(f"`{dtype}` is not a dtype for a model: use auto, {', '.join(known)}")
    return known[dtype]
