"""A smaller model of the same family as the draft (the choice of 2302.01318)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modicum.decode.batch import Batch
from modicum.decode.loop import PREFILL_CHUNK, open_cache
from modicum.decode.prompts import reads_apart, reads_video
from modicum.errors import UsageError
from modicum.speculative.drafters.base import Draft
from modicum.speculative.drafters.drawing import Drawing


class ModelDrafter:
    """Drafts token by token with a language model that shares the target's tokenizer."""

    k_invariant = True  # what it draws a token from depends on the text before that token alone

    def __init__(self, model: Any) -> None:
        self.model = model
        self.max_rows: int | None = None if model.ragged else 1

    def check(self, target: Any) -> None:
        if not self.model.ragged:
            self.model.check_speculation()
        # Behind the prompt of a caption a text goes on as any text does, and a draft may do without the clip.
        blind = reads_video(target) and not reads_apart(self.model)
        if kind_of(self.model) != kind_of(target) and not blind:
            raise UsageError(
                f"the draft {kind_of(self.model)} and the target {kind_of(target)}: choose a draft of the target's kind"
            )
        if hasattr(self.model, "check_sources_of"):
            self.model.check_sources_of(target)
        ours, theirs = self.model.tokenizer, target.tokenizer
        if ours is None or theirs is None:
            return  # token ids are the caller's own
        difference = theirs.difference(ours)
        if difference is not None:
            raise UsageError(
                f"the draft's tokenizer is not the target's ({difference}): choose a draft that was trained with it"
            )

    def start(self, batch: Batch, capacity: int) -> None:
        counts = [length - 1 for length in batch.lengths]
        ids_BM = self._readable(batch.tokens_BM)
        self.cache = open_cache(self.model, self._sources(batch), ids_BM, counts, capacity)
        self.read = counts  # tokens in the cache, per row

    def propose(self, batch: Batch, allowed: list[int], noise_BNP: Tensor | None) -> Draft:
        counts = self.offers(batch, allowed)
        if not max(counts):
            return Draft.empty(batch)
        drawing, calls = Drawing(batch, noise_BNP, counts), 1
        token_B = drawing.draw(self._catch_up(batch))
        while token_B is not None and len(drawing.tokens) < max(drawing.counts):
            logits_BV = batch.clock.call("draft", self.model, token_B[:, None], cache=self.cache)[:, -1]
            self.read = [read + 1 for read in self.read]
            self.cache.commit(1, self.read)
            calls += 1
            token_B = drawing.draw(logits_BV)
        return drawing.draft(calls)

    def offers(self, batch: Batch, allowed: list[int]) -> list[int]:
        """All that is allowed, up to the draft's own context."""
        context = self.model.config.max_seq_len
        return [max(0, min(n, context - length)) for n, length in zip(allowed, batch.lengths, strict=True)]

    def draft_seconds(self, clock: Callable[[Any, int, int], float], rows: int, n_tokens: int) -> float:
        # The first call reads one token after a rejection, and two after full acceptance.
        return clock(self.model, rows, 2) + (n_tokens - 1) * clock(self.model, rows, 1)

    def read_seconds(self, clock: Callable[[Any, int, int], float], rows: int, n_tokens: int) -> float:
        return clock(self.model, rows, n_tokens + 1) - clock(self.model, rows, 1)

    def keep(self, rows: list[int], lengths: list[int]) -> None:
        self.read = [self.read[row] for row in rows]
        self.cache.keep(rows, self.read)

    def _catch_up(self, batch: Batch) -> Tensor:
        """Read whatever the draft has not: one token after a rejection, two after full acceptance, more after loops
        without it. -> [B, V]"""
        # Of what the draft read last time, the accepted tokens stand; the last token of a row is new to it.
        self.read = [min(read, length - 1) for read, length in zip(self.read, batch.lengths, strict=True)]
        self.cache.truncate(batch.lengths_B - 1, self.read)
        behind = [length - read for read, length in zip(self.read, batch.lengths, strict=True)]
        while min(behind) > PREFILL_CHUNK:
            self._read_on(batch, PREFILL_CHUNK)
            behind = [n - PREFILL_CHUNK for n in behind]
        behind_B = batch.lengths_B - self.cache.lengths_B
        if max(behind) == 1:
            ids_BL, last_B1 = batch.last_B1, None
        else:
            columns_BL = self.cache.lengths_B[:, None] + torch.arange(max(behind), device=batch.device)
            ids_BL = batch.tokens_BM.gather(1, columns_BL.clamp(max=batch.tokens_BM.shape[1] - 1))
            last_B1 = behind_B[:, None] - 1
        ids_BL = self._readable(ids_BL)
        logits_BV = batch.clock.call("draft", self.model, ids_BL, cache=self.cache, at_BN=last_B1)[:, -1]
        self.read = list(batch.lengths)
        self.cache.commit(behind_B, self.read)
        return logits_BV

    def _read_on(self, batch: Batch, n_tokens: int) -> None:
        """Read `n_tokens` more of every row, in the memory of one chunk of a prompt."""
        columns_BL = self.cache.lengths_B[:, None] + torch.arange(n_tokens, device=batch.device)
        nothing_BN = columns_BL[:, :0]
        ids_BL = self._readable(batch.tokens_BM.gather(1, columns_BL))
        batch.clock.call("draft", self.model, ids_BL, cache=self.cache, at_BN=nothing_BN)
        self.read = [read + n_tokens for read in self.read]
        self.cache.commit(n_tokens, self.read)

    def _sources(self, batch: Batch) -> list[Any]:
        """What it reads of each row apart from the text, if it does."""
        if not reads_apart(self.model):
            return []
        if reads_video(self.model):
            return batch.sources
        last = self.model.config.vocab_size - 1
        return [[min(token, last) for token in source] for source in batch.sources]

    def _readable(self, ids: Tensor) -> Tensor:
        """Ids that only the target's larger table has, as the draft's last: a poor guess, but still only a guess."""
        return ids.clamp(max=self.model.config.vocab_size - 1)


def kind_of(model: Any) -> str:
    """What a model does."""
    return getattr(model, "kind", "only continues text")
