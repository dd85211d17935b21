"""A model's own text read through it: second moments of what its attention layers read, and a walk from layer to layer."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from modicum.core.attend import triangle
from modicum.core.attention import Attention
from modicum.gqa.heads import Place, places
from modicum.gqa.statistics import LayerStatistics, moment

# What an attention layer was called with.
Call = tuple[tuple[Tensor, ...], dict[str, Any]]


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
        x_BLE, read_BME = (with_constant(x) for x in (x_BLD, x_BLD if read_BMD is None else read_BMD))
        probs_BHLM = log_probabilities(self.attention, call).exp().cpu()
        self.sums.n_tokens += x_BLE.shape[0] * x_BLE.shape[1]
        self.sums.queries += moment(x_BLE)
        self.sums.inputs += moment(read_BME)
        averaged_BHLE = probs_BHLM @ read_BME[:, None].to(probs_BHLM.dtype)
        self.sums.averaged += moment(averaged_BHLE.double()) / averaged_BHLE.shape[1]

    def result(self) -> LayerStatistics:
        """Means per row: by its constant, a sum says itself how many there were."""
        queries, inputs, averaged = (x / x[-1, -1] for x in (self.sums.queries, self.sums.inputs, self.sums.averaged))
        return LayerStatistics(queries, inputs, averaged, self.sums.n_tokens)


def with_constant(x: Tensor) -> Tensor:
    """[..., D] -> float64 [..., D + 1] on the CPU."""
    return torch.nn.functional.pad(x.double().cpu(), (0, 1), value=1.0)


def log_probabilities(attention: Attention, call: Call) -> Tensor:
    """What the layer attends to, [B, H, L, M]: its own projections, norms, rotation and mask, without its fused kernel."""
    (x_BLD,), settings = call
    context_BMD, rotate = settings.get("context"), settings.get("rotate")
    read_BMD = x_BLD if context_BMD is None else context_BMD
    q_BLHK = attention.by_head(attention.project.q(x_BLD), attention.q_norm)
    k_BMGK = attention.by_head(attention.project.k(read_BMD), attention.k_norm)
    if rotate is not None:
        q_BLHK, k_BMGK = rotate(q_BLHK), rotate(k_BMGK)
    L, K = q_BLHK.shape[1], q_BLHK.shape[3]
    scale = K**-0.5 if attention.scale is None else attention.scale
    q_BGRLK = (q_BLHK * scale).transpose(1, 2).unflatten(1, (k_BMGK.shape[2], -1))
    scores_BHLM = (q_BGRLK @ k_BMGK.permute(0, 2, 3, 1)[:, :, None]).flatten(1, 2)
    mask = triangle(L, L, scores_BHLM) if settings.get("causal") else settings.get("mask")
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


def call_of(module: nn.Module, block: nn.Module, x_BLD: Tensor, settings: dict[str, Any]) -> Call:
    """What `module` is called with within a block; the block gets no further."""

    def stop(_: nn.Module, call: Call) -> None:
        raise _Called(call)

    try:
        with Recorder([module], stop):
            block(x_BLD, **settings)
    except _Called as called:
        return called.args[0]
    raise RuntimeError("the block does not call this module")


def statistics_of(attention: Attention, calls: Iterable[Call]) -> LayerStatistics:
    """What a layer read in these calls."""
    sums = Sums(attention)
    for call in calls:
        sums.add(call)
    return sums.result()


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

        with Recorder(self.members, keep):
            for batch in batches:
                model(*batch)

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
