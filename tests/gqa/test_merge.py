"""The closed forms by hand and against searching, statistics against plain sums, refits against what they start from."""

from dataclasses import replace

import pytest
import torch

from modicum.config import RopeConfig
from modicum.gqa.align import aligned_layer, fold_value_bias, permuted
from modicum.gqa.calibrate import collect, log_probabilities
from modicum.gqa.heads import AttentionWeights, cast, places, take
from modicum.gqa.merge import merge_keys, merge_rotated_keys, merge_values, merged_layer
from modicum.gqa.refit import convert_model, refit_output, refit_scores
from modicum.gqa.statistics import LayerStatistics, covariance, moment, roots
from tests.gqa.planted import FAMILIES, inputs
from tests.helpers import tiny

D = torch.float64


def test_values_by_hand():
    """Two heads of one dimension: values x_1 and x_2, outputs 3 and 1. The better of the two is kept, as it stands."""
    values = torch.eye(2, dtype=D)[:, None]
    outputs = torch.tensor([[[3.0, 0]], [[0, 1.0]]], dtype=D)
    shared, refitted = merge_values(values, outputs, torch.eye(2, dtype=D))
    assert shared.abs().squeeze().tolist() == pytest.approx([1, 0], abs=1e-5)
    assert (refitted[0, 0, 0] * shared[0, 0]).item() == pytest.approx(3, abs=1e-5)
    assert refitted[1].abs().max() < 1e-9
    # If the second input is ten times as large, its head counts for more.
    shared, refitted = merge_values(values, outputs, torch.diag(torch.tensor([1.0, 100.0], dtype=D)))
    assert (refitted[1, 0, 1] * shared[0, 1]).item() == pytest.approx(1, abs=1e-4)


def test_rotated_keys_by_hand():
    """One frequency, two heads that read one input each; queries of strength 1 and 2: the second key is kept."""
    stats = LayerStatistics.unknown(2, 2)
    k = torch.tensor([[[1.0, 0, 0]], [[0, 1.0, 0]]], dtype=torch.complex128)
    q = torch.tensor([[[1.0, 0, 0]], [[0, 2j, 0]]], dtype=torch.complex128)
    queries, keys = merge_rotated_keys(q, k, stats)
    assert keys.abs().tolist()[0] == pytest.approx([0, 1, 0], abs=1e-12)
    # Scores are q conj(k): of the second head as they were, of the first nothing is left.
    assert queries[1, 0, 1] * keys[0, 1].conj() == pytest.approx(2j)
    assert queries[0].abs().max() < 1e-12


def rows(n, dim, seed):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=D)


def error_of_values(values, outputs, shared, refitted, root):
    return sum(
        (root @ (v.T @ o - shared.T @ r)).square().sum() for v, o, r in zip(values, outputs, refitted, strict=True)
    )


def test_no_other_values_are_nearer():
    """Least squares for every other shared matrix, nearby or not, leaves more."""
    values, outputs = rows(15, 7, 0).unflatten(0, (5, 3)), rows(15, 6, 1).unflatten(0, (5, 3))
    second = moment(rows(40, 7, 2)) / 40
    root, _ = roots(second)
    shared, refitted = merge_values(values, outputs, second)
    least = error_of_values(values, outputs, shared, refitted, root)
    for seed in range(20):
        other = shared + 10 ** -(seed % 4) * rows(3, 7, 10 + seed)
        best = torch.linalg.lstsq((root @ other.T).expand(5, -1, -1), root @ values.mT @ outputs).solution
        assert error_of_values(values, outputs, other, best, root) > least


def test_no_other_keys_are_nearer():
    """Without rotation: scores differ least, keys counted about their mean."""
    q, k = rows(12, 8, 3).unflatten(0, (4, 3)), rows(12, 8, 4).unflatten(0, (4, 3))
    x = torch.nn.functional.pad(rows(50, 7, 5) + 1, (0, 1), value=1.0)
    stats = LayerStatistics(moment(x) / 50, moment(x) / 50, moment(x) / 50)

    def error(queries, keys):
        scores = [(x @ a.T) @ (x @ b.T).T - (x @ c.T) @ (x @ keys.T).T for a, b, c in zip(q, k, queries, strict=True)]
        # What all keys of a query have in common changes no softmax.
        return sum((s - s.mean(1, keepdim=True)).square().sum() for s in scores)

    queries, keys = merge_keys(q, k, stats)
    assert keys[:, -1].abs().max() == 0
    least = error(queries, keys)
    for seed in range(20):
        change = 10 ** -(seed % 4)
        assert error(queries + change * rows(12, 8, 30 + seed).unflatten(0, (4, 3)), keys) > least
        other = keys + change * torch.nn.functional.pad(rows(3, 7, 60 + seed), (0, 1))
        assert error(queries, other) > least


def test_merging_is_never_worse_than_aligning():
    """Of values and outputs: an average of aligned heads is one of the solutions that the closed form chooses from."""
    model = tiny(n_kv_heads=6, rope=RopeConfig(rotary_dim=10)).double()
    w = take(model.dense_state(), next(places(model.config)))
    stats = LayerStatistics.unknown(24, 24)

    def error(new):
        shared = new.v.repeat_interleave(3, 0)
        before, after = (torch.einsum("hkd,ehk->hde", v, o) for v, o in ((w.v, w.o), (shared, new.o)))
        return (before - after).square().sum()

    assert error(merged_layer(w, 2, stats)) < error(aligned_layer(w, 2, stats))


