"""bit_exact: logits bit for bit, whatever is scored with them; greedy text the same with any draft and without."""

import random

import pytest
import torch

import modicum
from modicum.config import RopeConfig
from modicum.core import exact
from modicum.core.attend import folded
from modicum.core.exact import ROWS, by_rows, check_rows, exact_view
from modicum.core.linear import PackedLinear
from modicum.errors import UsageError
from modicum.lm.decoder import Decoder
from tests.helpers import perturbed, prompts, tiny, tiny_t5
from tests.parity.families import CASES, make

DTYPES = [torch.bfloat16, torch.float32]


def scored(view, ids, steps):
    """The logits of `ids`, read as `steps` say: so many tokens at a time, and so many thrown away behind them."""
    cache, at, rows = view.new_cache(1, len(ids) + 40), 0, []
    if hasattr(view, "read"):
        view.read([[3, 1, 4, 1, 5]], cache)
    generator = random.Random(1)
    with torch.inference_mode():
        for real, junk in steps:
            real = min(real, len(ids) - at)
            drafted = [generator.randrange(view.config.vocab_size) for _ in range(junk)]
            rows.append(view(torch.tensor([ids[at : at + real] + drafted]), cache=cache)[0, :real])
            cache.commit(real)
            at += real
            if at == len(ids):
                return torch.cat(rows)
    raise AssertionError("too few steps")


def differing(view, ids, seed, rounds=2):
    """How many tokens' logits are other bits when they are scored in random company than when alone."""
    generator = random.Random(seed)
    alone = scored(view, ids, [(1, 0)] * len(ids))
    assert alone.isfinite().all()
    count = 0
    for _ in range(rounds):
        steps = [(generator.randint(1, 11), generator.randint(0, 8)) for _ in ids]
        count += int((scored(view, ids, steps) != alone).any(-1).sum())
    return count


@pytest.mark.parametrize("case", CASES)
def test_every_family_to_the_bit(case, tmp_path):
    make(case, tmp_path)
    by_company = 0
    for dtype in DTYPES:
        model = modicum.load(tmp_path, dtype=dtype).for_inference()
        for seed, given in enumerate(prompts([45], vocab_size=61)):
            assert differing(exact_view(model), given, seed) == 0
            by_company += differing(model, given, seed, rounds=1)
    # Positive control: as models compute otherwise, bits depend on company.
    assert by_company > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_a_text_about_a_text(dtype, gated):
    model = tiny_t5(gated=gated, activation="gelu_tanh").to(dtype).for_inference()
    assert differing(exact_view(model), prompts([47])[0], 0) == 0


