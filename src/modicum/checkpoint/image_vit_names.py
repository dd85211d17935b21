"""What image ViTs call their parts: Hugging Face's, timm's and Flax's names to those of a ViViT of one frame.

All readers give the same: block tensors and the last norm under our own names, weights as [out, in], and beside them
`embed.weight` [D, height, width, C], `embed.bias`, `positions` and, in a model that has one, `class_token`.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modicum.checkpoint.flax import flax_parameters
from modicum.errors import CheckpointError

PROJECTIONS = {"q": "query", "k": "key", "v": "value"}

# Parts of a block as others call them. Hugging Face stores the names of its version 4; version 5 names its modules anew.
_TORCH_BLOCK = re.compile(r"(?:encoder\.layer|layers|blocks)\.(\d+)\.(.+)\.(weight|bias)")
_TORCH_PARTS = {
    **{f"attention.attention.{long}": f"attention.project.{short}" for short, long in PROJECTIONS.items()},
    **{f"attention.{short}_proj": f"attention.project.{short}" for short in PROJECTIONS},
    **dict.fromkeys(("attention.output.dense", "attention.o_proj", "attn.proj"), "attention.out"),
    **dict.fromkeys(("layernorm_before", "norm1"), "attention_norm"),
    **dict.fromkeys(("layernorm_after", "norm2"), "ffn_norm"),
    **dict.fromkeys(("intermediate.dense", "mlp.fc1"), "ffn.project.up"),
    **dict.fromkeys(("output.dense", "mlp.fc2"), "ffn.down"),
    "attn.qkv": "attention.project.qkv",
}
_TORCH_TOP = {
    **dict.fromkeys(("embeddings.patch_embeddings.projection", "patch_embed.proj"), "embed"),
    # timm's models that pool norm the average; what a ViViT pools has been normed.
    **dict.fromkeys(("layernorm", "norm", "fc_norm"), "encoder.norm"),
}
_TORCH_ROWS = {
    **dict.fromkeys(("embeddings.cls_token", "cls_token"), "class_token"),
    **dict.fromkeys(("embeddings.position_embeddings", "pos_embed"), "positions"),
}
_TORCH_HEADS = re.compile(r"(pooler|classifier|head|pre_logits|decoder|attn_pool|embeddings\.mask_token)(\.|$)")

_FLAX_BLOCK = re.compile(r"Transformer/encoderblock_(\d+)/(.+)/(kernel|bias|scale)")
_FLAX_PARTS = {
    **{f"MultiHeadDotProductAttention_0/{long}": f"attention.project.{short}" for short, long in PROJECTIONS.items()},
    "MultiHeadDotProductAttention_0/out": "attention.out",
    "LayerNorm_0": "attention_norm",
    "LayerNorm_1": "ffn_norm",
    "MlpBlock_0/Dense_0": "ffn.project.up",
    "MlpBlock_0/Dense_1": "ffn.down",
}
_FLAX_TOP = {
    "embedding/kernel": "embed.weight",
    "embedding/bias": "embed.bias",
    "cls": "class_token",
    "pos_embedding": "positions",
    "Transformer/posembed_input/pos_embedding": "positions",
    "Transformer/encoder_norm/scale": "encoder.norm.weight",
    "Transformer/encoder_norm/bias": "encoder.norm.bias",
}
_FLAX_HEADS = re.compile(r"(head|pre_logits|output_projection|MAPHead_0)(/|$)")


def torch_tensors(stored: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Hugging Face's and timm's tensors, whose names do not clash.

    Raises:
        CheckpointError: a tensor that a ViViT has no place for.
    """
    raw: dict[str, Tensor] = {}
    for name in stored:
        own = name.removeprefix("vit.")
        if not _TORCH_HEADS.match(own):
            _put(raw, _torch_name(own), stored[name], name, path)
    for name in [name for name in raw if ".qkv." in name]:
        for short, part in zip(PROJECTIONS, raw.pop(name).chunk(3), strict=True):
            raw[name.replace(".qkv.", f".{short}.")] = part
    if "embed.weight" in raw and raw["embed.weight"].dim() == 4:
        raw["embed.weight"] = raw["embed.weight"].permute(0, 2, 3, 1)
    return raw


def _torch_name(name: str) -> str | None:
    """A ViViT's name for a tensor of Hugging Face's or timm's; None if it has no such part."""
    if match := _TORCH_BLOCK.fullmatch(name):
        part = _TORCH_PARTS.get(match[2])
        return part and f"encoder.blocks.{match[1]}.{part}.{match[3]}"
    owner, _, leaf = name.rpartition(".")
    return f"{_TORCH_TOP[owner]}.{leaf}" if owner in _TORCH_TOP else _TORCH_ROWS.get(name)


def flax_tensors(arrays: Mapping[str, np.ndarray], path: Path) -> tuple[dict[str, Tensor], int | None]:
    """AugReg's, big_vision's and scenic's tensors, and the number of heads, which is an axis of their kernels.

    Raises:
        CheckpointError: an array that a ViViT has no place for.
    """
    parameters = flax_parameters(arrays)
    if "img/embedding/kernel" in parameters:  # beside a tower for texts
        parameters = {key[4:]: value for key, value in parameters.items() if key.startswith("img/")}
    raw: dict[str, Tensor] = {}
    n_heads = None
    for key, array in _unstacked(parameters):
        if _FLAX_HEADS.match(key):
            continue
        name = _flax_name(key)
        # A copy, because in the file an array may begin at any byte.
        tensor = torch.from_numpy(np.array(array, order="C"))
        if name == "embed.weight":
            tensor = tensor.movedim(-1, 0)
        elif key.endswith("/kernel"):
            if key.endswith("query/kernel"):
                n_heads = tensor.shape[1]
            tensor = (tensor.flatten(0, -2) if key.endswith("out/kernel") else tensor.flatten(1)).T
        elif name and name.startswith("encoder."):
            tensor = tensor.flatten()
        _put(raw, name, tensor, key, path)
    return raw, n_heads


def _flax_name(key: str) -> str | None:
    if match := _FLAX_BLOCK.fullmatch(key):
        part = _FLAX_PARTS.get(match[2])
        return part and f"encoder.blocks.{match[1]}.{part}.{'bias' if match[3] == 'bias' else 'weight'}"
    return _FLAX_TOP.get(key)


def _unstacked(parameters: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Layers that were scanned over lie in one array, one after another on its first axis."""
    for key, array in parameters.items():
        if key.startswith("Transformer/encoderblock/"):
            for i, layer in enumerate(array):
                yield key.replace("encoderblock/", f"encoderblock_{i}/", 1), layer
        else:
            yield key, array


def _put(raw: dict[str, Tensor], name: str | None, tensor: Tensor, given: str, path: Path) -> None:
    if name is None or name in raw:
        raise CheckpointError(
            f"{path} holds `{given}`, which has no counterpart in a ViViT: give an image ViT of attention, two-layer "
            "feed-forwards and norms before each, without additional tokens"
        )
    raw[name] = tensor
