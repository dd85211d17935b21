"""Early exit, heads, features and parallel drafters: greedy identity, exact distribution, state, limits, folders."""

import functools
import itertools
import warnings
from collections import Counter

import pytest
import torch

import modicum
from modicum.core.cache import KVCache
from modicum.decode import loop as decode_loop
from modicum.decode.batch import Batch, Request
from modicum.decode.loop import PlainEngine
from modicum.decode.sampling import Sampler, SamplingParams
from modicum.errors import CheckpointError, UsageError
from modicum.speculative.drafters import parallel
from modicum.speculative.drafters.base import Draft
from modicum.speculative.drafters.early_exit import EarlyExitDrafter
from modicum.speculative.drafters.folder import KINDS, new_network
from modicum.speculative.loop import SpeculativeEngine
from tests.helpers import prompts, tiny, tiny_t5
from tests.parity.families import CASES, make
from tests.speculative.drafters import NAMES, deviation, drafter, logits_of
from tests.speculative.test_generate import assert_greedy_equal, chi_square, limit

LENGTHS = [5, 1, 17, 9, 2]


@pytest.mark.parametrize("case", CASES)
def test_greedy_identity_in_every_family(case, tmp_path):
    make(case, tmp_path)
    target = modicum.load(tmp_path)
    given, settings = prompts(LENGTHS, vocab_size=61), {"temperature": 0, "max_new_tokens": 13}
    expected = modicum.generate(target, given, **settings).tokens
    fresh = modicum.load(tmp_path)
    for place, name in enumerate(NAMES):
        for k, rows in ((1 + place, 5), (8 - place, 1 + place)):
            out = modicum.generate(
                target, given[:rows], draft=drafter(name, fresh, noise=0.01), num_draft_tokens=k, **settings
            )
            assert_greedy_equal(target, given[:rows], expected[:rows], out.tokens)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_identity_at_every_number_of_drafted_tokens(name):
    target, given, settings = tiny(), prompts(LENGTHS), {"temperature": 0, "max_new_tokens": 19}
    expected = modicum.generate(target, given, **settings).tokens
    source = drafter(name, tiny(), num_draft_tokens=6, noise=0.02)
    for k in range(1, 9):
        rows = 1 + k % 5
        out = modicum.generate(target, given[:rows], draft=source, num_draft_tokens=k, **settings)
        assert_greedy_equal(target, given[:rows], expected[:rows], out.tokens)
        # Heads and slots beyond those it was made with do not exist.
        assert len(out.stats.judged_by_position) <= (k if name == "self" else min(k, 6))


SAMPLING = {
    "temperature": {"temperature": 0.7},
    "top-k": {"top_k": 2},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
    "min-p": {"min_p": 0.2},
    "penalty": {"repetition_penalty": 1.7},
}


@pytest.mark.parametrize("option", SAMPLING)
@pytest.mark.parametrize("name", NAMES)
def test_the_engine_induces_the_targets_distribution(name, option):
    target = tiny(vocab_size=3, scale=0.5).double()
    source = drafter(name, target, noise=0.3)
    source.check(target)
    found, n_rows = deviation(name, target, source, [1, 2, 1], SamplingParams(**SAMPLING[option]), 2)
    assert n_rows > 10
    assert found < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_the_enumeration_notices_another_distribution_than_the_draws(name, monkeypatch):
    """Positive control: drafts handed over with probabilities that they were not drawn from."""
    propose = Draft.__init__

    def tampered(self, tokens, probs, counts, calls):
        propose(
            self, tokens, None if probs is None else probs.sqrt() / probs.sqrt().sum(-1, keepdim=True), counts, calls
        )

    monkeypatch.setattr(Draft, "__init__", tampered)
    target = tiny(vocab_size=3, scale=0.5).double()
    source = drafter(name, target, noise=0.3)
    source.check(target)
    assert deviation(name, target, source, [1, 2, 1], SamplingParams(), 2)[0] > 1e-3


