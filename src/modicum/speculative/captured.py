"""Whole loops on the device: draft, verification, acceptance and commit are one function of tensors that never move.

What a loop yields is what `SpeculativeEngine` and, with K = 0, `PlainEngine` yield: the same functions on the same random
numbers. But lengths, tokens and caches are advanced where the models run, so that the next loop need not wait for the
host to hear of the last: on a GPU a loop is one launch of a CUDA graph, and one small copy back while the next one runs.

For that, shapes are fixed. Every row drafts K tokens and K + 1 are scored; how many of them count, near a row's end or the
draft's context, is a column. The draft always reads a row's last two tokens: after a rejection it knows the first of them
already, and writes the same keys again. Attention reads a bucket of cache slots, masked by length. A row that has ended
stays, idle, until half of them have.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modicum.core.cache import KVCache
from modicum.core.graphs import Replayed
from modicum.decode.batch import Batch, Loop
from modicum.decode.clock import Stamp
from modicum.decode.loop import open_cache, refuse_invalid
from modicum.decode.random import Purpose, address_table, hashed
from modicum.decode.sampling import seen_prefixes
from modicum.lm.decoder import Decoder
from modicum.speculative.drafters.base import Drafter
from modicum.speculative.drafters.drawing import Drawing
from modicum.speculative.drafters.model import ModelDrafter
from modicum.speculative.loop import kept_tokens, verdict

# Where loops are captured without being asked. On a CPU a launch costs nothing that a graph would save.
DEVICES = {"cuda"}
# Loops on their way at a time: the device has the next one before the host has read the last.
AHEAD = 2
# Cache slots that attention reads are a multiple of this, or of a quarter of the power of two below their number, so
# that a text that doubles is captured four times.
BUCKET = 256


def can_capture(target: Any, drafter: Drafter | None, num_draft_tokens: int | str) -> bool:
    """Whether the whole loop of this pair is tensors: native decoders on a device where launches count, and a fixed K."""
    models = [target]
    if drafter is not None:
        if type(drafter) is not ModelDrafter or not isinstance(num_draft_tokens, int):
            return False
        models.append(drafter.model)
    native = all(isinstance(model, Decoder) and model.device == target.device for model in models)
    return native and target.device.type in DEVICES


class Tensors:
    """Everything a loop reads and writes, in tensors that stay where they are."""

    seen_BV: Tensor | None

    def __init__(self, batch: Batch, num_draft_tokens: int, capacity: int, draft: Any) -> None:
        B, K, device = len(batch.rows), num_draft_tokens, batch.device
        self.num_draft_tokens, self.vocab_size = K, batch.vocab_size
        self.sampler = batch.sampler
        # Room for what is written behind a row's end.
        self.tokens_BM = torch.nn.functional.pad(batch.tokens_BM, (0, capacity - batch.tokens_BM.shape[1]))
        self.lengths_B, self.keys_B = batch.lengths_B.clone(), batch.uniforms.key_B.clone()
        self.seen_BV = None if batch.seen_BV is None else batch.seen_BV.clone()
        ends = [row.request.max_total for row in batch.rows]
        # A draft proposes no further than its own context; a loop's last token is the target's.
        context = draft.config.max_seq_len if draft is not None else 0
        self.ends_B = torch.tensor(ends, device=device)
        self.draft_ends_B = torch.tensor([min(end - 1, context) for end in ends], device=device)
        self.addresses_NP = address_table(K + 1, len(Purpose), device)
        self.table_BX = torch.zeros(B, 3 + K + 1, dtype=torch.int64, device=device)

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these. Everything moves."""
        index = torch.tensor(rows, device=self.lengths_B.device)
        self.sampler = self.sampler.select(rows)
        for name in ("tokens_BM", "lengths_B", "keys_B", "ends_B", "draft_ends_B", "table_BX"):
            setattr(self, name, getattr(self, name)[index])
        self.seen_BV = None if self.seen_BV is None else self.seen_BV[index]


