"""Heads that share keys and values in disguise are found again; errors shrink with what is known of the inputs."""

from dataclasses import replace

import pytest
import torch

import modicum
from modicum import resources
from modicum.config import RopeConfig
from modicum.errors import UsageError
from modicum.gqa.calibrate import collect, moment, probabilities
from modicum.gqa.convert import mean
from modicum.gqa.heads import places, put, take
from modicum.gqa.merge import merge_values, merged_layer, roots
from modicum.lm.decoder import Decoder
from tests.helpers import tiny
from tests.parity.families import make

G = 2
IDS = torch.tensor([[3, 17, 5, 24, 9, 2, 20, 11, 8], [1, 1, 28, 7, 23, 0, 12, 0, 6]])
KINDS = {
    "llama": {"rope": RopeConfig(rotary_dim=10)},
    "llama-biases": {"rope": RopeConfig(rotary_dim=10), "qkv_bias": True, "out_bias": True},
    "gpt2": {"rope": None, "qkv_bias": True, "out_bias": True, "norm": "layer", "gated": False, "ffn_bias": True},
    "gpt_neox": {"rope": RopeConfig(rotary_dim=4), "qkv_bias": True, "out_bias": True, "parallel": True},
}


def invertible(size, generator, dtype=torch.float64):
    """A random matrix whose singular values lie between 1/2 and 2: in float32 nothing is lost by it."""
    left, right = (torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=dtype))[0] for _ in range(2))
    return left @ torch.diag(0.5 + 1.5 * torch.rand(size, generator=generator, dtype=torch.float64)).to(dtype) @ right


def gauge(K, rotary_dim, generator):
    """A matrix for keys and its counterpart for queries, [K, K]: a complex number per frequency, anything elsewhere."""
    keys, queries = torch.zeros(2, K, K, dtype=torch.float64)
    half = rotary_dim // 2
    if half:
        turn = 7 * torch.rand(half, generator=generator, dtype=torch.float64)
        a = torch.polar(0.5 + 1.5 * torch.rand(half, generator=generator, dtype=torch.float64), turn)
        for matrix, number in ((keys, a), (queries, 1 / a.conj())):
            rows = [torch.cat([number.real.diag(), -number.imag.diag()], 1)]
            rows.append(torch.cat([number.imag.diag(), number.real.diag()], 1))
            matrix[:rotary_dim, :rotary_dim] = torch.cat(rows)
    rest = invertible(K - rotary_dim, generator)
    keys[rotary_dim:, rotary_dim:] = rest
    queries[rotary_dim:, rotary_dim:] = torch.linalg.inv(rest).T
    return keys, queries


def disguised(weights, seed):
    """Grouped weights as a multi-head layer, every head in a form of its own."""
    generator = torch.Generator().manual_seed(seed)
    H, K, _ = weights.q.shape
    per_group = H // weights.n_kv_heads
    q, o = weights.q.clone(), weights.o.clone()
    k, v = (x.repeat_interleave(per_group, 0) for x in (weights.k, weights.v))
    biases = [None if b is None else b.repeat_interleave(per_group, 0) for b in (weights.k_bias, weights.v_bias)]
    k_bias, v_bias = biases
    q_bias = None if weights.q_bias is None else weights.q_bias.clone()
    for h in range(H):
        for_keys, for_queries = gauge(K, weights.rotary_dim, generator)
        for_values = invertible(K, generator)
        q[h], k[h], v[h] = for_queries @ q[h], for_keys @ k[h], for_values @ v[h]
        o[:, h] = o[:, h] @ torch.linalg.inv(for_values)
        if q_bias is not None:
            q_bias[h], k_bias[h], v_bias[h] = for_queries @ q_bias[h], for_keys @ k_bias[h], for_values @ v_bias[h]
    return replace(weights, q=q, k=k, v=v, o=o, q_bias=q_bias, k_bias=k_bias, v_bias=v_bias)


def with_layers(model, config, change):
    """A model of another configuration whose attention layers are those of `model`, changed."""
    state = dict(model.dense_state())
    for before, after in zip(places(model.config), places(config), strict=True):
        state |= put(change(take(state, before)), after)
    result = Decoder(config).to(next(iter(state.values())).dtype).eval()
    result.load_state_dict(state, strict=False)
    return result


@pytest.fixture(params=KINDS)
def planted(request):
    """A grouped model in float64, and the same function as a multi-head one."""
    model = tiny(n_kv_heads=G, **KINDS[request.param]).double()
    seeds = iter(range(100))
    wide = with_layers(model, replace(model.config, n_kv_heads=6), lambda w: disguised(w, next(seeds)))
    return model, wide


