"""One two-way key table per family: tensors under stock names, and in stock layouts, to ours and back.

Every tensor is read, turned and handed on by itself, so that a checkpoint passes through without being in memory.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from modicum.config import DecoderConfig
from modicum.errors import CheckpointError

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """How one stock tensor holds one or several of ours, which are `[out, in]` weights or `[out]` biases.

    `split(stock, rows, cfg)` gives ours, of so many rows each; `join(ours, cfg)` is its inverse.
    """

    split: Callable[[Tensor, list[int], DecoderConfig], list[Tensor]]
    join: Callable[[list[Tensor], DecoderConfig], Tensor]
    transposed: bool = False


def _turned(tensor: Tensor) -> Tensor:
    return tensor.T if tensor.ndim == 2 else tensor


def _split_groups(fused: Tensor, rows: list[int], cfg: DecoderConfig) -> list[Tensor]:
    per_group = cfg.n_heads // cfg.n_kv_heads
    rest = fused.shape[1:]
    groups = fused.reshape(cfg.n_kv_heads, per_group + 2, cfg.head_dim, *rest)
    parts = groups[:, :per_group], groups[:, per_group], groups[:, per_group + 1]
    return [part.reshape(count, *rest) for part, count in zip(parts, rows, strict=True)]


def _join_groups(parts: list[Tensor], cfg: DecoderConfig) -> Tensor:
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
    """`rows`: stock module, our modules, layout. `buffers`: tensors of older files that hold nothing learned."""

    prefix: str
    head: str
    rows: tuple[tuple[str, tuple[str, ...], Layout], ...]
    buffers: str


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

TABLES = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA, "gpt2": GPT2, "gpt_neox": GPT_NEOX}


def native_shapes(cfg: DecoderConfig) -> dict[str, Shape]:
    """Name and shape of every tensor of a `Decoder`."""
    shapes: dict[str, Shape] = {"embed.weight": (cfg.vocab_size, cfg.dim)}
    if cfg.rope is None:
        shapes["positions.weight"] = (cfg.max_seq_len, cfg.dim)

    def linear(name: str, rows: int, columns: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = (cfg.dim,)
        if cfg.norm == "layer":
            shapes[f"{name}.bias"] = (cfg.dim,)

    for block in (f"blocks.{i}" for i in range(cfg.n_layers)):
        norm(f"{block}.attention_norm")
        for name, heads in (("q", cfg.n_heads), ("k", cfg.n_kv_heads), ("v", cfg.n_kv_heads)):
            linear(f"{block}.attention.project.{name}", heads * cfg.head_dim, cfg.dim, cfg.qkv_bias)
        if cfg.qk_norm:
            shapes |= {f"{block}.attention.{name}.weight": (cfg.head_dim,) for name in ("q_norm", "k_norm")}
        linear(f"{block}.attention.out", cfg.dim, cfg.n_heads * cfg.head_dim, cfg.out_bias)
        norm(f"{block}.ffn_norm")
        for name in ("gate", "up") if cfg.gated else ("up",):
            linear(f"{block}.ffn.project.{name}", cfg.ffn_dim, cfg.dim, cfg.ffn_bias)
        linear(f"{block}.ffn.down", cfg.dim, cfg.ffn_dim, cfg.ffn_bias)
    norm("norm")
    if not cfg.tie_embeddings:
        shapes["head.weight"] = (cfg.vocab_size, cfg.dim)
    return shapes


@dataclass(frozen=True)
class _Slot:
    """One stock tensor: which of ours it holds, with their shapes, and how."""

    stock: str
    native: dict[str, Shape]
    layout: Layout

    @property
    def shape(self) -> Shape:
        shapes = list(self.native.values())
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        return shape[::-1] if self.layout.transposed else shape


def _slots(cfg: DecoderConfig) -> dict[str, _Slot]:
    shapes = native_shapes(cfg)
    slots = {}
    for stock, natives, layout in TABLES[cfg.family].rows:
        for i in range(cfg.n_layers if "{i}" in stock else 1):
            for kind in ("weight", "bias"):
                ours = [f"{native.format(i=i)}.{kind}" for native in natives]
                if ours[0] in shapes:
                    name = f"{stock.format(i=i)}.{kind}"
                    slots[name] = _Slot(name, {name: shapes[name] for name in ours}, layout)
    return slots


class NativeTensors(Mapping[str, Tensor]):
    """Stock tensors under our names, contiguous `[out, in]`, each read and turned when it is asked for."""

    def __init__(self, state_dict: Mapping[str, Tensor], cfg: DecoderConfig) -> None:
        self._state_dict, self._cfg = state_dict, cfg
        table, slots = TABLES[cfg.family], _slots(cfg)
        bare = not any(name.startswith(table.prefix) for name in state_dict)
        found = {table.prefix + name if bare and name not in slots else name: name for name in state_dict}
        found = {name: key for name, key in found.items() if not re.fullmatch(table.buffers, name)}
        head = f"{table.head}.weight"
        tied_head = (
            next((found.pop(name) for name in (head, table.prefix + head) if name in found), None)
            if cfg.tie_embeddings
            else None
        )
        check_names(found, slots, f"the checkpoint, for the {cfg.family} model that its config.json describes,")
        if tied_head is not None:
            embed = next(slot.stock for slot in slots.values() if "embed.weight" in slot.native)
            if not torch.equal(state_dict[tied_head], state_dict[found[embed]]):
                raise CheckpointError(
                    f"config.json ties the output head to the embeddings, and `{tied_head}` differs from "
                    f"`{found[embed]}`: set `tie_word_embeddings` to false, or remove the tensor"
                )
        self._found = found
        self._slots = {ours: slot for slot in slots.values() for ours in slot.native}

    def __getitem__(self, name: str) -> Tensor:
        slot = self._slots[name]
        return self._parts(slot)[list(slot.native).index(name)].contiguous()

    def _parts(self, slot: _Slot) -> list[Tensor]:
        tensor = self._state_dict[self._found[slot.stock]]
        check_shape(self._found[slot.stock], tensor, slot.shape)
        return slot.layout.split(tensor, [shape[0] for shape in slot.native.values()], self._cfg)

    def __contains__(self, name: object) -> bool:
        # Mapping's own would read the tensor to find out.
        return name in self._slots

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def one_by_one(self) -> Iterator[tuple[str, Tensor]]:
        """All of them; of a stock tensor that holds several of ours, it is read once."""
        for slot in {slot.stock: slot for slot in self._slots.values()}.values():
            parts = self._parts(slot)
            for name in slot.native:
                yield name, parts.pop(0).contiguous()


def to_native(state_dict: Mapping[str, Tensor], cfg: DecoderConfig) -> Iterator[tuple[str, Tensor]]:
    """Our names and tensors, contiguous `[out, in]`, one at a time, from a mapping with stock names.

    Names may lack the prefix of the base model, as in GPT-2's hub file; buffers of older files are passed over.

    Raises:
        CheckpointError: a tensor is missing, left over, or of the wrong shape (this one when its turn comes), or the
            embeddings are tied by config.json and the checkpoint holds a head that differs from them.
    """
    return NativeTensors(state_dict, cfg).one_by_one()


class StockTensors(Mapping[str, Tensor]):
    """Our tensors under stock names and in stock layouts, each made when it is asked for."""

    def __init__(self, native: Mapping[str, Tensor], cfg: DecoderConfig) -> None:
        self._native, self._cfg, self._slots = native, cfg, _slots(cfg)
        check_names(native, native_shapes(cfg), f"the model, for its {cfg.family} configuration,")

    def __getitem__(self, name: str) -> Tensor:
        slot = self._slots[name]
        parts = [self._native[ours] for ours in slot.native]
        for part, (ours, shape) in zip(parts, slot.native.items(), strict=True):
            check_shape(ours, part, shape)
        return slot.layout.join(parts, self._cfg).contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)


def to_stock(native: Mapping[str, Tensor], cfg: DecoderConfig) -> Mapping[str, Tensor]:
    """The inverse of `to_native`, lazy: with the base model's prefix, without buffers and without a tied head.

    Raises:
        CheckpointError: `native` does not have exactly the tensors of `cfg`, in their shapes.
    """
    return StockTensors(native, cfg)


def check_names(given: Mapping[str, object], required: Mapping[str, object], whose: str) -> None:
    for names, trouble in (
        ([name for name in required if name not in given], "lacks"),
        ([name for name in given if name not in required], "has a surplus"),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(
                f"{whose} {trouble} `{names[0]}`{more}: weights and configuration must belong together"
            )


def check_shape(name: str, tensor: Tensor, required: Shape) -> None:
    if tuple(tensor.shape) != required:
        raise CheckpointError(
            f"`{name}` has shape {list(tensor.shape)} and the configuration requires {list(required)}: "
            "weights and configuration must belong together"
        )
