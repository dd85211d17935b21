"""Quality of a model on text: sums by hand, windows that score every token once."""

import math

import pytest
import tokenizers
import torch

from modicum.checkpoint.tokenizer import Tokenizer
from modicum.errors import UsageError
from modicum.lm.objective import objective_of
from modicum.train.evaluate import quality, scored_windows, seconds_per_token, usual_window
from tests.helpers import perturbed, tiny, tiny_t5


@pytest.mark.parametrize(("n_tokens", "window"), [(2, 8), (9, 8), (10, 8), (23, 8), (23, 7), (5, 2)])
def test_every_token_but_the_first_is_scored_once(n_tokens, window):
    scored = []
    for begin, end, first in scored_windows(n_tokens, window):
        assert 0 <= begin <= first < end <= n_tokens - 1
        assert end - begin <= window
        # At least half a window of context, where there is so much.
        assert first - begin >= min(first, window // 2)
        scored += range(first + 1, end + 1)
    assert scored == list(range(1, n_tokens))


def test_within_one_window_it_is_the_plain_mean():
    model, ids = tiny(), torch.randint(0, 29, (13,))
    with torch.no_grad():
        scores = model(ids[None, :-1])[0].double().log_softmax(-1)
    expected = -scores.gather(1, ids[1:, None]).mean().item()
    found = quality(model, ids, 64)
    assert found.nats_per_token == pytest.approx(expected, abs=1e-9)
    assert (found.n_tokens, found.divergence) == (12, None)


def test_divergence_by_hand():
    model = tiny()
    other, ids = perturbed(model, 1, 0.1), torch.randint(0, 29, (13,))
    with torch.no_grad():
        p, q = (m(ids[None, :-1])[0].double().softmax(-1) for m in (model, other))
    expected = (p * (p / q).log()).sum(-1).mean().item()
    assert quality(other, ids, 64, original=model).divergence == pytest.approx(expected, abs=1e-9)
    assert quality(model, ids, 64, original=model).divergence == pytest.approx(0, abs=1e-12)
    # The other way round is another number.
    assert abs(quality(model, ids, 64, original=other).divergence - expected) > 1e-6


def t5(seed=0):
    model = tiny_t5(seed)
    vocabulary = {"<unk>": 2, "</s>": 1, **{f"<extra_id_{n}>": 28 - n for n in range(4)}}
    model.tokenizer = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")))
    return model


def test_a_t5_is_judged_by_what_spans_it_fills_in():
    model, other, ids, read = t5(), t5(1), torch.randint(3, 22, (70,)), []
    found = quality(other, ids, 33, original=model, on_window=read.append)
    nats, count = objective_of(other, 33).held_out(other, ids)
    assert found.n_tokens == count
    assert found.nats_per_token == pytest.approx(nats / count, rel=1e-6)
    assert read == [33, 66, 70]
    divergence = 0.0
    for given, targets in objective_of(model, 33).held_out_examples(ids):
        p, q = (m(*given)[0].double().softmax(-1) for m in (model, other))
        assert p.shape[0] == targets.shape[1]
        divergence += (p * (p / q).log()).sum().item()
    assert found.divergence == pytest.approx(divergence / count, rel=1e-5)
    assert quality(model, ids, 33, original=model).divergence == pytest.approx(0, abs=1e-12)
    with pytest.raises(UsageError, match="span corruption marks what it drops"):
        quality(tiny_t5(), ids, 33)


def test_how_much_is_read_at_once():
    assert (usual_window(tiny()), usual_window(tiny(max_seq_len=4096)), usual_window(tiny_t5())) == (97, 1024, 568)


@pytest.mark.parametrize(("make", "written", "read"), [(tiny, 24, None), (tiny_t5, 4, [20])])
def test_a_step_is_timed_after_its_context(make, written, read, monkeypatch):
    """By what the cache holds after 4 steps: 20 tokens of a decoder's own text, or 20 that a T5 has read."""
    model, caches = make(), []
    new_cache = model.new_cache
    monkeypatch.setattr(model, "new_cache", lambda *size: caches.append(new_cache(*size)) or caches[-1])
    assert seconds_per_token(model, 20, n_tokens=4) > 0
    (cache,) = caches
    assert (cache.lengths_B.tolist(), cache.k_NBGMK.shape[3]) == ([written], written)
    assert (None if cache.context is None else cache.context.lengths) == read


def test_refusals_and_time():
    with pytest.raises(UsageError, match="the text has 1 tokens: at least 2 are needed"):
        quality(tiny(), torch.tensor([3]), 8)
    assert 0 < seconds_per_token(tiny(), 20, n_tokens=4) < math.inf
    with pytest.raises(UsageError, match="a context of 95 and 16 tokens to time are more than the model's 97"):
        seconds_per_token(tiny(), 95)
