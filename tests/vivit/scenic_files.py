"""Files as the ViViT authors' code leaves them, written here from a model of ours with `msgpack` alone."""

from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch

from modicum.config import VivitConfig
from modicum.vivit.model import Vivit

ARRAY, SCALAR = 1, 3


def extension(array: Any, code: int = ARRAY, dtype: str | None = None) -> msgpack.ExtType:
    """An array as flax.serialization packs it: shape, name of the dtype, elements."""
    array = np.asarray(array)
    return msgpack.ExtType(code, msgpack.packb((array.shape, dtype or array.dtype.name, array.tobytes())))


def chunked(array: np.ndarray, size: int) -> dict:
    """An array too large for one extension, in pieces of `size` elements."""
    flat = array.reshape(-1)
    pieces = [flat[i : i + size] for i in range(0, flat.size, size)]
    return {
        "__msgpack_chunked_array__": True,
        "shape": {str(i): n for i, n in enumerate(array.shape)},
        "chunks": {str(i): extension(piece) for i, piece in enumerate(pieces)},
    }


def write_flax(path: Path, tree: dict) -> Path:
    """A nested dictionary of arrays, numbers and extensions as a MessagePack file."""
    path.write_bytes(msgpack.packb(tree, default=extension))
    return path


def nested(flat: dict[str, Any]) -> dict:
    """{"a/b": 1} -> {"a": {"b": 1}}"""
    tree: dict = {}
    for key, value in flat.items():
        *path, leaf = key.split("/")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[leaf] = value
    return tree


def scenic_parameters(model: Vivit) -> dict[str, np.ndarray]:
    """A model's parameters under the authors' names and in their shapes, written down module by module."""
    c = model.config
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    t, h, w = c.tubelet_size
    filters = state["embed.project.weight"].T.reshape(t, h, w, 3, c.dim)
    found = {"embedding/kernel": filters[0] if t == 1 else filters, "embedding/bias": state["embed.project.bias"]}
    for theirs, ours in (("pre_logits", "pre_logits"), ("output_projection", "head")):
        if f"{ours}.weight" in state:
            found[f"{theirs}/kernel"] = state[f"{ours}.weight"].T
            found[f"{theirs}/bias"] = state[f"{ours}.bias"]
    factorized = c.variant == "factorized_encoder"
    encoders = [("SpatialTransformer" if factorized else "Transformer", "encoder", c.n_layers, c.n_heads)]
    if c.temporal_layers:
        encoders.append(("TemporalTransformer", "temporal", c.temporal_layers, c.temporal_heads or c.n_heads))
    for theirs, ours, depth, n_heads in encoders:
        if f"{ours}.class_token" in state:
            found[f"cls_{theirs}" if factorized else "cls"] = state[f"{ours}.class_token"].reshape(1, 1, c.dim)
        found[f"{theirs}/posembed_input/pos_embedding"] = state[f"{ours}.positions"].reshape(1, -1, c.dim)
        found |= _norm(f"{theirs}/encoder_norm", state, f"{ours}.norm")
        for i in range(depth):
            found |= _block(f"{theirs}/encoderblock_{i}", state, f"{ours}.blocks.{i}", n_heads, c)
    return found


def _norm(theirs: str, state: dict, ours: str) -> dict:
    return {f"{theirs}/scale": state[f"{ours}.weight"], f"{theirs}/bias": state[f"{ours}.bias"]}


def _block(theirs: str, state: dict, ours: str, n_heads: int, c: VivitConfig) -> dict:
    attention = "MultiHeadDotProductAttention"
    parts = [("LayerNorm_0", "attention_norm", f"{attention}_0", "attention")]
    last_norm, mlp = "LayerNorm_1", "MlpBlock_0"
    if c.variant == "factorized_self_attention":
        parts = [(f"LayerNorm_{axis}", f"{axis}_norm", f"{attention}_{axis}", axis) for axis in ("space", "time")]
        last_norm, mlp = "LayerNorm_mlp", "MlpBlock"
    found = _norm(f"{theirs}/{last_norm}", state, f"{ours}.ffn_norm")
    for their_norm, our_norm, their_attention, our_attention in parts:
        found |= _norm(f"{theirs}/{their_norm}", state, f"{ours}.{our_norm}")
        at = f"{ours}.{our_attention}"
        for name in ("query", "key", "value"):
            kernel = state[f"{at}.project.{name[0]}.weight"].T.reshape(c.dim, n_heads, -1)
            found[f"{theirs}/{their_attention}/{name}/kernel"] = kernel
            found[f"{theirs}/{their_attention}/{name}/bias"] = state[f"{at}.project.{name[0]}.bias"].reshape(
                n_heads, -1
            )
        found[f"{theirs}/{their_attention}/out/kernel"] = state[f"{at}.out.weight"].T.reshape(n_heads, -1, c.dim)
        found[f"{theirs}/{their_attention}/out/bias"] = state[f"{at}.out.bias"]
    for dense, layer in (("Dense_0", "project.up"), ("Dense_1", "down")):
        found[f"{theirs}/{mlp}/{dense}/kernel"] = state[f"{ours}.ffn.{layer}.weight"].T
        found[f"{theirs}/{mlp}/{dense}/bias"] = state[f"{ours}.ffn.{layer}.bias"]
    return found


def before_linen(key: str) -> str:
    """A key of a checkpoint older than Linen, in which a block numbers its parts together."""
    for newer, older in (("LayerNorm_1", "LayerNorm_2"), ("Attention_0", "Attention_1"), ("MlpBlock_0", "MlpBlock_3")):
        key = key.replace(newer, older)
    return key


def equal_weights(a: Vivit, b: Vivit) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
