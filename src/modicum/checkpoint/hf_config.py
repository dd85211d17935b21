"""config.json of the stock Hugging Face layout to our configurations and back, for every native family."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from modicum.checkpoint.hf_families import ACTIVATIONS, FAMILIES, SWITCHED_OFF, Family
from modicum.checkpoint.hf_fields import UnknownFamilyError, flag, integer, number, refuse, shown
from modicum.checkpoint.hf_rope import OUTSIDE_KEYS, read_rope, write_rope
from modicum.checkpoint.hf_t5 import read_t5, written_projection
from modicum.config import DecoderConfig, EncoderDecoderConfig, LanguageConfig
from modicum.errors import CheckpointError, UsageError

NATIVE_FAMILIES = tuple(FAMILIES)
_FIELD_TYPES = typing.get_type_hints(EncoderDecoderConfig) | typing.get_type_hints(DecoderConfig)
_DTYPES = typing.get_args(_FIELD_TYPES["dtype"])
_LAYER_TYPES = {
    "full_attention": "full_attention",
    "attention": "full_attention",
    "sliding_attention": "sliding_attention",
}


def language_config(config: Mapping[str, Any]) -> LanguageConfig:
    """The model that a config.json describes, written by `transformers` 4 or 5.

    A key that changes what the model computes is honoured or refused; any other is ignored. `num_key_value_heads` is
    honoured for gpt2, gpt_neox and t5 too, whose stock classes do not know it. Where no dtype is given it is float32.

    Raises:
        UnknownFamilyError: `model_type` has no native code.
        CheckpointError: a value that is out of range or asks for something that is not implemented.
    """
    name = config.get("model_type")
    if name not in FAMILIES:
        given = "has no `model_type`" if name is None else f"has `model_type` = {shown(name)}"
        raise UnknownFamilyError(
            f"config.json {given}, and the families with native code are {', '.join(NATIVE_FAMILIES)}: "
            "`pip install 'modicum[hf]'` runs others through transformers"
        )
    family = FAMILIES[name]
    # JSON's null and an absent key mean the same, except where a reader looks for the key itself.
    config = {family.aliases.get(key, key): value for key, value in config.items()}
    for key, off in {**SWITCHED_OFF, **family.switches}.items():
        if config.get(key) not in off:
            raise refuse(key, config[key], f"{shown(off[-1])}, because it does not implement this")
    values = {ours: _value(config, key, ours, family.defaults[ours]) for ours, key in family.keys.items()}
    _derive_sizes(config, values)
    values["dtype"] = stored_dtype(config)
    if family.config is EncoderDecoderConfig:
        read_t5(config, values)
    else:
        values["windows"] = _windows(config, family, values["n_layers"])
    if family.rope is not None:
        values["rope"] = read_rope(
            config,
            head_dim=values["head_dim"],
            max_seq_len=values["max_seq_len"],
            partial=family.rope == "partial",
        )
    try:
        return family.config(family=name, **family.constants, **values)
    except UsageError as error:
        raise CheckpointError(f"config.json: {error}") from error


def _value(config: Mapping[str, Any], key: str, ours: str, default: Any) -> Any:
    if ours == "activation":
        name = config.get(key) or default
        if not isinstance(name, str) or name not in ACTIVATIONS:
            raise refuse(key, name, f"one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[name]
    if _FIELD_TYPES[ours] is bool:
        return flag(config, key, default)
    return (number if _FIELD_TYPES[ours] is float else integer)(config, key, default)


def _derive_sizes(config: Mapping[str, Any], values: dict[str, Any]) -> None:
    """Fill in the sizes that follow from others when config.json does not give them."""
    dim, n_heads = values["dim"], values["n_heads"]
    if n_heads < 1:
        raise CheckpointError(f"config.json gives {n_heads} query heads, where at least 1 is needed")
    # An explicit null means one key-value head per query head, whatever the family assumes for an absent key.
    explicit_null = "num_key_value_heads" in config and config["num_key_value_heads"] is None
    if values["n_kv_heads"] is None or explicit_null:
        values["n_kv_heads"] = n_heads
    if values["ffn_dim"] is None:
        values["ffn_dim"] = 4 * dim
    if values.get("head_dim") is not None:
        return
    if dim % n_heads:
        raise CheckpointError(f"config.json gives a width of {dim}, which {n_heads} query heads do not divide")
    if config.get("head_dim") not in (None, dim // n_heads):
        raise refuse("head_dim", config["head_dim"], f"width / heads = {dim // n_heads} in this family")
    values["head_dim"] = dim // n_heads


def _windows(config: Mapping[str, Any], family: Family, n_layers: int) -> tuple[int | None, ...]:
    """How many of the latest tokens each layer sees; empty when every layer sees all."""
    window = _window(config, family)
    first = integer(config, "max_window_layers", 28) if family.windows == "by layer" else 0
    implied = ["sliding_attention" if window and i >= first else "full_attention" for i in range(n_layers)]
    kinds = _layer_types(config, n_layers) or implied
    if family.windows != "by layer" and kinds != implied:
        raise refuse("layer_types", config["layer_types"], f"{implied[0]} in every layer of this family")
    if "sliding_attention" not in kinds:
        return ()
    if window is None:
        raise refuse("layer_types", config["layer_types"], "`sliding_window`, switched on, beside it")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _window(config: Mapping[str, Any], family: Family) -> int | None:
    if family.windows == "none" or (family.windows == "by layer" and not flag(config, "use_sliding_window", False)):
        return None
    # Here null switches the window off, and only an absent key means the default.
    if "sliding_window" in config and config["sliding_window"] is None:
        return None
    window = integer(config, "sliding_window", 4096)
    if window < 1:
        raise refuse("sliding_window", window, "at least 1, or null for none")
    return window


def _layer_types(config: Mapping[str, Any], n_layers: int) -> list[str] | None:
    given = config.get("layer_types")
    if given is None:
        return None
    if not isinstance(given, list) or any(kind not in _LAYER_TYPES for kind in given):
        raise refuse("layer_types", given, "full_attention or sliding_attention for each layer")
    if len(given) != n_layers:
        raise refuse("layer_types", given, f"one entry for each of {n_layers} layers")
    return [_LAYER_TYPES[kind] for kind in given]


def stored_dtype(config: Mapping[str, Any]) -> str:
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    value = config.get(key)
    if value is None:
        return "float32"
    name = str(value).removeprefix("torch.")
    if name not in _DTYPES:
        raise refuse(key, value, f"one of {', '.join(_DTYPES)}")
    return name


def stock_config(cfg: LanguageConfig, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of a model, readable by `transformers` 4 and 5.

    Args:
        base: the config.json that the model came from. What it says is carried through, key by key, and only what
            `cfg` changes is written anew. Without it, the token ids are written as null: set those that exist.

    Raises:
        UsageError: `base` describes another family, or the family's layout cannot hold a field of `cfg`.
    """
    if cfg.family not in FAMILIES:
        raise UsageError(f"`family` is {cfg.family!r}, which has no stock layout: use {', '.join(NATIVE_FAMILIES)}")
    written = _written(cfg)
    if base is None:
        head = {"architectures": [FAMILIES[cfg.family].architecture], "model_type": cfg.family}
        result = {**head, "bos_token_id": None, "eos_token_id": None, **written}
    else:
        result = _carried_through(cfg, written, base)
    kept = language_config(result)
    for item in dataclasses.fields(cfg):
        wanted, got = getattr(cfg, item.name), getattr(kept, item.name)
        if wanted != got:
            raise UsageError(f"`{item.name}` is {wanted}, and the {cfg.family} layout can only hold {got}: change it")
    return result


