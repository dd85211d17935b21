"""Logits processors: a caller's own functions on the logits, asked about every prefix that a draft makes.

They have the signature of `transformers`' `LogitsProcessor`, so its objects and those written for it work unchanged.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from modicum.errors import UsageError

# int64 ids [1, L] of prompt and text so far, float scores [1, V] -> scores [1, V]
Processor = Callable[[Tensor, Tensor], Tensor]

NEVER = 1 << 30  # more drafted tokens than there can be


def processors_per_prompt(given: Any, n_prompts: int) -> list[tuple[Processor, ...]]:
    """One processor, a list of them for all prompts, or one list (or None) per prompt, as a tuple per prompt.

    Raises:
        UsageError: something in it cannot be called, or there are lists for another number of prompts.
    """
    # A `LogitsProcessorList` can be called itself, but is meant as the list that it is.
    listed = given if isinstance(given, list | tuple) else [] if given is None else [given]
    several = any(item is None or isinstance(item, list | tuple) for item in listed)
    if several and len(listed) != n_prompts:
        raise UsageError(
            f"logits_processors has {len(listed)} lists for {n_prompts} prompts: give one list, or one per prompt"
        )
    rows = [tuple(item or ()) if item is None or isinstance(item, list | tuple) else (item,) for item in listed]
    for processor in (processor for row in rows for processor in row):
        if not callable(processor):
            raise UsageError(
                f"logits_processors has {processor!r}: give functions of (ids [1, L], scores [1, V]) that return scores"
            )
    if several and not all(item is None or isinstance(item, list | tuple) for item in listed):
        raise UsageError("logits_processors mixes functions and lists: give one list, or one per prompt")
    return rows if several else [tuple(processor for row in rows for processor in row)] * n_prompts


class PrefixProcessors:
    """The processors of a batch's rows, evaluated row by row and prefix by prefix, so that they never see padding.

    A row's processors are not asked about a text that cannot come: one behind an end of text, or behind a token that
    they have themselves ruled out, which a draft that does not know them may hold. So a grammar never leaves its states.
    """

    def __init__(self, rows: Sequence[tuple[Processor, ...]], ends: Sequence[frozenset[int]]) -> None:
        self.rows, self.ends = list(rows), list(ends)

    def select(self, rows: list[int]) -> "PrefixProcessors":
        return PrefixProcessors([self.rows[row] for row in rows], [self.ends[row] for row in rows])

    def apply(
        self, scores_BNV: Tensor, tokens_BM: Tensor, lengths: list[int], drafted_BC: Tensor, longest: list[int]
    ) -> tuple[Tensor, list[int]]:
        """Processed scores [B, N, V], and per row the drafted tokens behind which its processors allow nothing.

        Args:
            scores_BNV: what the model and the repetition penalty say behind the last N of the prefixes 0 ... C.
            tokens_BM: prompt and text of each row, `lengths[b]` of them.
            drafted_BC: what was drafted to follow.
            longest: per row, how many drafted tokens its longest prefix may have; what is drafted behind is padding.

        Behind those scores are all -inf: a mistake only if the text really gets there. The second result is NEVER for a
        row that did not get stuck. Scores of prefixes that cannot come stay as they are.
        """
        N, C = scores_BNV.shape[1], drafted_BC.shape[1]
        first, stuck = C + 1 - N, [NEVER] * len(self.rows)
        drafted = drafted_BC.tolist()
        processed_BNV = scores_BNV.clone()
        for row, processors in enumerate(self.rows):
            if not processors or longest[row] < first or not self.ends[row].isdisjoint(drafted[row][:first]):
                continue
            ids_1L = torch.cat([tokens_BM[row, : lengths[row]], drafted_BC[row]])[None]
            end = min(longest[row], C)
            for n in range(first, end + 1):
                scores_1V = scores_BNV[row, n - first].clone()[None]
                for processor in processors:
                    scores_1V = processor(ids_1L[:, : lengths[row] + n], scores_1V)
                    check_shape(processor, scores_1V, scores_BNV.shape[-1])
                processed_BNV[row, n - first] = scores_1V[0]
                impossible_V = scores_1V[0] == -torch.inf
                if bool(impossible_V.all()):
                    stuck[row] = n
                    break
                if n < end and (drafted[row][n] in self.ends[row] or bool(impossible_V[drafted[row][n]])):
                    break
        return processed_BNV, stuck


def check_shape(processor: Any, scores: Any, vocab_size: int) -> None:
    """Raise UsageError if a processor returned no scores for the vocabulary."""
    shape = getattr(scores, "shape", None)
    if shape != (1, vocab_size):
        name = getattr(processor, "__name__", type(processor).__name__)
        returned = type(scores).__name__ if shape is None else f"shape {list(shape)}"
        raise UsageError(f"logits processor `{name}` returned {returned}: it must return scores, [1, {vocab_size}]")
