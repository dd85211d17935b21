"""What reads and writes, T5 and captioners, through the public calls: transformers' texts, greedy identity, exact
distribution, batches, limits."""

import itertools
from collections import defaultdict

import pytest
import torch

import modicum
from modicum.decode.batch import Batch, Request
from modicum.decode.random import Purpose
from modicum.decode.sampling import Sampler, SamplingParams
from modicum.errors import UsageError
from modicum.speculative.drafters.model import ModelDrafter
from modicum.speculative.drafters.ngram import NgramDrafter
from modicum.speculative.loop import SpeculativeEngine
from tests.helpers import clips, perturbed, prompts, tiny, tiny_captioner, tiny_t5
from tests.parity.t5 import CASES, VOCAB, make
from tests.speculative.enumeration import Toy, chance, distance, joint, points
from tests.speculative.readers import CAPTIONERS, KINDS, name_of

GREEDY = {"temperature": 0, "max_new_tokens": 19}
LENGTHS = [5, 1, 17, 9, 2]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_greedy_equals_transformers_in_any_batch(case, penalty, tmp_path):
    theirs = make(case, tmp_path, decoder_start_token_id=3)
    ours = modicum.load(tmp_path)
    given = prompts(LENGTHS, vocab_size=VOCAB)
    out = modicum.generate(ours, given, repetition_penalty=penalty, **GREEDY)
    for prompt, tokens in zip(given, out.tokens, strict=True):
        ids = torch.tensor([prompt])
        expected = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=19,
            repetition_penalty=penalty,
            decoder_start_token_id=3,
            use_cache=False,  # theirs fails where the decoder is deeper than the encoder
        )
        assert tokens == expected[0, 1:].tolist()
        assert len(tokens) == 19


@pytest.mark.parametrize("case", ["v1.0", "v1.1"])
def test_greedy_identity(case, tmp_path):
    make(case, tmp_path)
    target = modicum.load(tmp_path)
    # A smaller model as well: another depth on both sides.
    drafts = (perturbed(modicum.load(tmp_path), 5, 0.03), tiny_t5(2, vocab_size=VOCAB), "ngram")
    given = prompts(LENGTHS, vocab_size=VOCAB)
    expected = modicum.generate(target, given, **GREEDY).tokens
    for k in range(1, 9):
        for draft in drafts:
            batch = given[: 1 + k % 5]
            out = modicum.generate(target, batch, draft=draft, num_draft_tokens=k, **GREEDY)
            assert out.tokens == expected[: len(batch)]


@pytest.mark.parametrize("kind", CAPTIONERS, ids=name_of)
def test_greedy_captions_are_the_same_with_any_draft(kind):
    target, given = kind.make(), kind.sources(LENGTHS)
    # Near and far from the target, one that does not see the clip, and none at all.
    drafts = (perturbed(target, 5, 0.03), kind.make(2, n_layers=1, windows=()), tiny(3), "ngram", "self:1")
    expected = kind.write(target, given, **GREEDY).tokens
    assert len({tuple(tokens) for tokens in expected}) > 1  # they are about the clips
    for place, draft in enumerate(drafts):
        for k, rows in ((1 + place, 5), (7 - place, 1 + place)):
            out = kind.write(kind.make(), given[:rows], draft=draft, num_draft_tokens=k, **GREEDY)
            assert out.tokens == expected[:rows]


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_a_draft_that_is_the_target_is_always_accepted(kind, temperature):
    target = kind.make()
    settings = {"temperature": temperature, "max_new_tokens": 40, "seed": 1}
    out = kind.write(target, kind.sources(LENGTHS), draft=target, num_draft_tokens=3, **settings)
    assert out.stats.tokens_per_target_call == 4
    assert out.stats.acceptance_rate == 1


def conditional(kind, model, source, sampler):
    """What `model` says after `source` and a prefix, as a toy of the enumeration."""

    def probs(prefix):
        with torch.inference_mode():
            logits = kind.logits(model, source, prefix)
        return sampler.probs(logits[:, -1])[0]

    return Toy(probs)


def in_cell(probs, token):
    """A uniform that draws `token`."""
    end = float(probs.cumsum(0)[token])
    return (end - float(probs[token]) / 2) / float(probs.sum())