def three_tokens(model, prompt, **settings):
    """The exact distribution of the next three tokens, penalties included."""
    sampler, found = Sampler([SamplingParams(**settings)], torch.device("cpu")), {(): 1.0}
    for _ in range(3):
        texts = list(found)
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *text] for text in texts]))[:, -1].double()
        longer = {}
        for text, row in zip(texts, logits, strict=True):
            seen = torch.zeros(1, len(row), dtype=torch.bool)
            seen[0, [*prompt, *text]] = True
            for token, probability in enumerate(sampler.probs(row[None], seen)[0].tolist()):
                longer[(*text, token)] = found[text] * probability
        found = longer
    return found


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("self", {"temperature": 0.8, "top_p": 0.95}),
        ("heads", {"top_k": 4, "repetition_penalty": 1.3}),
        ("features", {"temperature": 2.2, "min_p": 0.05}),
        ("parallel", {"temperature": 0.7, "top_k": 3}),
    ],
)
def test_sampled_distribution_is_the_targets(name, settings):
    target, prompt, n = tiny(vocab_size=5, scale=0.5), [1, 3, 1, 3], 6_400
    source = drafter(name, tiny(vocab_size=5, scale=0.5), noise=0.3, seed=0)
    out = modicum.generate(
        target, [prompt] * n, draft=source, num_draft_tokens=2, max_new_tokens=3, seed=11, **settings
    )
    assert 0.1 < out.stats.acceptance_rate < 0.98
    probs, counts = three_tokens(target, prompt, **settings), Counter(map(tuple, out.tokens))
    assert all(probs[outcome] > 0 for outcome in counts)
    statistic, freedom = chi_square(counts, probs, n)
    assert statistic < limit(freedom)
    # Positive control: the same texts are not from a different temperature.
    warmer = {**settings, "temperature": 1.5 * settings.get("temperature", 1.0)}
    statistic, freedom = chi_square(counts, three_tokens(target, prompt, **warmer), n)
    assert statistic > limit(freedom)


def recorded(source, target, given, **settings):
    """Every proposal of a call: the texts that it was made for, and the draft."""
    made, propose = [], source.propose

    def spy(batch, allowed, noise):
        draft = propose(batch, allowed, noise)
        made.append(([list(row.tokens) for row in batch.rows], draft))
        return draft

    source.propose = spy
    modicum.generate(target, given, draft=source, **settings)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_drafts_depend_on_the_text_alone(name, monkeypatch):
    """After ragged acceptance, rows that left, and prompts read in pieces, each distribution is that of the whole text."""
    pieces = functools.partial(decode_loop.prefill, chunk=4)
    monkeypatch.setattr(decode_loop, "prefill", pieces)
    monkeypatch.setattr(parallel, "prefill", pieces)
    target, fresh = tiny(), tiny()
    source = drafter(name, fresh, noise=0.05)
    given, limits = prompts([5, 1, 17, 2]), [15, 3, 9, 12]
    made = recorded(source, target, given, num_draft_tokens=3, max_new_tokens=limits, seed=4)
    source = drafter(name, fresh, noise=0.05)
    largest, wrong, n_places = 0.0, 0.0, 0
    for texts, draft in made:
        for row, text in enumerate(texts):
            drawn = draft.tokens_BC[row].tolist()
            for place in range(draft.counts[row]):
                expected = logits_of(name, source, fresh, text, drawn[:place]).softmax(-1)
                got = draft.probs_BCV[row, place]
                largest = max(largest, float((got - expected).abs().max()))
                if len(text) > 2:  # the control: the same, had it missed a token
                    other = logits_of(name, source, fresh, [*text[:-2], text[-1]], drawn[:place]).softmax(-1)
                    wrong = max(wrong, float((got - other).abs().max()))
                n_places += 1
    assert n_places > 30
    assert largest < 1e-4
    assert wrong > 1e-2
    # Heads and features have nothing to go by before the second token.
    texts, draft = made[0]
    assert draft.counts[[len(text) for text in texts].index(1)] == (0 if name in ("heads", "features") else 2)


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_text_whatever_the_batch(name):
    target, given, mixed = tiny(), prompts(LENGTHS), [0.7, 1.0, 0.0, 1.3, 0.9]
    source = drafter(name, tiny(), noise=0.05)
    settings = {"draft": source, "num_draft_tokens": 3, "top_k": 13, "repetition_penalty": 1.2}
    together = modicum.generate(target, given, temperature=mixed, seed=42, max_new_tokens=15, **settings)
    for index, prompt in enumerate(given):
        alone = modicum.generate(
            target,
            [[7, 7], prompt],
            temperature=[1.0, mixed[index]],
            max_new_tokens=[3 + index, 15],
            seed=[1, (42, index)],
            **settings,
        )
        assert alone.tokens[1] == together.tokens[index]


