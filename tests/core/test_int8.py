"""int8 weights: the rounding by hand, exact sums, errors within their bound, the same choices with and without a draft."""

from types import SimpleNamespace

import pytest
import torch

import modicum
from modicum.core import int8
from modicum.core.int8 import FORMS, FULL, Int8Linear, exact_products, quantise
from modicum.core.linear import ACTIVATIONS, Linear, Projections
from modicum.errors import UsageError
from modicum.lm.hf_adapter import HFAdapter
from modicum.speculative.costs import forms
from tests.helpers import perturbed, prompts, tiny, tiny_t5

if not exact_products():
    pytest.skip("this CPU has no exact integer products", allow_module_level=True)


def rounded(weight):
    """The weight that int8 stands for, in float64."""
    values, step = quantise(weight)
    return values.double() * step.double()[:, None]


def test_rounding_by_hand():
    values, step = quantise(torch.tensor([[127.0, 63.4, -0.6], [0.0, 0.0, 0.0], [-0.254, 0.001, 0.127]]))
    assert values.tolist() == [[127, 63, -1], [0, 0, 0], [-127, 0, 64]]
    assert step[0] == 1
    assert step[2] == pytest.approx(0.002)


def test_a_product_by_hand():
    layer = Int8Linear(torch.tensor([[127.0, -127.0, 3.0], [0.0, 254.0, 2.0]]), torch.tensor([0.5, -1.0]))
    # 254 is step 2, so that the 2 beside it is one step; every activation here is one that two bytes can hold.
    y = layer(torch.tensor([[FULL * 1.0, 0.0, -2.0], [1.0, 1.0, FULL * 1.0]]))
    assert y.tolist() == [[127 * FULL - 6 + 0.5, -4 - 1.0], [3 * FULL + 0.5, 254 + 2 * FULL - 1.0]]


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_the_weights_and_within_half_a_step(dtype, form):
    torch.manual_seed(0)
    weight, bias = (torch.randn(37, 53) * torch.rand(37, 1)).to(dtype), torch.randn(37).to(dtype)
    layer, x = Int8Linear(weight, bias, form), (torch.randn(2, 7, 53) * 3).to(dtype)
    y = layer(x)
    assert (y.shape, y.dtype) == ((2, 7, 37), dtype)
    stood_for = x.double() @ rounded(weight).T + bias.double()
    resolution = 1e-2 if dtype == torch.bfloat16 else 1e-6
    # Of the activations: half of a 32639th (127th) of the row's largest, at worst in step with every weight.
    top = x.double().abs().amax(-1, keepdim=True)
    full = FULL if form == "int8" else 127
    slack = 0.5 * top / full * rounded(weight).abs().sum(1) + resolution * stood_for.abs() + 1e-5
    assert ((y.double() - stood_for).abs() <= slack).all()
    exact = x.double() @ weight.double().T + bias.double()
    step = weight.double().abs().amax(1) / 127
    assert ((y.double() - exact).abs() <= slack + 0.5 * step * x.double().abs().sum(-1, keepdim=True)).all()
    # Positive control: activations of a twentieth of the steps are not within it.
    coarse = (x.double() * full / top / 20).round() * 20 * top / full @ rounded(weight).T + bias.double()
    assert dtype == torch.bfloat16 or ((coarse - stood_for).abs() > slack).any()


@pytest.mark.parametrize("form", sorted(FORMS))
def test_a_row_has_the_same_bits_whatever_is_beside_it(form):
    torch.manual_seed(1)
    layer, x = Int8Linear(torch.randn(67, 131), None, form), torch.randn(33, 131)
    together = layer(x)
    for n_rows in (1, 2, 3, 5, 8, 17):
        assert torch.equal(layer(x[:n_rows]), together[:n_rows])
        assert torch.equal(layer(x[-n_rows:] * 1.0), together[-n_rows:])


@pytest.mark.parametrize("form", sorted(FORMS))
def test_rows_that_are_not_numbers_stay_so_and_alone(form):
    layer = Int8Linear(torch.randn(7, 5), torch.ones(7), form)
    x = torch.randn(5, 5)
    x[1], x[2, 3], x[3, 0] = 0, torch.nan, torch.inf
    y = layer(x)
    assert torch.equal(y[1], torch.ones(7))
    assert not y[2:4].isfinite().any()
    assert torch.equal(y[[0, 4]], layer(x[[0, 4]]))
    assert layer(x[:0]).shape == (0, 7)
    assert layer(x.view(5, 1, 5)[:, :0]).shape == (5, 0, 7)