CASES_OF_DRAFTS = [
    (kind, drafter)
    for kind in KINDS
    for drafter in ("model", "ngram", "text")
    if not (kind.of_text and drafter == "text")
]


@pytest.mark.parametrize(("kind", "drafter"), CASES_OF_DRAFTS, ids=str)
def test_the_engine_induces_the_targets_distribution(kind, drafter):
    """Every piece of a loop's outcome, as a row of one batch through both models, their encoders and their caches."""
    V, C = 4, 2
    source, another = ([1, 3, 2, 2, 1], [1, 3, 2, 2, 3]) if kind.of_text else clips([7, 7])
    params = SamplingParams(temperature=0.8, top_p=0.95)
    sampler = Sampler([params], torch.device("cpu"))
    model = kind.make(vocab_size=V).double()
    fewer = {"n_encoder_layers": 1} if kind.of_text else {}
    small = kind.make(7, vocab_size=V, n_layers=1, **fewer).double()
    target, draft = (conditional(kind, m, source, sampler) for m in (model, small))
    if drafter == "text":
        small = tiny(7, vocab_size=V, n_layers=1).double()
        draft = Toy(lambda prefix: sampler.probs(small(torch.tensor([[0, *prefix]]))[:, -1].detach())[0])
    start = [0, 2, 1, 2] if drafter == "ngram" else [0]
    prefix = tuple(start[1:])
    noise, shares = [], []
    for drawn in [(1, 2)] if drafter == "ngram" else itertools.product(range(V), repeat=C):
        along = [(*prefix, *drawn[:i]) for i in range(C + 1)]
        targets = torch.stack([target(text) for text in along])
        one_hot = torch.eye(V, dtype=torch.float64)
        drafts = torch.stack([draft(text) for text in along[:C]]) if drafter != "ngram" else one_hot[list(drawn)]
        weight = 1.0 if drafter == "ngram" else chance(draft, prefix, drawn)
        for uniforms, share in points(targets, drafts, drawn, C) if weight else ():
            for i, token in enumerate(drawn):
                uniforms[i, Purpose.DRAFT] = in_cell(drafts[i], token)
            noise.append(uniforms)
            shares.append(weight * share)
    with torch.inference_mode():
        held = kind.held(model, source)
    request = {"prompt": start, "source": held, "params": params, "eos_ids": frozenset(), "max_total": len(start) + 3}
    batch = Batch(
        [Request(index=i, key=i, **request) for i in range(len(noise))], vocab_size=V, device=torch.device("cpu")
    )
    batch.noise = lambda n_offsets: torch.stack(noise)
    engine = SpeculativeEngine(model, NgramDrafter() if drafter == "ngram" else ModelDrafter(small), C)
    engine.drafter.check(model)
    with torch.inference_mode():
        engine.start(batch)
        loop = engine.step(batch)
    found = defaultdict(float)
    for text, share in zip(loop.tokens, shares, strict=True):
        for ending in itertools.product(range(V), repeat=C + 1 - len(text)):
            found[(*text, *ending)] += share * chance(target, (*prefix, *text), ending)
    expected = joint(Toy(lambda text: target((*prefix, *text))), V, C + 1)
    assert len(noise) > 10
    assert distance(found, expected) < 1e-9
    # The comparison can fail: the texts are about this source.
    other = conditional(kind, model, another, sampler)
    assert distance(found, joint(Toy(lambda text: other((*prefix, *text))), V, C + 1)) > 1e-3


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("drafter", [None, "model", "ngram"])
def test_same_seed_same_text_whatever_the_batch(kind, drafter):
    target = kind.make()
    draft = kind.make(5) if drafter == "model" else drafter
    given, mixed = kind.sources(LENGTHS), [0.7, 1.0, 0.0, 1.3, 0.9]
    settings = {"draft": draft, "num_draft_tokens": 3, "top_k": 13, "repetition_penalty": 1.2}
    together = kind.write(target, given, temperature=mixed, seed=42, max_new_tokens=15, **settings)
    assert len({tuple(tokens) for tokens in together.tokens}) == 5
    (neighbour,) = kind.sources([2], seed=8)
    for index, source in enumerate(given):
        # An unrelated neighbour, another place in the call, other limits for it: nothing of that may show.
        alone = kind.write(
            target,
            [neighbour, source],
            temperature=[1.0, mixed[index]],
            max_new_tokens=[3 + index, 15],
            seed=[1, (42, index)],
            **settings,
        )
        assert alone.tokens[1] == together.tokens[index]


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("drafter", [None, "model", "ngram"])
def test_eos_ends_a_text_and_the_rest_goes_on(kind, drafter):
    target = kind.make()
    draft = target if drafter == "model" else drafter
    given, settings = kind.sources(LENGTHS), {"temperature": 1.0, "seed": 3, "max_new_tokens": 30}
    plain = kind.write(target, given, draft=draft, **settings).tokens
    eos = plain[2][7]
    target.eos_ids = frozenset({eos})
    out = kind.write(target, given, draft=draft, **settings)
    for got, whole in zip(out.tokens, plain, strict=True):
        assert got == (whole[: whole.index(eos) + 1] if eos in whole else whole)
    assert out.finish_reasons[2] == "eos"
    assert out.tokens[2][-1] == eos


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_keys_and_values_are_held_once_per_group(kind, monkeypatch):
    """6 query heads share 2 key-value heads, for what was read and what was written; nothing is computed twice."""
    target = kind.make()
    caches, new_cache, calls = [], target.new_cache, []
    monkeypatch.setattr(target, "new_cache", lambda *args: caches.append(new_cache(*args)) or caches[-1])
    encode = target.encode
    monkeypatch.setattr(target, "encode", lambda *args: calls.append(1) or encode(*args))
    out = kind.write(target, kind.sources([7, 7, 7]), max_new_tokens=11, temperature=1, seed=0)
    assert out.tokens[0] != out.tokens[1]
    (cache,) = caches
    assert cache.k_NBGMK.shape == cache.v_NBGMK.shape == (2, 3, 2, 12, 10)
    assert cache.context.k_NBGMK.shape == cache.context.v_NBGMK.shape == (2, 3, 2, kind.slots(7), 10)
    assert calls == [1]


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_on_token_and_counts(kind):
    target = kind.make()
    events, given = [], kind.sources([2])
    out = kind.write(target, given, draft=target, max_new_tokens=10, temperature=0, on_token=events.append)
    assert [event.token for event in events] == out.tokens[0]
    assert [event.source for event in events] == (["draft"] * 4 + ["target"]) * 2
    assert out.row_stats[0].target_calls == 2


