"""`VivitForVideoClassification` of `transformers`, the stock layout of Model 1 with a class token, to ours and back.

Its image processor maps black to -3 and white to 1 by default; the weights were trained on [-1, 1], which is what a
model of ours is given, and what gives the published accuracy.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from modicum.checkpoint.hf_config import stored_dtype
from modicum.checkpoint.hf_families import ACTIVATIONS, SWITCHED_OFF
from modicum.checkpoint.hf_fields import flag, integer, number, refuse, shown
from modicum.checkpoint.hf_tensors import check_names, check_shape
from modicum.config import VivitConfig
from modicum.errors import CheckpointError, UsageError

MODEL_TYPE = "vivit"
ARCHITECTURE = "VivitForVideoClassification"
CHANNELS = 3
_ACTIVATION_NAMES = {"gelu_tanh": "gelu_fast", "gelu": "gelu", "relu": "relu", "silu": "silu"}
# What `transformers` 5 calls the modules in memory, and in files that are not written in the original format.
_NEWER_NAMES = {
    r"vivit\.layers\.(\d+)\.": r"vivit.encoder.layer.\1.",
    r"\.attention\.q_proj\.": ".attention.attention.query.",
    r"\.attention\.k_proj\.": ".attention.attention.key.",
    r"\.attention\.v_proj\.": ".attention.attention.value.",
    r"\.attention\.o_proj\.": ".attention.output.dense.",
    r"\.mlp\.fc1\.": ".intermediate.dense.",
    r"\.mlp\.fc2\.": ".output.dense.",
}


def vivit_config(config: Mapping[str, Any]) -> VivitConfig:
    """The model that a stock config.json describes; a key that changes what it computes is honoured or refused.

    Raises:
        CheckpointError: a value that is out of range or asks for something that is not implemented.
    """
    for key, off in SWITCHED_OFF.items():
        if config.get(key) not in off:
            raise refuse(key, config[key], f"{shown(off[-1])}, because it does not implement this")
    if integer(config, "num_channels", CHANNELS) != CHANNELS:
        raise refuse("num_channels", config["num_channels"], f"{CHANNELS}, red, green and blue")
    activation = config.get("hidden_act") or "gelu_fast"
    if activation not in ACTIVATIONS:
        raise refuse("hidden_act", activation, f"one of {', '.join(ACTIVATIONS)}")
    dim, n_heads = integer(config, "hidden_size", 768), integer(config, "num_attention_heads", 12)
    if n_heads < 1 or (config.get("head_dim") is None and dim % n_heads):
        raise refuse("num_attention_heads", n_heads, f"a number that divides the width of {dim}")
    try:
        return VivitConfig(
            variant="spacetime",
            image_size=_sizes(config, "image_size", (224, 224)),
            num_frames=integer(config, "num_frames", 32),
            tubelet_size=_sizes(config, "tubelet_size", (2, 16, 16)),
            dim=dim,
            n_layers=integer(config, "num_hidden_layers", 12),
            n_heads=n_heads,
            n_kv_heads=n_heads,
            head_dim=integer(config, "head_dim", dim // n_heads),
            ffn_dim=integer(config, "intermediate_size", 3072),
            num_classes=_num_classes(config),
            stochastic_depth=number(config, "stochastic_depth", 0.0),
            stochastic_depth_rule=config.get("stochastic_depth_rule") or "from_zero",
            qkv_bias=flag(config, "qkv_bias", True),
            norm_eps=number(config, "layer_norm_eps", 1e-6),
            activation=ACTIVATIONS[activation],  # type: ignore[arg-type]
            dtype=stored_dtype(config),  # type: ignore[arg-type]
        )
    except UsageError as error:
        raise CheckpointError(f"config.json: {error}") from error


def _sizes(config: Mapping[str, Any], key: str, default: tuple[int, ...]) -> Any:
    """A list of as many whole numbers as `default` has; one number stands for two equal sides."""
    value = config.get(key, default)
    if isinstance(value, int) and len(default) == 2:
        value = (value, value)
    if not isinstance(value, list | tuple) or len(value) != len(default):
        raise refuse(key, value, f"{len(default)} whole numbers of at least 1")
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in value):
        raise refuse(key, value, f"{len(default)} whole numbers of at least 1")
    return tuple(value)


def _num_classes(config: Mapping[str, Any]) -> int:
    labels = config.get("id2label")
    return len(labels) if isinstance(labels, dict) else integer(config, "num_labels", 2)


def stock_vivit_config(cfg: VivitConfig, base: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The stock config.json of a model, or None where the layout cannot hold it (Models 2 to 4, pooling, groups, ...).

    Args:
        base: the config.json that the model came from; what it says is carried through, but for what `cfg` changes.
    """
    written = _written(cfg)
    if base is None or base.get("model_type") != MODEL_TYPE:
        result: dict[str, Any] = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE, **written}
    else:
        before = _written(vivit_config(base))
        changed = {key for key in written | before if written.get(key) != before.get(key)}
        result = {key: value for key, value in base.items() if key not in changed}
        result |= {key: value for key, value in written.items() if key in changed}
    return result if vivit_config(result) == cfg else None


