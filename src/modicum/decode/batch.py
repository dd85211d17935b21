"""The rows that are being written together: their tokens, their settings, and what ends each of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from modicum.checkpoint.tokenizer import Tokenizer
from modicum.decode.clock import Clock
from modicum.decode.logprobs import TokenLogprob
from modicum.decode.processors import PrefixProcessors, Processor
from modicum.decode.random import Purpose, UniformsAhead, uniforms_by_place
from modicum.decode.sampling import Sampler, SamplingParams
from modicum.decode.stats import GenerationStats
from modicum.decode.text import RowText


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and everything that decides its continuation.

    `prompt` is what the written text begins with. `source` is what a model reads that writes about something: the token ids
    of a text, or what an encoder made of a clip, [M, D].
    """

    index: int  # place in the caller's list
    prompt: list[int]
    source: Any = None
    key: int  # of its random stream
    params: SamplingParams
    max_total: int  # tokens at which it ends: prompt + max_new_tokens, or the context
    eos_ids: frozenset[int]
    stops: tuple[str, ...] = ()
    processors: tuple[Processor, ...] = ()


@dataclass(frozen=True)
class TokenEvent:
    """A token as it is kept. `source`: "draft" accepted, "target" drawn by the target beside a draft, or "plain".

    `text` is what the token releases: it can be empty, or hold the end of an earlier token's character. `logprob` is
    there if log-probabilities were asked for.
    """

    row: int
    token: int
    text: str
    source: str
    logprob: TokenLogprob | None = None


OnToken = Callable[[TokenEvent], None]


@dataclass
class Row:
    """A request under way. `tokens` holds prompt and continuation, on the host."""

    request: Request
    tokens: list[int]
    text: RowText | None
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    stats: GenerationStats = field(default_factory=GenerationStats)

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    @property
    def remaining(self) -> int:
        return self.request.max_total - len(self.tokens)

    def take(self, token: int) -> str:
        """Add one token; sets `finish_reason` if it is the last. Returns the text that it releases."""
        self.tokens.append(token)
        text = ""
        if token in self.request.eos_ids:
            self.finish_reason = "eos"
        elif self.text is not None:
            text, stopped = self.text.feed(token)
            if stopped:
                self.finish_reason = "stop"
        if self.finish_reason is None and self.remaining == 0:
            self.finish_reason = "length"
        if self.finish_reason in ("eos", "length") and self.text is not None:
            text += self.text.flush()
        return text


@dataclass(frozen=True)
class Loop:
    """What one target call yielded, per active row: the tokens, and how many drafted ones were judged and accepted.

    `new_BN` and `n_new_B` are the tokens and their number where the models run, so that nothing has to travel back; a
    row's last token is repeated behind it. None: the engine has appended them itself, to tensors of its own.
    `k` is how many were asked for, where that is chosen for every loop.
    """

    tokens: list[list[int]]
    judged: list[int]
    accepted: list[int]
    new_BN: Tensor | None
    n_new_B: Tensor | int | None
    draft_calls: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    logprobs: list[list[TokenLogprob]] | None = None
    k: int | None = None


