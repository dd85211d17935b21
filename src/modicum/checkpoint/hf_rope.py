"""Rotary settings between config.json, in both of its generations, and `RopeConfig`.

The older generation has `rope_theta` beside an optional `rope_scaling`; the newer one has everything in
`rope_parameters`. GPT-NeoX once called the base `rotary_emb_base` and the rotated share of a head `rotary_pct`.
"""

import math
from collections.abc import Mapping
from typing import Any

from modicum.checkpoint.hf_fields import flag, number, refuse
from modicum.config import RopeConfig
from modicum.errors import CheckpointError

SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn")
# Keys outside `rope_parameters` that speak of rotation; writing a new `rope_parameters` makes them void.
OUTSIDE_KEYS = (
    "rope_scaling",
    "rope_theta",
    "rotary_emb_base",
    "rotary_pct",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)


def read_rope(config: Mapping[str, Any], *, head_dim: int, max_seq_len: int, partial: bool) -> RopeConfig:
    """The rotation that `transformers` 5 applies for this config.json.

    Args:
        partial: whether the family rotates a share of each head (GPT-NeoX, a quarter unless told) or all of it.

    Raises:
        CheckpointError: a scaling, or a key of one, that has no counterpart here, or a required key that is missing.
    """
    rope: dict[str, Any] = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    for key, value in rope.items():
        if isinstance(value, dict) or key == "mrope_section":
            raise refuse(key, value, "one set of rotary parameters for all layers")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in SCALINGS:
        raise refuse("rope_type", kind, f"one of {', '.join(SCALINGS)}")
    theta_key = "rotary_emb_base" if partial else "rope_theta"
    theta = number(rope, "rope_theta", number(config, theta_key, 10000.0))
    if partial and "rope_parameters" not in config and number(config, "rope_theta", theta) != theta:
        # The families' readers disagree on which of the two counts, so that no choice would be safe.
        raise refuse("rope_theta", config["rope_theta"], f"the same value as `rotary_emb_base`, {theta:g}")
    return RopeConfig(
        theta=theta,
        rotary_dim=_rotary_dim(config, rope, head_dim, partial),
        scaling=kind,
        **_scaling(config, rope, kind, max_seq_len),
    )


def _rotary_dim(config: Mapping[str, Any], rope: Mapping[str, Any], head_dim: int, partial: bool) -> int:
    outside = number(config, "rotary_pct", 0.25) if partial else number(config, "partial_rotary_factor", 1.0)
    share = number(rope, "partial_rotary_factor", outside)
    if not partial and share != 1:
        # Stock code ignores the share in some scalings and fails in others.
        raise refuse("partial_rotary_factor", share, "1 (only gpt_neox rotates a part of each head)")
    rotary_dim = int(head_dim * share)
    if not 0 < rotary_dim <= head_dim:
        raise refuse("partial_rotary_factor", share, f"a share of {head_dim} dimensions, at least one of them")
    if rotary_dim == head_dim and head_dim % 2:
        raise CheckpointError(f"config.json gives heads of {head_dim} dimensions, where rotation needs an even number")
    return rotary_dim


def _scaling(config: Mapping[str, Any], rope: Mapping[str, Any], kind: str, max_seq_len: int) -> dict[str, Any]:
    """The fields of `RopeConfig` that `kind` uses; the others stay at their defaults so that equal means equal."""
    if kind == "default":
        return {}
    original = int(number(rope, "original_max_position_embeddings", max_seq_len))
    # Beside the rotary parameters it overrules the one among them.
    original = int(number(config, "original_max_position_embeddings", original))
    if kind == "yarn" and "factor" in rope and rope["factor"] is None:
        factor = max_seq_len / original
    else:
        factor = _required(rope, "factor", kind)
    if factor <= 0:
        raise refuse("factor", factor, "a positive number")
    if kind == "linear":
        return {"factor": factor}
    if kind == "dynamic":
        return {"factor": factor, "original_max_seq_len": max_seq_len}
    if kind == "llama3":
        return {
            "factor": factor,
            "original_max_seq_len": original,
            "low_freq_factor": _required(rope, "low_freq_factor", kind),
            "high_freq_factor": _required(rope, "high_freq_factor", kind),
        }
    return {
        "factor": factor,
        "original_max_seq_len": original,
        # Zero means unset, as in stock code.
        "beta_fast": number(rope, "beta_fast", 32.0) or 32.0,
        "beta_slow": number(rope, "beta_slow", 1.0) or 1.0,
        "truncate": flag(rope, "truncate", True),
        **{
            key: number(rope, key, 0.0) if rope.get(key) is not None else None
            for key in ("attention_factor", "mscale", "mscale_all_dim")
        },
    }


def _required(rope: Mapping[str, Any], key: str, kind: str) -> float:
    if rope.get(key) is None:
        raise CheckpointError(f"config.json asks for {kind} rotary scaling but does not give its `{key}`: add it")
    return number(rope, key, 0.0)


def write_rope(rope: RopeConfig, *, head_dim: int, partial: bool) -> dict[str, Any]:
    """The keys of config.json for `rope`, in both generations at once."""
    scaling: dict[str, Any] = {"rope_type": rope.scaling}
    if rope.scaling != "default":
        scaling["factor"] = rope.factor
    if rope.scaling in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_max_seq_len
    if rope.scaling == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        optional = {key: getattr(rope, key) for key in ("attention_factor", "mscale", "mscale_all_dim")}
        scaling |= {key: value for key, value in optional.items() if value is not None}
    share = _share(rope.rotary_dim, head_dim)
    parameters = {**scaling, "rope_theta": rope.theta, **({"partial_rotary_factor": share} if partial else {})}
    older = {"rotary_emb_base": rope.theta, "rotary_pct": share} if partial else {"rope_theta": rope.theta}
    return {
        "rope_parameters": parameters,
        **older,
        **({"rope_scaling": scaling} if rope.scaling != "default" else {}),
    }


def _share(rotary_dim: int, head_dim: int) -> float:
    """A share that gives `rotary_dim` back once multiplied and cut to a whole number."""
    share = rotary_dim / head_dim
    return share if int(head_dim * share) == rotary_dim else math.nextafter(share, 1.0)