@pytest.mark.parametrize("name", NAMES)
def test_eos_inside_a_draft_ends_the_text_there(name):
    target, fresh = tiny(), tiny()
    # All layers, or heads and slots that mostly agree: the end is often within an accepted draft.
    source = EarlyExitDrafter(2) if name == "self" else drafter(name, fresh, noise=0.0)
    plain = modicum.generate(target, prompts(LENGTHS), temperature=0, max_new_tokens=30).tokens
    eos = plain[2][7]
    target.eos_ids = frozenset({eos})
    out = modicum.generate(target, prompts(LENGTHS), draft=source, temperature=0, max_new_tokens=30)
    for got, whole in zip(out.tokens, plain, strict=True):
        assert got == (whole[: whole.index(eos) + 1] if eos in whole else whole)
    assert out.finish_reasons[2] == "eos"


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("name", NAMES)
def test_limits_are_exact(name, positions):
    changes = {"rope": None} if positions == "learned" else {}
    target, lengths = tiny(**changes), [1, 90, 96, 50]
    source = drafter(name, tiny(**changes), noise=0.02)
    settings = {"max_new_tokens": 43, "temperature": 0}
    out = modicum.generate(target, prompts(lengths), draft=source, num_draft_tokens=5, **settings)
    assert [len(tokens) for tokens in out.tokens] == [43, 7, 1, 43]
    assert out.tokens == modicum.generate(target, prompts(lengths), **settings).tokens


# Early exit


@pytest.mark.parametrize("make_target", [tiny, tiny_t5])
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_all_layers_are_always_accepted(make_target, temperature):
    target = make_target()
    settings = {"temperature": temperature, "max_new_tokens": 40, "seed": 1}
    out = modicum.generate(target, prompts(LENGTHS), draft="self:2", num_draft_tokens=3, **settings)
    assert out.stats.tokens_per_target_call == 4
    assert out.stats.acceptance_rate == 1
    assert out.row_stats[0].draft_calls == 30


def test_early_exit_of_an_encoder_decoder():
    target, given = tiny_t5(n_layers=3), prompts(LENGTHS)
    settings = {"temperature": 0, "max_new_tokens": 19}
    expected = modicum.generate(target, given, **settings).tokens
    for k in (1, 4, 7):
        out = modicum.generate(target, given, draft="self:1", num_draft_tokens=k, **settings)
        assert out.tokens == expected
        assert out.stats.acceptance_rate < 1


def texts_and_cache(target, engine, given, n_loops):
    """A batch after so many loops, and the target's cache."""
    params = {"params": SamplingParams(), "eos_ids": frozenset(), "max_total": 60}
    requests = [Request(index=i, key=i, prompt=prompt, **params) for i, prompt in enumerate(given)]
    batch = Batch(requests, vocab_size=29, device=torch.device("cpu"))
    with torch.inference_mode():
        engine.start(batch)
        for _ in range(n_loops):
            batch.take(engine.step(batch), engine.sources, 0.0)
    return batch, engine.cache


@pytest.mark.parametrize("windows", [(), (5, None, 7)])
def test_the_shared_cache_holds_what_plain_decoding_would(windows):
    target, given = tiny(n_layers=3, windows=windows), prompts([7, 3, 12])
    batch, cache = texts_and_cache(target, SpeculativeEngine(target, exits(target), 4), given, 5)
    assert len(set(batch.lengths)) > 1
    assert cache.lengths_B.tolist() == [length - 1 for length in batch.lengths]
    assert cache.k_NBGMK.shape[0] == 3
    texts = [row.tokens for row in batch.rows]
    _, plain = texts_and_cache(target, PlainEngine(target), texts, 0)
    difference = stale = 0.0
    for row, length in enumerate(plain.lengths_B.tolist()):
        for ours, theirs in ((cache.k_NBGMK, plain.k_NBGMK), (cache.v_NBGMK, plain.v_NBGMK)):
            difference = max(difference, float((ours[:, row, :, :length] - theirs[:, row, :, :length]).abs().max()))
        stale = max(stale, float(cache.k_NBGMK[0, row, :, length:].abs().max()))
    assert difference < 1e-4
    # What was rejected still stands beyond the lengths: the drafts were written here and nowhere else.
    assert stale > 0


def exits(target, n_layers=1):
    source = EarlyExitDrafter(n_layers)
    source.check(target)
    return source


