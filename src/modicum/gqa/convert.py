"""From multi-head to grouped-query attention (2305.13245, section 2.1), on (config, state_dict), layer by layer."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from modicum.checkpoint.io import Checkpoint
from modicum.checkpoint.native import changed_checkpoint, read_tensors
from modicum.config import AnyConfig, VivitConfig, nearest, with_kv_heads
from modicum.errors import CheckpointError, UsageError
from modicum.gqa.align import aligned_layer, balanced, permuted, query_order
from modicum.gqa.grouping import best_order, pair_costs
from modicum.gqa.heads import AttentionWeights, Place, cast, in_one_order, names, places, put, take
from modicum.gqa.merge import merged_layer
from modicum.gqa.statistics import LayerStatistics

# A conversion of the paper's: a layer's weights, the new number of key-value heads, a seed of its own -> weights.
Method = Callable[[AttentionWeights, int, int], AttentionWeights]
CALIBRATED = ("aligned", "merged")
NAMES = ("mean", "first", "random", *CALIBRATED)


def convert_checkpoint(ckpt: Checkpoint, config: AnyConfig, n_kv_heads: int, method: str, seed: int) -> Checkpoint:
    """The same checkpoint with fewer key-value heads. Tensors are made when they are asked for, one layer at a time.

    Args:
        ckpt, config: of a native family, a ViViT or a captioner; multi-head or grouped already. Whoever calls has checked.
        n_kv_heads: must divide the checkpoint's own number.
        method: mean (the paper's choice: keys and values of a group are averaged), first (the group's first head), random
            (normal, with the standard deviation of the weights that it replaces), and with heads grouped by what they lose:
            aligned (averages of heads in one form, `gqa.align`), merged (the closed forms of `gqa.merge`).
        seed: of random; every layer draws from a stream of its own.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    new: Any = with_kv_heads(config, n_kv_heads)
    return changed_checkpoint(ckpt, new, ConvertedTensors(read_tensors(ckpt, config), config, new, method, seed))


def check_convertible(ckpt: Checkpoint) -> None:
    """Refuse what no conversion could be right about, with the reason.

    Raises:
        CheckpointError: positions by ALiBi, adapters that are not merged, quantised weights, capped scores.
    """
    kind = ckpt.config.get("model_type")
    if kind in ("bloom", "mpt") or ckpt.config.get("alibi"):
        raise CheckpointError(
            f"{kind} takes each head's positions from the head's number (ALiBi), so heads cannot be ordered or share a "
            "form: convert a model with rotary, learned or relative positions"
        )
    adapter = next((name for name in ckpt.state_dict if ".lora_" in name), None)
    if adapter is not None or "peft_type" in ckpt.config:
        raise CheckpointError(
            f"the checkpoint holds LoRA adapters{f' (`{adapter}`)' if adapter else ''} beside its weights: merge them into "
            "it first, as peft's `merge_and_unload` does"
        )
    if ckpt.config.get("quantization_config"):
        raise CheckpointError(
            "the checkpoint's weights are quantised, and keys and values are shared in full precision: convert the "
            "original, and quantise the result"
        )
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if ckpt.config.get(key):
            raise CheckpointError(
                f"config.json caps logits (`{key}`), which no native family does: convert a checkpoint without"
            )


def check_method(method: str) -> None:
    if method not in NAMES:
        raise UsageError(f"`method` is {method!r}{nearest(method, NAMES)}")


def check(config: AnyConfig, n_kv_heads: int) -> None:
    """Refuse a number of key-value heads that the present ones cannot be grouped into."""
    held = config.n_kv_heads
    halves = isinstance(config, VivitConfig) and config.variant == "factorized_dot_product"
    valid = [*group_counts(held, halves), held]
    if n_kv_heads not in valid:
        why = ", half of them for time and half for space" if halves else ""
        raise UsageError(
            f"{n_kv_heads} key-value heads do not divide the checkpoint's {held}{why}: "
            f"choose one of {', '.join(map(str, valid))}"
        )


def group_counts(held: int, halves: bool) -> list[int]:
    """The smaller numbers of key-value heads that `held` of them can be grouped into."""
    return [n for n in range(1, held) if held % n == 0 and not (halves and n % 2)]


def converted_layer(
    weights: AttentionWeights, n_kv_heads: int, method: str, stats: LayerStatistics
) -> AttentionWeights:
    """`aligned` or `merged` of one layer, its heads already in order; in float64, then in the dtype of its weights."""
    layer = aligned_layer if method == "aligned" else merged_layer
    return cast(balanced(layer(cast(weights, torch.float64), n_kv_heads, stats)), weights.q.dtype)


def shared_costs(layers: list[tuple[AttentionWeights, LayerStatistics]]) -> Tensor:
    """What every two key-value heads would lose by sharing in all of these layers together, [G, G]."""
    return torch.stack([pair_costs(cast(weights, torch.float64), stats) for weights, stats in layers]).sum(0)