def test_disguises_change_nothing(planted):
    model, wide = planted
    with torch.no_grad():
        assert (wide(IDS) - model(IDS)).abs().max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_merging_finds_the_shared_heads_again(planted, dtype):
    model, wide = (m.to(dtype) for m in planted)
    with torch.no_grad():
        merged = with_layers(wide, model.config, lambda w: merged_layer(w, G))
        assert (merged(IDS) - model(IDS)).abs().max() < (1e-9 if dtype == torch.float64 else 1e-4)
        # The paper's mean, on the same weights, does not.
        averaged = with_layers(wide, model.config, lambda w: mean(w, G, 0))
        assert (averaged(IDS) - model(IDS)).abs().max() > 0.1


def test_statistics_find_them_too(planted):
    model, wide = planted
    statistics = collect(wide, IDS.tolist(), G)
    prefixes = iter([place.prefix for place in places(wide.config)])
    with torch.no_grad():
        merged = with_layers(wide, model.config, lambda w: merged_layer(w, G, statistics[next(prefixes)]))
        # Eighteen tokens of a width of 24 leave directions unseen, which count only as much as the ridge.
        assert (merged(IDS) - model(IDS)).abs().max() < 1e-4


def test_values_by_hand():
    """Two heads of one dimension: values x_1 and x_2, outputs 3 and 1. The better of the two is kept, as it stands."""
    values = torch.eye(2, dtype=torch.float64)[:, None]
    outputs = torch.tensor([[[3.0, 0]], [[0, 1.0]]], dtype=torch.float64)
    shared, refitted = merge_values(values, outputs, torch.eye(2, dtype=torch.float64))
    assert shared.abs().squeeze().tolist() == pytest.approx([1, 0], abs=1e-5)
    assert (refitted[0, 0, 0] * shared[0, 0]).item() == pytest.approx(3, abs=1e-5)
    assert refitted[1].abs().max() < 1e-9
    # If the second input is ten times as large, its head counts for more.
    shared, refitted = merge_values(values, outputs, torch.diag(torch.tensor([1.0, 100.0], dtype=torch.float64)))
    assert (refitted[1, 0, 1] * shared[0, 1]).item() == pytest.approx(1, abs=1e-4)


def test_roots():
    x = torch.randn(7, 5, dtype=torch.float64)
    root, inverse = roots(moment(x))
    torch.testing.assert_close(root @ root, moment(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(root @ inverse, torch.eye(5, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_statistics_are_moments_of_what_layers_read():
    model = tiny(n_kv_heads=6)
    read, attended = [], []
    block = model.blocks[1]

    def watch(module, args, settings):
        read.append(args[0])
        attended.append(probabilities(module, args[0], settings))

    hook = block.attention.register_forward_pre_hook(watch, with_kwargs=True)
    found = collect(model, IDS.tolist(), G)["blocks.1.attention"]
    hook.remove()
    x = torch.cat([torch.cat(read), torch.ones(2, 9, 1)], -1).double()
    assert found.n_tokens == 18
    torch.testing.assert_close(found.inputs, moment(x) / 18)
    probs = torch.cat(attended).double()
    assert torch.allclose(probs.sum(-1), torch.ones(1, dtype=torch.float64))
    assert probs.triu(1).abs().max() == 0
    averaged = torch.stack([moment(probs[:, h] @ x) for h in (3, 4, 5)]).mean(0) / 18
    torch.testing.assert_close(found.averaged[1], averaged)


def test_from_files_with_calibration(tmp_path):
    make("llama-multi-head", tmp_path / "source")
    source = modicum.read_checkpoint(tmp_path / "source")
    text = [torch.randint(0, 61, (40,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(20)]
    ids = torch.tensor(text[:4])
    model, errors = modicum.load(tmp_path / "source"), {}
    for name, calibration in (("mean", None), ("merged", None), ("calibrated", text)):
        method = "mean" if name == "mean" else "merged"
        modicum.write_checkpoint(modicum.convert_to_gqa(source, 2, method, calibration), tmp_path / name)
        with torch.no_grad():
            errors[name] = (modicum.load(tmp_path / name)(ids) - model(ids)).square().mean().item()
    assert errors["calibrated"] < errors["merged"] < errors["mean"]
    with pytest.raises(UsageError, match="calibration is for the method `merged` on language models"):
        modicum.convert_to_gqa(source, 2, "mean", text)
    draft = modicum.read_checkpoint(resources.model_presets()["modicum-code-draft"])
    with pytest.raises(UsageError, match=r"calibration text .*none\.txt does not exist"):
        modicum.convert_to_gqa(draft, 2, "merged", str(tmp_path / "none.txt"))
