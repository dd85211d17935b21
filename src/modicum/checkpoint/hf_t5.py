"""What is peculiar to T5's config.json: fields that follow from others, and one key for activation and gate."""

from collections.abc import Mapping
from typing import Any

from modicum.checkpoint.hf_families import ACTIVATIONS
from modicum.checkpoint.hf_fields import integer, refuse
from modicum.config import EncoderDecoderConfig

# With a gate, the name `gelu` means its tanh form.
_PROJECTIONS = {"gated-gelu": ("gelu_tanh", True)}


def read_t5(config: Mapping[str, Any], values: dict[str, Any]) -> None:
    """Fill in what is missing in `values`, the fields read so far."""
    if values["n_layers"] is None:
        values["n_layers"] = values["n_encoder_layers"]
    tied = values["tie_embeddings"]
    if values["scale_head"] is None:
        values["scale_head"] = tied
    # transformers 5 writes `tie_word_embeddings` = true for every T5; that a head is not scaled tells the others.
    values["tie_embeddings"] = tied and values["scale_head"]
    if values["decoder_start_id"] is None:
        values["decoder_start_id"] = integer(config, "pad_token_id", 0)
    values["activation"], values["gated"] = _projection(config)


def _projection(config: Mapping[str, Any]) -> tuple[str, bool]:
    """Activation, and whether it is gated."""
    given = config.get("feed_forward_proj") or "relu"
    gate, _, name = str(given).rpartition("-")
    if gate not in ("", "gated") or name not in ACTIVATIONS:
        raise refuse("feed_forward_proj", given, f"one of {', '.join(ACTIVATIONS)}, or one with `gated-` before it")
    activation, gated = _PROJECTIONS.get(given, (ACTIVATIONS[name], bool(gate)))
    # transformers writes what it made of the key beside it.
    for key, made in (("dense_act_fn", activation), ("is_gated_act", gated)):
        value = config.get(key)
        if value is not None and ACTIVATIONS.get(value, value) != made:
            raise refuse(key, value, f"what `feed_forward_proj` = {given} means")
    return activation, gated


def written_projection(cfg: EncoderDecoderConfig) -> str:
    """`feed_forward_proj` of a model."""
    special = {meant: name for name, meant in _PROJECTIONS.items()}
    if (cfg.activation, cfg.gated) in special:
        return special[cfg.activation, cfg.gated]
    plain = {"gelu": "gelu_python", "gelu_tanh": "gelu_new"}
    name = plain.get(cfg.activation, cfg.activation)
    return f"gated-{name}" if cfg.gated else name
