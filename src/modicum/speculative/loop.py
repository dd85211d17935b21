"""The speculative loop (2302.01318, Algorithm 2): draft, score in one call, accept, commit; every row at its own pace."""

from typing import Any

import torch
from torch import Tensor

from modicum.decode.batch import Batch, Loop
from modicum.decode.logprobs import read_logprobs
from modicum.decode.loop import Observe, fetch, open_cache, refuse_invalid
from modicum.decode.sampling import Sampler, greedy, seen_prefixes
from modicum.speculative.accept import Acceptance, accept, accept_greedy
from modicum.speculative.block import accept_block
from modicum.speculative.drafters.base import Draft, Drafter
from modicum.speculative.invariant import accept_invariant, within

VERIFICATIONS = ("token", "block")


class SpeculativeEngine:
    """Up to `num_draft_tokens` + 1 tokens per row and target call, with exactly the target's distribution."""

    sources = ("draft", "target")

    def __init__(
        self,
        target: Any,
        drafter: Drafter,
        num_draft_tokens: int,
        verification: str = "token",
        k_invariant: bool = False,
    ) -> None:
        self.target, self.drafter, self.num_draft_tokens = target, drafter, num_draft_tokens
        self.verification, self.k_invariant = verification, k_invariant
        self.observe: Observe | None = getattr(drafter, "observe", None)

    def start(self, batch: Batch) -> None:
        # Rows near their end are padded up to the longest draft in the batch: those slots are never committed.
        capacity = batch.tokens_BM.shape[1] + self.num_draft_tokens + 1
        counts = [length - 1 for length in batch.lengths]
        self.drafter.start(batch, capacity)
        self.cache = open_cache(self.target, batch.sources, batch.tokens_BM, counts, capacity, self.observe)
        if hasattr(self.drafter, "share"):
            self.drafter.share(self.cache)

    def step(self, batch: Batch) -> Loop:
        clock, began = batch.clock, batch.clock.stamp()
        # A loop yields one token more than it drafts, so the last one of a row never needs a draft.
        allowed = [min(self.num_draft_tokens, row.remaining - 1) for row in batch.rows]
        invariant = self.k_invariant and not batch.sampler.all_greedy
        noise_BNP = (
            batch.noise_by_place(self.num_draft_tokens + 2) if invariant else batch.noise(self.num_draft_tokens + 1)
        )
        proposed = self.drafter.propose(batch, [n + invariant for n in allowed], noise_BNP)
        draft = within(proposed, allowed) if invariant else proposed
        drafted = clock.stamp()
        ids_BN = torch.cat([batch.last_B1, draft.tokens_BC], dim=1)
        logits_BNV, hidden_BND = clock.call("target", self._score, ids_BN)
        logits_BNV = logits_BNV[..., : batch.vocab_size]
        accepted = judge(batch, logits_BNV, draft, noise_BNP, self.verification, proposed if invariant else None)
        n_new_B, new_BN = accepted.n_accepted_B + 1, kept_tokens(draft.tokens_BC, accepted)
        results_BX = torch.cat([n_new_B[:, None], accepted.valid_B[:, None], new_BN], 1)
        verified = clock.stamp()
        table, scored = fetch(batch, results_BX, logits_BNV, new_BN)
        refuse_invalid(batch, all(valid for _, valid, *_ in table))
        tokens = [new[:n] for n, _, *new in table]
        n_accepted = [n - 1 for n, *_ in table]
        self.cache.commit(n_new_B, [length + n for length, n in zip(batch.lengths, n_accepted, strict=True)])
        if self.observe is not None and hidden_BND is not None:
            self.observe(hidden_BND, n_new_B, [n + 1 for n in n_accepted])
        judged = [min(n + 1, count) for n, count in zip(n_accepted, draft.counts, strict=True)]
        seconds = {"draft": clock.between(began, drafted), "verify": clock.between(drafted, verified)}
        logprobs = None if scored is None else read_logprobs(scored, tokens, batch.logprobs)
        return Loop(tokens, judged, n_accepted, new_BN, n_new_B, draft.calls, seconds, logprobs)

    def _score(self, ids_BN: Tensor) -> tuple[Tensor, Tensor | None]:
        """The target's logits, and for a drafter that is shown them its hidden states."""
        if self.observe is None:
            return self.target(ids_BN, cache=self.cache), None
        hidden_BND = self.target.hidden(ids_BN, cache=self.cache)
        return self.target.score(hidden_BND), hidden_BND

    def keep(self, rows: list[int], lengths: list[int]) -> None:
        self.cache.keep(rows, [length - 1 for length in lengths])
        self.drafter.keep(rows, lengths)


