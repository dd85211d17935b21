"""Dropout for T5: the places and the rate are those of `transformers`, and evaluation sees none of it."""

import pytest
import torch
import torch.nn.functional as F

from modicum import api
from modicum.lm.objective import SpanCorruption
from modicum.train.dropout import add_dropout
from tests.helpers import tiny_t5
from tests.parity import t5


def pattern(x, p=0.5, training=True, inplace=False):
    """In place of a random mask, one that only the shape decides: every seventh number is dropped."""
    if not training:
        return x
    kept = torch.arange(x.numel()).view(x.shape) % 7 != 3
    return x * kept / (1 - p)


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """PyTorch's kernel written out, so that its dropout is the pattern too."""
    scores = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5) + (0 if attn_mask is None else attn_mask)
    return pattern(scores.softmax(-1), dropout_p, dropout_p > 0) @ v


@pytest.mark.parametrize("case", ["v1.0", "v1.1"])
def test_the_places_are_those_of_transformers(case, tmp_path, monkeypatch):
    theirs = t5.make(case, tmp_path, dropout_rate=0.3).train()
    ours = api.load(tmp_path, device="cpu", dtype="float32").train()
    ids, read = torch.randint(2, t5.VOCAB, (2, 9)), torch.randint(2, t5.VOCAB, (2, 5))
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(F, "dropout", pattern)
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: pattern(x, self.p, self.training))
    plain = ours(ids, read)
    add_dropout(ours, 0.3)
    wanted = theirs(input_ids=ids, decoder_input_ids=read).logits
    torch.testing.assert_close(ours(ids, read), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, wanted, rtol=1e-2, atol=1e-2)
    # The comparison notices a place that is missing.
    ours.decoder.blocks[0].cross.attend = lambda *args: attention(*args[:4], 0.0, args[4], args[5])
    assert not torch.allclose(ours(ids, read), wanted, rtol=1e-3, atol=1e-3)


def test_evaluation_sees_none_of_it():
    model, ids, read = tiny_t5(), torch.randint(0, 29, (2, 9)), torch.randint(0, 29, (2, 5))
    plain = model(ids, read)
    add_dropout(model, 0.3)
    assert torch.equal(model(ids, read), plain)
    assert not torch.equal(model.train()(ids, read), plain)
    assert torch.equal(model.eval()(ids, read), plain)


def test_a_step_drops_what_its_seed_says():
    """A resumed run repeats the step."""
    model, tokens = tiny_t5(), torch.randint(2, 22, (3, 34))
    add_dropout(model, 0.3)
    model.train()
    objective = SpanCorruption(33, range(28, 22, -1), end=1, start=0)
    first = objective.loss(model, tokens, (0, 5))
    torch.rand(3)
    assert torch.equal(objective.loss(model, tokens, (0, 5)), first)
    model.eval()
    assert not torch.equal(objective.loss(model, tokens, (0, 5)), first)