def test_a_draft_that_advances_the_targets_cache_is_noticed(monkeypatch):
    """Positive control: without lengths of its own the draft moves the target's."""
    monkeypatch.setattr(KVCache, "fork", lambda self: self)
    target = tiny()
    expected = modicum.generate(target, prompts([7]), temperature=0, max_new_tokens=19).tokens
    out = modicum.generate(target, prompts([7]), draft="self:1", temperature=0, max_new_tokens=19)
    assert out.tokens != expected


@pytest.mark.parametrize(
    ("draft", "sentence"),
    [
        ("self:", "names no number of layers: write self:LAYERS"),
        ("self:two", "names no number of layers"),
        ("self:0", "the target has 2 layers, choose from 1 to 2"),
        ("self:3", "the target has 2 layers, choose from 1 to 2"),
        ("myself:1", "is not a drafter's name: use `ngram`, `self:LAYERS`"),
    ],
)
def test_refused_names(draft, sentence):
    with pytest.raises(UsageError, match=sentence):
        modicum.generate(tiny(), [[1, 2]], draft=draft)


# Trained drafters: folders and targets


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_holds_the_drafter(kind, tmp_path):
    target, given = tiny(), prompts(LENGTHS)
    source = drafter(kind, tiny(), noise=0.05)
    source.files = {"training.json": b"{}"}
    settings = {"num_draft_tokens": 3, "max_new_tokens": 9, "seed": 3}
    before = modicum.generate(target, given, draft=source, **settings)
    modicum.save(source, tmp_path / "packed")  # after its weights were packed
    loaded = modicum.load(tmp_path / "packed", device="cpu")
    after = modicum.generate(target, given, draft=loaded, **settings)
    assert after.tokens == before.tokens
    assert after.stats.acceptance_by_position == before.stats.acceptance_by_position
    assert (loaded.config, loaded.files) == (source.config, source.files)
    with pytest.raises(UsageError, match="already holds files"):
        modicum.save(loaded, tmp_path / "packed")
    with pytest.raises(UsageError, match="the target is a drafter"):
        modicum.generate(loaded, [[1]])


@pytest.mark.parametrize("kind", KINDS)
def test_one_drafter_serves_its_target_in_any_dtype(kind):
    source, given = drafter(kind, tiny(), noise=0.02), prompts(LENGTHS)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        target = tiny().to(dtype)
        settings = {"temperature": 0, "max_new_tokens": 7}
        out = modicum.generate(target, given, draft=source, **settings)
        assert next(iter(source.network.dense_state().values())).dtype == dtype
        if dtype == torch.float32:
            assert out.tokens == modicum.generate(target, given, **settings).tokens


@pytest.mark.parametrize("kind", KINDS)
def test_another_target_is_refused_or_warned_of(kind):
    source = drafter(kind, tiny())
    with pytest.raises(
        UsageError, match="trained for a llama of 2 layers, width 24 and 29 tokens and the target is a llama of 3"
    ):
        modicum.generate(tiny(n_layers=3), [[1, 2]], draft=source)
    with pytest.raises(UsageError, match="native decoder-only target, and this one is EncoderDecoder"):
        modicum.generate(tiny_t5(), [[1, 2]], draft=source)
    settings = {"temperature": 0, "max_new_tokens": 9}
    other = tiny(1)
    with pytest.warns(UserWarning, match="trained for a target with other weights"):
        out = modicum.generate(other, [[1, 2]], draft=source, **settings)
    assert out.tokens == modicum.generate(other, [[1, 2]], **settings).tokens
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        modicum.generate(tiny(), [[1, 2]], draft=source, **settings)


def test_a_fingerprint_is_of_weights_and_shape_but_not_of_how_they_are_held():
    model = tiny()
    before = model.fingerprint
    assert tiny().fingerprint == before
    assert tiny().bfloat16().fingerprint == before
    assert model.for_inference().fingerprint == before
    assert tiny(1).fingerprint != before
    assert tiny(windows=(3, None)).fingerprint != before
    changed = tiny()
    with torch.no_grad():
        changed.blocks[1].ffn.down.weight[0, 0] += 1
    assert changed.fingerprint != before