class Batch:
    """Active rows, side by side. Rows leave when they end; what is left moves together (`keep`)."""

    def __init__(
        self,
        requests: list[Request],
        *,
        vocab_size: int,
        device: torch.device,
        tokenizer: Tokenizer | None = None,
        on_token: OnToken | None = None,
        logprobs: int = 0,
    ) -> None:
        self.clock = Clock(device)
        self.started, self.began = perf_counter(), self.clock.stamp()
        self.vocab_size, self.device, self.on_token, self.logprobs = vocab_size, device, on_token, logprobs
        streaming = on_token is not None
        self.rows = [
            Row(r, list(r.prompt), RowText(tokenizer, r.stops) if tokenizer and (streaming or r.stops) else None)
            for r in requests
        ]
        self.sampler = Sampler([r.params for r in requests], device)
        self.processors: PrefixProcessors | None = None
        if any(r.processors for r in requests):
            self.processors = PrefixProcessors([r.processors for r in requests], [r.eos_ids for r in requests])
        keys_B = torch.tensor([r.key for r in requests], dtype=torch.int64, device=device)
        self.uniforms = UniformsAhead(keys_B, len(Purpose))
        capacity = max(r.max_total for r in requests)
        self.tokens_BM = torch.zeros(len(requests), capacity, dtype=torch.int64)
        for row, request in enumerate(requests):
            self.tokens_BM[row, : len(request.prompt)] = torch.tensor(request.prompt)
        self.tokens_BM = self.tokens_BM.to(device)
        self.seen_BV: Tensor | None = None
        if self.sampler.penalised:
            self.seen_BV = torch.zeros(len(requests), vocab_size, dtype=torch.bool, device=device)
            for row, request in enumerate(requests):
                self.seen_BV[row, torch.tensor(request.prompt, device=device)] = True
        # An engine that keeps tokens and settings in tensors of its own says so: those here are then what it began with.
        self.elsewhere = False
        self.seconds: dict[str, float] = {}  # by part, of all rows together
        self.model_seconds: dict[str, float] = {}
        self.known_counts: tuple[list[int], Tensor] | None = None
        self.lengths = [len(row.tokens) for row in self.rows]
        self.lengths_B = torch.tensor(self.lengths, device=self.device)
        # Each row's last token, which no cache holds yet.
        self.last_B1 = self.tokens_BM.gather(1, self.lengths_B[:, None] - 1)

    @property
    def sources(self) -> list[Any]:
        """What each row's model reads before it writes; none for models that only continue."""
        return [row.request.source for row in self.rows if row.request.source is not None]

    def noise(self, n_offsets: int) -> Tensor | None:
        """This loop's uniforms, [B, n_offsets, purposes], keyed by stream and where the loop starts; None: all greedy."""
        if self.sampler.all_greedy:
            return None
        return self.uniforms.at(self.lengths, self.lengths_B, n_offsets)

    def counts(self, values: list[int]) -> Tensor:
        """One number per row where the models run, [B]; the same as in the last loop do not travel again."""
        if self.known_counts is None or self.known_counts[0] != values:
            self.known_counts = list(values), torch.tensor(values, device=self.device)
        return self.known_counts[1]

    def process(
        self, logits_BNV: Tensor, seen: Tensor | None, drafted_BC: Tensor, longest: list[int]
    ) -> tuple[Tensor, list[int]]:
        """Logits after repetition penalty and `processors`, which must be there: see `PrefixProcessors.apply`."""
        assert self.processors is not None
        scores_BNV = self.sampler.penalise(logits_BNV, seen)
        return self.processors.apply(scores_BNV, self.tokens_BM, self.lengths, drafted_BC, longest)

    def noise_by_place(self, n_offsets: int) -> Tensor:
        """Uniforms as above, but keyed by the place in the text alone, wherever the loop starts."""
        return uniforms_by_place(self.uniforms.key_B, self.lengths_B, n_offsets, len(Purpose))

    def take(self, loop: Loop, sources: tuple[str, str], seconds: float) -> list[Row]:
        """Append what a loop yielded, up to each row's end. Returns the rows that ended; the rest stay.

        `sources` name where accepted tokens and the last one came from.
        """
        for at, row in enumerate(self.rows):
            start, accepted = len(row.tokens), loop.accepted[at]
            for offset, token in enumerate(loop.tokens[at]):
                text = row.take(token)
                logprob = None if loop.logprobs is None else loop.logprobs[at][offset]
                if logprob is not None:
                    row.logprobs.append(logprob)
                if self.on_token is not None:
                    self.on_token(TokenEvent(row.request.index, token, text, sources[offset >= accepted], logprob))
                if row.finish_reason is not None:
                    break
            kept = len(row.tokens) - start
            # Tokens behind an end were never part of the text: neither accepted nor rejected.
            judged = loop.judged[at] if kept > accepted else min(loop.judged[at], kept)
            row.stats.record_loop(kept, judged, min(accepted, kept), loop.draft_calls, seconds, loop.k)
            self.lengths[at] = len(row.tokens)
        if loop.new_BN is not None and loop.n_new_B is not None:
            self._append(loop.new_BN, loop.n_new_B)
        return [row for row in self.rows if row.finish_reason is not None]

    def _append(self, new_BN: Tensor, n_new_B: Tensor | int) -> None:
        """The same where the models run. A row that ended within `new_BN` gets it all: it does not stay."""
        at_BN = self.lengths_B[:, None] + torch.arange(new_BN.shape[1], device=self.device)
        # What stands behind a row's new tokens is overwritten before it is read.
        self.tokens_BM.scatter_(1, at_BN.clamp_(max=self.tokens_BM.shape[1] - 1), new_BN)
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, new_BN, True)
        self.lengths_B = self.lengths_B + n_new_B
        self.last_B1 = new_BN[:, -1:]

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        self.rows = [self.rows[row] for row in rows]
        self.lengths = [self.lengths[row] for row in rows]
        if self.elsewhere:
            return
        index = torch.tensor(rows, device=self.device)
        self.sampler = self.sampler.select(rows)
        self.processors = None if self.processors is None else self.processors.select(rows)
        self.uniforms = self.uniforms.select(index)
        self.tokens_BM = self.tokens_BM[index]
        self.seen_BV = None if self.seen_BV is None else self.seen_BV[index]
        self.lengths_B, self.last_B1 = self.lengths_B[index], self.last_B1[index]
