"""The ViViT authors' checkpoints (2103.15691): Flax parameters under Scenic's names to `VivitConfig` and our names.

Sizes come from the shapes in the file. What leaves no trace there has to be told: frames and image size (the tables of
positions hold their product), Model 4, the order of the axes in Model 3, and which pooling replaces the class token.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from modicum.checkpoint.flax import flax_file, flax_parameters, read_flax
from modicum.config import Variant, VivitConfig
from modicum.errors import CheckpointError, UsageError

Arrays = Mapping[str, np.ndarray]

_ENCODERS = {"Transformer": "encoder", "SpatialTransformer": "encoder", "TemporalTransformer": "temporal"}
_CLASS_TOKENS = {
    "cls": "encoder.class_token",
    "cls_SpatialTransformer": "encoder.class_token",
    "cls_TemporalTransformer": "temporal.class_token",
}
_MODULES = {
    "embedding": "embed.project",
    "pre_logits": "pre_logits",
    "output_projection": "head",
    "encoder_norm": "norm",
    "LayerNorm_0": "attention_norm",
    "LayerNorm_1": "ffn_norm",
    "LayerNorm_space": "space_norm",
    "LayerNorm_time": "time_norm",
    "LayerNorm_mlp": "ffn_norm",
    "MultiHeadDotProductAttention_0": "attention",
    "MultiHeadDotProductAttention_space": "space",
    "MultiHeadDotProductAttention_time": "time",
    "MlpBlock_0": "ffn",
    "MlpBlock": "ffn",
    "query": "project.q",
    "key": "project.k",
    "value": "project.v",
    "out": "out",
    "Dense_0": "project.up",
    "Dense_1": "down",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def read_scenic(
    path: str | Path,
    num_frames: int = 32,
    image_size: int | tuple[int, int] = (224, 224),
    variant: Variant | None = None,
    attention_order: Literal["space_time", "time_space"] = "space_time",
    pooling: str | None = None,
    heads: Mapping[str, int] | None = None,
    sampled_frames: int | None = None,
) -> tuple[VivitConfig, dict[str, Tensor]]:
    """A checkpoint of the authors' code: its configuration and its tensors under the names of `vivit.model`.

    Args:
        path: a MessagePack file, or a folder with one; of several `checkpoint_<step>` the highest step.
        num_frames, image_size: what the model is given; a side, or (height, width).
        variant: needed for one encoder without a class token, which Models 1 and 4 write alike.
        attention_order: of Model 3; the authors' code has time_space where its configuration does not say.
        pooling: gap if not given and the file has no class token; gmp and gsp look the same.
        heads: names for parts of the projection, in order, such as {"noun": 300, "verb": 97}.
        sampled_frames: how many frames uniform sampling keeps.

    Raises:
        CheckpointError: the file is damaged or holds something else than such a model.
        UsageError: an argument that the file contradicts, or one that it does not answer.
    """
    file = flax_file(path)
    arrays = flax_parameters(read_flax(file))
    for needed in ("embedding/kernel", "output_projection/kernel"):
        if needed not in arrays:
            raise CheckpointError(f"{file} has no `{needed}`: give a ViViT of the authors' code")
    main = "SpatialTransformer" if any(key.startswith("SpatialTransformer/") for key in arrays) else "Transformer"
    space = _encoder(arrays, main)
    if space is None or arrays["embedding/kernel"].ndim not in (4, 5):
        raise CheckpointError(f"{file} has no encoder or no filters of a ViViT: give a checkpoint of the authors' code")
    variant = _variant(arrays, variant)
    time = _encoder(arrays, "TemporalTransformer")
    kernel, classes = arrays["embedding/kernel"].shape, arrays["output_projection/kernel"].shape[1]
    pre_logits = arrays.get("pre_logits/kernel")
    config = VivitConfig(
        variant=variant,
        image_size=(image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1]),
        num_frames=num_frames,
        sampled_frames=sampled_frames,
        # Filters of single frames, as uniform frame sampling uses, have no axis of time.
        tubelet_size=(1, *kernel[:2]) if len(kernel) == 4 else kernel[:3],
        dim=kernel[-1],
        n_layers=space.n_layers,
        n_heads=space.n_heads,
        n_kv_heads=space.n_heads,
        head_dim=space.head_dim,
        ffn_dim=space.ffn_dim,
        temporal_layers=time.n_layers if time else 0,
        temporal_heads=time.n_heads if time and time.n_heads != space.n_heads else None,
        temporal_ffn_dim=time.ffn_dim if time and time.ffn_dim != space.ffn_dim else None,
        attention_order=attention_order if variant == "factorized_self_attention" else "space_time",
        pooling=_pooling(arrays, pooling),
        num_classes=classes,
        heads=tuple((heads or {}).items()),
        pre_logits=None if pre_logits is None else pre_logits.shape[1],
    )
    _check_positions(arrays, config, main)
    return config, {_native_name(key, file): _native_tensor(key, array, config) for key, array in arrays.items()}


class _Encoder(NamedTuple):
    """Sizes of one encoder, those of its first block for all."""

    n_layers: int
    n_heads: int
    head_dim: int
    ffn_dim: int


def _encoder(arrays: Arrays, name: str) -> _Encoder | None:
    """What the file says about an encoder; None when it has no blocks."""
    blocks = {int(match[1]) for key in arrays if (match := re.match(rf"{name}/encoderblock_(\d+)/", key))}
    first = f"{name}/encoderblock_{min(blocks, default=0)}/"
    query = next((a for k, a in arrays.items() if k.startswith(first) and k.endswith("/query/kernel")), None)
    hidden = next((a for k, a in arrays.items() if k.startswith(first) and k.endswith("/Dense_0/kernel")), None)
    if query is None or hidden is None or query.ndim != 3:
        return None
    return _Encoder(len(blocks), query.shape[1], query.shape[2], hidden.shape[1])


def _variant(arrays: Arrays, given: Variant | None) -> Variant:
    """The variant that the names in the file mean, together with the argument where they mean two."""
    if any(key.startswith("SpatialTransformer/") for key in arrays):
        possible: tuple[Variant, ...] = ("factorized_encoder",)
    elif any("/LayerNorm_space/" in key for key in arrays):
        possible = ("factorized_self_attention",)
    elif "cls" in arrays:
        possible = ("spacetime",)
    else:
        possible = ("spacetime", "factorized_dot_product")
    if given is None and len(possible) > 1:
        raise UsageError(
            "a checkpoint with one encoder and no class token is Model 1 with pooling or Model 4: "
            f"say which with `variant` = {' or '.join(possible)}"
        )
    if given is not None and given not in possible:
        raise UsageError(
            f"`variant` is {given} and the checkpoint holds a {' or '.join(possible)}: change the argument"
        )
    return given or possible[0]


def _pooling(arrays: Arrays, given: str | None) -> Any:
    token = any(key in arrays for key in _CLASS_TOKENS)
    if given is not None and (given == "token") != token:
        raise UsageError(
            f"`pooling` is {given} and the checkpoint has {'a' if token else 'no'} class token: "
            + ("leave it out, or give token" if token else "give gap, gmp or gsp")
        )
    return given or ("token" if token else "gap")


def _check_positions(arrays: Arrays, config: VivitConfig, main: str) -> None:
    """Refuse frames and sizes that make another number of tokens than the file has positions."""
    T, height, width = config.grid
    space, tubelet = height * width, config.tubelet_size
    sides = "x".join(map(str, config.image_size))
    kept = config.kept_frames
    tokens = {main: space if config.variant == "factorized_encoder" else T * space, "TemporalTransformer": T}
    for name, wanted in tokens.items():
        table = arrays.get(f"{name}/posembed_input/pos_embedding")
        if table is None:
            continue
        held = table.shape[-2] - (config.pooling == "token")
        if held == wanted:
            continue
        if name == "TemporalTransformer":
            frames = f"{held * tubelet[0]} frames: give num_frames={held * tubelet[0]}"
            remedy = f"{frames}, or sampled_frames={held * tubelet[0]} if they are sampled uniformly"
            raise UsageError(
                f"the checkpoint has {held} tokens in time and {kept} frames make {wanted}; it needs {remedy}"
            )
        if name == "SpatialTransformer":
            side = math.isqrt(held)
            square = f", such as {side * tubelet[1]}x{side * tubelet[2]}" if side * side == held else ""
            raise UsageError(
                f"the checkpoint has {held} tokens per frame and image_size {sides} makes {wanted}: "
                f"give the image_size it was trained on{square}"
            )
        raise UsageError(
            f"the checkpoint has {held} tokens and {kept} frames of {sides} in tubelets of "
            f"{'x'.join(map(str, tubelet))} make {wanted}: give its num_frames, image_size and sampled_frames"
        )


def _native_name(key: str, file: Path) -> str:
    """`SpatialTransformer/encoderblock_3/MlpBlock_0/Dense_1/kernel` -> `encoder.blocks.3.ffn.down.weight`"""
    if key in _CLASS_TOKENS:
        return _CLASS_TOKENS[key]
    *path, leaf = key.split("/")
    encoder = [_ENCODERS[path.pop(0)]] if path and path[0] in _ENCODERS else []
    if path == ["posembed_input"] and leaf == "pos_embedding":
        return ".".join([*encoder, "positions"])
    names = []
    for part in path:
        block = re.fullmatch(r"encoderblock_(\d+)", part)
        names.append(f"blocks.{int(block[1])}" if block else _MODULES.get(part))
    if None in names or leaf not in _LEAVES:
        raise CheckpointError(f"{file} holds `{key}`, which no ViViT of the authors' code has: give another checkpoint")
    return ".".join([*encoder, *names, _LEAVES[leaf]])  # type: ignore[list-item]


def _native_tensor(key: str, array: np.ndarray, config: VivitConfig) -> Tensor:
    """Flax multiplies from the right, with heads as an axis: kernels in x ... x out become [out, in]."""
    *path, leaf = key.split("/")
    if leaf == "kernel":
        # What is summed over is the last axis' complement in these two, else the first axis alone.
        several_in = path[-1] in ("embedding", "out")
        array = (array.reshape(-1, array.shape[-1]) if several_in else array.reshape(array.shape[0], -1)).T
    elif leaf == "pos_embedding" and config.variant == "factorized_self_attention":
        array = array.reshape(config.grid[0], -1, array.shape[-1])
    elif leaf == "pos_embedding":
        array = array.reshape(-1, array.shape[-1])
    else:
        array = array.reshape(-1)
    # A copy, because in the file an array may begin at any byte.
    return torch.from_numpy(np.array(array, order="C"))
