"""How a drafter takes tokens from its logits: by each row's own settings, with the uniforms of their place in the loop."""

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from modicum.decode.random import Purpose
from modicum.decode.sampling import Sampler, draw, greedy, seen_prefixes
from modicum.speculative.drafters.base import Draft


class Rows(Protocol):
    """What there is to know of the rows that tokens are drawn for: a `Batch`, or what stands for one."""

    sampler: Sampler
    seen_BV: Tensor | None
    vocab_size: int
    processors: Any  # only a `Batch` has some


class Drawing:
    """The tokens of one proposal, drawn one after another, with the distributions that they were drawn from.

    Row b is to offer `counts[b]` of them, or as many as its logits processors let follow.
    """

    def __init__(self, batch: Rows, noise_BNP: Tensor | None, counts: list[int]) -> None:
        self.batch: Any = batch
        self.noise_BNP, self.counts = noise_BNP, counts
        self.tokens: list[Tensor] = []
        self.probs: list[Tensor] = []

    def draw(self, logits_BV: Tensor) -> Tensor | None:
        """Each row's next token, int64 [B]; None where no row may go on."""
        batch, logits_BV, seen_BV = self.batch, fitted(logits_BV, self.batch.vocab_size), self.batch.seen_BV
        if seen_BV is not None and self.tokens:
            seen_BV = seen_prefixes(seen_BV, torch.stack(self.tokens, 1))[:, -1]
        if batch.processors is not None:
            processed_BV = self._process(logits_BV, seen_BV)
            if processed_BV is None:
                return None
            logits_BV, seen_BV = processed_BV, None
        if self.noise_BNP is None:
            penalised = batch.sampler.penalised
            token_B = batch.sampler.greedy(logits_BV, seen_BV) if penalised else greedy(logits_BV)
        else:
            probs_BV = batch.sampler.probs(logits_BV, seen_BV)
            token_B = draw(probs_BV, self.noise_BNP[:, len(self.tokens), Purpose.DRAFT])
            self.probs.append(probs_BV)
        self.tokens.append(token_B)
        return token_B

    def _process(self, logits_BV: Tensor, seen_BV: Tensor | None) -> Tensor | None:
        batch, place = self.batch, len(self.tokens)
        drafted_BC = torch.stack(self.tokens, 1) if self.tokens else batch.last_B1[:, :0]
        scores_B1V, stuck = batch.process(logits_BV, seen_BV, drafted_BC, [count - 1 for count in self.counts])
        # A row that nothing may follow is not drafted further; whether it gets there is for the target to say.
        self.counts = [min(pair) for pair in zip(self.counts, stuck, strict=True)]
        if max(self.counts) <= place:
            return None
        for row in (row for row, at in enumerate(stuck) if at == place):
            scores_B1V[row, 0] = logits_BV[row]  # to draw from beside rows that go on
        return scores_B1V[:, 0]

    def draw_all(self, logits_BCV: Tensor) -> None:
        """The tokens of all C places at once, from logits that none of them has changed."""
        B, C, _ = logits_BCV.shape
        if self.batch.seen_BV is not None or self.batch.processors is not None:
            # Each depends on those before it.
            for place in range(C):
                if self.draw(logits_BCV[:, place]) is None:
                    return
            return
        logits_BCV = fitted(logits_BCV, self.batch.vocab_size)
        if self.noise_BNP is None:
            self.tokens += greedy(logits_BCV).unbind(1)
            return
        probs_BCV = self.batch.sampler.probs(logits_BCV)
        uniforms = self.noise_BNP[:, :C, Purpose.DRAFT].flatten()
        self.tokens += draw(probs_BCV.flatten(0, 1), uniforms).view(B, C).unbind(1)
        self.probs += probs_BCV.unbind(1)

    def draft(self, calls: int) -> Draft:
        """What was drawn; `calls` of a model it took."""
        if not self.tokens:
            return replace(Draft.empty(self.batch), calls=calls)
        probs_BCV = torch.stack(self.probs, 1) if self.probs else None
        return Draft(torch.stack(self.tokens, 1), probs_BCV, self.counts, calls)


def fitted(logits: Tensor, vocab_size: int) -> Tensor:
    """A draft's logits over the target's vocabulary: its own padding cut off, what it lacks impossible."""
    missing = vocab_size - logits.shape[-1]
    if missing <= 0:
        return logits[..., :vocab_size] if missing else logits
    return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
