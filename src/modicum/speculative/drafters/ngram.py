"""Prompt lookup: what followed the last few tokens the last time they occurred is proposed again. No model, no cost."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modicum.decode.batch import Batch
from modicum.speculative.drafters.base import Draft

# About what two lookups and their indexing take in Python; loops soon show what they really do.
LOOKUP_SECONDS = 3e-5


class NgramDrafter:
    """Looks each row's last `longest` ... 1 tokens up in the row itself, the longest match first, the latest of equals.

    A proposal is a point mass, so a sampled row accepts it with the target's own probability of that token.
    """

    max_rows: int | None = None
    k_invariant = True  # point masses: see `speculative.invariant`

    def __init__(self, longest: int = 4) -> None:
        self.longest = longest

    def check(self, target: Any) -> None:
        """It drafts in the target's own tokens: always possible."""

    def start(self, batch: Batch, capacity: int) -> None:
        self.indexes = [NgramIndex(self.longest) for _ in batch.rows]

    def propose(self, batch: Batch, allowed: list[int], noise_BNP: Tensor | None) -> Draft:
        found = [index.lookup(row.tokens, n) for index, row, n in zip(self.indexes, batch.rows, allowed, strict=True)]
        counts = [len(tokens) for tokens in found]
        width = max(counts)
        padded = [tokens + [0] * (width - len(tokens)) for tokens in found]
        tokens_BC = torch.tensor(padded, dtype=torch.int64, device=batch.device).view(len(found), width)
        return Draft(tokens_BC, None, counts, 0)

    def offers(self, batch: Batch, allowed: list[int]) -> list[int]:
        """What there is a match for: it depends on the text alone, so that looking first biases nothing."""
        rows = zip(self.indexes, batch.rows, allowed, strict=True)
        return [len(index.lookup(row.tokens, n)) for index, row, n in rows]

    def draft_seconds(self, clock: Callable[[Any, int, int], float], rows: int, n_tokens: int) -> float:
        return LOOKUP_SECONDS * rows

    def keep(self, rows: list[int], lengths: list[int]) -> None:
        self.indexes = [self.indexes[row] for row in rows]


class NgramIndex:
    """Where each n-gram of a growing text was last followed by something; each token is indexed once."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.indexed = 0
        self.follower: dict[tuple[int, ...], int] = {}

    def lookup(self, tokens: list[int], n_tokens: int) -> list[int]:
        """Up to `n_tokens` that followed the latest earlier occurrence of the longest known ending of `tokens`."""
        # The n-gram that ends the text has no follower yet, so it cannot match itself.
        for end in range(max(self.indexed, 1), len(tokens)):
            for size in range(1, min(self.longest, end) + 1):
                self.follower[tuple(tokens[end - size : end])] = end
        self.indexed = len(tokens)
        for size in range(min(self.longest, len(tokens)), 0, -1):
            start = self.follower.get(tuple(tokens[-size:]))
            if start is not None:
                return tokens[start : start + n_tokens]
        return []
