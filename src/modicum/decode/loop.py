"""Plain decoding: read the prompt in chunks, then one token per call of the model; and the loop around any engine."""

from collections.abc import Callable
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from modicum.decode.batch import Batch, Loop, Row
from modicum.decode.logprobs import logprob_columns, read_logprobs
from modicum.decode.random import Purpose
from modicum.decode.sampling import draw, greedy
from modicum.decode.stats import add_seconds
from modicum.errors import GenerationError

# Long prompts are read this many tokens at a time, so that the memory for activations does not grow with them.
PREFILL_CHUNK = 512


class Engine(Protocol):
    """Something that continues the rows of a batch by at least one token per `step`."""

    sources: tuple[str, str]  # what `TokenEvent.source` says of accepted tokens, and of the last of a loop

    def start(self, batch: Batch) -> None: ...
    def step(self, batch: Batch) -> Loop: ...
    def keep(self, rows: list[int], lengths: list[int]) -> None: ...


def run(batch: Batch, engine: Engine) -> list[Row]:
    """Write every row of `batch` to its end. Returns the rows in the order in which they ended."""
    done: list[Row] = []
    engine.start(batch)
    read, counted = batch.clock.stamp(), batch.started
    while batch.rows:
        loop = engine.step(batch)
        if not batch.seconds:
            # Known only now: on a GPU the prefill was still running when the first loop began.
            batch.seconds["prefill"] = batch.clock.between(batch.began, read)
            counted += batch.seconds["prefill"]
        ended = batch.take(loop, engine.sources, perf_counter() - counted)
        # Counted from where the last loop's count ended, so that the parts add up to the whole.
        now = perf_counter()
        add_seconds(batch.seconds, {**loop.seconds, "rest": now - counted - sum(loop.seconds.values())})
        batch.clock.collect(batch.model_seconds)
        for row in ended:
            row.stats.seconds = now - batch.started
            row.stats.seconds_by_part = dict(batch.seconds)
            row.stats.model_seconds = dict(batch.model_seconds)
        counted = now
        if ended:
            done += ended
            rows = [at for at, row in enumerate(batch.rows) if row.finish_reason is None]
            if rows:
                engine.keep(rows, [batch.lengths[at] for at in rows])
                batch.keep(rows)
            else:
                batch.rows = []
    return done


# Shown what a model made of tokens it has read: hidden states [B, L, D], and how many of a row's L are its text.
Observe = Callable[[Tensor, Tensor, list[int]], None]


def open_cache(
    model: Any,
    sources: list[Any],
    tokens_BM: Tensor,
    counts: list[int],
    capacity: int,
    observe: Observe | None = None,
) -> Any:
    """A cache of `capacity` tokens per row that has read the first `counts[b]` of each, and its source if it has one."""
    cache = model.new_cache(len(counts), capacity)
    if sources:
        model.read(sources, cache)
    prefill(model, cache, tokens_BM, counts, observe=observe)
    return cache


def prefill(
    model: Any,
    cache: Any,
    tokens_BM: Tensor,
    counts: list[int],
    chunk: int = PREFILL_CHUNK,
    observe: Observe | None = None,
) -> None:
    """Put the first `counts[b]` tokens of each row into an empty cache. Rows are padded at the right.

    `observe` is shown the hidden states chunk by chunk: they are never all in memory.
    """
    if observe is None and hasattr(model, "prefill"):
        model.prefill(tokens_BM, counts, cache)
        return
    counts_B = torch.tensor(counts, device=tokens_BM.device)
    nothing_BN = torch.zeros(len(counts), 0, dtype=torch.int64, device=tokens_BM.device)
    for start in range(0, max(counts), chunk):
        end = min(start + chunk, max(counts))
        known = [min(count, end) for count in counts]
        read_B = counts_B.clamp(max=end) - cache.lengths_B
        if observe is None:
            model(tokens_BM[:, start:end], cache=cache, at_BN=nothing_BN)
        else:
            hidden_BLD = model.hidden(tokens_BM[:, start:end], cache=cache)
            observe(hidden_BLD, read_B, [max(0, count - start) for count in known])
        cache.commit(read_B, known)


