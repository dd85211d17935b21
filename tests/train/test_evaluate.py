"""Quality of a model on text: sums by hand, windows that score every token once."""

import math

import pytest
import torch

from modicum.errors import UsageError
from modicum.train.evaluate import quality, scored_windows, seconds_per_token
from tests.helpers import perturbed, tiny


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


def test_refusals_and_time():
    with pytest.raises(UsageError, match="the text has 1 tokens: at least 2 are needed"):
        quality(tiny(), torch.tensor([3]), 8)
    assert 0 < seconds_per_token(tiny(), 20, n_tokens=4) < math.inf
    with pytest.raises(UsageError, match="a context of 95 and 16 tokens to time are more than the model's 97"):
        seconds_per_token(tiny(), 95)
