"""What the config.json of each family calls the fields of our configurations, and what it means by leaving one out.

Absent keys have the meaning that the family's class in `transformers` 5 gives them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from modicum.config import DecoderConfig, EncoderDecoderConfig

FFN_BIASED = {"qkv_bias": True, "out_bias": True, "ffn_bias": True}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family: `keys` maps a field of `config` to its key; a field without a key is in `constants`.

    `grouped`: whether the stock class knows key-value heads. `switches`: beyond `SWITCHED_OFF`, or instead of it.
    """

    architecture: str
    config: type[DecoderConfig] | type[EncoderDecoderConfig] = DecoderConfig
    keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    constants: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)  # other spelling -> key
    rope: Literal["whole", "partial"] | None = "whole"
    windows: Literal["none", "all layers", "by layer"] = "none"
    grouped: bool = True
    switches: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


# `head_dim` and `n_kv_heads` default to None where they follow from other fields.
_KEYS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "activation": "hidden_act",
    "tie_embeddings": "tie_word_embeddings",
}
_DEFAULTS = {
    "vocab_size": 32000,
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": None,
    "head_dim": None,
    "ffn_dim": 11008,
    "max_seq_len": 2048,
    "norm_eps": 1e-6,
    "activation": "silu",
    "tie_embeddings": False,
}
_QWEN = _DEFAULTS | {"vocab_size": 151936, "ffn_dim": 22016, "n_kv_heads": 32, "max_seq_len": 32768}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        keys=_KEYS | {"qkv_bias": "attention_bias", "out_bias": "attention_bias", "ffn_bias": "mlp_bias"},
        defaults=_DEFAULTS | {"qkv_bias": False, "out_bias": False, "ffn_bias": False},
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        keys=_KEYS,
        defaults=_DEFAULTS | {"n_kv_heads": 8, "ffn_dim": 14336, "max_seq_len": 131072},
        windows="all layers",
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        keys=_KEYS,
        defaults=_QWEN,
        constants={"qkv_bias": True},
        windows="by layer",
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        keys=_KEYS | {"qkv_bias": "attention_bias", "out_bias": "attention_bias"},
        defaults=_QWEN | {"head_dim": 128, "qkv_bias": False, "out_bias": False},
        constants={"qk_norm": True},
        windows="by layer",
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        keys={
            "vocab_size": "vocab_size",
            "dim": "n_embd",
            "n_layers": "n_layer",
            "n_heads": "n_head",
            "n_kv_heads": "num_key_value_heads",
            "ffn_dim": "n_inner",
            "max_seq_len": "n_positions",
            "norm_eps": "layer_norm_epsilon",
            "activation": "activation_function",
            "tie_embeddings": "tie_word_embeddings",
        },
        defaults={
            "vocab_size": 50257,
            "dim": 768,
            "n_layers": 12,
            "n_heads": 12,
            "n_kv_heads": None,
            "ffn_dim": None,
            "max_seq_len": 1024,
            "norm_eps": 1e-5,
            "activation": "gelu_new",
            "tie_embeddings": True,
        },
        constants=FFN_BIASED | {"norm": "layer", "gated": False},
        aliases={
            "hidden_size": "n_embd",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
        rope=None,
        grouped=False,
    ),
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
        keys={field: key for field, key in _KEYS.items() if field != "head_dim"}
        | {
            "norm_eps": "layer_norm_eps",
            "parallel": "use_parallel_residual",
            "qkv_bias": "attention_bias",
            "out_bias": "attention_bias",
        },
        defaults={
            "vocab_size": 50432,
            "dim": 6144,
            "n_layers": 44,
            "n_heads": 64,
            "n_kv_heads": None,
            "ffn_dim": 24576,
            "max_seq_len": 2048,
            "norm_eps": 1e-5,
            "activation": "gelu",
            "tie_embeddings": False,
            "parallel": True,
            "qkv_bias": True,
            "out_bias": True,
        },
        constants={"norm": "layer", "gated": False, "ffn_bias": True},
        rope="partial",
        grouped=False,
    ),
    # Activation and gate are one key, and three fields depend on others: see `hf_t5`.
    "t5": Family(
        architecture="T5ForConditionalGeneration",
        config=EncoderDecoderConfig,
        keys={
            "vocab_size": "vocab_size",
            "dim": "d_model",
            "n_encoder_layers": "num_layers",
            "n_layers": "num_decoder_layers",
            "n_heads": "num_heads",
            "n_kv_heads": "num_key_value_heads",
            "head_dim": "d_kv",
            "ffn_dim": "d_ff",
            "norm_eps": "layer_norm_epsilon",
            "relative_buckets": "relative_attention_num_buckets",
            "relative_max_distance": "relative_attention_max_distance",
            "tie_embeddings": "tie_word_embeddings",
            "scale_head": "scale_decoder_outputs",
            "decoder_start_id": "decoder_start_token_id",
        },
        defaults={
            "vocab_size": 32128,
            "dim": 512,
            "n_encoder_layers": 6,
            "n_layers": None,
            "n_heads": 8,
            "n_kv_heads": None,
            "head_dim": 64,
            "ffn_dim": 2048,
            "norm_eps": 1e-6,
            "relative_buckets": 32,
            "relative_max_distance": 128,
            "tie_embeddings": True,
            "scale_head": None,
            "decoder_start_id": None,
        },
        aliases={
            "hidden_size": "d_model",
            "head_dim": "d_kv",
            "num_attention_heads": "num_heads",
            "num_hidden_layers": "num_layers",
        },
        rope=None,
        grouped=False,
        switches={
            "is_encoder_decoder": (None, True),
            "is_decoder": (None, False),
            "tie_encoder_decoder": (None, False),
        },
    ),
}

# config.json's name -> ours. All of the tanh forms are the same function up to rounding.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}

# Keys that change what the model computes and that no native family implements: the values that switch them off.
SWITCHED_OFF: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "compression_config": (None,),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "clip_qkv": (None,),
    "logit_scale": (None, 1, 1.0),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": (None, False),
}