def kept_tokens(drafted_BC: Tensor, accepted: Acceptance) -> Tensor:
    """Every row's accepted tokens and the one after them, [B, C + 1]; that one is repeated behind itself."""
    next_B1 = accepted.next_token_B[:, None]
    at_N = torch.arange(drafted_BC.shape[1] + 1, device=drafted_BC.device)
    return torch.where(at_N < accepted.n_accepted_B[:, None], torch.cat([drafted_BC, next_B1], 1), next_B1)


def judge(
    batch: Batch,
    logits_BNV: Tensor,
    draft: Draft,
    noise_BNP: Tensor | None,
    verification: str = "token",
    proposed: Draft | None = None,
) -> Acceptance:
    """Accept or correct a batch's drafts by its target's logits; penalties are evaluated on every drafted prefix.

    `proposed` is for `k_invariant` decoding: the draft with one token more than was scored.
    """
    seen_BNV = None if batch.seen_BV is None else seen_prefixes(batch.seen_BV, draft.tokens_BC)
    counts = draft.counts
    if batch.processors is not None:
        logits_BNV, stuck = batch.process(logits_BNV, seen_BNV, draft.tokens_BC, counts)
        counts, seen_BNV = [min(pair) for pair in zip(counts, stuck, strict=True)], None
    probs_BCV, drafted_B = draft.probs_BCV, batch.counts(counts)
    if proposed is not None and noise_BNP is not None:
        return accept_invariant(batch.sampler.probs(logits_BNV, seen_BNV), proposed, drafted_B, noise_BNP)
    return verdict(batch.sampler, logits_BNV, seen_BNV, draft.tokens_BC, probs_BCV, drafted_B, noise_BNP, verification)


def verdict(
    sampler: Sampler,
    logits_BNV: Tensor,
    seen_BNV: Tensor | None,
    tokens_BC: Tensor,
    probs_BCV: Tensor | None,
    drafted_B: Tensor,
    noise_BNP: Tensor | None,
    verification: str,
) -> Acceptance:
    """`judge` on tensors alone: row b drafted the first `drafted_B[b]` of its tokens. Nothing here waits for the device."""
    if noise_BNP is None:
        target_BN = sampler.greedy(logits_BNV, seen_BNV) if sampler.penalised else greedy(logits_BNV)
        accepted = accept_greedy(target_BN, tokens_BC, drafted_B)
        numbers_BN = logits_BNV.gather(-1, target_BN[..., None])[..., 0] > -torch.inf
        # Processors may rule everything out behind a draft that is rejected before: that is no part of the text.
        at_N = torch.arange(target_BN.shape[1], device=target_BN.device)
        numbers_BN |= at_N > accepted.n_accepted_B[:, None]
        numbers_B = numbers_BN.all(1)
        return Acceptance(accepted.n_accepted_B, accepted.next_token_B, accepted.valid_B & numbers_B)
    probs_BNV = sampler.probs(logits_BNV, seen_BNV)
    rule = accept_block if verification == "block" else accept
    return rule(probs_BNV, tokens_BC, probs_BCV, drafted_B, noise_BNP[:, : tokens_BC.shape[1] + 1])