def test_damaged_folders_are_refused(tmp_path):
    source = drafter("heads", tiny())
    modicum.save(source, tmp_path / "whole")
    checkpoint = modicum.read_checkpoint(tmp_path / "whole")
    for change, sentence in (
        ({"kind": "tails"}, "`kind` is 'tails'"),
        ({"num_draft_tokens": 5}, "`heads.5.bias` has shape None and its config.json asks for"),
        ({"n_layers": 2}, "has one layer: leave it out"),
        ({"num_heads": 3}, "has no key `num_heads`"),
    ):
        checkpoint.config.update(change)
        modicum.write_checkpoint(checkpoint, tmp_path / "damaged", overwrite=True)
        with pytest.raises(CheckpointError, match=sentence):
            modicum.load(tmp_path / "damaged")
        checkpoint.config = modicum.read_checkpoint(tmp_path / "whole").config


def test_heads_at_zero_say_what_the_target_does():
    target = tiny()
    network = new_network(target, "heads", 3)
    ids = torch.tensor([[4, 8, 15, 16, 23]])
    hidden = target.hidden(ids)
    for shift, logits in network.predictions(target, ids, hidden):
        assert torch.allclose(logits, target.score(hidden)[:, :-shift], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_training_sees_what_drafting_does(kind):
    """The first drafted place of every token in one pass, and all of a parallel drafter's, equal what propose computes."""
    target = tiny()
    source = drafter(kind, target, num_draft_tokens=3, noise=0.1)
    text = prompts([11])[0]
    ids = torch.tensor([text])
    with torch.no_grad():
        predictions = dict(source.network.predictions(target, ids, target.hidden(ids)))
    first = 0 if kind == "parallel" else 1
    assert list(predictions) == [first, first + 1, first + 2]
    for shift, logits in predictions.items():
        assert logits.shape == (1, 11 - shift, 29)
        if kind == "features" and shift > 1:
            continue  # the features before are true ones when it drafts, and predicted ones here
        for t in range(11 - shift):
            # Its last token is at t + first: the heads and features do not see their own.
            drawn = text[t + first + 1 : t + shift + 1]
            expected = logits_of(kind, source, target, text[: t + first + 1], drawn)
            assert torch.allclose(logits[0, t], expected, atol=1e-4)


def test_drafters_that_know_nothing_of_the_target_work_as_before():
    class Constant:
        max_rows = None

        def check(self, target): ...

        def start(self, batch, capacity): ...

        def propose(self, batch, allowed, noise_BNP):
            n = max(allowed)
            return Draft(torch.full((len(batch.rows), n), 7), None, allowed, 0) if n else Draft.empty(batch)

        def keep(self, rows, lengths): ...

    target, settings = tiny(), {"temperature": 0, "max_new_tokens": 9}
    out = modicum.generate(target, prompts([5, 2]), draft=Constant(), **settings)
    assert out.tokens == modicum.generate(target, prompts([5, 2]), **settings).tokens


@pytest.mark.parametrize("name", NAMES)
def test_its_time_is_known_as_a_models(name):
    target = tiny()
    out = modicum.generate(target, prompts([7]), draft=drafter(name, target), max_new_tokens=12, temperature=0)
    assert set(out.stats.model_seconds) == {"target", "draft"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_processors_are_asked_before_a_token_is_proposed(name, temperature):
    def odd_only(ids, scores):
        return scores.masked_fill(torch.arange(scores.shape[-1]) % 2 == 0, -torch.inf)

    target, proposed = tiny(), []
    source = drafter(name, target)
    whole = source.propose

    def propose(*args):
        draft = whole(*args)
        proposed.extend(int(t) for row, n in zip(draft.tokens_BC, draft.counts, strict=True) for t in row[:n])
        return draft

    source.propose = propose
    settings = {"max_new_tokens": 16, "temperature": temperature, "seed": 3, "ignore_eos": True}
    out = modicum.generate(target, prompts([7, 4]), draft=source, logits_processors=odd_only, **settings)
    assert len(proposed) > 10
    assert all(token % 2 for token in (*proposed, *itertools.chain(*out.tokens)))


def test_a_target_in_low_precision_leaves_the_loaded_weights_as_they_were(tmp_path):
    target = tiny()
    source = drafter("heads", target)
    before = {name: tensor.clone() for name, tensor in source.loaded.state_dict().items()}
    for dtype in (torch.bfloat16, torch.float32):
        modicum.generate(tiny().to(dtype), prompts([5]), draft=source, max_new_tokens=6, temperature=0)
    modicum.save(source, tmp_path / "heads")
    saved = modicum.load(tmp_path / "heads").loaded.state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(dict(source.network.dense_state())[name], tensor) for name, tensor in before.items())