def run_loop(
    t: Tensors, target: Any, draft: Any, cache: KVCache, draft_cache: KVCache | None, verification: str
) -> None:
    """One loop of every row, nothing of which the host waits for.

    Row b of `t.table_BX` becomes: how many drafted tokens were accepted, how many counted, whether the distributions were
    valid, and the tokens of `kept_tokens`. Tokens, lengths and what was seen are advanced; an idle row stays as it is.
    """
    drafted_B = (t.draft_ends_B - t.lengths_B).clamp(0, t.num_draft_tokens)
    noise_BNP = None if t.sampler.all_greedy else hashed(t.keys_B, t.lengths_B, t.addresses_NP)
    last_B1 = t.tokens_BM.gather(1, t.lengths_B[:, None] - 1)
    tokens_BC: Tensor = last_B1[:, :0]
    probs_BCV: Tensor | None = None
    if t.num_draft_tokens:
        tokens_BC, probs_BCV = propose(t, draft, draft_cache, noise_BNP)
    cache.place(t.lengths_B - 1)
    logits_BNV = target(torch.cat([last_B1, tokens_BC], 1), cache=cache)[..., : t.vocab_size]
    seen_BNV = None if t.seen_BV is None else seen_prefixes(t.seen_BV, tokens_BC)
    accepted = verdict(t.sampler, logits_BNV, seen_BNV, tokens_BC, probs_BCV, drafted_B, noise_BNP, verification)
    new_BN = kept_tokens(tokens_BC, accepted)
    columns = [accepted.n_accepted_B, drafted_B, accepted.valid_B.long()]
    t.table_BX.copy_(torch.cat([torch.stack(columns, 1), new_BN], 1))
    at_BN = t.lengths_B[:, None] + torch.arange(new_BN.shape[1], device=new_BN.device)
    # What stands behind a row's new tokens is overwritten before it is read.
    t.tokens_BM.scatter_(1, at_BN, new_BN)
    if t.seen_BV is not None:
        t.seen_BV.scatter_(1, new_BN, True)
    t.lengths_B.add_((accepted.n_accepted_B + 1) * (t.lengths_B < t.ends_B))


