"""k_invariant: the same text for every K, and exactly the target's distribution although numbers are met again."""

import itertools
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest
import torch

import modicum
from modicum.core.cache import KVCache
from modicum.decode import batch
from modicum.decode.random import Purpose, uniforms, uniforms_by_place
from modicum.errors import UsageError
from modicum.speculative import generate
from modicum.speculative.drafters.drawing import Drawing
from modicum.speculative.drafters.model import ModelDrafter
from modicum.speculative.drafters.ngram import NgramDrafter
from tests.helpers import perturbed, prompts, tiny
from tests.speculative.enumeration import distance
from tests.speculative.test_generate import chi_square, limit, pair_probs


class Chain:
    """A model whose next token depends on the last one only, by a table of probabilities [V, V]."""

    ragged, tokenizer, eos_ids, cache_bytes_per_token = True, None, frozenset(), 4
    device = torch.device("cpu")

    def __init__(self, seed, n_tokens, context=97):
        generator = torch.Generator().manual_seed(seed)
        self.table = (torch.randn(n_tokens, n_tokens, generator=generator, dtype=torch.float64) * 1.2).softmax(-1)
        self.config = SimpleNamespace(vocab_size=n_tokens, max_seq_len=context)

    def __call__(self, ids, cache=None, *, at_BN=None):
        logits = self.table.log()[ids]
        return logits if at_BN is None else logits.gather(1, at_BN[..., None].expand(-1, -1, logits.shape[-1]))

    def new_cache(self, n_rows, capacity):
        return KVCache(1, n_rows, 1, capacity, 1, dtype=torch.float32)

    def for_inference(self):
        return self

    def joint(self, last, length):
        texts = itertools.product(range(len(self.table)), repeat=length)
        return {text: path(self.table, (last, *text)) for text in texts}


def path(table, text):
    probability = 1.0
    for before, after in itertools.pairwise(text):
        probability *= float(table[before, after])
    return probability


def edges(target, draft):
    """Where, over all tables' rows, the outcome of a place changes with its numbers, per purpose."""
    rest = (target - draft).clamp(min=0)
    return {
        Purpose.DRAFT: draft.cumsum(-1),
        Purpose.COIN: (target / draft).clamp(max=1),
        Purpose.RESIDUAL: rest.cumsum(-1) / rest.sum(-1, keepdim=True),
        Purpose.BONUS: target.cumsum(-1),
    }


def enumerated(
    monkeypatch, target, draft, k, length, prompt, used=(Purpose.DRAFT, Purpose.COIN, Purpose.RESIDUAL), **call
):
    """The distribution of texts through the public call: a row for every combination of pieces, weighted by its size."""
    table = draft.table if isinstance(draft, Chain) else draft.model.table if hasattr(draft, "model") else target.table
    cells = []
    for purpose in Purpose:
        cuts = edges(target.table, table)[purpose].flatten().tolist() if purpose in used else []
        cuts = sorted({0.0, 1.0, *(round(cut, 14) for cut in cuts)})
        cells.append([((a + b) / 2, b - a) for a, b in itertools.pairwise(cuts)])
    places = list(itertools.product(*cells))
    combinations = list(itertools.product(range(len(places)), repeat=length))
    numbers = torch.tensor([[number for number, _ in place] for place in places], dtype=torch.float64)
    weights = torch.tensor([[size for _, size in place] for place in places], dtype=torch.float64).prod(-1)
    chosen = torch.tensor(combinations)

    def by_place(keys, lengths, n_offsets, n_purposes):
        at = lengths[:, None] - len(prompt) + torch.arange(n_offsets)
        return numbers[chosen[keys[:, None], at.clamp(max=length - 1)]]

    monkeypatch.setattr(batch, "uniforms_by_place", by_place)
    monkeypatch.setattr(generate, "stream_keys", lambda seed, n: list(range(n)))
    given = [prompt] * len(combinations)
    out = modicum.generate(
        target, given, draft=draft, num_draft_tokens=k, max_new_tokens=length, k_invariant=True, **call
    )
    found = defaultdict(float)
    for text, weight in zip(out.tokens, weights[chosen].prod(-1).tolist(), strict=True):
        found[tuple(text)] += weight
    return found, out.tokens


@pytest.mark.parametrize(("n_tokens", "length"), [(2, 4), (3, 2)])
def test_enumerated_through_the_public_call(n_tokens, length, monkeypatch):
    target, draft = Chain(0, n_tokens), Chain(1, n_tokens)
    texts = []
    for k in (1, 2, 5):
        found, tokens = enumerated(monkeypatch, target, draft, k, length, [1])
        assert distance(found, target.joint(1, length)) < 1e-12
        texts.append(tokens)
    # Every single combination of numbers gives one text, not only all of them one distribution.
    assert texts[0] == texts[1] == texts[2]


def test_a_draft_with_a_short_context(monkeypatch):
    # Places beyond it are drawn from the target alone, at any K.
    target, draft = Chain(2, 2), Chain(3, 2, context=4)
    texts = []
    for k in (1, 3):
        found, tokens = enumerated(monkeypatch, target, draft, k, 3, [0, 1], used=tuple(Purpose))
        assert distance(found, target.joint(1, 3)) < 1e-12
        texts.append(tokens)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("k", [1, 3])