def _carried_through(cfg: LanguageConfig, written: dict[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    before = language_config(base)
    if before.family != cfg.family:
        raise UsageError(f"the base config.json is of family {before.family} and the model of {cfg.family}: drop it")
    as_before = _written(before)
    changed = {key for key in {**as_before, **written} if as_before.get(key) != written.get(key)}
    # A key goes together with its other spellings, so that no two of them can contradict each other.
    changed |= {other for key in changed for other in _other_spellings(cfg.family, key)}
    result = {key: value for key, value in base.items() if key not in changed}
    return result | {key: value for key, value in written.items() if key in changed}


def _other_spellings(family: str, key: str) -> list[str]:
    """Keys that speak of the same thing as `key`."""
    others = [alias for alias, meant in FAMILIES[family].aliases.items() if meant == key]
    if key == "rope_parameters":
        others += OUTSIDE_KEYS
    if key == FAMILIES[family].keys["n_layers"]:
        others.append("layer_types")
    if key == "feed_forward_proj":
        others += ["dense_act_fn", "is_gated_act"]
    return others


def _written(cfg: LanguageConfig) -> dict[str, Any]:
    """Every key that says something about `cfg`, in the spelling of both generations where they differ."""
    family = FAMILIES[cfg.family]
    result = {key: getattr(cfg, ours) for ours, key in family.keys.items()}
    if not family.grouped and cfg.n_kv_heads == cfg.n_heads:
        # The stock classes of these families do not know the key: without groups the files stay entirely stock.
        del result["num_key_value_heads"]
    result |= {"dtype": cfg.dtype, "torch_dtype": cfg.dtype}
    if isinstance(cfg, EncoderDecoderConfig):
        return {**result, "feed_forward_proj": written_projection(cfg), "is_encoder_decoder": True}
    result[family.keys["activation"]] = _activation_name(cfg, family)
    if cfg.rope is not None:
        result |= write_rope(cfg.rope, head_dim=cfg.head_dim, partial=family.rope == "partial")
    if family.windows != "none":
        result |= _written_windows(cfg, family)
    return result


def _activation_name(cfg: DecoderConfig, family: Family) -> str:
    default = family.defaults["activation"]
    names = [default, "gelu_pytorch_tanh", "gelu", "silu", "relu"]
    return next(name for name in names if ACTIVATIONS[name] == cfg.activation)


def _written_windows(cfg: DecoderConfig, family: Family) -> dict[str, Any]:
    window = next((width for width in cfg.windows if width is not None), None)
    if family.windows == "all layers":
        return {"sliding_window": window}
    slides = [bool(cfg.windows) and cfg.windows[i] is not None for i in range(cfg.n_layers)]
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": slides.index(True) if True in slides else cfg.n_layers,
        "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
    }