@pytest.mark.parametrize("activation", [None, *sorted(ACTIVATIONS)])
def test_projections_that_read_the_same_input(activation):
    torch.manual_seed(2)
    layers = Projections(11, {"q": 7, "k": 5, "v": 3}, bias=True)
    x, alone = torch.randn(2, 13, 11), {}
    for name in layers.sizes:
        layer = layers.get_submodule(name)
        assert isinstance(layer, Linear)
        alone[name] = Int8Linear(layer.weight, layer.bias)(x)
    layers.pack("int8")
    for got, name in zip(layers(x, activation), alone, strict=True):
        wanted = alone[name] if activation is None else ACTIVATIONS[activation](alone[name])
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("make", [tiny, tiny_t5])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_the_one_its_rounded_weights_make(make, tied):
    model, reference = make(tie_embeddings=tied), make(tie_embeddings=tied)
    ids = torch.randint(0, 29, (3, 7))
    given = (ids, ids[:, :5]) if make is tiny_t5 else (ids,)
    with torch.no_grad():
        table = reference.embed.weight.clone()
        for module in reference.modules():
            if isinstance(module, Linear):
                module.weight = torch.nn.Parameter(rounded(module.weight).float())
        reference.embed.weight = torch.nn.Parameter(table)
        wanted = reference(*given)
        exact = model(*given)
        got = model.for_inference(weights="int8")(*given)
    assert forms(model) == ["float32", "int8"]
    scale = wanted.abs().max()
    assert (got - wanted).abs().max() <= 1e-3 * scale
    # Positive control: rounding did something, and more than that.
    assert (got - exact).abs().max() > 2e-3 * scale
    # Again is once, and `generate` leaves it as it is.
    assert model.for_inference(weights="int8").for_inference() is model


@pytest.mark.parametrize(("form", "k"), [("int8", 1), ("int8", 4), ("int8-dynamic", 3)])
def test_greedy_identity_within_the_same_int8_model(form, k):
    target = tiny()
    draft = perturbed(target, 5, 0.05)
    target.for_inference(weights=form)
    assert forms(target) == ["float32", form]
    given, settings = prompts([5, 1, 17]), {"temperature": 0, "max_new_tokens": 40}
    expected = modicum.generate(target, given, **settings)
    for drafter in (draft, "ngram", target):
        out = modicum.generate(target, given, draft=drafter, num_draft_tokens=k, **settings)
        assert out.tokens == expected.tokens
    assert out.stats.acceptance_rate == 1


@pytest.mark.parametrize(("form", "most"), [("int8", 0.02), ("int8-dynamic", 0.06)])
def test_the_shipped_target_hardly_changes(form, most):
    text = "def binary_search(items, wanted):\n    low, high = 0, len(items)\n    while low < high:\n"
    plain = modicum.load("modicum-code-target", dtype="float32")
    ids = torch.tensor([plain.tokenizer.encode(text)])
    with torch.inference_mode():
        exact = plain(ids)
        got = modicum.load("modicum-code-target", dtype="float32").for_inference(weights=form)(ids)
    assert 1e-3 < (got - exact).square().mean().sqrt() / exact.std() < most


def test_refusals(tmp_path, monkeypatch):
    model = tiny().for_inference(weights="int8")
    with pytest.raises(UsageError, match="rounded to int8 .* are gone: load the checkpoint again to save"):
        modicum.save(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(UsageError, match="packed for inference and cannot be trained"):
        model.train()
    with pytest.raises(UsageError, match="weights `int4` are not known: use int8, int8-dynamic, or leave it out"):
        tiny().for_inference(weights="int4")
    with pytest.raises(UsageError, match='packed for inference already, not as int8: load it again .*weights="int8"'):
        tiny().for_inference().for_inference(weights="int8")
    with pytest.raises(UsageError, match="packed for inference already, not as int8-dynamic"):
        model.for_inference(weights="int8-dynamic")
    with pytest.raises(UsageError, match="this model is on meta"):
        tiny().to("meta").for_inference(weights="int8")
    with pytest.raises(UsageError, match="for families with native code, not for `mamba`"):
        HFAdapter.for_inference(SimpleNamespace(config=SimpleNamespace(family="mamba")), weights="int8")
    monkeypatch.setattr(int8, "exact_products", lambda: False)
    with pytest.raises(UsageError, match="no exact integer products"):
        tiny().for_inference(weights="int8")


def test_products_that_saturate_are_noticed(monkeypatch):
    """Without VNNI, two products of bytes are added in 16 bits."""

    def saturating(x, packed, scale, zeros):
        weight = torch.tensor([[127, 127], [-127, 127], [127, -1]], dtype=torch.int64).repeat(1, 32)
        pairs = (x.long()[:, None] * weight).unflatten(-1, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1)
        return (pairs.sum(-1) - 128 * weight.sum(-1)).float()

    monkeypatch.setattr(int8, "product", saturating)
    assert not exact_products.__wrapped__()
