"""What sharing would lose, layer by layer and for every number of key-value heads: to choose one by looking."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from modicum.checkpoint.hf import NativeTensors, language_config
from modicum.checkpoint.io import Checkpoint
from modicum.checkpoint.vivit_folder import MODEL_TYPES, native_tensors, read_vivit_config
from modicum.gqa.align import permuted, query_order
from modicum.gqa.calibrate import Call, Walk, collect, statistics_of
from modicum.gqa.convert import converted_layer, group_counts, order_of, unknown_inputs
from modicum.gqa.grouping import key_grams, lost, value_grams
from modicum.gqa.heads import AttentionWeights, Place, cast, places, take
from modicum.gqa.refit import install, weights_of
from modicum.gqa.statistics import LayerStatistics

# {"layer": name, "kv_heads": n, "keys": share, "values": share, "outputs": share or None}
Row = dict[str, Any]


def weights_report(ckpt: Checkpoint, on_layer: Callable[[], Any] | None = None) -> list[Row]:
    """By the weights alone, as if all inputs were alike: of every layer and number of key-value heads, shares from 0 to 1.

    keys: of the energy of the scores, values: of that of the outputs as long as attention stays as it is. Heads are grouped
    as `aligned` and `merged` group them. One layer is held at a time.
    """
    video = ckpt.config.get("model_type") in MODEL_TYPES
    config: Any = read_vivit_config(ckpt.config) if video else language_config(ckpt.config)
    tensors = dict(native_tensors(ckpt, config)) if video else NativeTensors(ckpt.state_dict, config)
    rows: list[Row] = []
    for place in places(config):
        together = [take(tensors, other) for other in sharing_order(place, config)]
        layers = [(weights, unknown_inputs(weights)) for weights in together]
        weights = take(tensors, place)
        for order in orders(place, layers):
            rows.append(row_of(place, weights, unknown_inputs(weights), *order))
        if on_layer is not None:
            on_layer()
    return rows


@torch.no_grad()
def calibrated_report(
    model: Any, batches: Sequence[tuple[Tensor, ...]], on_layer: Callable[[], Any] | None = None
) -> list[Row]:
    """The same on the model's own text, with outputs besides: of the energy of what the layer says, what `merged` gets wrong
    before it is refitted, the layer's own inputs given. The model is read, not changed."""
    tied = [place for place in places(model.config) if place.head_bias is not None]
    found = collect(model, batches, [place.prefix for place in tied])
    rows: list[Row] = []
    for _, members, _ in Walk(model, batches):
        for place, calls in members:
            layer = model.get_submodule(place.prefix)
            weights, stats = weights_of(layer, place), statistics_of(layer, calls)
            layers = [(weights, stats)]
            if place.head_bias is not None:
                layers = [(weights_of(model.get_submodule(p.prefix), p), found[p.prefix]) for p in tied]
            for n_kv_heads, order in orders(place, layers):
                merged = merged_module(model, place, permuted(weights, order), stats, n_kv_heads)
                outputs = output_error(layer, merged, calls, query_order(order, place.n_heads // place.n_kv_heads))
                rows.append(row_of(place, weights, stats, n_kv_heads, order) | {"outputs": outputs})
            if on_layer is not None:
                on_layer()
    return rows


def sharing_order(place: Place, config: Any) -> list[Place]:
    """The layers whose heads have one order with this one's: itself, or all that share its table of position biases."""
    return [p for p in places(config) if p == place or (p.head_bias is not None and p.head_bias == place.head_bias)]


def orders(place: Place, layers: list[tuple[AttentionWeights, LayerStatistics]]) -> Iterator[tuple[int, list[int]]]:
    """Every number of key-value heads that the layer can be given, with the order of heads for it."""
    for n_kv_heads in group_counts(place.n_kv_heads, place.halves):
        yield n_kv_heads, order_of(layers, n_kv_heads)


def row_of(place: Place, weights: AttentionWeights, stats: LayerStatistics, n_kv_heads: int, order: list[int]) -> Row:
    w, groups = cast(weights, torch.float64), torch.tensor(order).unflatten(0, (n_kv_heads, -1))
    keys, values = (lost(grams, groups).sum().item() for grams in (key_grams(w, stats), value_grams(w, stats)))
    return {"layer": place.prefix, "kv_heads": n_kv_heads, "keys": keys, "values": values, "outputs": None}


def merged_module(
    model: Any, place: Place, ordered: AttentionWeights, stats: LayerStatistics, n_kv_heads: int
) -> nn.Module:
    """The layer, its heads in order, with `n_kv_heads` by the closed forms."""
    with torch.device("meta"):
        shell = type(model)(replace(model.config, n_kv_heads=n_kv_heads))
    merged = shell.get_submodule(place.prefix)
    install(merged, converted_layer(ordered, n_kv_heads, "merged", stats), replace(place, n_kv_heads=n_kv_heads))
    return merged


def output_error(layer: Any, merged: Any, calls: Sequence[Call], heads: list[int]) -> float:
    """Squared error of what `merged` says, relative to the energy of what `layer` says. `heads` stand in this order."""
    error = energy = 0.0
    for (x_BLD,), settings in calls:
        wanted = layer(x_BLD, **settings).double()
        mask = settings.get("mask")
        # Biases of positions belong to heads, and follow them.
        moved = settings if mask is None or mask.shape[1] == 1 else settings | {"mask": mask[:, heads]}
        error += (merged(x_BLD, **moved).double() - wanted).square().sum().item()
        energy += wanted.square().sum().item()
    return error / energy