def _written(cfg: VivitConfig) -> dict[str, Any]:
    """Every key that says something about `cfg`."""
    height, width = cfg.image_size
    result = {
        # `transformers` 4 knows squares alone.
        "image_size": height if height == width else [height, width],
        "num_frames": cfg.num_frames,
        "tubelet_size": list(cfg.tubelet_size),
        "num_channels": CHANNELS,
        "hidden_size": cfg.dim,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "intermediate_size": cfg.ffn_dim,
        "hidden_act": _ACTIVATION_NAMES[cfg.activation],
        "layer_norm_eps": cfg.norm_eps,
        "qkv_bias": cfg.qkv_bias,
        "id2label": {str(i): f"LABEL_{i}" for i in range(cfg.num_classes)},
        "label2id": {f"LABEL_{i}": i for i in range(cfg.num_classes)},
        "dtype": cfg.dtype,
        "torch_dtype": cfg.dtype,
    }
    if cfg.head_dim * cfg.n_heads != cfg.dim:
        result["head_dim"] = cfg.head_dim
    if cfg.stochastic_depth:
        # Not stock keys: a rate for training, which the stock class ignores.
        result["stochastic_depth"] = cfg.stochastic_depth
        result["stochastic_depth_rule"] = cfg.stochastic_depth_rule
    return result


class _Row(NamedTuple):
    """One tensor: its stock name and ours, and its stock shape."""

    stock: str
    native: str
    shape: tuple[int, ...]


def _rows(cfg: VivitConfig) -> Iterator[_Row]:
    width = cfg.n_heads * cfg.head_dim
    embeddings = "vivit.embeddings"
    yield _Row(f"{embeddings}.cls_token", "encoder.class_token", (1, 1, cfg.dim))
    yield _Row(f"{embeddings}.position_embeddings", "encoder.positions", (1, math.prod(cfg.grid) + 1, cfg.dim))
    filters = f"{embeddings}.patch_embeddings.projection"
    yield _Row(f"{filters}.weight", "embed.project.weight", (cfg.dim, CHANNELS, *cfg.tubelet_size))
    yield _Row(f"{filters}.bias", "embed.project.bias", (cfg.dim,))

    def layer(stock: str, native: str, rows: int, columns: int | None = None, bias: bool = True) -> Iterator[_Row]:
        yield _Row(f"{stock}.weight", f"{native}.weight", (rows,) if columns is None else (rows, columns))
        if bias:
            yield _Row(f"{stock}.bias", f"{native}.bias", (rows,))

    for i in range(cfg.n_layers):
        theirs, ours = f"vivit.encoder.layer.{i}", f"encoder.blocks.{i}"
        yield from layer(f"{theirs}.layernorm_before", f"{ours}.attention_norm", cfg.dim)
        for name in ("query", "key", "value"):
            native = f"{ours}.attention.project.{name[0]}"
            yield from layer(f"{theirs}.attention.attention.{name}", native, width, cfg.dim, cfg.qkv_bias)
        yield from layer(f"{theirs}.attention.output.dense", f"{ours}.attention.out", cfg.dim, width)
        yield from layer(f"{theirs}.layernorm_after", f"{ours}.ffn_norm", cfg.dim)
        yield from layer(f"{theirs}.intermediate.dense", f"{ours}.ffn.project.up", cfg.ffn_dim, cfg.dim)
        yield from layer(f"{theirs}.output.dense", f"{ours}.ffn.down", cfg.dim, cfg.ffn_dim)
    yield from layer("vivit.layernorm", "encoder.norm", cfg.dim)
    yield from layer("classifier", "head", cfg.num_classes, cfg.dim)


def vivit_to_native(state_dict: Mapping[str, Tensor], cfg: VivitConfig) -> Iterator[tuple[str, Tensor]]:
    """Our names and tensors, one at a time, from a mapping with stock names.

    Raises:
        CheckpointError: a tensor is missing, left over or of the wrong shape, as without a classifier.
    """
    found = {_older_name(name): name for name in state_dict}
    if "classifier.weight" not in found:
        raise CheckpointError(
            f"the checkpoint has no `classifier.weight`, as a bare VivitModel has none: give a {ARCHITECTURE}"
        )
    rows = {row.stock: row for row in _rows(cfg)}
    check_names(found, rows, "the checkpoint, for the vivit model that its config.json describes,")
    return _turned(state_dict, found, rows)


def _older_name(name: str) -> str:
    for newer, older in _NEWER_NAMES.items():
        name = re.sub(newer, older, name)
    return name


def _turned(
    state_dict: Mapping[str, Tensor], found: Mapping[str, str], rows: Mapping[str, _Row]
) -> Iterator[tuple[str, Tensor]]:
    for row in rows.values():
        tensor = state_dict[found[row.stock]]
        check_shape(found[row.stock], tensor, row.shape)
        if len(row.shape) == 5:  # [D, C, t, h, w]
            tensor = tensor.permute(0, 2, 3, 4, 1).flatten(1)
        elif len(row.shape) == 3:
            tensor = tensor.flatten(0, 1)
        yield row.native, tensor[0] if row.native == "encoder.class_token" else tensor


def vivit_to_stock(native: Mapping[str, Tensor], cfg: VivitConfig) -> dict[str, Tensor]:
    """The inverse of `vivit_to_native`, sharing the memory of what it is given."""
    result = {}
    for row in _rows(cfg):
        tensor = native[row.native]
        if len(row.shape) == 5:
            D, C, *tubelet = row.shape
            tensor = tensor.reshape(D, *tubelet, C).permute(0, 4, 1, 2, 3)
        result[row.stock] = tensor.reshape(row.shape)
    return result