def test_folding_a_bias():
    w = AttentionWeights(
        *(rows(4, 5, seed).unflatten(0, (2, 2)) for seed in range(3)),
        o=rows(7, 4, 3).unflatten(1, (2, 2)),
        v_bias=torch.tensor([[1.0, 0], [0, 2.0]], dtype=D),
        o_bias=torch.zeros(7, dtype=D),
    )
    folded = fold_value_bias(w)
    assert folded.v_bias.abs().max() == 0
    torch.testing.assert_close(folded.o_bias, w.o[:, 0, 0] + 2 * w.o[:, 1, 1])
    without = replace(w, o_bias=None)
    assert fold_value_bias(without) is without


def test_moments():
    x = rows(9, 5, 0)
    root, inverse = roots(moment(x))
    torch.testing.assert_close(root @ root, moment(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(root @ inverse, torch.eye(5, dtype=D), rtol=1e-9, atol=1e-9)
    constant = torch.nn.functional.pad(x, (0, 1), value=1.0)
    centred = covariance(moment(constant) / 9)
    torch.testing.assert_close(centred[:-1, :-1], torch.cov(x.T, correction=0))
    assert centred[-1].abs().max() < 1e-12


@pytest.mark.parametrize("family", ["llama", "t5", "captioner"])
def test_statistics_are_moments_of_what_layers_read(family):
    model = FAMILIES[family]()
    prefix = "blocks.1.attention" if family == "llama" else "decoder.blocks.1.cross"
    calls = []
    hook = model.get_submodule(prefix).register_forward_pre_hook(
        lambda module, args, settings: calls.append((args, settings)), with_kwargs=True
    )
    found = collect(model, [inputs(model.config)], [prefix])[prefix]
    hook.remove()
    (x,), settings = calls[0]
    read = settings.get("context", x)
    queries, keys = (torch.nn.functional.pad(t.double(), (0, 1), value=1.0) for t in (x, read))
    probs = log_probabilities(model.get_submodule(prefix), calls[0]).exp().double()
    torch.testing.assert_close(probs.sum(-1), torch.ones_like(probs.sum(-1)), rtol=1e-5, atol=1e-5)
    assert found.n_tokens == x.shape[0] * x.shape[1]
    torch.testing.assert_close(found.queries, moment(queries) / queries[..., 0].numel())
    torch.testing.assert_close(found.inputs, moment(keys) / keys[..., 0].numel())
    averaged = torch.stack([moment(probs[:, h] @ keys) for h in range(6)]).mean(0) / queries[..., 0].numel()
    torch.testing.assert_close(found.averaged, averaged, rtol=1e-4, atol=1e-4)
    if family == "llama":
        assert probs.triu(1).abs().max() == 0


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "t5", "captioner"])
def test_attention_by_hand_is_the_kernels(family):
    """`log_probabilities` gives the weights by which the layer's own output is made."""
    model = FAMILIES[family]()
    seen = []
    layers = [m for name, m in model.named_modules() if name.endswith((".attention", ".cross"))]
    hooks = [
        layer.register_forward_hook(
            lambda m, args, settings, out: seen.append((m, (args, settings), out)), with_kwargs=True
        )
        for layer in layers
    ]
    with torch.no_grad():
        model(*inputs(model.config))
        for hook in hooks:
            hook.remove()
        for layer, call, out in seen:
            (x,), settings = call
            probs = log_probabilities(layer, call).exp()
            v = layer.project.v(settings.get("context", x)).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
            mixed = probs @ v.repeat_interleave(probs.shape[1] // v.shape[1], 1)
            torch.testing.assert_close(layer.out(mixed.transpose(1, 2).flatten(2)), out, rtol=1e-3, atol=1e-4)


def calls_of(model, prefix, batches):
    calls = []
    hook = model.get_submodule(prefix).register_forward_pre_hook(
        lambda module, args, settings: calls.append((args, settings)), with_kwargs=True
    )
    with torch.no_grad():
        for batch in batches:
            model(*batch)
    hook.remove()
    return calls


def test_refits_lower_what_they_are_judged_by():
    wide = tiny(n_kv_heads=6, rope=RopeConfig(rotary_dim=10))
    ids = torch.randint(0, 29, (12, 1, 40), generator=torch.Generator().manual_seed(5))
    calls = calls_of(wide, "blocks.0.attention", [(x,) for x in ids])
    old = wide.blocks[0].attention
    model = tiny(n_kv_heads=6, rope=RopeConfig(rotary_dim=10))
    convert_model(model, [(ids[0],)], 2)  # a single piece: the closed form alone
    new = model.blocks[0].attention
    with torch.no_grad():
        before, after = refit_scores(old, new, calls, calls)
        assert after < 0.9 * before
        before, after = refit_output(old, new, calls, calls)
        assert after < 0.9 * before
        # Nothing is left to gain where the layer is the original: a step that gains nothing is taken back.
        kept = [p.clone() for p in old.parameters()]
        refit_scores(old, old, calls, calls)
        refit_output(old, old, calls, calls)
        assert all(torch.allclose(p, k, atol=1e-6) for p, k in zip(old.parameters(), kept, strict=True))


def test_orders_move_whole_groups():
    w = cast(take(tiny(n_kv_heads=3).dense_state(), next(places(tiny(n_kv_heads=3).config))), D)
    moved = permuted(w, [2, 0, 1])
    assert torch.equal(moved.k, w.k[[2, 0, 1]])
    assert torch.equal(moved.q, w.q[[4, 5, 0, 1, 2, 3]])
    assert torch.equal(moved.o, w.o[:, [4, 5, 0, 1, 2, 3]])
