"""How a drafter takes tokens from its logits: by each row's own settings, with the uniforms of their place in the loop."""

from typing import Protocol

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


class Drawing:
    """The tokens of one proposal, drawn one after another, with the distributions that they were drawn from."""

    def __init__(self, batch: Rows, noise_BNP: Tensor | None) -> None:
        self.batch, self.noise_BNP = batch, noise_BNP
        self.tokens: list[Tensor] = []
        self.probs: list[Tensor] = []

    def draw(self, logits_BV: Tensor) -> Tensor:
        """Each row's next token, int64 [B], from logits over at least the target's vocabulary."""
        batch, logits_BV = self.batch, logits_BV[:, : self.batch.vocab_size]
        seen_BV = batch.seen_BV
        if seen_BV is not None and self.tokens:
            seen_BV = seen_prefixes(seen_BV, torch.stack(self.tokens, 1))[:, -1]
        if self.noise_BNP is None:
            penalised = batch.sampler.penalised
            token_B = batch.sampler.greedy(logits_BV, seen_BV) if penalised else greedy(logits_BV)
        else:
            probs_BV = batch.sampler.probs(logits_BV, seen_BV)
            token_B = draw(probs_BV, self.noise_BNP[:, len(self.tokens), Purpose.DRAFT])
            self.probs.append(probs_BV)
        self.tokens.append(token_B)
        return token_B

    def draw_all(self, logits_BCV: Tensor) -> None:
        """The tokens of all C places at once, from logits that none of them has changed."""
        B, C, _ = logits_BCV.shape
        if self.batch.seen_BV is not None:  # a penalty makes each depend on those before it
            for place in range(C):
                self.draw(logits_BCV[:, place])
            return
        logits_BCV = logits_BCV[..., : self.batch.vocab_size]
        if self.noise_BNP is None:
            self.tokens += greedy(logits_BCV).unbind(1)
            return
        probs_BCV = self.batch.sampler.probs(logits_BCV)
        uniforms = self.noise_BNP[:, :C, Purpose.DRAFT].flatten()
        self.tokens += draw(probs_BCV.flatten(0, 1), uniforms).view(B, C).unbind(1)
        self.probs += probs_BCV.unbind(1)

    def draft(self, counts: list[int], calls: int) -> Draft:
        """What was drawn; row b offers the first `counts[b]`."""
        return Draft(torch.stack(self.tokens, 1), torch.stack(self.probs, 1) if self.probs else None, counts, calls)
