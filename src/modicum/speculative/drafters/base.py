"""What the speculative loop asks of a drafter."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from modicum.decode.batch import Batch


@dataclass(frozen=True)
class Draft:
    """Proposed tokens, [B, C], of which row b offers the first `counts[b]`.

    `probs_BCV` are the distributions that the tokens were really drawn from, after temperature, filters and penalties;
    None for tokens that were not drawn at all (a point mass: n-grams, greedy drafts). `calls` of a model it took.
    """

    tokens_BC: Tensor
    probs_BCV: Tensor | None
    counts: list[int]
    calls: int

    @staticmethod
    def empty(batch: Batch) -> "Draft":
        n_rows = len(batch.rows)
        nothing = torch.zeros(n_rows, 0, dtype=torch.int64, device=batch.device)
        return Draft(nothing, None, [0] * n_rows, 0)


class Drafter(Protocol):
    """A source of proposals. It may keep state per row, such as a cache; `keep` drops rows in step with the batch.

    Whether a row gets another drafted token may depend only on that row's own tokens and probabilities, and a token
    that was drawn is always verified: looking at a draw and withholding it would bias the text.
    """

    max_rows: int | None  # the most rows it can serve at once; None: any number

    def check(self, target: Any) -> None:
        """Raise UsageError if it cannot draft for `target`."""
        ...

    def start(self, batch: Batch, capacity: int) -> None:
        """A new batch begins; no row will grow beyond `capacity` tokens."""
        ...

    def propose(self, batch: Batch, allowed: list[int], noise_BNP: Tensor | None) -> Draft:
        """At most `allowed[b]` tokens to follow each row. `noise_BNP` as from `Batch.noise`, None if all are greedy.

        A model is called through `batch.clock.call("draft", model, ...)`, so that its time is known as a model's.
        `drawing.Drawing` draws from its logits as the rows' settings and processors ask.
        """
        ...

    def keep(self, rows: list[int], lengths: list[int]) -> None:
        """Go on with these rows, which hold `lengths` tokens now."""
        ...


class Sharer(Drafter, Protocol):
    """A drafter that computes in the target's own cache."""

    def share(self, cache: Any) -> None:
        """A new batch's cache, which has read all but each row's last token; the target drops rows from it itself."""
        ...


class Observer(Drafter, Protocol):
    """A drafter that is shown what the target makes of every token, prompt and text, as soon as it has read it."""

    def observe(self, hidden_BLD: Tensor, counts_B: Tensor, counts: list[int]) -> None:
        """What the target's head reads at its next tokens; row b keeps the first `counts[b]` of them.

        It is called after `start`: chunk by chunk for the prompts, without each row's last token, and once per loop for
        that token and the accepted ones, before the batch has taken them.
        """
        ...
