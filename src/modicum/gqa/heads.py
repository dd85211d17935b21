"""One attention layer with its heads apart, taken from and put back into a model's tensors.

Query heads g * H/G ... (g + 1) * H/G - 1 share key-value head g, in all of modicum and in the stock layouts.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modicum.config import AnyConfig, CaptionerConfig, DecoderConfig, EncoderDecoderConfig


@dataclass
class AttentionWeights:
    """The weights of one layer, as `nn.Linear` holds them: rows are outputs.

    q: [H, K, D]. k, v: [G, K, D] (D is the width of what is read). o: [D, H, K]. Biases: [H, K], [G, K], [G, K], [D].
    q_norm, k_norm: [K], weights of an RMSNorm of queries and keys (Qwen3). rotary_dim: how many of a head's dimensions are
    rotated, in half-split pairs (f, f + rotary_dim / 2); 0 without rotary positions. halves: the first half of the heads
    and the second see different tokens (ViViT's Model 4), so that no group may cross the middle.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    rotary_dim: int = 0
    halves: bool = False

    @property
    def n_heads(self) -> int:
        return self.q.shape[0]

    @property
    def n_kv_heads(self) -> int:
        return self.k.shape[0]


@dataclass(frozen=True)
class Place:
    """Where a layer stands in a model: the prefix of its tensors' names, and its heads.

    head_bias: a table of position biases, a column per query head, that several layers share (T5): their heads keep one
    order.
    """

    prefix: str
    n_heads: int
    n_kv_heads: int
    rotary_dim: int = 0
    halves: bool = False
    head_bias: str | None = None

    @property
    def cross(self) -> bool:
        """Whether keys and values are made from another text."""
        return self.prefix.endswith(".cross")


def places(config: AnyConfig) -> Iterator[Place]:
    """Every attention layer whose keys and values may be shared, in order: of T5 and captioners the decoder's, as in the
    paper."""
    c = config
    if isinstance(c, CaptionerConfig):
        for i, place in enumerate(places(c.decoder)):
            yield replace(place, prefix=f"decoder.{place.prefix}")
            yield Place(f"decoder.blocks.{i}.cross", c.n_heads, c.n_kv_heads)
        return
    if isinstance(c, EncoderDecoderConfig):
        for i in range(c.n_layers):
            table = "decoder.relative.weight"
            yield Place(f"decoder.blocks.{i}.attention", c.n_heads, c.n_kv_heads, head_bias=table)
            yield Place(f"decoder.blocks.{i}.cross", c.n_heads, c.n_kv_heads)
        return
    if isinstance(c, DecoderConfig):
        rotary_dim = c.rope.rotary_dim if c.rope is not None else 0
        for i in range(c.n_layers):
            yield Place(f"blocks.{i}.attention", c.n_heads, c.n_kv_heads, rotary_dim)
        return
    names = ("space", "time") if c.variant == "factorized_self_attention" else ("attention",)
    for i in range(c.n_layers):
        for name in names:
            halves = c.variant == "factorized_dot_product"
            yield Place(f"encoder.blocks.{i}.{name}", c.n_heads, c.n_kv_heads, halves=halves)
    heads = c.temporal_heads or c.n_heads
    for i in range(c.temporal_layers):
        yield Place(f"temporal.blocks.{i}.attention", heads, max(1, heads * c.n_kv_heads // c.n_heads))


def in_one_order(place: Place, others: Iterable[Place]) -> list[Place]:
    """The layers whose heads have one order with this one's: itself, or all that share its table of position biases."""
    return [p for p in others if p == place or (p.head_bias is not None and p.head_bias == place.head_bias)]


_NAMES = {"q": "project.q", "k": "project.k", "v": "project.v", "o": "out"}


def names(place: Place) -> dict[str, str]:
    """Our name of each tensor a layer may have -> the field that holds it."""
    result = {}
    for field, module in _NAMES.items():
        result[f"{place.prefix}.{module}.weight"] = field
        result[f"{place.prefix}.{module}.bias"] = f"{field}_bias"
    return result | {f"{place.prefix}.{field}.weight": field for field in ("q_norm", "k_norm")}


def take(native: Mapping[str, Tensor], place: Place) -> AttentionWeights:
    """The weights of a layer, from tensors under our names."""
    held = {field: native[name] for name, field in names(place).items() if name in native}
    for field in ("q", "k", "v"):
        n_heads = place.n_heads if field == "q" else place.n_kv_heads
        held[field] = held[field].unflatten(0, (n_heads, -1))
        if f"{field}_bias" in held:
            held[f"{field}_bias"] = held[f"{field}_bias"].unflatten(0, (n_heads, -1))
    held["o"] = held["o"].unflatten(1, (place.n_heads, -1))
    return AttentionWeights(**held, rotary_dim=place.rotary_dim, halves=place.halves)


def put(weights: AttentionWeights, place: Place) -> dict[str, Tensor]:
    """The inverse of `take`: contiguous tensors under our names."""
    result = {}
    for name, field in names(place).items():
        tensor = getattr(weights, field)
        if tensor is None:
            continue
        if field == "o":
            tensor = tensor.flatten(1)
        elif field[0] in "qkv" and not field.endswith("norm"):
            tensor = tensor.flatten(0, 1)
        result[name] = tensor.contiguous()
    return result


_TRAINED = ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "o_bias")


def cast(weights: AttentionWeights, dtype: torch.dtype) -> AttentionWeights:
    """The same weights in another dtype; norms stay as they are."""
    held = {field: getattr(weights, field) for field in _TRAINED}
    changes = {field: None if x is None else x.to(dtype) for field, x in held.items()}
    return replace(weights, **changes)  # type: ignore[arg-type]


def with_bias(heads: Tensor, bias: Tensor | None) -> Tensor:
    """[heads, K, D] and [heads, K] -> [heads, K, D + 1]: a bias is the weight of a constant input."""
    column = heads.new_zeros(heads.shape[:2]) if bias is None else bias
    return torch.cat([heads, column[..., None]], dim=-1)


def without_bias(heads: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The inverse of `with_bias`; there is a bias afterwards if there was one before."""
    return heads[..., :-1], None if bias is None else heads[..., -1]
