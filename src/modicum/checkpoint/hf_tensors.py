"""Tensors under stock names, and in stock layouts, to ours and back, by the tables of `hf_tables`.

Every tensor is read, turned and handed on by itself, so that a checkpoint passes through without being in memory.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.checkpoint.hf_tables import Layout, Table, table_of
from modicum.config import DecoderConfig, EncoderDecoderConfig, LanguageConfig
from modicum.errors import CheckpointError

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


def native_shapes(cfg: LanguageConfig) -> Shapes:
    """Name and shape of every tensor of a `Decoder` or `EncoderDecoder`."""
    return _encoder_decoder_shapes(cfg) if isinstance(cfg, EncoderDecoderConfig) else _decoder_shapes(cfg)


def _decoder_shapes(cfg: DecoderConfig) -> Shapes:
    shapes: Shapes = {"embed.weight": (cfg.vocab_size, cfg.dim)}
    if cfg.rope is None:
        shapes["positions.weight"] = (cfg.max_seq_len, cfg.dim)
    biased = cfg.norm == "layer"
    for block in (f"blocks.{i}" for i in range(cfg.n_layers)):
        shapes |= _norm(f"{block}.attention_norm", cfg.dim, biased)
        shapes |= _attention(f"{block}.attention", cfg, cfg.n_kv_heads, cfg.qkv_bias, cfg.out_bias)
        if cfg.qk_norm:
            shapes |= {f"{block}.attention.{name}.weight": (cfg.head_dim,) for name in ("q_norm", "k_norm")}
        shapes |= _norm(f"{block}.ffn_norm", cfg.dim, biased)
        shapes |= _feed_forward(f"{block}.ffn", cfg, cfg.ffn_bias)
    shapes |= _norm("norm", cfg.dim, biased)
    if not cfg.tie_embeddings:
        shapes["head.weight"] = (cfg.vocab_size, cfg.dim)
    return shapes


def _encoder_decoder_shapes(cfg: EncoderDecoderConfig) -> Shapes:
    shapes: Shapes = {"embed.weight": (cfg.vocab_size, cfg.dim)}
    for stack, n_layers in (("encoder", cfg.n_encoder_layers), ("decoder", cfg.n_layers)):
        shapes[f"{stack}.relative.weight"] = (cfg.relative_buckets, cfg.n_heads)
        n_kv_heads = cfg.n_heads if stack == "encoder" else cfg.n_kv_heads
        for block in (f"{stack}.blocks.{i}" for i in range(n_layers)):
            for name in ("attention",) if stack == "encoder" else ("attention", "cross"):
                shapes |= _norm(f"{block}.{name}_norm", cfg.dim) | _attention(f"{block}.{name}", cfg, n_kv_heads)
            shapes |= _norm(f"{block}.ffn_norm", cfg.dim) | _feed_forward(f"{block}.ffn", cfg)
        shapes |= _norm(f"{stack}.norm", cfg.dim)
    if not cfg.tie_embeddings:
        shapes["head.weight"] = (cfg.vocab_size, cfg.dim)
    return shapes


def _linear(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (rows, columns)}
    return shapes | {f"{name}.bias": (rows,)} if bias else shapes


def _norm(name: str, dim: int, bias: bool = False) -> Shapes:
    return {f"{name}.{part}": (dim,) for part in (("weight", "bias") if bias else ("weight",))}


def _attention(
    name: str, cfg: LanguageConfig, n_kv_heads: int, qkv_bias: bool = False, out_bias: bool = False
) -> Shapes:
    shapes: Shapes = {}
    for part, heads in (("q", cfg.n_heads), ("k", n_kv_heads), ("v", n_kv_heads)):
        shapes |= _linear(f"{name}.project.{part}", heads * cfg.head_dim, cfg.dim, qkv_bias)
    return shapes | _linear(f"{name}.out", cfg.dim, cfg.n_heads * cfg.head_dim, out_bias)


def _feed_forward(name: str, cfg: LanguageConfig, bias: bool = False) -> Shapes:
    shapes: Shapes = {}
    for part in ("gate", "up") if cfg.gated else ("up",):
        shapes |= _linear(f"{name}.project.{part}", cfg.ffn_dim, cfg.dim, bias)
    return shapes | _linear(f"{name}.down", cfg.dim, cfg.ffn_dim, bias)


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


def _slots(cfg: LanguageConfig) -> dict[str, _Slot]:
    shapes = native_shapes(cfg)
    depth = max(cfg.n_layers, cfg.n_encoder_layers) if isinstance(cfg, EncoderDecoderConfig) else cfg.n_layers
    slots = {}
    for stock, natives, layout in table_of(cfg).rows:
        for i in range(depth if "{i}" in stock else 1):
            for kind in ("weight", "bias"):
                ours = [f"{native.format(i=i)}.{kind}" for native in natives]
                if ours[0] in shapes:
                    name = f"{stock.format(i=i)}.{kind}"
                    slots[name] = _Slot(name, {name: shapes[name] for name in ours}, layout)
    return slots


class NativeTensors(Mapping[str, Tensor]):
    """Stock tensors under our names, contiguous `[out, in]`, each read and turned when it is asked for."""

    def __init__(self, state_dict: Mapping[str, Tensor], cfg: LanguageConfig) -> None:
        self._state_dict, self._cfg = state_dict, cfg
        table, slots = table_of(cfg), _slots(cfg)
        bare = not any(name.startswith(table.prefix) for name in state_dict)
        found = {table.prefix + name if bare and name not in slots else name: name for name in state_dict}
        found = {name: key for name, key in found.items() if not re.fullmatch(table.buffers, name)}
        embed = next(slot.stock for slot in slots.values() if "embed.weight" in slot.native)
        self._found = self._without_copies(found, table, embed)
        check_names(found, slots, f"the checkpoint, for the {cfg.family} model that its config.json describes,")
        self._slots = {ours: slot for slot in slots.values() for ours in slot.native}

    def _without_copies(self, found: dict[str, str], table: Table, embed: str) -> dict[str, str]:
        """`found` without what repeats the embeddings, and with what is stored as the embeddings alone."""
        head = f"{table.head}.weight"
        heads = (head, table.prefix + head) if self._cfg.tie_embeddings else ()
        copies = [found.pop(name) for name in (*(f"{name}.weight" for name in table.copies), *heads) if name in found]
        if copies:
            found.setdefault(embed, copies[0])
        for name in copies:
            if not torch.equal(self._state_dict[name], self._state_dict[found[embed]]):
                raise CheckpointError(
                    f"config.json ties the output head to the embeddings, and `{name}` differs from `{found[embed]}`: "
                    "set `tie_word_embeddings` to false, or remove the tensor"
                    if name in heads
                    else f"`{name}` differs from `{found[embed]}`, which it has to repeat: remove the tensor"
                )
        if table.head_optional and not self._cfg.tie_embeddings and embed in found:
            found.setdefault(head, found[embed])
        return found

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


def to_native(state_dict: Mapping[str, Tensor], cfg: LanguageConfig) -> Iterator[tuple[str, Tensor]]:
    """Our names and tensors, contiguous `[out, in]`, one at a time, from a mapping with stock names.

    Names may lack the prefix of the base model, as in GPT-2's hub file; buffers of older files are passed over.

    Raises:
        CheckpointError: a tensor is missing, left over, or of the wrong shape (this one when its turn comes), or the
            embeddings are tied by config.json and the checkpoint holds a head that differs from them.
    """
    return NativeTensors(state_dict, cfg).one_by_one()


class StockTensors(Mapping[str, Tensor]):
    """Our tensors under stock names and in stock layouts, each made when it is asked for."""

    def __init__(self, native: Mapping[str, Tensor], cfg: LanguageConfig) -> None:
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


def to_stock(native: Mapping[str, Tensor], cfg: LanguageConfig) -> Mapping[str, Tensor]:
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
