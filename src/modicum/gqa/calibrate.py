"""A model's own text read through it: second moments of what its attention layers read, and a walk from layer to layer."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modicum.core.attend import triangle
from modicum.core.attention import Attention
from modicum.gqa.heads import Place, places
from modicum.gqa.statistics import LayerStatistics, moment

# What an attention layer was called with.
Call = tuple[tuple[Tensor, ...], dict[str, Any]]

# Of a piece's queries, evenly spread, about this many are averaged over: a moment of H times as many rows as any other.
AVERAGED_ROWS = 64


class Sums:
    """Running sums of one layer's statistics."""

    def __init__(self, attention: Attention) -> None:
        self.attention = attention
        q_dim, kv_dim = attention.project.q.in_features, attention.project.k.in_features
        queries, inputs, averaged = (torch.zeros(n + 1, n + 1, dtype=torch.float64) for n in (q_dim, kv_dim, kv_dim))
        self.sums = LayerStatistics(queries, inputs, averaged)

    def add(self, call: Call) -> None:
        (x_BLD,), settings = call
        read_BMD = settings.get("context")
        x_BLE = with_constant(x_BLD)
        read_BME = x_BLE if read_BMD is None else with_constant(read_BMD)
        probs_BHLM = log_probabilities(self.attention, call, spread(x_BLD.shape[1], AVERAGED_ROWS)).exp().cpu()
        self.sums.n_tokens += x_BLE.shape[0] * x_BLE.shape[1]
        own = moment(x_BLE)
        self.sums.queries += own
        self.sums.inputs += own if read_BMD is None else moment(read_BME)
        averaged_BHLE = probs_BHLM @ read_BME[:, None].to(probs_BHLM.dtype)
        self.sums.averaged += moment(averaged_BHLE.double()) / averaged_BHLE.shape[1]

    def result(self) -> LayerStatistics:
        """Means per row: by its constant, a sum says itself how many there were."""
        queries, inputs, averaged = (x / x[-1, -1] for x in (self.sums.queries, self.sums.inputs, self.sums.averaged))
        return LayerStatistics(queries, inputs, averaged, self.sums.n_tokens)


def with_constant(x: Tensor) -> Tensor:
    """[..., D] -> float64 [..., D + 1] on the CPU."""
    return torch.nn.functional.pad(x.double().cpu(), (0, 1), value=1.0)


def spread(n_rows: int, wanted: int, turn: int = 0) -> slice:
    """About `wanted` of `n_rows` rows at even distances, others at every turn until all had theirs; all if they are few."""
    step = max(1, n_rows // wanted)
    return slice(turn % step, None, step)


def log_probabilities(attention: Attention, call: Call, rows: slice = slice(None)) -> Tensor:
    """What the layer attends to from these rows of queries, [B, H, rows, M]: its own projections, norms, rotation and mask,
    without its fused kernel."""
    (x_BLD,), settings = call
    context_BMD, rotate = settings.get("context"), settings.get("rotate")
    read_BMD = x_BLD if context_BMD is None else context_BMD
    q_BLHK = attention.by_head(attention.project.q(x_BLD[:, rows]), attention.q_norm)
    k_BMGK = attention.by_head(attention.project.k(read_BMD), attention.k_norm)
    if rotate is not None:
        q_BLHK, k_BMGK = rotate.at(rows)(q_BLHK), rotate(k_BMGK)
    scale = q_BLHK.shape[-1] ** -0.5 if attention.scale is None else attention.scale
    q_BGRLK = (q_BLHK * scale).transpose(1, 2).unflatten(1, (k_BMGK.shape[2], -1))
    scores_BHLM = (q_BGRLK @ k_BMGK.permute(0, 2, 3, 1)[:, :, None]).flatten(1, 2)
    M = scores_BHLM.shape[-1]
    mask = triangle(M, M, scores_BHLM) if settings.get("causal") else settings.get("mask")
    if mask is not None and mask.shape[-2] > 1:
        mask = mask[..., rows, :]
    return (scores_BHLM if mask is None else scores_BHLM + mask).log_softmax(-1)


class Recorder:
    """What a module is called with, while this is entered."""

    def __init__(self, modules: Iterable[nn.Module], keep: Callable[[nn.Module, Call], Any]) -> None:
        self.modules, self.keep = list(modules), keep

    def __enter__(self) -> None:
        def hook(module: nn.Module, args: tuple[Tensor, ...], settings: dict[str, Any]) -> None:
            self.keep(module, (args, settings))

        self.handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in self.modules]

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


