"""Exact gauges change nothing; heads that share keys and values in disguise are found again, in every family."""

import pytest
import torch

from modicum.gqa.align import balanced, rms
from modicum.gqa.convert import ConvertedTensors
from modicum.gqa.heads import places, put, take
from modicum.gqa.refit import convert_model
from tests.gqa.planted import FAMILIES, TEXT, disguised, examples, logits, with_tensors
from tests.helpers import tiny


@pytest.fixture(params=FAMILIES)
def pair(request):
    """A grouped model in float64, and the same function as a multi-head one."""
    model = FAMILIES[request.param]().double()
    return model, disguised(model, model.config.n_heads)


def converted(wide, config, method):
    return with_tensors(wide, config, ConvertedTensors(wide.dense_state(), wide.config, config, method, 0))


def test_exact_gauges(pair):
    model, wide = pair
    assert (logits(wide) - logits(model)).abs().max() < 1e-10
    # A gauge that is none is seen.
    with torch.no_grad():
        wide.get_parameter(f"{next(places(wide.config)).prefix}.project.k.weight")[0] *= 1.1
    assert (logits(wide) - logits(model)).abs().max() > 1e-6


def test_balancing_changes_sizes_alone(pair):
    """Values become as large as their outputs and keys as their queries, and logits stay."""
    _, wide = pair
    state = wide.dense_state()
    sizes = []
    for place in places(wide.config):
        w = balanced(take(state, place))
        state |= put(w, place)
        sizes.append((rms(w.v) / rms(w.o.permute(1, 2, 0)) - 1).abs().max())
        if w.k_norm is None:
            rest = slice(w.rotary_dim, None)
            sizes += (rms(w.k)[:, rest] / rms(w.q)[:, rest] - 1).abs().flatten().tolist()
            pairs = [rms(x)[:, : w.rotary_dim].unflatten(1, (2, -1)).sum(1) for x in (w.k, w.q)]
            sizes += (pairs[0] / pairs[1] - 1).abs().flatten().tolist()
    assert max(sizes) < 1e-9
    assert (logits(with_tensors(wide, wide.config, state)) - logits(wide)).abs().max() < 1e-10


@pytest.mark.parametrize("method", ["aligned", "merged"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_disguises_are_seen_through(pair, method, dtype):
    model, wide = (m.to(dtype) for m in pair)
    found = logits(converted(wide, model.config, method))
    assert (found - logits(model)).abs().max() < (1e-5 if dtype == torch.float64 else 1e-4)


def test_the_mean_does_not(pair):
    model, wide = pair
    assert (logits(converted(wide, model.config, "mean")) - logits(model)).abs().max() > 0.05


@pytest.mark.parametrize("family", TEXT)
@pytest.mark.parametrize("method", ["aligned", "merged"])
def test_calibrated(family, method):
    model = FAMILIES[family]()
    wide = disguised(model.double(), model.config.n_heads).float()
    ids = torch.randint(0, 29, (8, 2, 11), generator=torch.Generator().manual_seed(5))
    batches = examples(model.config, ids)
    layers = []
    convert_model(wide, batches, model.config.n_kv_heads, method, lambda: layers.append(1))
    assert wide.config == model.config
    assert len(layers) == sum(
        "project.k.weight" in n for n, _ in wide.named_parameters() if not n.startswith("encoder")
    )
    assert (logits(wide) - logits(model.float())).abs().max() < 1e-4


@pytest.mark.parametrize("method", ["aligned", "merged"])
def test_from_grouped_to_fewer(method):
    """Queries of a group keep their keys: six heads that are two come from three that are not all alike."""
    model = FAMILIES["gpt2"]().double()
    between = disguised(model, 2)
    assert (logits(converted(between, model.config, method)) - logits(model)).abs().max() < 1e-9
    single = tiny(n_kv_heads=1).double()
    pairs = disguised(single, 3)
    assert (logits(converted(pairs, single.config, method)) - logits(single)).abs().max() < 1e-7
