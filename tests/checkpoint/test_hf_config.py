"""config.json of both generations of transformers to our configurations and back."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from modicum.checkpoint.hf import NATIVE_FAMILIES, UnknownFamilyError, language_config, stock_config
from modicum.checkpoint.hf_families import ACTIVATIONS
from modicum.config import DecoderConfig, EncoderDecoderConfig, LanguageConfig, RopeConfig
from modicum.errors import CheckpointError, UsageError

SIZES = {
    "vocab_size": 101,
    "hidden_size": 42,
    "intermediate_size": 59,
    "num_hidden_layers": 3,
    "num_attention_heads": 7,
    "max_position_embeddings": 89,
}
NATIVE_SIZES = {
    "vocab_size": 101,
    "dim": 42,
    "ffn_dim": 59,
    "n_layers": 3,
    "n_heads": 7,
    "head_dim": 6,
    "max_seq_len": 89,
}

OLD: dict[str, dict[str, Any]] = {
    "llama": SIZES
    | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0",
    },
    "mistral": SIZES
    | {
        "model_type": "mistral",
        "head_dim": 10,
        "num_key_value_heads": 7,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 13,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    },
    "qwen2": SIZES
    | {
        "model_type": "qwen2",
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 13,
        "max_window_layers": 1,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
    "qwen3": SIZES
    | {
        "model_type": "qwen3",
        "head_dim": 10,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "attention_bias": False,
        "sliding_window": 13,
        "max_window_layers": 1,
        "use_sliding_window": True,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "gpt2": {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-05,
        "n_ctx": 89,
        "n_embd": 42,
        "n_head": 7,
        "n_layer": 3,
        "n_positions": 89,
        "vocab_size": 101,
        "reorder_and_upcast_attn": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "gpt_neox": SIZES
    | {
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-05,
        "rotary_emb_base": 10000,
        "rope_theta": 10000,
        "rotary_pct": 0.34,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "torch_dtype": "float16",
    },
    "t5": {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "d_model": 42,
        "d_kv": 10,
        "d_ff": 59,
        "num_layers": 5,
        "num_decoder_layers": 3,
        "num_heads": 7,
        "vocab_size": 101,
        "n_positions": 512,
        "relative_attention_num_buckets": 12,
        "layer_norm_epsilon": 1e-05,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "is_encoder_decoder": True,
        "decoder_start_token_id": 3,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    },
}


def renewed(config: dict[str, Any], **rope: Any) -> dict[str, Any]:
    """A 4.x config.json in the spelling of 5.x."""
    gone = ("rope_theta", "rope_scaling", "rotary_emb_base", "rotary_pct", "torch_dtype")
    result = {key: value for key, value in config.items() if key not in gone}
    if "torch_dtype" in config:
        result["dtype"] = config["torch_dtype"]
    return result | ({"rope_parameters": {"rope_type": "default", **rope}} if rope else {})


NEW = {
    "llama": renewed(OLD["llama"], rope_theta=500000.0),
    "mistral": renewed(OLD["mistral"], rope_theta=10000.0),
    "qwen2": renewed(OLD["qwen2"], rope_theta=1000000.0)
    | {"sliding_window": None, "layer_types": ["full_attention"] * 3},
    "qwen3": renewed(OLD["qwen3"], rope_theta=1000000.0)
    | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    "gpt2": renewed(OLD["gpt2"]),
    "gpt_neox": renewed(OLD["gpt_neox"], rope_theta=10000, partial_rotary_factor=0.34),
    # 5.x ties every T5 in its config.json; what 4.x meant by it is in the new key.
    "t5": renewed(OLD["t5"])
    | {"tie_word_embeddings": True, "scale_decoder_outputs": False, "dense_act_fn": "gelu_new", "is_gated_act": True},
}

EXPECTED: dict[str, LanguageConfig] = {
    "llama": DecoderConfig(
        **NATIVE_SIZES,
        family="llama",
        n_kv_heads=1,
        norm_eps=1e-5,
        rope=RopeConfig(theta=500000.0, rotary_dim=6),
        tie_embeddings=True,
        dtype="bfloat16",
    ),
    "mistral": DecoderConfig(
        **NATIVE_SIZES | {"head_dim": 10},
        family="mistral",
        n_kv_heads=7,
        norm_eps=1e-5,
        rope=RopeConfig(rotary_dim=10),
        windows=(13, 13, 13),
        dtype="float16",
    ),
    "qwen2": DecoderConfig(
        **NATIVE_SIZES,
        family="qwen2",
        n_kv_heads=1,
        rope=RopeConfig(theta=1e6, rotary_dim=6),
        qkv_bias=True,
        tie_embeddings=True,
        dtype="bfloat16",
    ),
    "qwen3": DecoderConfig(
        **NATIVE_SIZES | {"head_dim": 10},
        family="qwen3",
        n_kv_heads=1,
        rope=RopeConfig(theta=1e6, rotary_dim=10),
        qk_norm=True,
        windows=(None, 13, 13),
        dtype="bfloat16",
    ),
    "gpt2": DecoderConfig(
        **NATIVE_SIZES | {"ffn_dim": 168},
        family="gpt2",
        n_kv_heads=7,
        norm="layer",
        norm_eps=1e-5,
        activation="gelu_tanh",
        gated=False,
        qkv_bias=True,
        out_bias=True,
        ffn_bias=True,
        tie_embeddings=True,
    ),
    "gpt_neox": DecoderConfig(
        **NATIVE_SIZES,
        family="gpt_neox",
        n_kv_heads=7,
        norm="layer",
        norm_eps=1e-5,
        activation="gelu",
        gated=False,
        parallel=True,
        qkv_bias=True,
        out_bias=True,
        ffn_bias=True,
        rope=RopeConfig(rotary_dim=2),
        dtype="float16",
    ),
    "t5": EncoderDecoderConfig(
        family="t5",
        vocab_size=101,
        dim=42,
        n_encoder_layers=5,
        n_layers=3,
        n_heads=7,
        n_kv_heads=7,
        head_dim=10,
        ffn_dim=59,
        norm_eps=1e-5,
        activation="gelu_tanh",
        gated=True,
        relative_buckets=12,
        tie_embeddings=False,
        scale_head=False,
        decoder_start_id=3,
        dtype="bfloat16",
    ),
}


@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_both_generations_mean_the_same(family: str) -> None:
    assert language_config(OLD[family]) == EXPECTED[family]
    assert language_config(NEW[family]) == EXPECTED[family]


@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_an_empty_config_has_the_defaults_of_transformers(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    written = json.loads(transformers.CONFIG_MAPPING[family]().to_json_string(use_diff=False))
    assert language_config({"model_type": family}) == language_config(written)


SCALINGS = [
    ({"type": "linear", "factor": 3.0}, {"scaling": "linear", "factor": 3.0}),
    ({"type": "dynamic", "factor": 3.0}, {"scaling": "dynamic", "factor": 3.0, "original_max_seq_len": 89}),
    (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.5,
            "high_freq_factor": 5.0,
            "original_max_position_embeddings": 31,
        },
        {
            "scaling": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.5,
            "high_freq_factor": 5.0,
            "original_max_seq_len": 31,
        },
    ),
    (
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 31},
        {"scaling": "yarn", "factor": 4.0, "original_max_seq_len": 31},
    ),
    ({"type": "yarn", "factor": 4.0}, {"scaling": "yarn", "factor": 4.0, "original_max_seq_len": 89}),
    (
        {
            "rope_type": "yarn",
            "factor": None,
            "original_max_position_embeddings": 10,
            "beta_fast": 16,
            "beta_slow": 2,
            "attention_factor": 0.7,
            "mscale": 0.8,
            "mscale_all_dim": 0.9,
            "truncate": False,
        },
        {
            "scaling": "yarn",
            "factor": 8.9,
            "original_max_seq_len": 10,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 0.7,
            "mscale": 0.8,
            "mscale_all_dim": 0.9,
            "truncate": False,
        },
    ),
]


@pytest.mark.parametrize(("given", "expected"), SCALINGS)
def test_rope_scalings(given: dict[str, Any], expected: dict[str, Any]) -> None:
    rope = RopeConfig(theta=500000.0, rotary_dim=6, **expected)
    old = OLD["llama"] | {"rope_scaling": given}
    new = NEW["llama"] | {"rope_parameters": {"rope_theta": 500000.0, **given}}
    assert language_config(old).rope == rope
    assert language_config(new).rope == rope
    assert language_config(stock_config(language_config(old))).rope == rope


def test_original_context_beside_the_rope_parameters_overrules() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 31}
    config = OLD["llama"] | {"rope_scaling": scaling, "original_max_position_embeddings": 17}
    rope = language_config(config).rope
    assert rope is not None
    assert rope.original_max_seq_len == 17


@pytest.mark.parametrize(("share", "rotary_dim"), [(0.25, 3), (0.5, 6), (1.0, 12), (0.99, 11)])
def test_partial_rotary_survives_the_round_trip(share: float, rotary_dim: int) -> None:
    config = OLD["gpt_neox"] | {"num_attention_heads": 3, "hidden_size": 36, "rotary_pct": share}
    cfg = language_config(config)
    assert cfg.rope is not None
    assert cfg.rope.rotary_dim == rotary_dim
    assert language_config(stock_config(cfg)) == cfg


def test_rotary_share_defaults_to_a_quarter_in_gpt_neox() -> None:
    config = {key: value for key, value in OLD["gpt_neox"].items() if key != "rotary_pct"}
    rope = language_config(config | {"hidden_size": 56}).rope
    assert rope is not None
    assert rope.rotary_dim == 2


WINDOWS = [
    ("mistral", {"sliding_window": None}, ()),
    ("mistral", {"layer_types": ["sliding_attention"] * 3}, (13, 13, 13)),
    ("qwen2", {"use_sliding_window": True}, (None, 13, 13)),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 28}, ()),
    ("qwen2", {"use_sliding_window": True, "layer_types": ["sliding_attention", "attention", "sliding_attention"]},
     (13, None, 13)),
    ("llama", {"layer_types": ["full_attention"] * 3, "sliding_window": 13}, ()),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "windows"), WINDOWS)
def test_windows(family: str, changes: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert language_config(OLD[family] | changes).windows == windows


def test_mistral_without_the_key_has_a_window_of_4096() -> None:
    config = {key: value for key, value in OLD["mistral"].items() if key != "sliding_window"}
    assert language_config(config).windows == (4096,) * 3


def test_groups_are_honoured_where_stock_classes_do_not_know_them() -> None:
    for family in ("gpt2", "gpt_neox", "t5"):
        assert language_config(OLD[family] | {"num_key_value_heads": 1}).n_kv_heads == 1


def test_gpt2_in_the_common_spelling() -> None:
    config = {"model_type": "gpt2", **{k: v for k, v in SIZES.items() if k != "intermediate_size"}}
    assert language_config(config) == EXPECTED["gpt2"]


def t5(**changes: Any) -> Any:
    return language_config({"model_type": "t5", **changes})


def test_t5_scales_what_its_head_reads_where_the_head_is_tied() -> None:
    for changes in ({}, {"tie_word_embeddings": None}, {"tie_word_embeddings": True}):
        assert (t5(**changes).tie_embeddings, t5(**changes).scale_head) == (True, True)
    assert (t5(tie_word_embeddings=False).tie_embeddings, t5(tie_word_embeddings=False).scale_head) == (False, False)


def test_what_t5_means_by_leaving_a_key_out() -> None:
    assert t5(num_layers=4).n_layers == 4
    assert t5(pad_token_id=9).decoder_start_id == 9
    assert t5(pad_token_id=9, decoder_start_token_id=2).decoder_start_id == 2
    assert t5(hidden_size=24, num_attention_heads=3, num_hidden_layers=2, head_dim=5) == t5(
        d_model=24, num_heads=3, num_layers=2, d_kv=5
    )


@pytest.mark.parametrize(
    ("given", "activation", "gated"),
    [
        ("relu", "relu", False),
        ("gated-relu", "relu", True),
        ("gated-gelu", "gelu_tanh", True),  # and not what `gelu` alone means
        ("gelu", "gelu", False),
        ("gelu_new", "gelu_tanh", False),
        ("gated-silu", "silu", True),
        ("gated-gelu_python", "gelu", True),
    ],
)
def test_t5_activations(given: str, activation: str, gated: bool) -> None:
    transformers = pytest.importorskip("transformers")
    cfg = t5(feed_forward_proj=given)
    assert (cfg.activation, cfg.gated) == (activation, gated)
    written = stock_config(cfg)
    assert language_config(written) == cfg
    # transformers understands the same, and we what it makes of the key.
    theirs = transformers.T5Config(feed_forward_proj=written["feed_forward_proj"])
    assert ACTIVATIONS[theirs.dense_act_fn] == activation
    assert theirs.is_gated_act == gated
    assert language_config(json.loads(theirs.to_json_string(use_diff=False))).activation == activation


def test_another_activation_of_t5_replaces_what_transformers_wrote_beside_it() -> None:
    cfg = dataclasses.replace(language_config(NEW["t5"]), activation="silu")
    result = stock_config(cfg, NEW["t5"])
    assert result["feed_forward_proj"] == "gated-silu"
    assert "dense_act_fn" not in result


def test_null_key_value_heads_mean_one_per_query_head() -> None:
    assert language_config(OLD["mistral"] | {"num_key_value_heads": None}).n_kv_heads == 7


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("gelu_fast", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu", "gelu"),
        ("relu", "relu"),
        ("swish", "silu"),
    ],
)
def test_activations(given: str, expected: str) -> None:
    cfg = language_config(OLD["llama"] | {"hidden_act": given})
    assert cfg.activation == expected
    assert language_config(stock_config(cfg)) == cfg


REFUSED = [
    ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
    ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("llama", {"hidden_act": "xielu"}, "xielu"),
    ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "factor"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": -1.0}}, "factor"),
    ("llama", {"rope_scaling": {"type": "llama3", "factor": 2.0, "low_freq_factor": 1.0}}, "high_freq_factor"),
    ("llama", {"rope_scaling": {"mrope_section": [1, 1, 1]}}, "mrope_section"),
    ("qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}, "rope_scaling": None}, "full_attention"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"hidden_size": 43}, "43"),
    ("llama", {"head_dim": 5}, "heads of 5"),
    ("llama", {"hidden_size": "42"}, '"42"'),
    ("llama", {"hidden_size": True}, "whole number"),
    ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ("llama", {"num_key_value_heads": 2}, "do not divide"),
    ("llama", {"num_attention_heads": 0}, "at least 1"),
    ("llama", {"num_hidden_layers": 0}, "n_layers"),
    ("llama", {"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    ("llama", {"layer_types": ["full_attention"] * 2}, "3 layers"),
    ("llama", {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "sliding_window"),
    ("qwen2", {"layer_types": ["linear_attention"] * 3}, "linear_attention"),
    ("mistral", {"sliding_window": 0}, "sliding_window"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ("gpt_neox", {"rope_theta": 500.0}, "rope_theta"),
    ("gpt_neox", {"rotary_pct": 0.01}, "partial_rotary_factor"),
    ("gpt_neox", {"head_dim": 8}, "head_dim"),
    ("t5", {"feed_forward_proj": "gated-xielu"}, "gated-xielu"),
    ("t5", {"feed_forward_proj": "swapped-gelu"}, "swapped-gelu"),
    ("t5", {"dense_act_fn": "relu"}, "dense_act_fn"),
    ("t5", {"is_gated_act": False}, "is_gated_act"),
    ("t5", {"is_encoder_decoder": False}, "is_encoder_decoder"),
    ("t5", {"is_decoder": True}, "is_decoder"),
    ("t5", {"tie_encoder_decoder": True}, "tie_encoder_decoder"),
    ("t5", {"num_decoder_layers": 0}, "n_layers"),
    ("t5", {"relative_attention_num_buckets": 3}, "relative buckets"),
    ("t5", {"relative_attention_max_distance": 6}, "distance of 6"),
    ("t5", {"decoder_start_token_id": 101}, "decoder_start_id"),
    ("t5", {"num_key_value_heads": 3}, "3 key-value heads do not divide 7"),
]


@pytest.mark.parametrize(("family", "changes", "named"), REFUSED, ids=[named for _, _, named in REFUSED])
def test_refusals_are_one_sentence_with_key_and_value(family: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        language_config(OLD[family] | changes)
    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("config", [{"model_type": "opt"}, {}, {"model_type": 3}, {"model_type": "umt5"}])
def test_unknown_family(config: dict[str, Any]) -> None:
    with pytest.raises(UnknownFamilyError, match=r"llama, mistral, qwen2, qwen3, gpt2, gpt_neox.*modicum\[hf\]"):
        language_config(config)


@pytest.mark.parametrize("family", NATIVE_FAMILIES)
@pytest.mark.parametrize("generation", [OLD, NEW], ids=["4.x", "5.x"])
def test_an_unchanged_model_keeps_its_config(family: str, generation: dict[str, dict[str, Any]]) -> None:
    base = generation[family]
    assert stock_config(language_config(base), base) == base


@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_a_config_from_nothing_reads_back(family: str) -> None:
    cfg = dataclasses.replace(EXPECTED[family], n_kv_heads=1)
    assert language_config(stock_config(cfg)) == cfg


@pytest.mark.parametrize("family", NATIVE_FAMILIES)
@pytest.mark.parametrize("generation", [OLD, NEW], ids=["4.x", "5.x"])
def test_changes_are_written_and_the_rest_is_carried(family: str, generation: dict[str, dict[str, Any]]) -> None:
    base = generation[family] | {"my_note": [1, 2]}
    old = language_config(base)
    fewer = {"windows": old.windows[:2]} if isinstance(old, DecoderConfig) else {}
    cfg = dataclasses.replace(old, n_kv_heads=1, n_layers=2, vocab_size=103, dtype="float64", **fewer)
    result = stock_config(cfg, base)
    assert language_config(result) == cfg
    assert result["num_key_value_heads"] == 1
    assert result["dtype"] == result["torch_dtype"] == "float64"
    assert result["my_note"] == [1, 2]


def test_a_new_rotation_replaces_every_older_spelling() -> None:
    base = OLD["llama"] | {"rope_scaling": {"type": "linear", "factor": 3.0}}
    cfg = dataclasses.replace(language_config(base), rope=RopeConfig(theta=500000.0, rotary_dim=6))
    result = stock_config(cfg, base)
    assert "rope_scaling" not in result
    assert result["rope_theta"] == result["rope_parameters"]["rope_theta"] == 500000.0


def test_keys_that_would_overrule_the_new_value_go() -> None:
    scaling = {"type": "yarn", "factor": 4.0}
    base = OLD["llama"] | {"rope_scaling": scaling, "original_max_position_embeddings": 17}
    old = language_config(base)
    assert old.rope is not None
    cfg = dataclasses.replace(old, rope=dataclasses.replace(old.rope, original_max_seq_len=23))
    assert language_config(stock_config(cfg, base)) == cfg
    base = {"model_type": "gpt2", **{k: v for k, v in SIZES.items() if k != "intermediate_size"}}
    cfg = dataclasses.replace(language_config(base), n_layers=2)
    result = stock_config(cfg, base)
    assert language_config(result) == cfg
    assert "num_hidden_layers" not in result


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("llama", {"qk_norm": True}, "qk_norm"),
        ("llama", {"windows": (5, 5, 5)}, "windows"),
        ("llama", {"qkv_bias": True}, "bias"),
        ("mistral", {"windows": (5, None, 5)}, "windows"),
        ("qwen2", {"windows": (5, 7, 5)}, "windows"),
        ("gpt2", {"head_dim": 8}, "head_dim"),
        ("t5", {"tie_embeddings": True}, "tie_embeddings"),
        ("opt", {}, "opt"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(family: str, changes: dict[str, Any], named: str) -> None:
    cfg = dataclasses.replace(EXPECTED.get(family, EXPECTED["llama"]), **{"family": family} | changes)
    with pytest.raises(UsageError, match=named):
        stock_config(cfg)


def test_a_base_of_another_family_is_refused() -> None:
    with pytest.raises(UsageError, match=r"family qwen2.*llama"):
        stock_config(EXPECTED["llama"], OLD["qwen2"])


@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_transformers_reads_what_is_written(family: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    cfg = EXPECTED[family]
    (tmp_path / "config.json").write_text(json.dumps(stock_config(cfg)))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "again")
    assert language_config(json.loads((tmp_path / "again" / "config.json").read_text())) == cfg
    warned = capfd.readouterr().err
    assert "rope" not in warned
    assert "deprecated" not in warned


@pytest.mark.parametrize(("given", "expected"), SCALINGS)
def test_transformers_reads_the_scalings(given: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    rope = RopeConfig(theta=500000.0, rotary_dim=6, **expected)
    (tmp_path / "config.json").write_text(json.dumps(stock_config(dataclasses.replace(EXPECTED["llama"], rope=rope))))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "again")
    assert language_config(json.loads((tmp_path / "again" / "config.json").read_text())).rope == rope