def propose(t: Tensors, draft: Any, cache: Any, noise_BNP: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """K tokens behind every row, and the distributions they were drawn from, None for greedy ones."""
    drawing, most = Drawing(t, noise_BNP), draft.config.vocab_size - 1
    # The last two tokens; of a text of one, that one and whatever stands behind it, which is not asked about.
    start_B = (t.lengths_B - 2).clamp(min=0)
    ids_BL = t.tokens_BM.gather(1, start_B[:, None] + torch.arange(2, device=start_B.device))
    at_B1: Tensor | None = (t.lengths_B - 1 - start_B)[:, None]
    cache.place(start_B)
    for offset in range(t.num_draft_tokens):
        if offset:
            cache.place(t.lengths_B + (offset - 1))
        logits_BV = draft(ids_BL.clamp(max=most), cache=cache, at_BN=at_B1)[:, 0]
        # From here on one token is read at a time.
        ids_BL, at_B1 = drawing.draw(ModelDrafter.fit(logits_BV, t.vocab_size))[:, None], None
    return torch.stack(drawing.tokens, 1), torch.stack(drawing.probs, 1) if drawing.probs else None


@dataclass
class Flight:
    """A loop on its way. `slots` says which row of the table is whose, in the order of the batch's rows."""

    table_BX: Tensor
    slots: list[int]
    began: Stamp
    ended: Stamp


class CapturedEngine:
    """`SpeculativeEngine` with a model as the drafter, or without one `PlainEngine`, as replayed loops."""

    def __init__(self, target: Decoder, drafter: Any, num_draft_tokens: Any, verification: str = "token") -> None:
        """For what `can_capture` allows."""
        self.target, self.draft = target, None if drafter is None else drafter.model
        self.num_draft_tokens = 0 if drafter is None else num_draft_tokens
        self.verification = verification
        self.sources = ("plain", "plain") if drafter is None else ("draft", "target")

    def start(self, batch: Batch) -> None:
        # Bound to happen, at most: every loop on its way writes K + 1 tokens behind what the host knows of.
        capacity = bucket_of(batch.tokens_BM.shape[1] + self.num_draft_tokens + 1)
        self.tensors = Tensors(batch, self.num_draft_tokens, capacity, self.draft)
        counts = [length - 1 for length in batch.lengths]
        self.caches = [open_cache(self.target, [], batch.tokens_BM, counts, capacity)]
        if self.draft is not None:
            readable_BM = batch.tokens_BM.clamp(max=self.draft.config.vocab_size - 1)
            self.caches.append(open_cache(self.draft, [], readable_BM, counts, capacity))
        self.slots = list(range(len(batch.rows)))
        self.flights: list[Flight] = []
        self.bucket, self.landed = 0, None
        self._buffers()

    def step(self, batch: Batch) -> Loop:
        # Each loop on its way brings a row one token at least, so that further ones may find nothing to do.
        while len(self.flights) < AHEAD and any(row.remaining > len(self.flights) for row in batch.rows):
            self._launch(batch)
        flight = self.flights.pop(0)
        if batch.clock.on_device:
            flight.ended.synchronize()
        table = flight.table_BX.tolist()
        rows = [table[slot] for slot in flight.slots]
        refuse_invalid(batch, all(valid for _, _, valid, *_ in rows))
        seconds = {"loop": batch.clock.between(flight.began, flight.ended)}
        if self.landed is not None:
            seconds["idle"] = batch.clock.between(self.landed, flight.began)
        self.landed = flight.ended
        accepted = [n for n, *_ in rows]
        judged = [min(n + 1, count) for n, count, *_ in rows]
        tokens = [new[: n + 1] for n, _, _, *new in rows]
        return Loop(tokens, judged, accepted, None, None, self.num_draft_tokens, seconds)

    def keep(self, rows: list[int], lengths: list[int]) -> None:
        for slot in set(self.slots) - {self.slots[row] for row in rows}:
            self.tensors.ends_B[slot].zero_()
        self.slots = [self.slots[row] for row in rows]
        for flight in self.flights:
            flight.slots = [flight.slots[row] for row in rows]
        if 2 * len(rows) <= len(self.tensors.lengths_B):
            self.tensors.keep(self.slots)
            for cache in self.caches:
                cache.keep(self.slots)
            self.slots, self.bucket = list(range(len(rows))), 0
            self._buffers()

    def _launch(self, batch: Batch) -> None:
        unknown = len(self.flights) * (self.num_draft_tokens + 1)
        pairs = zip(batch.lengths, batch.rows, strict=True)
        longest = max(min(length + unknown, row.request.max_total) for length, row in pairs)
        if longest + self.num_draft_tokens > self.bucket:
            self._bind(bucket_of(longest + self.num_draft_tokens), batch.device)
        began = batch.clock.stamp()
        self.loop()
        table_BX = self.buffers.pop(0)
        self.buffers.append(table_BX)
        table_BX.copy_(self.tensors.table_BX, non_blocking=True)
        self.flights.append(Flight(table_BX, list(self.slots), began, batch.clock.stamp()))

    def _bind(self, n_slots: int, device: torch.device) -> None:
        """From now on loops read `n_slots` of the caches."""
        self.bucket = n_slots
        cache, *draft_cache = [cache.fixed(n_slots) for cache in self.caches]
        pair = self.target, self.draft, cache, draft_cache[0] if draft_cache else None
        self.loop = Replayed(lambda: run_loop(self.tensors, *pair, self.verification), device)

    def _buffers(self) -> None:
        """Where tables land: one for every loop that can be on its way."""
        like = self.tensors.table_BX
        pinned = like.is_cuda
        self.buffers = [torch.empty(like.shape, dtype=like.dtype, pin_memory=pinned) for _ in range(AHEAD)]


def bucket_of(n_slots: int) -> int:
    """How many slots are read where `n_slots` are needed."""
    step = max(BUCKET, 1 << max(0, n_slots.bit_length() - 3))
    return -(-n_slots // step) * step
