"""Key tables: stock tensors to ours and back, fused layouts by hand, refusals."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modicum.checkpoint.hf import NATIVE_FAMILIES, language_config, to_native, to_stock
from modicum.checkpoint.hf_tensors import native_shapes
from modicum.checkpoint.io import read_checkpoint
from modicum.config import LanguageConfig, RopeConfig
from modicum.errors import CheckpointError

SIZES = {
    "vocab_size": 101,
    "hidden_size": 42,
    "intermediate_size": 59,
    "num_hidden_layers": 2,
    "num_attention_heads": 7,
    "max_position_embeddings": 89,
    "bos_token_id": None,
    "eos_token_id": None,
}
TINY: dict[str, dict[str, Any]] = {
    "llama": SIZES | {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    "mistral": SIZES | {"num_key_value_heads": 7, "head_dim": 10, "tie_word_embeddings": True},
    "qwen2": SIZES | {"num_key_value_heads": 1},
    "qwen3": SIZES | {"num_key_value_heads": 7, "head_dim": 10, "attention_bias": True},
    "gpt2": {k: v for k, v in SIZES.items() if k != "intermediate_size"} | {"n_inner": 59},
    "gpt_neox": SIZES | {"rotary_pct": 0.34, "attention_bias": True},
    "t5": {
        "vocab_size": 101,
        "d_model": 42,
        "d_kv": 10,
        "d_ff": 59,
        "num_layers": 3,
        "num_decoder_layers": 2,
        "num_heads": 7,
    },
}


def small(family: str, **changes: Any) -> Any:
    return replace(language_config({"model_type": family, **SIZES, "num_key_value_heads": 7, "head_dim": 6}), **changes)


def random_native(cfg: LanguageConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return {name: torch.randn(shape, generator=generator) for name, shape in native_shapes(cfg).items()}


class Counting(Mapping[str, Tensor]):
    """A mapping that records which tensors were asked for."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.read = tensors, list[str]()

    def __getitem__(self, name: str) -> Tensor:
        self.read.append(name)
        return self.tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_files_written_by_transformers(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    auto = transformers.AutoModelForSeq2SeqLM if family == "t5" else transformers.AutoModelForCausalLM
    model = auto.from_config(transformers.CONFIG_MAPPING[family](**TINY[family]))
    model.save_pretrained(tmp_path)
    ckpt = read_checkpoint(tmp_path)
    cfg = language_config(ckpt.config)
    native = dict(to_native(ckpt.state_dict, cfg))
    assert {name: tuple(tensor.shape) for name, tensor in native.items()} == native_shapes(cfg)
    assert all(tensor.is_contiguous() for tensor in native.values())
    assert same(to_stock(native, cfg), ckpt.state_dict)
    theirs = model.config
    assert (cfg.vocab_size, cfg.dim, cfg.n_layers, cfg.n_heads) == (101, 42, 2, 7)
    assert cfg.n_kv_heads == getattr(theirs, "num_key_value_heads", 7)
    assert cfg.head_dim == getattr(theirs, "head_dim", 6)
    assert cfg.ffn_dim == 59
    assert cfg.max_seq_len == (1 << 31 if family == "t5" else 89)
    assert cfg.tie_embeddings == theirs.tie_word_embeddings


@pytest.mark.parametrize("family", NATIVE_FAMILIES)
@pytest.mark.parametrize("n_kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_for_every_number_of_groups(family: str, n_kv_heads: int, tied: bool) -> None:
    cfg = small(family, n_heads=6, n_kv_heads=n_kv_heads, head_dim=7, tie_embeddings=tied)
    native = random_native(cfg)
    stock = to_stock(native, cfg)
    assert same(dict(to_native(stock, cfg)), native)
    assert len(stock) == len(list(stock))


def neox(n_heads: int, n_kv_heads: int) -> LanguageConfig:
    return small(
        "gpt_neox", vocab_size=5, dim=3, ffn_dim=2, n_layers=1, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=2,
        rope=RopeConfig(rotary_dim=2),
    )  # fmt: skip


def with_fused(cfg: LanguageConfig, name: str, fused: Tensor) -> dict[str, Tensor]:
    stock = dict(to_stock(random_native(cfg), cfg))
    assert stock[name].shape == fused.shape
    return dict(to_native(stock | {name: fused}, cfg))


def rows(*numbers: int) -> Tensor:
    """Rows 0 0 0, 1 1 1, ...: a row says where it came from."""
    return torch.tensor(numbers).float()[:, None].expand(-1, 3)


def test_gpt_neox_rows_by_hand() -> None:
    # Two heads of two rows each: [q0 k0 v0 q1 k1 v1].
    native = with_fused(neox(2, 2), "gpt_neox.layers.0.attention.query_key_value.weight", rows(*range(12)))
    assert torch.equal(native["blocks.0.attention.project.q.weight"], rows(0, 1, 6, 7))
    assert torch.equal(native["blocks.0.attention.project.k.weight"], rows(2, 3, 8, 9))
    assert torch.equal(native["blocks.0.attention.project.v.weight"], rows(4, 5, 10, 11))


def test_gpt_neox_groups_by_hand() -> None:
    # Four query heads in two groups: [q0 q1 k0 v0 q2 q3 k1 v1], as rows of a weight and entries of a bias.
    native = with_fused(neox(4, 2), "gpt_neox.layers.0.attention.query_key_value.weight", rows(*range(16)))
    assert torch.equal(native["blocks.0.attention.project.q.weight"], rows(0, 1, 2, 3, 8, 9, 10, 11))
    assert torch.equal(native["blocks.0.attention.project.k.weight"], rows(4, 5, 12, 13))
    assert torch.equal(native["blocks.0.attention.project.v.weight"], rows(6, 7, 14, 15))
    native = with_fused(neox(4, 2), "gpt_neox.layers.0.attention.query_key_value.bias", torch.arange(16.0))
    assert native["blocks.0.attention.project.k.bias"].tolist() == [4, 5, 12, 13]


def test_gpt2_columns_by_hand() -> None:
    # Width 3, four query heads and one key-value head of two columns: [8 of Q | 2 of K | 2 of V], from the right.
    cfg = small("gpt2", vocab_size=5, dim=3, ffn_dim=2, n_layers=1, n_heads=4, n_kv_heads=1, head_dim=2)
    native = with_fused(cfg, "transformer.h.0.attn.c_attn.weight", rows(*range(12)).T)
    assert torch.equal(native["blocks.0.attention.project.q.weight"], rows(*range(8)))
    assert torch.equal(native["blocks.0.attention.project.k.weight"], rows(8, 9))
    assert torch.equal(native["blocks.0.attention.project.v.weight"], rows(10, 11))
    native = with_fused(cfg, "transformer.h.0.attn.c_attn.bias", torch.arange(12.0))
    assert native["blocks.0.attention.project.v.bias"].tolist() == [10, 11]


def test_conv1d_multiplies_from_the_right() -> None:
    cfg = small("gpt2")
    stock = dict(to_stock(random_native(cfg), cfg))
    native = dict(to_native(stock, cfg))
    x_BD = torch.randn(5, 42)
    theirs = x_BD @ stock["transformer.h.1.mlp.c_fc.weight"] + stock["transformer.h.1.mlp.c_fc.bias"]
    up = "blocks.1.ffn.project.up"
    ours = torch.nn.functional.linear(x_BD, native[f"{up}.weight"], native[f"{up}.bias"])
    torch.testing.assert_close(ours, theirs)


def test_gpt2_as_on_the_hub() -> None:
    cfg = small("gpt2")
    native = random_native(cfg)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in to_stock(native, cfg).items()}
    bare |= {f"h.{i}.attn.bias": torch.ones(1, 1, 89, 89).tril() for i in range(2)}
    bare |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    assert same(dict(to_native(bare, cfg)), native)


@pytest.mark.parametrize(
    ("family", "buffers"),
    [
        ("llama", ["model.layers.1.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]),
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]),
        (
            "gpt_neox",
            [
                "gpt_neox.layers.0.attention.bias",
                "gpt_neox.layers.0.attention.masked_bias",
                "gpt_neox.layers.0.attention.rotary_emb.inv_freq",
            ],
        ),
        ("t5", ["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"]),
    ],
)
def test_known_buffers_are_passed_over(family: str, buffers: list[str]) -> None:
    cfg = small(family)
    native = random_native(cfg)
    stock = Counting({**to_stock(native, cfg), **{name: torch.zeros(3) for name in buffers}})
    assert same(dict(to_native(stock, cfg)), native)
    assert not set(buffers) & set(stock.read)


def test_missing_surplus_and_misshapen_tensors_are_refused() -> None:
    cfg = small("llama", tie_embeddings=False)
    stock = dict(to_stock(random_native(cfg), cfg))
    without = {name: tensor for name, tensor in stock.items() if name != "lm_head.weight"}
    with pytest.raises(CheckpointError, match=r"lacks `lm_head.weight`"):
        to_native(without, cfg)
    with pytest.raises(CheckpointError, match=r"lacks `model.embed_tokens.weight` and \d+ more"):
        to_native({}, cfg)
    biases = {f"model.layers.0.self_attn.{name}_proj.bias": torch.zeros(42) for name in "qk"}
    with pytest.raises(CheckpointError, match=r"surplus `model.layers.0.self_attn.q_proj.bias` and 1 more"):
        to_native(stock | biases, cfg)
    with pytest.raises(CheckpointError, match=r"`model.norm.weight` has shape \[41\] .* requires \[42\]"):
        list(to_native(stock | {"model.norm.weight": torch.ones(41)}, cfg))


def test_a_buffer_of_another_family_is_surplus() -> None:
    cfg = small("llama")
    stock = dict(to_stock(random_native(cfg), cfg))
    with pytest.raises(CheckpointError, match="surplus"):
        to_native(stock | {"model.layers.0.self_attn.masked_bias": torch.zeros(1)}, cfg)


def test_tied_heads() -> None:
    cfg = small("llama", tie_embeddings=True)
    native = random_native(cfg)
    stock = dict(to_stock(native, cfg))
    assert "lm_head.weight" not in stock
    assert same(dict(to_native(stock | {"lm_head.weight": native["embed.weight"].clone()}, cfg)), native)
    with pytest.raises(CheckpointError, match=r"ties.*`lm_head.weight` differs.*tie_word_embeddings"):
        to_native(stock | {"lm_head.weight": native["embed.weight"] + 1}, cfg)


GATED = {"activation": "gelu_tanh", "gated": True, "tie_embeddings": False, "scale_head": False}


@pytest.mark.parametrize("changes", [{}, GATED])
def test_t5_under_stock_names(changes: dict[str, Any]) -> None:
    cfg = small("t5", n_encoder_layers=2, n_layers=1, n_kv_heads=1, head_dim=5, **changes)
    stock = to_stock(random_native(cfg), cfg)
    assert "encoder.block.1.layer.1.DenseReluDense.wo.weight" in stock
    assert ("decoder.block.0.layer.2.DenseReluDense.wi_0.weight" in stock) == cfg.gated
    assert ("encoder.block.0.layer.1.DenseReluDense.wi.weight" in stock) != cfg.gated
    assert [name for name in stock if "relative" in name] == [
        f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for stack in ("encoder", "decoder")
    ]
    # The encoder keeps all of its heads.
    assert stock["encoder.block.0.layer.0.SelfAttention.k.weight"].shape == (35, 42)
    assert stock["decoder.block.0.layer.0.SelfAttention.k.weight"].shape == (5, 42)
    assert stock["decoder.block.0.layer.1.EncDecAttention.v.weight"].shape == (5, 42)


def test_repeated_embeddings_of_t5() -> None:
    cfg = small("t5")
    native = random_native(cfg)
    stock = dict(to_stock(native, cfg))
    table = stock["shared.weight"]
    copies = {f"{name}.weight": table.clone() for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")}
    assert same(dict(to_native(stock | copies, cfg)), native)
    # Whichever of them is stored is the embedding.
    without = {name: tensor for name, tensor in stock.items() if name != "shared.weight"}
    for name in copies:
        assert same(dict(to_native(without | {name: table}, cfg)), native)
    with pytest.raises(
        CheckpointError, match="`encoder.embed_tokens.weight` differs from `shared.weight`, which it has"
    ):
        to_native(stock | {"encoder.embed_tokens.weight": table + 1}, cfg)
    with pytest.raises(CheckpointError, match="ties the output head .* `lm_head.weight` differs from `shared.weight`"):
        to_native(stock | {"lm_head.weight": table + 1}, cfg)
    with pytest.raises(CheckpointError, match="lacks `shared.weight`"):
        to_native(without, cfg)


def test_an_untied_head_that_t5_does_not_store_is_the_embeddings() -> None:
    cfg = small("t5", **GATED)
    native = random_native(cfg)
    stock = {name: tensor for name, tensor in to_stock(native, cfg).items() if name != "lm_head.weight"}
    assert same(dict(to_native(stock, cfg)), native | {"head.weight": native["embed.weight"]})


def test_both_directions_read_one_tensor_at_a_time() -> None:
    cfg = small("gpt_neox")
    source = Counting(random_native(cfg))
    stock = to_stock(source, cfg)
    assert source.read == []
    assert torch.is_tensor(stock["gpt_neox.layers.1.attention.query_key_value.bias"])
    assert source.read == [f"blocks.1.attention.project.{name}.bias" for name in "qkv"]
    counted = Counting(dict(stock))
    pairs = to_native(counted, cfg)
    assert counted.read == []
    next(pairs)
    assert len(counted.read) == 1


def test_to_stock_refuses_tensors_that_are_not_the_models() -> None:
    cfg = small("qwen2")
    native = random_native(cfg)
    with pytest.raises(CheckpointError, match="surplus `extra`"):
        to_stock(native | {"extra": torch.zeros(1)}, cfg)
    with pytest.raises(CheckpointError, match=r"lacks `norm.weight`"):
        to_stock({name: tensor for name, tensor in native.items() if name != "norm.weight"}, cfg)
    with pytest.raises(CheckpointError, match=r"`norm.weight` has shape \[1\]"):
        to_stock(native | {"norm.weight": torch.zeros(1)}, cfg)["model.norm.weight"]