class PlainEngine:
    """One token per row and call."""

    sources = ("plain", "plain")

    def __init__(self, model: Any) -> None:
        self.model = model

    def start(self, batch: Batch) -> None:
        counts, capacity = [length - 1 for length in batch.lengths], batch.tokens_BM.shape[1]
        self.cache = open_cache(self.model, batch.sources, batch.tokens_BM, counts, capacity)

    def step(self, batch: Batch) -> Loop:
        clock, began = batch.clock, batch.clock.stamp()
        logits_BV = clock.call("target", self.model, batch.last_B1, cache=self.cache)[:, -1, : batch.vocab_size]
        token_B, valid_B = choose(batch, logits_BV)
        token_B1 = token_B[:, None]
        results_B2 = torch.cat([token_B1, valid_B[:, None]], 1)
        judged = clock.stamp()
        table, scored = fetch(batch, results_B2, logits_BV[:, None], token_B1)
        refuse_invalid(batch, all(valid for _, valid in table))
        self.cache.commit(1)
        tokens, nothing = [[token] for token, _ in table], [0] * len(table)
        seconds = {"verify": clock.between(began, judged)}
        logprobs = None if scored is None else read_logprobs(scored, tokens, batch.logprobs)
        return Loop(tokens, nothing, nothing, token_B1, 1, 0, seconds, logprobs)

    def keep(self, rows: list[int], lengths: list[int]) -> None:
        self.cache.keep(rows, [length - 1 for length in lengths])


def choose(batch: Batch, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's next token by its own settings, and whether its logits were numbers: [B], [B] bool."""
    seen_BV = batch.seen_BV
    if batch.processors is not None:
        none_B0, zeros = batch.last_B1[:, :0], [0] * len(batch.rows)
        scores_B1V, _ = batch.process(logits_BV, seen_BV, none_B0, zeros)
        logits_BV, seen_BV = scores_B1V[:, 0], None
    if batch.sampler.all_greedy:
        token_B = batch.sampler.greedy(logits_BV, seen_BV) if batch.sampler.penalised else greedy(logits_BV)
        return token_B, logits_BV.gather(1, token_B[:, None])[:, 0] > -torch.inf
    probs_BV = batch.sampler.probs(logits_BV, seen_BV)
    noise_BNP = batch.noise(1)
    assert noise_BNP is not None
    token_B = draw(probs_BV, noise_BNP[:, 0, Purpose.BONUS])
    return token_B, probs_BV.gather(1, token_B[:, None])[:, 0] > 0


def fetch(
    batch: Batch, results_BX: Tensor, logits_BNV: Tensor, new_BN: Tensor
) -> tuple[list[list[int]], Tensor | None]:
    """A loop's results on the host, its one transfer; with them `logprob_columns` of the new tokens, if asked for."""
    if not batch.logprobs:
        return results_BX.tolist(), None
    table_BX = torch.cat([results_BX, logprob_columns(logits_BNV, new_BN, batch.logprobs)], 1).cpu()
    width = results_BX.shape[1]
    return table_BX[:, :width].tolist(), table_BX[:, width:]


def refuse_invalid(batch: Batch, valid: bool) -> None:
    """Raise GenerationError if a row's distribution was not one."""
    if not valid and batch.processors is not None:
        raise GenerationError(
            "the logits processors left no token that can be drawn, or the model returned logits that are not numbers "
            "(NaN): let them allow at least one token after every text that they allow, an end of text at the least"
        )
    if not valid:
        raise GenerationError(
            "the model returned logits that are not numbers (NaN) or all -inf, so no token can be drawn: "
            "try `--dtype float32`, or check the checkpoint with `modicum inspect`"
        )