# Wide enough that oneDNN adds up in several parts, by the number of rows.
WIDE = {"dim": 2304, "ffn_dim": 2816, "n_layers": 1, "n_heads": 6, "head_dim": 64, "rope": RopeConfig(rotary_dim=64)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_wide_model(dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = tiny(scale=0.03, **WIDE).to(dtype).for_inference()
        assert differing(exact_view(model), prompts([37])[0], 0) == 0
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tampered", ["rows", "attention"])
def test_every_part_is_needed(tampered, monkeypatch):
    """Positive control: with one part computed as ever, bits differ somewhere."""
    if tampered == "rows":
        monkeypatch.setattr(exact.FixedRows, "__call__", lambda self, x, activation=None: self.packed(x, activation))
    else:
        monkeypatch.setattr(exact, "causal_alone", folded)
    model = tiny(scale=0.03, **WIDE).for_inference()
    assert differing(exact_view(model), prompts([37])[0], 0) > 0


def test_activations_row_by_row():
    # 31 numbers are no whole number of vectors, so rows that lie behind each other share one.
    x = torch.randn(200, 9, 31, generator=torch.Generator().manual_seed(0)) * 3
    silu = torch.nn.functional.silu
    alone = torch.stack([silu(row) for row in x.view(-1, 31)]).view(x.shape)
    assert torch.equal(by_rows(silu, x), alone)
    assert not torch.equal(silu(x), alone)


def recorded(monkeypatch, target, given, **call):
    """A text and the logits that each of its tokens was chosen by."""
    calls, events, whole = [], [], Decoder.forward

    def forward(self, *args, **kwargs):
        logits = whole(self, *args, **kwargs)
        if self.config is target.config and logits.shape[1]:
            calls.append(logits[0].clone())
        return logits

    monkeypatch.setattr(Decoder, "forward", forward)
    out = modicum.generate(target, [given], temperature=0, bit_exact=True, on_token=events.append, **call)
    monkeypatch.setattr(Decoder, "forward", whole)
    kept = [[]]
    for event in events:
        kept[-1].append(event.token)
        if event.source != "draft":
            kept.append([])
    return out.tokens[0], torch.cat([logits[: len(loop)] for logits, loop in zip(calls, kept, strict=False)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_hundreds_of_prompts_through_the_public_call(dtype, monkeypatch):
    target, draft = tiny(scale=0.2).to(dtype), perturbed(tiny(scale=0.2), 5, 0.03).to(dtype)
    generator = random.Random(0)
    for index, given in enumerate(prompts([1 + i % 23 for i in range(100)])):
        plain, alone = recorded(monkeypatch, target, given, max_new_tokens=5)
        drafter = "ngram" if index % 4 == 3 else draft
        settings = {"draft": drafter, "num_draft_tokens": generator.randint(1, 10), "max_new_tokens": 5}
        text, logits = recorded(monkeypatch, target, given, **settings)
        assert text == plain
        assert torch.equal(logits, alone)


def test_the_pair_that_ships():
    target, draft = (modicum.load(f"modicum-code-{name}", dtype="bfloat16") for name in ("target", "draft"))
    given = [
        "def mean(values):\n",
        "import os\n\ndef main(",
        "class Queue:\n    def __init__(self",
        "for i in range(",
        "x = ",
    ]
    plain = modicum.generate(target, given, temperature=0, max_new_tokens=32, bit_exact=True)
    for drafter, k in ((draft, 4), ("ngram", 9)):
        out = modicum.generate(
            target, given, draft=drafter, num_draft_tokens=k, temperature=0, max_new_tokens=32, bit_exact=True
        )
        assert out.tokens == plain.tokens
        assert out.stats.tokens_per_target_call > 1.2


def test_sampled_text_does_not_depend_on_k_or_company():
    target = tiny().to(torch.bfloat16)
    draft = perturbed(tiny(), 5, 0.1).to(torch.bfloat16)
    given = prompts([5, 1, 17])
    call = {"draft": draft, "seed": 8, "max_new_tokens": 21, "k_invariant": True, "bit_exact": True}
    texts = [modicum.generate(target, given, num_draft_tokens=k, **call).tokens for k in (1, 3, 6)]
    assert texts[0] == texts[1] == texts[2]
    alone = modicum.generate(target, given[2:], num_draft_tokens=2, **{**call, "seed": [(8, 2)]})
    assert alone.tokens[0] == texts[0][2]


def test_the_model_is_left_as_it_was():
    model = tiny().for_inference()
    ids = torch.tensor([prompts([9])[0]])
    with torch.inference_mode():
        before = model(ids)
        modicum.generate(model, [[1, 2]], temperature=0, max_new_tokens=3, bit_exact=True)
        assert torch.equal(model(ids), before)
    assert all(module.attend is folded for module in model.modules() if hasattr(module, "attend"))


class Tilted(PackedLinear):
    """A product whose last row rounds otherwise."""

    def __call__(self, x, activation=None):
        y = super().__call__(x, activation)
        return torch.cat([y[:-1], y[-1:] * (1 + 2**-22)]) if len(y) == ROWS else y


def test_a_machine_that_rounds_by_rows_is_refused():
    torch.manual_seed(0)
    weight = torch.randn(7, 101)
    check_rows(PackedLinear(weight, None), 101)
    with pytest.raises(UsageError, match="rounds by the row it stands in"):
        check_rows(Tilted(torch.randn(13, 103), None), 103)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            {"target": tiny().double()},
            "needs weights that oneDNN lays out, float32 or bfloat16, and these are torch.float64",
        ),
        ({"num_draft_tokens": 64, "draft": "ngram"}, "bit_exact with num_draft_tokens=64: give at most 63"),
    ],
)
def test_refusals(call, sentence):
    with pytest.raises(UsageError, match=sentence):
        modicum.generate(**{"target": tiny(), "prompts": [[1, 2]], "bit_exact": True, **call})


def test_a_model_of_transformers_is_refused():
    with pytest.raises(UsageError, match="not offered for models that run through transformers"):
        exact_view(object())


@pytest.mark.parametrize("n_source", [8, 70])
def test_an_exact_view_is_the_same_model(n_source):
    """Up to rounding: other sums, but of the same things, for sources shorter and longer than what is computed apart."""
    for model in (tiny(), tiny_t5()):
        model.for_inference()
        view = exact_view(model)
        given = prompts([n_source])[0]
        call = (
            (torch.tensor([given]), torch.tensor([[3, 5, 7]])) if hasattr(model, "read") else (torch.tensor([given]),)
        )
        with torch.inference_mode():
            assert torch.allclose(view(*call), model(*call), atol=1e-4)