def test_point_masses_give_the_text_of_plain_decoding(k, monkeypatch):
    target, prompt = Chain(4, 3), [0, 1, 0, 2, 1, 0]
    found, _ = enumerated(monkeypatch, target, NgramDrafter(), k, 4, prompt, used=(Purpose.BONUS,))
    assert distance(found, target.joint(0, 4)) < 1e-12


class Peeking(ModelDrafter):
    """Drafts nothing after a loop whose last drawn token was 0, kept or thrown away."""

    last = None

    def propose(self, batch, allowed, noise):
        if self.last is not None and len(self.last) == len(allowed):
            allowed = [0 if token == 0 else n for n, token in zip(allowed, self.last, strict=True)]
        draft = super().propose(batch, allowed, noise)
        self.last = [int(row[-1]) for row in draft.tokens_BC] if draft.tokens_BC.shape[1] else None
        return draft


def test_the_enumeration_notices_a_number_that_was_looked_at(monkeypatch):
    """Positive control: whether to draft a place must not depend on what was drawn there before."""
    target, draft = Chain(0, 2), Peeking(Chain(1, 2))
    found, _ = enumerated(monkeypatch, target, draft, 1, 3, [1], used=tuple(Purpose))
    assert sum(found.values()) == pytest.approx(1)
    assert distance(found, target.joint(1, 3)) > 1e-3


def test_the_enumeration_notices_numbers_used_for_two_purposes(monkeypatch):
    target, draft = Chain(0, 2), Chain(1, 2)
    monkeypatch.setattr(Drawing, "draw", draw_with_the_coin)
    found, _ = enumerated(monkeypatch, target, draft, 2, 3, [1], used=tuple(Purpose))
    assert distance(found, target.joint(1, 3)) > 1e-3


def draw_with_the_coin(drawing, logits):
    probs, offset = drawing.batch.sampler.probs(logits), len(drawing.tokens)
    drawing.tokens.append((drawing.noise_BNP[:, offset, Purpose.COIN, None] > probs.cumsum(-1)).sum(-1))
    drawing.probs.append(probs)
    return drawing.tokens[-1]


@pytest.mark.parametrize("drafter", ["model", "ngram"])
def test_the_same_text_for_every_k(drafter):
    target = tiny()
    draft = perturbed(target, 5, 0.1) if drafter == "model" else "ngram"
    given = prompts([5, 1, 17, 9, 60])
    call = {"draft": draft, "seed": 8, "max_new_tokens": 37, "temperature": [0.7, 1.0, 0.0, 1.3, 0.9], "top_k": 13}
    call |= {"repetition_penalty": [1.0, 1.2, 1.0, 1.0, 1.1]}
    outs = [modicum.generate(target, given, num_draft_tokens=k, k_invariant=True, **call) for k in range(1, 7)]
    assert all(out.tokens == outs[0].tokens for out in outs)
    assert len({out.stats.target_calls for out in outs}) > 1
    alone = modicum.generate(
        target,
        given[3:4],
        num_draft_tokens=2,
        k_invariant=True,
        **{**call, "seed": [(8, 3)], "temperature": 1.3, "repetition_penalty": 1.0},
    )
    assert alone.tokens[0] == outs[0].tokens[3]
    if drafter == "ngram":
        assert outs[0].tokens == modicum.generate(target, given, **{**call, "draft": None}).tokens
    # Positive control: without it the texts differ.
    usual = [modicum.generate(target, given, num_draft_tokens=k, **call).tokens for k in (1, 4)]
    assert usual[0] != usual[1]


def test_a_draft_that_is_the_target_is_always_accepted():
    target = tiny()
    out = modicum.generate(target, [[1, 2]], draft=target, num_draft_tokens=3, max_new_tokens=40, k_invariant=True)
    assert out.stats.tokens_per_target_call == 4
    assert out.stats.acceptance_by_position == [1, 1, 1]
    # Behind full acceptance the draft has read everything but the newest token: K + 1 calls per loop.
    assert out.stats.draft_calls == 40


def test_sampled_distribution_is_the_targets():
    target, n, prompt = tiny(vocab_size=5, scale=0.5), 8_000, [1, 3, 1, 3]
    settings = {"temperature": 0.8, "top_p": 0.95}
    call = {"draft": perturbed(target, 9, 0.3), "num_draft_tokens": 2, "max_new_tokens": 3, "seed": 13, **settings}
    out = modicum.generate(target, [prompt] * n, k_invariant=True, **call)
    statistic, freedom = chi_square(Counter(map(tuple, out.tokens)), pair_probs(target, prompt, **settings), n)
    assert statistic < limit(freedom)


def test_numbers_by_place():
    keys, lengths = torch.tensor([5, -7]), torch.tensor([3, 11])
    numbers = uniforms_by_place(keys, lengths, 4, len(Purpose))
    assert numbers.shape == (2, 4, len(Purpose))
    for offset in range(4):
        assert torch.equal(numbers[:, offset], uniforms(keys, lengths + offset, 1, len(Purpose))[:, 0])


class Heads:
    max_rows = None

    def propose(self, batch, allowed, noise):
        raise AssertionError

    def check(self, target):
        pass


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"verification": "block"},
            "k_invariant needs verification `token`, because `block` keeps tokens for the sake",
        ),
        ({"draft": Heads()}, "k_invariant cannot be kept with Heads, whose proposals depend on where a loop starts"),
    ],
)
def test_refusals(arguments, sentence):
    with pytest.raises(UsageError, match=sentence):
        modicum.generate(tiny(), [[1, 2]], k_invariant=True, **{"draft": "ngram", **arguments})
