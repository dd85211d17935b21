"""Conversion of a running model: layer by layer, from its own text, each layer refitted to what those before it have become.

After the closed forms (`merge`) two things are left to gain. Keys and queries were fitted to scores, and what counts is
their softmax: they descend the divergence between the layer's attention and the original's, which is convex in the queries
for given keys and the other way round (not under QK-norm). And the output, by ridge regression, takes back what it can of
the errors of values and attention. Both read what the converted layers before them hand on, and are held against what the
original makes of its own; both begin at the closed forms, and stay only if the residual falls on pieces not fitted to.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modicum.config import with_kv_heads
from modicum.core.attention import Attention
from modicum.gqa.align import permuted, query_order
from modicum.gqa.calibrate import Call, Recorder, Walk, call_of, collect, log_probabilities, spread, statistics_of
from modicum.gqa.convert import converted_layer, order_of
from modicum.gqa.heads import Place, places, put, take

# Steps over keys and queries, of so many of one piece's rows each; their first length relative to the size of the weights.
STEPS = 100
SCORED_ROWS = 64
RATE = 0.1
# Of the output's regression, relative to the mean energy of its inputs.
OUTPUT_RIDGE = 1e-3
# One piece in so many is kept to judge by.
JUDGED = 6


@torch.no_grad()
def convert_model(
    model: Any,
    batches: Sequence[tuple[Tensor, ...]],
    n_kv_heads: int,
    method: str = "merged",
    on_layer: Callable[[], Any] | None = None,
) -> None:
    """Convert a language model in place.

    Args:
        model: not packed, in float32 or float64.
        batches: what the model is called with, to calibrate: ten tokens per unit of width are advised. One in six judges the
            refits; a single one leaves nothing to judge by, and there are none.
        method: aligned, or merged with its refits.
        on_layer: called after every attention layer.
    """
    shell = shell_of(model, n_kv_heads)
    after_of = {place.prefix: place for place in places(shell.config)}
    order_shared_heads(model, batches, n_kv_heads)
    walk = Walk(model, batches)
    converted = walk.rows
    for block, members, settings in walk:
        for before, old_calls in members:
            old, new = (m.get_submodule(before.prefix) for m in (model, shell))
            after = after_of[before.prefix]
            new_calls = [call_of(old, block, x, **given) for x, given in zip(converted, settings, strict=True)]
            convert_attention(old, new, before, after, old_calls, method)
            if method == "merged" and len(batches) > 1:
                refit_scores(old, new, old_calls, new_calls)
                refit_output(old, new, old_calls, new_calls)
            setattr(block, before.prefix.rpartition(".")[2], new.eval())
            if on_layer is not None:
                on_layer()
        converted = [block(x, **given) for x, given in zip(converted, settings, strict=True)]
    model.config = shell.config


def shell_of(model: Any, n_kv_heads: int) -> Any:
    """A model of the same kind with fewer key-value heads, without memory for its weights."""
    with torch.device("meta"):
        return type(model)(with_kv_heads(model.config, n_kv_heads))


def converted_tensors(model: Any) -> dict[str, Tensor]:
    """All that a conversion may have changed, by name."""
    state: dict[str, Tensor] = {}
    for place in places(model.config):
        state |= put(weights_of(model.get_submodule(place.prefix), place), place)
        if place.head_bias is not None:
            state[place.head_bias] = model.get_parameter(place.head_bias).detach()
    return state


def order_shared_heads(model: Any, batches: Sequence[tuple[Tensor, ...]], n_kv_heads: int) -> None:
    """Where layers share a table of position biases, put the heads of all of them, and its columns, into one order."""
    sharing: dict[str, list[Place]] = {}
    for place in places(model.config):
        if place.head_bias is not None:
            sharing.setdefault(place.head_bias, []).append(place)
    for table, members in sharing.items():
        stats = collect(model, batches, [place.prefix for place in members])
        layers = [model.get_submodule(place.prefix) for place in members]
        weights = [weights_of(layer, place) for layer, place in zip(layers, members, strict=True)]
        order = order_of([(w, stats[p.prefix]) for w, p in zip(weights, members, strict=True)], n_kv_heads)
        for layer, w, place in zip(layers, weights, members, strict=True):
            install(layer, permuted(w, order), place)
        biases = model.get_parameter(table)
        biases.copy_(biases[:, query_order(order, members[0].n_heads // members[0].n_kv_heads)].clone())


def convert_attention(old: Any, new: Any, before: Place, after: Place, calls: Sequence[Call], method: str) -> None:
    """Fill `new` with the closed form of `old`, whose heads are put into its order."""
    stats, weights = statistics_of(old, calls), weights_of(old, before)
    if before.head_bias is None:
        weights = permuted(weights, order_of([(weights, stats)], after.n_kv_heads))
        install(old, weights, before)
    install(new, converted_layer(weights, after.n_kv_heads, method, stats), after)


def weights_of(attention: nn.Module, place: Place) -> Any:
    """The weights of an attention layer, heads apart."""
    return take({f"{place.prefix}.{name}": p.detach() for name, p in attention.named_parameters()}, place)


def install(attention: nn.Module, weights: Any, place: Place) -> None:
    """The inverse of `weights_of`."""
    tensors = put(weights, place)
    attention.load_state_dict({name.removeprefix(f"{place.prefix}."): x for name, x in tensors.items()}, assign=True)


def judged(n_batches: int) -> tuple[range, range]:
    """Which batches are fitted to, and which only judge."""
    n_judged = max(1, n_batches // JUDGED)
    return range(n_batches - n_judged), range(n_batches - n_judged, n_batches)


def refit_scores(
    old: Attention, new: Attention, calls: Sequence[Call], new_calls: Sequence[Call]
) -> tuple[float, float]:
    """Keys and queries of `new` moved so that it attends as `old` did. -> judged KL per row, before and after."""
    fitted, held_out = judged(len(calls))

    def divergence(i: int, turn: int = 0) -> Tensor:
        rows = spread(calls[i][0][0].shape[1], SCORED_ROWS, turn)
        wanted, got = log_probabilities(old, calls[i], rows), log_probabilities(new, new_calls[i], rows)
        hidden = wanted == -torch.inf
        difference = wanted.masked_fill(hidden, 0) - got.masked_fill(hidden, 0)
        return (wanted.exp() * difference).sum(-1).mean()

    def judge() -> float:
        with torch.no_grad():
            return sum(divergence(i).item() for i in held_out) / len(held_out)

    before = judge()
    tensors = [p for layer in (new.project.q, new.project.k) for p in layer.parameters()]  # type: ignore[union-attr]
    start = [p.detach().clone() for p in tensors]
    rates = [RATE * p.square().mean().sqrt().item() for p in start]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(tensors, rates, strict=True)]
    optimizer = torch.optim.Adam(groups)
    for step in range(STEPS):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / STEPS)
        optimizer.zero_grad()
        with torch.enable_grad():
            divergence(fitted[step % len(fitted)], turn=step // len(fitted)).backward()
        optimizer.step()
    optimizer.zero_grad()
    after = judge()
    if not after < before:
        for p, value in zip(tensors, start, strict=True):
            p.copy_(value)
    return before, after


def refit_output(
    old: Attention, new: Attention, calls: Sequence[Call], new_calls: Sequence[Call]
) -> tuple[float, float]:
    """The output of `new` by ridge regression on that of `old`, pulled towards what it is. -> squared error, as above."""
    fitted, held_out = judged(len(calls))
    biased = new.out.bias is not None

    def rows(i: int) -> tuple[Tensor, Tensor]:
        """What the output reads, and what it lacks of the original's."""
        heads: list[Tensor] = []
        with Recorder([new.out], lambda _, call: heads.append(call[0][0])):
            (x_BLD,), settings = new_calls[i]
            got = new(x_BLD, **settings)
        (x_BLD,), settings = calls[i]
        missing = (old(x_BLD, **settings) - got).flatten(0, -2).double()
        read = heads[0].flatten(0, -2).double()
        return torch.nn.functional.pad(read, (0, 1), value=1.0) if biased else read, missing

    n_inputs = new.out.in_features + biased
    gram, cross = (torch.zeros(n_inputs, n, dtype=torch.float64) for n in (n_inputs, new.out.out_features))
    for i in fitted:
        x, y = rows(i)
        gram, cross = gram + x.T @ x, cross + x.T @ y
    lift = OUTPUT_RIDGE * gram.diagonal().mean() * torch.eye(n_inputs, dtype=gram.dtype)
    change = torch.linalg.solve(gram + lift, cross)
    before = after = 0.0
    for i in held_out:
        x, y = rows(i)
        before, after = before + y.square().sum().item(), after + (y - x @ change).square().sum().item()
    if after < before:
        new.out.weight.add_(change[: new.out.in_features].T)
        if biased:
            new.out.bias.add_(change[-1])
    return before, after