@pytest.mark.parametrize(
    ("target", "draft", "sentence"),
    [
        (tiny_t5(), tiny(), "the draft only continues text and the target reads one text and writes another"),
        (tiny(), tiny_t5(), "the draft reads one text and writes another and the target only continues text"),
    ],
)
def test_a_draft_of_another_kind_is_refused(target, draft, sentence):
    with pytest.raises(UsageError, match=sentence):
        modicum.generate(target, [[1, 2]], draft=draft)


def test_drafts_that_read_something_else_are_refused():
    reading = "the draft reads one text and writes another and the target reads a video and writes about it"
    with pytest.raises(UsageError, match=reading):
        modicum.caption(tiny_captioner(), clips([9]), draft=tiny_t5())
    with pytest.raises(UsageError, match="the draft reads a video and writes about it and the target only continues"):
        modicum.generate(tiny(), [[1, 2]], draft=tiny_captioner())


def test_calls_without_a_second_text_are_refused():
    model = tiny_t5()
    with pytest.raises(UsageError, match="call `model\\(ids, decoder_ids\\)`"):
        model(torch.tensor([[1, 2]]))
    with pytest.raises(UsageError, match="call `model.read\\(texts, cache\\)` first"):
        model(torch.tensor([[1, 2]]), cache=model.new_cache(1, 5))
    model = tiny_captioner()
    with pytest.raises(UsageError, match="reads a video and writes about it: call `model\\(video, ids\\)`"):
        model(torch.stack(clips([9])))
    with pytest.raises(UsageError, match="call `model.read\\(memories, cache\\)` first"):
        model(torch.tensor([[1, 2]]), cache=model.new_cache(1, 5))