class _Called(Exception):
    """Carries the call out of a module that is not to be run."""


def call_of(module: nn.Module, within: nn.Module, *args: Any, **settings: Any) -> Call:
    """What `module` is called with where `within` is called with these; nothing behind it is run."""

    def stop(_: nn.Module, call: Call) -> None:
        raise _Called(call)

    try:
        with Recorder([module], stop):
            within(*args, **settings)
    except _Called as called:
        return called.args[0]
    raise RuntimeError("this module is not called")


def statistics_of(attention: Attention, calls: Iterable[Call]) -> LayerStatistics:
    """What a layer read in these calls."""
    sums = Sums(attention)
    for call in calls:
        sums.add(call)
    return sums.result()


@contextmanager
def passed_by(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Blocks hand on what they are given, while this is entered."""
    blocks = list(blocks)
    for block in blocks:
        block.forward = lambda x_BLD, **_: x_BLD  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own is found again


class Walk:
    """A text on its way through a model, block by block.

    Iterated, it gives every block that holds attention layers to be shared, those layers' places with what they are called
    with, and the settings the block is called with, one per batch. `rows` are what the first block reads of every batch.
    """

    def __init__(self, model: Any, batches: Iterable[tuple[Tensor, ...]]) -> None:
        self.members: dict[nn.Module, list[tuple[Place, nn.Module]]] = {}
        for place in places(model.config):
            block = model.get_submodule(place.prefix.rpartition(".")[0])
            self.members.setdefault(block, []).append((place, model.get_submodule(place.prefix)))
        self.settings: dict[nn.Module, list[dict[str, Any]]] = {block: [] for block in self.members}
        self.rows: list[Tensor] = []
        first = next(iter(self.members))

        def keep(block: nn.Module, call: Call) -> None:
            self.settings[block].append(call[1])
            if block is first:
                self.rows.append(call[0][0])

        # What blocks are given besides their rows does not depend on the rows, so that none has to be run for it.
        with Recorder(self.members, keep), passed_by(self.members):
            for batch in batches:
                call_of(model.head, model, *batch)

    def __iter__(self) -> Iterator[tuple[nn.Module, list[tuple[Place, list[Call]]], list[dict[str, Any]]]]:
        rows = self.rows
        for block, members in self.members.items():
            calls: dict[nn.Module, list[Call]] = {layer: [] for _, layer in members}
            with Recorder(calls, lambda layer, call, calls=calls: calls[layer].append(call)):  # type: ignore[misc]
                rows = [block(x, **given) for x, given in zip(rows, self.settings[block], strict=True)]
            yield block, [(place, calls[layer]) for place, layer in members], self.settings[block]


@torch.no_grad()
def collect(
    model: nn.Module, batches: Iterable[tuple[Tensor, ...]], prefixes: Iterable[str]
) -> dict[str, LayerStatistics]:
    """Statistics of the attention layers at `prefixes`.

    Args:
        model: not packed; its own dtype is what it computes in, sums are in float64.
        batches: what the model is called with, each at most its context; ten tokens per unit of width are advised.
    """
    sums = {prefix: Sums(model.get_submodule(prefix)) for prefix in prefixes}  # type: ignore[arg-type]
    of = {total.attention: total for total in sums.values()}
    with Recorder(of, lambda module, call: of[module].add(call)):  # type: ignore[index]
        for batch in batches:
            model(*batch)
    return {prefix: total.result() for prefix, total in sums.items()}
