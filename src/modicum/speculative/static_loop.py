"""One loop as a function of tensors that never move: what `captured` replays."""

from typing import Any

import torch
from torch import Tensor

from modicum.core.cache import KVCache
from modicum.core.graphs import Replayed, Side
from modicum.decode.batch import Batch
from modicum.decode.loop import prefill
from modicum.decode.random import Purpose, address_table, hashed
from modicum.decode.sampling import Sampler, SamplingParams, seen_prefixes
from modicum.speculative.drafters.drawing import Drawing
from modicum.speculative.loop import kept_tokens, verdict

# What rows bring with them, and take along when they go on in another room.
OF_ROWS = ("tokens_BM", "lengths_B", "keys_B", "ends_B", "draft_ends_B")


class Room:
    """Everything that a loop of so many rows reads and writes, and the loops themselves, one per bucket of cache slots.

    `models` are the target and, if there is one, the draft.
    """

    processors = None  # of the caller's: functions of Python, which no graph holds

    def __init__(
        self,
        models: list[Any],
        params: list[SamplingParams],
        num_draft_tokens: int,
        vocab_size: int,
        capacity: int,
        device: torch.device,
    ) -> None:
        B, K = len(params), num_draft_tokens
        self.models, self.num_draft_tokens, self.vocab_size, self.device = models, K, vocab_size, device
        self.sampler = Sampler(params, device)
        self.tokens_BM = torch.zeros(B, capacity, dtype=torch.int64, device=device)
        # How long rows are, and at how many tokens they and what is drafted for them end; an idle row has ended.
        self.lengths_B, self.keys_B, self.ends_B, self.draft_ends_B = self.tokens_BM.new_zeros(4, B).unbind()
        self.seen_BV: Tensor | None = None
        if self.sampler.penalised:
            self.seen_BV = torch.zeros(B, vocab_size, dtype=torch.bool, device=device)
        self.table_BX = self.tokens_BM.new_zeros(B, 3 + K + 1)
        # Held here because a graph that uses it would not.
        self.addresses_NP = address_table(K + 1, len(Purpose), device)
        self.caches: list[KVCache] = [model.new_cache(B, capacity) for model in models]
        self.loops: dict[int, Replayed] = {}

    def fill(self, batch: Batch) -> None:
        """Read a batch's prompts."""
        self.tokens_BM[:, : batch.tokens_BM.shape[1]].copy_(batch.tokens_BM)
        self.lengths_B.copy_(batch.lengths_B)
        self.keys_B.copy_(batch.uniforms.key_B)
        if self.seen_BV is not None and batch.seen_BV is not None:
            self.seen_BV.copy_(batch.seen_BV)
        ends = [row.request.max_total for row in batch.rows]
        # A draft proposes no further than its own context, and the last token of a loop is the target's.
        context = self.models[-1].config.max_seq_len
        self.ends_B.copy_(torch.tensor(ends))
        self.draft_ends_B.copy_(torch.tensor([min(end - 1, context) for end in ends]))
        counts = [length - 1 for length in batch.lengths]
        for model, cache in zip(self.models, self.caches, strict=True):
            cache.truncate(torch.zeros_like(self.lengths_B), [0] * len(counts))
            prefill(model, cache, batch.tokens_BM.clamp(max=model.config.vocab_size - 1), counts)

    def take(self, other: "Room", rows: list[int]) -> None:
        """Go on with these rows of another room of the same capacity."""
        index = torch.tensor(rows, device=self.device)
        for name in OF_ROWS:
            getattr(self, name).copy_(getattr(other, name)[index])
        if self.seen_BV is not None and other.seen_BV is not None:
            self.seen_BV.copy_(other.seen_BV[index])
        for mine, theirs in zip(self.caches, other.caches, strict=True):
            mine.take(theirs, index)

    def loop(self, n_slots: int, verification: str, side: Side | None) -> Replayed:
        """The loop whose attention reads `n_slots` slots of the caches."""
        if n_slots not in self.loops:
            caches = [cache.fixed(n_slots) for cache in self.caches]
            self.loops[n_slots] = Replayed(lambda: run_loop(self, caches, verification), side)
        return self.loops[n_slots]


def run_loop(room: Room, caches: list[KVCache], verification: str) -> None:
    """One loop of every row, nothing of which the host waits for.

    Row b of `room.table_BX` becomes: how many drafted tokens were accepted, how many counted, whether the distributions
    were valid, and the tokens of `kept_tokens`. Tokens, lengths and what was seen are advanced; an idle row stays as it is.
    """
    drafted_B = (room.draft_ends_B - room.lengths_B).clamp(0, room.num_draft_tokens)
    noise_BNP = None if room.sampler.all_greedy else hashed(room.keys_B, room.lengths_B, room.addresses_NP)
    last_B1 = room.tokens_BM.gather(1, room.lengths_B[:, None] - 1)
    tokens_BC: Tensor = last_B1[:, :0]
    probs_BCV: Tensor | None = None
    if room.num_draft_tokens:
        tokens_BC, probs_BCV = propose(room, caches[1], noise_BNP)
    caches[0].place(room.lengths_B - 1)
    logits_BNV = room.models[0](torch.cat([last_B1, tokens_BC], 1), cache=caches[0])[..., : room.vocab_size]
    seen_BNV = None if room.seen_BV is None else seen_prefixes(room.seen_BV, tokens_BC)
    accepted = verdict(room.sampler, logits_BNV, seen_BNV, tokens_BC, probs_BCV, drafted_B, noise_BNP, verification)
    new_BN = kept_tokens(tokens_BC, accepted)
    columns = [accepted.n_accepted_B, drafted_B, accepted.valid_B.long()]
    room.table_BX.copy_(torch.cat([torch.stack(columns, 1), new_BN], 1))
    at_BN = room.lengths_B[:, None] + torch.arange(new_BN.shape[1], device=new_BN.device)
    # What stands behind a row's new tokens is overwritten before it is read.
    room.tokens_BM.scatter_(1, at_BN, new_BN)
    if room.seen_BV is not None:
        room.seen_BV.scatter_(1, new_BN, True)
    room.lengths_B.add_((accepted.n_accepted_B + 1) * (room.lengths_B < room.ends_B))


def propose(room: Room, cache: KVCache, noise_BNP: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """K tokens behind every row, and the distributions they were drawn from, None for greedy ones."""
    draft = room.models[1]
    drawing = Drawing(room, noise_BNP, [room.num_draft_tokens] * len(room.lengths_B))
    most = draft.config.vocab_size - 1
    # The last two tokens; of a text of one, that one and whatever stands behind it, which is not asked about.
    start_B = (room.lengths_B - 2).clamp(min=0)
    ids_BL = room.tokens_BM.gather(1, start_B[:, None] + torch.arange(2, device=start_B.device))
    at_B1: Tensor | None = (room.lengths_B - 1 - start_B)[:, None]
    cache.place(start_B)
    for offset in range(room.num_draft_tokens):
        if offset:
            cache.place(room.lengths_B + (offset - 1))
        logits_BV = draft(ids_BL.clamp(max=most), cache=cache, at_BN=at_B1)[:, 0]
        token_B = drawing.draw(logits_BV)
        assert token_B is not None  # only processors end a draft early
        # From here on one token is read at a time.
        ids_BL, at_B1 = token_B[:, None], None
    return torch.stack(drawing.tokens, 1), torch.stack(drawing.probs, 1) if drawing.probs else None
