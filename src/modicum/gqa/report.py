"""What sharing would lose, layer by layer and for every number of key-value heads: to choose one by looking."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from modicum.checkpoint.io import Checkpoint
from modicum.checkpoint.native import read_config, read_tensors
from modicum.gqa.align import permuted, query_order
from modicum.gqa.calibrate import Call, Walk, collect, statistics_of
from modicum.gqa.convert import converted_layer, group_counts, shared_costs, unknown_inputs
from modicum.gqa.grouping import best_order, key_grams, lost, value_grams
from modicum.gqa.heads import AttentionWeights, Place, cast, in_one_order, places, take
from modicum.gqa.refit import install, shell_of, weights_of
from modicum.gqa.statistics import LayerStatistics

# {"layer": name, "kv_heads": n, "keys": share, "values": share, "outputs": share or None}
Row = dict[str, Any]


def weights_report(ckpt: Checkpoint, on_layer: Callable[[], Any] | None = None) -> list[Row]:
    """By the weights alone, as if all inputs were alike: of every layer and number of key-value heads, shares from 0 to 1.

    keys: of the energy of the scores, values: of that of the outputs as long as attention stays as it is. Heads are grouped
    as `aligned` and `merged` group them. One layer is held at a time.
    """
    config = read_config(ckpt.config)
    tensors, every = read_tensors(ckpt, config), list(places(config))
    rows: list[Row] = []
    for place in every:
        layers = {p: take(tensors, p) for p in in_one_order(place, every)}
        known = {p: (weights, unknown_inputs(weights)) for p, weights in layers.items()}
        rows += [row for row, _ in layer_rows(place, *known[place], list(known.values()))]
        if on_layer is not None:
            on_layer()
    return rows


@torch.no_grad()
def calibrated_report(
    model: Any, batches: Sequence[tuple[Tensor, ...]], on_layer: Callable[[], Any] | None = None
) -> list[Row]:
    """The same on the model's own text, with outputs besides: of the energy of what the layer says, what `merged` gets wrong
    before it is refitted, the layer's own inputs given. The model is read, not changed."""
    every = list(places(model.config))
    tied = [place for place in every if place.head_bias is not None]
    found = collect(model, batches, [place.prefix for place in tied])
    shells = {n: shell_of(model, n) for n in group_counts(every[0].n_kv_heads, every[0].halves)}
    rows: list[Row] = []
    for _, members, _ in Walk(model, batches):
        for place, calls in members:
            layer = model.get_submodule(place.prefix)
            weights, stats = weights_of(layer, place), statistics_of(layer, calls)
            others = [p for p in in_one_order(place, every) if p != place]
            layers = [(weights_of(model.get_submodule(p.prefix), p), found[p.prefix]) for p in others]
            for row, order in layer_rows(place, weights, stats, [(weights, stats), *layers]):
                after = replace(place, n_kv_heads=row["kv_heads"])
                merged = shells[after.n_kv_heads].get_submodule(place.prefix)
                install(merged, converted_layer(permuted(weights, order), after.n_kv_heads, "merged", stats), after)
                heads = query_order(order, place.n_heads // place.n_kv_heads)
                rows.append(row | {"outputs": output_error(layer, merged, calls, heads)})
            if on_layer is not None:
                on_layer()
    return rows


def layer_rows(
    place: Place,
    weights: AttentionWeights,
    stats: LayerStatistics,
    layers: list[tuple[AttentionWeights, LayerStatistics]],
) -> Iterator[tuple[Row, list[int]]]:
    """A row per number of key-value heads that the layer can be given, with the order of heads for it.

    layers: those whose heads have one order with this one's, itself included.
    """
    w, costs = cast(weights, torch.float64), shared_costs(layers)
    keys, values = key_grams(w, stats), value_grams(w, stats)
    for n_kv_heads in group_counts(place.n_kv_heads, place.halves):
        order = best_order(costs, n_kv_heads, place.halves)
        groups = torch.tensor(order).unflatten(0, (n_kv_heads, -1))
        shares = {name: lost(grams, groups).sum().item() for name, grams in (("keys", keys), ("values", values))}
        yield {"layer": place.prefix, "kv_heads": n_kv_heads, **shares, "outputs": None}, order


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