def order_of(layers: list[tuple[AttentionWeights, LayerStatistics]], n_kv_heads: int) -> list[int]:
    """The one order of key-value heads that loses least in all of these layers together."""
    return best_order(shared_costs(layers), n_kv_heads, layers[0][0].halves)


def unknown_inputs(weights: AttentionWeights) -> LayerStatistics:
    return LayerStatistics.unknown(weights.q.shape[-1], weights.k.shape[-1])


class ConvertedTensors(Mapping[str, Tensor]):
    """A model's tensors under our names, its attention layers converted. The latest layer is kept, no other."""

    def __init__(
        self, source: Mapping[str, Tensor], before: AnyConfig, after: AnyConfig, method: str, seed: int
    ) -> None:
        self.source, self.method, self.seed = source, method, seed
        self.places = dict(zip(places(before), places(after), strict=True))
        self.owner = {name: place for place in self.places for name in names(place) if name in source}
        self.latest: tuple[Place | None, dict[str, Tensor]] = (None, {})
        self.orders: dict[str, list[int]] = {}  # by table of biases

    def __getitem__(self, name: str) -> Tensor:
        place = self.owner.get(name)
        if place is None:
            return self._biases(name)
        if self.latest[0] != place:
            self.latest = (place, self._converted(place))
        return self.latest[1][name]

    def _converted(self, place: Place) -> dict[str, Tensor]:
        new = self.places[place]
        weights = take(self.source, place)
        if new.n_kv_heads == place.n_kv_heads:
            return put(weights, new)
        if self.method in PAPER:
            # A stream per layer, so that a layer does not depend on which others were asked for before it.
            digest = hashlib.sha256(f"{self.seed} {place.prefix}".encode()).digest()
            return put(PAPER[self.method](weights, new.n_kv_heads, int.from_bytes(digest[:7])), new)
        weights = permuted(weights, self._order(place, weights))
        return put(converted_layer(weights, new.n_kv_heads, self.method, unknown_inputs(weights)), new)

    def _order(self, place: Place, weights: AttentionWeights) -> list[int]:
        n_kv_heads = self.places[place].n_kv_heads
        if place.head_bias is None:
            return order_of([(weights, unknown_inputs(weights))], n_kv_heads)
        if place.head_bias not in self.orders:
            layers = [take(self.source, other) for other in in_one_order(place, self.places)]
            self.orders[place.head_bias] = order_of([(w, unknown_inputs(w)) for w in layers], n_kv_heads)
        return self.orders[place.head_bias]

    def _biases(self, name: str) -> Tensor:
        """A tensor of no attention layer: unchanged, unless it is a table whose columns follow the heads."""
        place = next((place for place in self.places if place.head_bias == name), None)
        if place is None or self.method in PAPER or self.places[place].n_kv_heads == place.n_kv_heads:
            return self.source[name]
        order = self._order(place, take(self.source, place))
        return self.source[name][:, query_order(order, place.n_heads // place.n_kv_heads)]

    def __contains__(self, name: object) -> bool:
        return name in self.source

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)

    def __len__(self) -> int:
        return len(self.source)


def grouped(heads: Tensor, n_kv_heads: int) -> Tensor:
    """[G, ...] -> [n_kv_heads, G / n_kv_heads, ...]: neighbours share a group."""
    return heads.unflatten(0, (n_kv_heads, -1))


def mean(weights: AttentionWeights, n_kv_heads: int, seed: int) -> AttentionWeights:
    """Each new key and value projection is the mean of its group's, biases too; computed in float64."""
    return _each(weights, lambda x: grouped(x.double(), n_kv_heads).mean(1).to(x.dtype))


def first(weights: AttentionWeights, n_kv_heads: int, seed: int) -> AttentionWeights:
    """Each new key and value projection is that of its group's first head."""
    return _each(weights, lambda x: grouped(x, n_kv_heads)[:, 0])


def random(weights: AttentionWeights, n_kv_heads: int, seed: int) -> AttentionWeights:
    """New key and value projections are drawn from a normal distribution as wide as the weights are; biases are zero."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x.new_zeros(n_kv_heads, x.shape[1])
        sample = torch.randn(n_kv_heads, *x.shape[1:], generator=generator, dtype=torch.float64)
        return (sample * x.double().std()).to(x.dtype)

    return _each(weights, drawn)


def _each(weights: AttentionWeights, change: Callable[[Tensor], Tensor]) -> AttentionWeights:
    """Keys and values, and their biases where there are any, changed alike."""
    biases = (None if bias is None else change(bias) for bias in (weights.k_bias, weights.v_bias))
    k_bias, v_bias = biases
    return replace(weights, k=change(weights.k), v=change(weights.v), k_bias=k_bias, v_bias=v_bias)


PAPER: dict[str, Method] = {"mean": mean, "first": first, "random": random}
