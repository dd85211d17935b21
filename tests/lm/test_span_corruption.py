"""Span corruption: the paper's own example, nothing lost, fixed lengths, and the statistics of what is dropped."""

import pytest
import torch

from modicum.errors import UsageError
from modicum.lm.span_corruption import corrupt, corrupted_lengths, dropped_tokens, span_counts

FIRST, END = 999, 1


def mask(text: str) -> torch.Tensor:
    return torch.tensor([[c == "x" for c in line] for line in text.split()])


def restore(inputs: list[int], targets: list[int]) -> list[int]:
    """The text that inputs and targets were made of."""
    dropped: dict[int, list[int]] = {}
    for token in targets[:-1]:
        if token > 900:
            span = dropped[token] = []
        else:
            span.append(token)
    return [t for token in inputs[:-1] for t in dropped.get(token, [token])]


def test_the_papers_example():
    """Figure 2: "Thank you for inviting me to your party last week ." loses "for inviting" and "last"."""
    tokens = torch.arange(10, 21)[None]
    inputs, targets = corrupt(tokens, mask("..xx....x.."), FIRST, END)
    assert inputs.tolist() == [[10, 11, FIRST, 14, 15, 16, 17, FIRST - 1, 19, 20, END]]
    # What stays behind the last dropped span is a sentinel more, the <Z> of the figure.
    assert targets.tolist() == [[FIRST, 12, 13, FIRST - 1, 18, FIRST - 2, END]]
    # The windows that T5 trains on end with a dropped span.
    inputs, targets = corrupt(tokens, mask("..xx.....xx"), FIRST, END)
    assert inputs.tolist() == [[10, 11, FIRST, 14, 15, 16, 17, 18, FIRST - 1, END]]
    assert targets.tolist() == [[FIRST, 12, 13, FIRST - 1, 19, 20, END]]


def test_rows_of_a_batch_differ():
    tokens = torch.arange(10, 17).expand(2, -1)
    inputs, targets = corrupt(tokens, mask("..x.xxx .xx..xx"), FIRST, END)
    assert inputs.tolist() == [[10, 11, 999, 13, 998, 1], [10, 999, 13, 14, 998, 1]]
    assert targets.tolist() == [[999, 12, 998, 14, 15, 16, 1], [999, 11, 12, 998, 15, 16, 1]]


@pytest.mark.parametrize(
    ("window", "counts", "lengths"),
    [
        (568, (85, 28), (512, 114)),  # T5's own: 512 inputs, 114 targets
        (100, (15, 5), (91, 21)),
        (13, (2, 1), (13, 4)),
        (2, (1, 1), (3, 3)),
    ],
)
def test_lengths_by_hand(window, counts, lengths):
    assert (span_counts(window), corrupted_lengths(window)) == (counts, lengths)


@pytest.mark.parametrize("window", [2, 3, 7, 29, 100, 568])
def test_nothing_is_lost_and_lengths_are_fixed(window):
    tokens = torch.randint(2, 900, (5, window), generator=torch.Generator().manual_seed(0))
    dropped = dropped_tokens(5, window, (4, window))
    inputs, targets = corrupt(tokens, dropped, FIRST, END)
    assert (inputs.shape[1], targets.shape[1]) == corrupted_lengths(window)
    for row in range(5):
        assert restore(inputs[row].tolist(), targets[row].tolist()) == tokens[row].tolist()
    n_dropped, n_spans = span_counts(window)
    begins = dropped & ~torch.nn.functional.pad(dropped[:, :-1], (1, 0))
    assert dropped.sum(1).tolist() == [n_dropped] * 5
    assert begins.sum(1).tolist() == [n_spans] * 5
    assert (dropped[:, 0].any().item(), dropped[:, -1].all().item()) == (False, True)


def test_statistics():
    """15 % of the tokens in spans of 3 on average; every way to cut 4 dropped tokens into 2 spans is as likely."""
    dropped = dropped_tokens(3000, 568, 7)
    assert dropped.float().mean().item() == pytest.approx(0.15, abs=0.001)
    begins = (dropped[:, 1:] & ~dropped[:, :-1]).sum().item()
    assert dropped.sum().item() / begins == pytest.approx(3.0, abs=0.05)
    # No place is favoured but the two ends: a window begins with a kept span and ends with a dropped one.
    share = dropped[:, 100:-100].float().mean(0)
    assert share.sub(0.15).abs().max().item() < 5 * (0.15 * 0.85 / 3000) ** 0.5
    dropped = dropped_tokens(30_000, 29, 3)  # 4 tokens in 1 span
    assert span_counts(29) == (4, 1)
    assert dropped[:, -4:].all()
    dropped = dropped_tokens(30_000, 33, 3)  # 5 tokens in 2 spans: 1+4, 2+3, 3+2, 4+1
    assert span_counts(33) == (5, 2)
    last = dropped.flip(1).int().cumprod(1).sum(1)
    shares = torch.bincount(last, minlength=5)[1:5] / 30_000
    assert shares.sub(0.25).abs().max().item() < 5 * (0.25 * 0.75 / 30_000) ** 0.5


def test_a_pure_function_of_the_seed():
    assert torch.equal(dropped_tokens(4, 100, (1, 2)), dropped_tokens(4, 100, (1, 2)))
    assert not torch.equal(dropped_tokens(4, 100, (1, 2)), dropped_tokens(4, 100, (2, 1)))
    rows = dropped_tokens(4, 100, 0)
    assert len({tuple(row) for row in rows.tolist()}) == 4


def test_refusal():
    with pytest.raises(UsageError, match="a window of 1 tokens: at least 2 are needed"):
        corrupted_lengths(1)
