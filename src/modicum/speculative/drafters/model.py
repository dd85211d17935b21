"""A smaller model of the same family as the draft (the choice of 2302.01318)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from modicum.decode.batch import Batch
from modicum.decode.loop import PREFILL_CHUNK, open_cache
from modicum.decode.prompts import reads_apart
from modicum.decode.random import Purpose
from modicum.decode.sampling import draw, greedy, seen_prefixes
from modicum.errors import UsageError
from modicum.speculative.drafters.base import Draft


class ModelDrafter:
    """Drafts token by token with a language model that shares the target's tokenizer."""

    k_invariant = True  # what it draws a token from depends on the text before that token alone

    def __init__(self, model: Any) -> None:
        self.model = model
        self.max_rows: int | None = None if model.ragged else 1

    def check(self, target: Any) -> None:
        if not self.model.ragged:
            self.model.check_speculation()
        if reads_apart(self.model) != reads_apart(target):
            raise UsageError(
                f"the draft {_kind(self.model)} and the target {_kind(target)}: choose a draft of the target's kind"
            )
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
        last = self.model.config.vocab_size - 1
        sources = [[min(token, last) for token in source] for source in batch.sources]
        self.cache = open_cache(self.model, sources, self._readable(batch.tokens_BM), counts, capacity)
        self.read = counts  # tokens in the cache, per row

    def propose(self, batch: Batch, allowed: list[int], noise_BNP: Tensor | None) -> Draft:
        counts = self.offers(batch, allowed)
        if not max(counts):
            return Draft.empty(batch)
        calls, logits_BV = 1, self._catch_up(batch)
        tokens: list[Tensor] = []
        probs: list[Tensor | None] = []
        for offset in range(max(counts)):
            if offset:
                logits_BV = batch.clock.call("draft", self.model, tokens[-1][:, None], cache=self.cache)[:, -1]
                self.read = [read + 1 for read in self.read]
                self.cache.commit(1, self.read)
                calls += 1
            logits_BV, seen_BV = self.fit(logits_BV, batch.vocab_size), self._seen(batch, tokens)
            if batch.processors is not None:
                drafted_BC = torch.stack(tokens, 1) if tokens else batch.last_B1[:, :0]
                scores_B1V, stuck = batch.process(logits_BV, seen_BV, drafted_BC, [count - 1 for count in counts])
                # A row that nothing may follow is not drafted further; whether it gets there is for the target to say.
                counts = [min(pair) for pair in zip(counts, stuck, strict=True)]
                if max(counts) <= offset:
                    break
                for row in (row for row, at in enumerate(stuck) if at == offset):
                    scores_B1V[row, 0] = logits_BV[row]  # to draw from beside rows that go on
                logits_BV, seen_BV = scores_B1V[:, 0], None
            token_B, probs_BV = self._draw(batch, logits_BV, seen_BV, noise_BNP, offset)
            tokens.append(token_B)
            probs.append(probs_BV)
        if not tokens:
            return replace(Draft.empty(batch), calls=calls)
        drawn = [p for p in probs if p is not None]
        return Draft(torch.stack(tokens, 1), torch.stack(drawn, 1) if drawn else None, counts, calls)

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
        if max(behind) == 1:
            ids_BL, last_B1 = batch.last_B1, None
        else:
            columns_BL = self.cache.lengths_B[:, None] + torch.arange(max(behind), device=batch.device)
            ids_BL = batch.tokens_BM.gather(1, columns_BL.clamp(max=batch.tokens_BM.shape[1] - 1))
            last_B1 = (batch.lengths_B - self.cache.lengths_B - 1)[:, None]
        ids_BL = self._readable(ids_BL)
        logits_BV = batch.clock.call("draft", self.model, ids_BL, cache=self.cache, at_BN=last_B1)[:, -1]
        self._commit(behind)
        return logits_BV

    def _read_on(self, batch: Batch, n_tokens: int) -> None:
        """Read `n_tokens` more of every row, in the memory of one chunk of a prompt."""
        columns_BL = self.cache.lengths_B[:, None] + torch.arange(n_tokens, device=batch.device)
        nothing_BN = columns_BL[:, :0]
        self.model(self._readable(batch.tokens_BM.gather(1, columns_BL)), cache=self.cache, at_BN=nothing_BN)
        self._commit([n_tokens] * len(self.read))

    def _readable(self, ids: Tensor) -> Tensor:
        """Ids that only the target's larger table has, as the draft's last: a poor guess, but still only a guess."""
        return ids.clamp(max=self.model.config.vocab_size - 1)

    def _commit(self, counts: list[int]) -> None:
        self.read = [read + n for read, n in zip(self.read, counts, strict=True)]
        step = counts[0] if min(counts) == max(counts) else torch.tensor(counts, device=self.cache.lengths_B.device)
        self.cache.commit(step, self.read)

    @staticmethod
    def _seen(batch: Batch, tokens: list[Tensor]) -> Tensor | None:
        if batch.seen_BV is None or not tokens:
            return batch.seen_BV
        return seen_prefixes(batch.seen_BV, torch.stack(tokens, 1))[:, -1]

    @staticmethod
    def fit(logits_BV: Tensor, vocab_size: int) -> Tensor:
        """The draft's logits over the target's vocabulary: its own padding cut off, what it lacks impossible."""
        missing = vocab_size - logits_BV.shape[-1]
        if missing <= 0:
            return logits_BV[:, :vocab_size] if missing else logits_BV
        return torch.nn.functional.pad(logits_BV, (0, missing), value=-torch.inf)

    @staticmethod
    def _draw(
        batch: Batch, logits_BV: Tensor, seen_BV: Tensor | None, noise_BNP: Tensor | None, offset: int
    ) -> tuple[Tensor, Tensor | None]:
        if noise_BNP is None:
            sampler = batch.sampler
            return sampler.greedy(logits_BV, seen_BV) if sampler.penalised else greedy(logits_BV), None
        probs_BV = batch.sampler.probs(logits_BV, seen_BV)
        return draw(probs_BV, noise_BNP[:, offset, Purpose.DRAFT]), probs_BV


def _kind(model: Any) -> str:
    return "reads one text and writes another" if reads_apart(model) else "only continues text"
