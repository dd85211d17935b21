"""How each family names and lays out its tensors: stock modules and ours, side by side."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from modicum.config import LanguageConfig


class Layout(NamedTuple):
    """How one stock tensor holds one or several of ours, which are `[out, in]` weights or `[out]` biases.

    `split(stock, rows, cfg)` gives ours, of so many rows each; `join(ours, cfg)` is its inverse.
    """

    split: Callable[[Tensor, list[int], LanguageConfig], list[Tensor]]
    join: Callable[[list[Tensor], LanguageConfig], Tensor]
    transposed: bool = False


def _turned(tensor: Tensor) -> Tensor:
    return tensor.T if tensor.ndim == 2 else tensor


def _split_groups(fused: Tensor, rows: list[int], cfg: LanguageConfig) -> list[Tensor]:
    per_group = cfg.n_heads // cfg.n_kv_heads
    rest = fused.shape[1:]
    groups = fused.reshape(cfg.n_kv_heads, per_group + 2, cfg.head_dim, *rest)
    parts = groups[:, :per_group], groups[:, per_group], groups[:, per_group + 1]
    return [part.reshape(count, *rest) for part, count in zip(parts, rows, strict=True)]


def _join_groups(parts: list[Tensor], cfg: LanguageConfig) -> Tensor:
    rest = parts[0].shape[1:]
    groups = [part.reshape(cfg.n_kv_heads, -1, cfg.head_dim, *rest) for part in parts]
    return torch.cat(groups, dim=1).reshape(-1, *rest)


PLAIN = Layout(split=lambda tensor, rows, cfg: [tensor], join=lambda parts, cfg: parts[0])
# GPT-2 multiplies from the right (Conv1D): weights [in, out], and [Q | K | V] side by side along `out`.
COLUMNS = Layout(
    split=lambda tensor, rows, cfg: list(_turned(tensor).split(rows)),
    join=lambda parts, cfg: _turned(torch.cat(parts)),
    transposed=True,
)
# GPT-NeoX: for each key-value head the rows of its queries, its key and its value; multi-head is one query each.
GROUPED_ROWS = Layout(split=_split_groups, join=_join_groups)


@dataclass(frozen=True)
class Table:
    """`rows`: stock module, our modules, layout. `buffers`: tensors of older files that hold nothing learned.

    `copies` are modules that repeat the embeddings. With `head_optional`, an untied head that is not stored repeats them
    too.
    """

    prefix: str
    head: str
    rows: tuple[tuple[str, tuple[str, ...], Layout], ...]
    buffers: str
    copies: tuple[str, ...] = ()
    head_optional: bool = False


def _one_to_one(names: dict[str, str], layout: Layout = PLAIN) -> tuple[tuple[str, tuple[str, ...], Layout], ...]:
    return tuple((stock, (native,), layout) for stock, native in names.items())


QKV = tuple(f"blocks.{{i}}.attention.project.{name}" for name in "qkv")

LLAMA = Table(
    prefix="model.",
    head="lm_head",
    rows=_one_to_one(
        {
            "model.embed_tokens": "embed",
            "model.layers.{i}.input_layernorm": "blocks.{i}.attention_norm",
            "model.layers.{i}.self_attn.q_proj": "blocks.{i}.attention.project.q",
            "model.layers.{i}.self_attn.k_proj": "blocks.{i}.attention.project.k",
            "model.layers.{i}.self_attn.v_proj": "blocks.{i}.attention.project.v",
            "model.layers.{i}.self_attn.q_norm": "blocks.{i}.attention.q_norm",
            "model.layers.{i}.self_attn.k_norm": "blocks.{i}.attention.k_norm",
            "model.layers.{i}.self_attn.o_proj": "blocks.{i}.attention.out",
            "model.layers.{i}.post_attention_layernorm": "blocks.{i}.ffn_norm",
            "model.layers.{i}.mlp.gate_proj": "blocks.{i}.ffn.project.gate",
            "model.layers.{i}.mlp.up_proj": "blocks.{i}.ffn.project.up",
            "model.layers.{i}.mlp.down_proj": "blocks.{i}.ffn.down",
            "model.norm": "norm",
            "lm_head": "head",
        }
    ),
    buffers=r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
)

GPT2 = Table(
    prefix="transformer.",
    head="lm_head",
    rows=(
        *_one_to_one(
            {
                "transformer.wte": "embed",
                "transformer.wpe": "positions",
                "transformer.h.{i}.ln_1": "blocks.{i}.attention_norm",
                "transformer.h.{i}.ln_2": "blocks.{i}.ffn_norm",
                "transformer.ln_f": "norm",
                "lm_head": "head",
            }
        ),
        ("transformer.h.{i}.attn.c_attn", QKV, COLUMNS),
        *_one_to_one(
            {
                "transformer.h.{i}.attn.c_proj": "blocks.{i}.attention.out",
                "transformer.h.{i}.mlp.c_fc": "blocks.{i}.ffn.project.up",
                "transformer.h.{i}.mlp.c_proj": "blocks.{i}.ffn.down",
            },
            COLUMNS,
        ),
    ),
    buffers=r"transformer\.h\.\d+\.attn\.(masked_)?bias",
)

GPT_NEOX = Table(
    prefix="gpt_neox.",
    head="embed_out",
    rows=(
        *_one_to_one(
            {
                "gpt_neox.embed_in": "embed",
                "gpt_neox.layers.{i}.input_layernorm": "blocks.{i}.attention_norm",
                "gpt_neox.layers.{i}.attention.dense": "blocks.{i}.attention.out",
                "gpt_neox.layers.{i}.post_attention_layernorm": "blocks.{i}.ffn_norm",
                "gpt_neox.layers.{i}.mlp.dense_h_to_4h": "blocks.{i}.ffn.project.up",
                "gpt_neox.layers.{i}.mlp.dense_4h_to_h": "blocks.{i}.ffn.down",
                "gpt_neox.final_layer_norm": "norm",
                "embed_out": "head",
            }
        ),
        ("gpt_neox.layers.{i}.attention.query_key_value", QKV, GROUPED_ROWS),
    ),
    buffers=r"gpt_neox\.(layers\.\d+\.attention\.)?((masked_)?bias|rotary_emb\.inv_freq)",
)


def _t5(*, gated: bool) -> Table:
    names = {"shared": "embed", "lm_head": "head"}
    ffn = {"wi_0": "project.gate", "wi_1": "project.up"} if gated else {"wi": "project.up"}
    parts = {
        "attention": ("SelfAttention", {"q": "project.q", "k": "project.k", "v": "project.v", "o": "out"}),
        "cross": ("EncDecAttention", {"q": "project.q", "k": "project.k", "v": "project.v", "o": "out"}),
        "ffn": ("DenseReluDense", ffn | {"wo": "down"}),
    }
    for stack, order in (("encoder", ("attention", "ffn")), ("decoder", ("attention", "cross", "ffn"))):
        # One table of relative positions serves every layer of a stack, and stands in its first.
        names[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"] = f"{stack}.relative"
        names[f"{stack}.final_layer_norm"] = f"{stack}.norm"
        for number, part in enumerate(order):
            stock, native = f"{stack}.block.{{i}}.layer.{number}", f"{stack}.blocks.{{i}}.{part}"
            module, inside = parts[part]
            names[f"{stock}.layer_norm"] = f"{native}_norm"
            names |= {f"{stock}.{module}.{theirs}": f"{native}.{ours}" for theirs, ours in inside.items()}
    return Table(
        prefix="",
        head="lm_head",
        rows=_one_to_one(names),
        # Early T5 checkpoints have a table that nothing reads.
        buffers=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
        copies=("encoder.embed_tokens", "decoder.embed_tokens"),
        # A T5 1.1 made by transformers 5 has its head tied, though its config.json says otherwise.
        head_optional=True,
    )


TABLES = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA, "gpt2": GPT2, "gpt_neox": GPT_NEOX}
T5, T5_GATED = _t5(gated=False), _t5(gated=True)


def table_of(cfg: LanguageConfig) -> Table:
    """The table of a configuration's family."""
    if cfg.family == "t5":
        return T5_GATED if cfg.gated else T5
    return TABLES[cfg.family]
