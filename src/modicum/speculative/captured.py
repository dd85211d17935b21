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

from modicum.core.graphs import Side
from modicum.decode.batch import Batch, Loop
from modicum.decode.clock import Stamp
from modicum.decode.loop import refuse_invalid
from modicum.decode.sampling import SamplingParams
from modicum.lm.decoder import Decoder
from modicum.speculative.drafters.base import Drafter
from modicum.speculative.drafters.model import ModelDrafter
from modicum.speculative.static_loop import Room

# Kinds of devices where loops are captured. None yet: the function that is captured is tested on a CPU, where a launch costs
# nothing that a graph would save, but its capture has not been run on a GPU. tests/gpu and benchmarks/text_gpu.py add cuda.
DEVICES: set[str] = set()
# Loops on their way at a time: the device has the next one before the host has read the last.
AHEAD = 2
# Loops still to come, drafts all accepted, from which recording one pays.
PAYS = 4
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


@dataclass
class Flight:
    """A loop on its way. `slots` says which row of the table is whose, in the order of the batch's rows."""

    table_BX: Tensor
    slots: list[int]
    began: Stamp
    ended: Stamp
    captured: bool  # the host had to record it first


class CapturedEngine:
    """`SpeculativeEngine` with a model as the drafter, or without one `PlainEngine`, as replayed loops.

    It may serve one batch after another: what was captured for so many rows is used again.
    """

    def __init__(self, target: Decoder, drafter: Any, num_draft_tokens: Any, verification: str = "token") -> None:
        """For what `can_capture` allows."""
        self.models = [target] if drafter is None else [target, drafter.model]
        self.num_draft_tokens = 0 if drafter is None else num_draft_tokens
        self.verification = verification
        self.sources = ("plain", "plain") if drafter is None else ("draft", "target")
        self.rooms: dict[int, Room] = {}
        self.capacity, self.vocab_size, self.side = 0, 0, Side.of(target.device)

    def start(self, batch: Batch) -> None:
        capacity = bucket_of(batch.tokens_BM.shape[1] + self.num_draft_tokens + 1)
        if capacity > self.capacity or batch.vocab_size != self.vocab_size:
            self.rooms.clear()
            self.capacity, self.vocab_size = capacity, batch.vocab_size
        self.room = self._room(batch.sampler.params, batch.device)
        self.room.fill(batch)
        batch.elsewhere = True
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
            seconds["capture" if flight.captured else "idle"] = batch.clock.between(self.landed, flight.began)
        self.landed = flight.ended
        accepted = [n for n, *_ in rows]
        judged = [min(n + 1, count) for n, count, *_ in rows]
        tokens = [new[: n + 1] for n, _, _, *new in rows]
        return Loop(tokens, judged, accepted, None, None, self.num_draft_tokens, seconds)

    def keep(self, rows: list[int], lengths: list[int]) -> None:
        for slot in set(self.slots) - {self.slots[row] for row in rows}:
            self.room.ends_B[slot].zero_()
        self.slots = [self.slots[row] for row in rows]
        for flight in self.flights:
            flight.slots = [flight.slots[row] for row in rows]
        left = self.room
        if 2 * len(rows) <= len(left.lengths_B):
            self.room = self._room([left.sampler.params[slot] for slot in self.slots], left.device)
            self.room.take(left, self.slots)
            self.slots, self.bucket = list(range(len(rows))), 0
            self._buffers()

    def _room(self, params: list[SamplingParams], device: torch.device) -> Room:
        """One for rows with these settings, where tensors and graphs of another batch's may still be."""
        room = self.rooms.get(len(params))
        if room is None or room.sampler.params != params:
            room = Room(self.models, params, self.num_draft_tokens, self.vocab_size, self.capacity, device)
            self.rooms[len(params)] = room
        return room

    def _launch(self, batch: Batch) -> None:
        unknown = len(self.flights) * (self.num_draft_tokens + 1)
        pairs = zip(batch.lengths, batch.rows, strict=True)
        longest = max(min(length + unknown, row.request.max_total) for length, row in pairs)
        # It never shrinks while rows that have ended are still there.
        self.bucket = max(self.bucket, bucket_of(longest + self.num_draft_tokens))
        loop = self.room.loop(self.bucket, self.verification, self.side)
        pays = max(row.remaining for row in batch.rows) >= PAYS * (self.num_draft_tokens + 1)
        captured, began = pays and loop.prepare(), batch.clock.stamp()
        loop()
        table_BX = self.buffers.pop(0)
        self.buffers.append(table_BX)
        table_BX.copy_(self.room.table_BX, non_blocking=True)
        self.flights.append(Flight(table_BX, list(self.slots), began, batch.clock.stamp(), captured))

    def _buffers(self) -> None:
        """Where tables land: one for every loop that can be on its way."""
        like = self.room.table_BX
        self.buffers = [torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda) for _ in range(AHEAD)]


def bucket_of(n_slots: int) -> int:
    """How many slots are read where `n_slots` are needed."""
    step = max(BUCKET, 1 << max(0, n_slots.bit_length() - 3))
    return -(-n_slots // step) * step
