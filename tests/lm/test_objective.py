"""Objectives: causal numbers as they were, span corruption by hand, distillation, held-out text always the same."""

import pytest
import tokenizers
import torch
import torch.nn.functional as F

from modicum.checkpoint.tokenizer import Tokenizer
from modicum.errors import UsageError
from modicum.lm.objective import CausalLM, SpanCorruption, objective_of
from modicum.lm.span_corruption import corrupted_lengths
from tests.helpers import perturbed, tiny, tiny_t5

SENTINELS = range(28, 22, -1)


def spans(window=33, sentinels=SENTINELS):
    return SpanCorruption(window, sentinels, end=1, start=0)


def windows(rows=3, length=34, seed=0):
    return torch.randint(2, 22, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_causal_loss_is_that_of_the_next_token_to_the_last_bit():
    model, teacher, tokens = tiny(), tiny(1), windows()
    logits = model(tokens[:, :-1]).float()
    entropy = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert torch.equal(CausalLM(23).loss(model, tokens, 5), entropy)
    p, q = teacher(tokens[:, :-1]).softmax(-1), model(tokens[:, :-1]).softmax(-1)
    distance = (p * (p / q).log()).sum(-1).mean()
    both = CausalLM(23).loss(model, tokens, 5, teacher, 0.75)
    torch.testing.assert_close(both, 0.75 * distance + 0.25 * entropy)
    # No gradient reaches the teacher.
    both.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None for p in model.parameters())


def test_causal_held_out_scores_every_token_once():
    model, ids = tiny(), windows(1, 50)[0]
    nats, count = CausalLM(20).held_out(model, ids)
    expected = 0.0
    for begin, end in ((0, 20), (20, 40), (40, 49)):
        scores = model(ids[None, begin:end])[0].log_softmax(-1)
        expected -= scores.gather(1, ids[begin + 1 : end + 1, None]).sum().item()
    assert count == 49
    assert nats == pytest.approx(expected, rel=1e-6)


def test_what_t5_reads_and_predicts():
    tokens = windows()
    (inputs, read), targets = spans().example(tokens, (0, 1))
    assert (inputs.shape[1], targets.shape[1]) == corrupted_lengths(33)
    # The decoder reads its start, then each target but the last, which is the end of the text.
    assert read[:, 0].tolist() == [0, 0, 0]
    assert torch.equal(read[:, 1:], targets[:, :-1])
    assert targets[:, -1].tolist() == inputs[:, -1].tolist() == [1, 1, 1]
    # The last of the 34 tokens is the next window's first.
    other = tokens.clone()
    other[:, -1] = 21
    (again, _), _ = spans().example(other, (0, 1))
    assert torch.equal(inputs, again)
    # Another step drops others.
    assert not torch.equal(spans().example(tokens, (0, 2))[0][0], inputs)


def test_span_corruption_loss_and_distillation():
    model, tokens = tiny_t5(), windows()
    teacher = perturbed(model, 1, 0.1)
    (inputs, read), targets = spans().example(tokens, 4)
    scores = model(inputs, read).log_softmax(-1)
    entropy = -scores.gather(2, targets[..., None]).mean()
    loss = spans().loss(model, tokens, 4)
    torch.testing.assert_close(loss, entropy)
    assert torch.equal(loss, spans().loss(model, tokens, 4))
    assert not torch.equal(loss, spans().loss(model, tokens, 5))
    p = teacher(inputs, read).softmax(-1)
    distance = (p * (p.log() - scores)).sum(-1).mean()
    torch.testing.assert_close(spans().loss(model, tokens, 4, teacher, 0.75), 0.75 * distance + 0.25 * entropy)
    assert spans().loss(model, tokens, 4, model, 1.0).item() == pytest.approx(0, abs=1e-6)


def test_held_out_spans_are_always_the_same():
    model, ids = tiny_t5(), windows(1, 70)[0]
    nats, count = spans().held_out(model, ids)
    # Windows of 33, 33 and 4 tokens.
    assert count == sum(corrupted_lengths(n)[1] for n in (33, 33, 4))
    assert (nats, count) == spans().held_out(model, ids)
    examples = list(spans().held_out_examples(ids))
    expected = sum(F.cross_entropy(model(*given)[0], targets[0], reduction="sum").item() for given, targets in examples)
    assert nats == pytest.approx(expected, rel=1e-6)
    # One token alone at the end is left out, and each window drops other places.
    assert spans().held_out(model, ids[:67])[1] == sum(corrupted_lengths(n)[1] for n in (33, 33))
    same = torch.cat([ids[:33], ids[:33]])
    first, second = (targets for _, targets in spans().held_out_examples(same))
    assert not torch.equal(first, second)


def test_it_learns():
    """A period of 4 tells every dropped token from its neighbours: much of the loss goes."""
    tokens = torch.tensor([5, 9, 13, 17]).repeat(9)[:34].expand(8, -1)
    model, objective = tiny_t5(n_kv_heads=6, scale=0.1).train(), spans()
    before = objective.held_out(model, tokens[0])[0]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(40):
        objective.loss(model, tokens, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert objective.held_out(model, tokens[0])[0] < 0.4 * before


def tokenizer_of(vocabulary):
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    return Tokenizer(tokenizers.Tokenizer(model))


def test_the_objective_of_a_model():
    assert type(objective_of(tiny(), 20)) is CausalLM
    model = tiny_t5(decoder_start_id=7)
    model.tokenizer = tokenizer_of({"<unk>": 2, "</s>": 1, **{f"<extra_id_{n}>": 28 - n for n in range(3)}})
    made = objective_of(model, 40)
    assert isinstance(made, SpanCorruption)
    assert (made.window, list(made.sentinels), made.end, made.start) == (40, [28, 27, 26], 1, 7)
    # A window of 100 tokens loses 5 spans.
    with pytest.raises(UsageError, match="a window of 100 tokens loses 5 spans and the tokenizer has 3 sentinels"):
        objective_of(model, 100)
    model.tokenizer = tokenizer_of({"<unk>": 2, "</s>": 1})
    with pytest.raises(UsageError, match="which this model's tokenizer does not have"):
        objective_of(model, 40)
