"""What a call of a model costs on this machine for so many rows and tokens: measured once, kept in the user's cache."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch

from modicum.report.machine import processor
from modicum.speculative.drafters.base import Drafter

# Tokens per row that are measured one by one, then in steps: kernels have cliffs where few rows become several.
TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 15, 17)
SLOW_TOKENS = (1, 2, 3, 5, 9, 17)  # where one call takes long
SLOW_SECONDS = 0.05
READ_TOKENS = 64  # a chunk of text, for what reading costs per token
MAX_TOKENS = 136  # rows x tokens of one measured call; beyond, time is arithmetic and grows in proportion
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
CONTEXT = 64  # tokens that stand in the cache while a call is timed
SHORT, LONG = 0.1, 2.0  # seconds that are spent on a set of timings: at least, and at most for more than two rounds

Clock = Callable[[Any, int, int], float]  # seconds of one call of a model with (rows, tokens)
Measure = Callable[[Any, int, list[int]], dict[int, float]]  # the same for several numbers of tokens


class Priced(Protocol):
    """A drafter that knows what it will cost before it has been seen at work; others are timed as they run.

    `read_seconds` may be left out where nothing has to be read.
    """

    def draft_seconds(self, clock: Clock, rows: int, n_tokens: int) -> float:
        """Proposing `n_tokens` tokens for each of `rows` rows; `clock(model, rows, tokens)` is one call of a model."""
        ...

    def read_seconds(self, clock: Clock, rows: int, n_tokens: int) -> float:
        """Reading, before that, `n_tokens` tokens of each row that were written without it."""
        ...


class CallTimes:
    """Seconds of one call of `model` by rows and tokens, from a file or measured when first needed.

    The file's name is a hash of everything that decides these times. One that is damaged or cannot be written is ignored:
    the times are measured again.
    """

    def __init__(self, model: Any, folder: Path | None = None, measure: Measure | None = None) -> None:
        self.model = model
        self.measure = time_calls if measure is None else measure
        self.key = key_of(model)
        folder = cache_folder() if folder is None else folder
        name = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:24]
        self.path = None if folder is None else folder / f"{name}.json"
        self.seconds = self._read()
        self.saved = len(self.seconds)
        self.between: dict[tuple[int, int], float] = {}

    def prepare(self, rows: int, *, reading: bool) -> None:
        """Measure what is missing for batches of `rows` rows, and keep it.

        Args:
            reading: for a draft: one token at a time, and a chunk of text; otherwise what verifying needs.
        """
        batch = next((size for size in BATCHES if size >= rows), rows)
        if reading:
            self._take(batch, (1, 2, max(2, min(READ_TOKENS, MAX_TOKENS // batch))))
        else:
            self._take(batch, (1, 2))
            wanted = TOKENS if self.seconds[batch, 1] < SLOW_SECONDS else SLOW_TOKENS
            self._take(batch, tuple(n for n in wanted if batch * n <= MAX_TOKENS))
        if len(self.seconds) > self.saved:
            self._write()

    def _take(self, batch: int, wanted: tuple[int, ...]) -> None:
        missing = [n for n in sorted(set(wanted)) if (batch, n) not in self.seconds]
        if missing:
            self.seconds.update({(batch, n): s for n, s in self.measure(self.model, batch, missing).items()})
            self.between.clear()

    def __call__(self, rows: int, n_tokens: int) -> float:
        """Between what was measured, a straight line."""
        if (rows, n_tokens) not in self.between:
            self.between[rows, n_tokens] = self._between(rows, n_tokens)
        return self.between[rows, n_tokens]

    def _between(self, rows: int, n_tokens: int) -> float:
        sizes = sorted({batch for batch, _ in self.seconds})
        return between([(size, self._of_batch(size, n_tokens)) for size in sizes], rows)

    def _of_batch(self, batch: int, n_tokens: int) -> float:
        return between(sorted((n, s) for (size, n), s in self.seconds.items() if size == batch), n_tokens)

    def _read(self) -> dict[tuple[int, int], float]:
        try:
            kept = json.loads(self.path.read_bytes()) if self.path is not None else {}
            if not isinstance(kept, dict) or kept.get("key") != self.key:
                return {}
            times = {(int(rows), int(n)): float(seconds) for rows, n, seconds in kept["seconds"]}
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        whole = all(rows > 0 and n > 0 and math.isfinite(s) and s > 0 for (rows, n), s in times.items())
        return times if whole else {}

    def _write(self) -> None:
        self.saved = len(self.seconds)
        if self.path is None:
            return
        content = {"key": self.key, "seconds": [[*at, seconds] for at, seconds in sorted(self.seconds.items())]}
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(content), encoding="utf-8")
            os.replace(partial, self.path)
        except OSError:
            return  # no room or no right: nothing but time is lost


def between(points: list[tuple[int, float]], at: int) -> float:
    """Straight lines through `points`, sorted by place; the first value before them, in proportion behind them."""
    (low, below), *rest = points
    if at <= low:
        return below
    for high, above in rest:
        if at <= high:
            return below + (above - below) * (at - low) / (high - low)
        low, below = high, above
    return below * at / low


class MeasuredCosts:
    """`lookahead.Costs` of a target and a drafter on this machine."""

    def __init__(self, target: Any, drafter: Drafter, times: Callable[[Any], CallTimes] = CallTimes) -> None:
        self.drafter, self.times = drafter, times
        self.known: dict[int, CallTimes] = {}
        self.target = target
        self.rows = 0

    def prepare(self, rows: int) -> float:
        """Measure what batches of up to `rows` rows need and no file has. Returns the seconds that took."""
        if rows <= self.rows:
            return 0.0
        began = perf_counter()
        self.rows = rows
        for size in {1, rows}:
            self._of(self.target).prepare(size, reading=False)
            if hasattr(self.drafter, "draft_seconds"):
                self.drafter.draft_seconds(self._measured, size, 1)
        return perf_counter() - began

    def verify(self, rows: int, n_tokens: int) -> float:
        return self._of(self.target)(rows, n_tokens)

    def draft(self, rows: int, n_tokens: int) -> float | None:
        if not hasattr(self.drafter, "draft_seconds"):
            return None
        return float(self.drafter.draft_seconds(self._clock, rows, n_tokens))

    def read(self, rows: int, n_tokens: int) -> float:
        if not hasattr(self.drafter, "read_seconds"):
            return 0.0
        return float(self.drafter.read_seconds(self._clock, rows, n_tokens))

    def _of(self, model: Any) -> CallTimes:
        if id(model) not in self.known:
            self.known[id(model)] = self.times(model)
        return self.known[id(model)]

    def _measured(self, model: Any, rows: int, n_tokens: int) -> float:
        self._of(model).prepare(rows, reading=True)
        return self._clock(model, rows, n_tokens)

    def _clock(self, model: Any, rows: int, n_tokens: int) -> float:
        return self._of(model)(rows, n_tokens)


def time_calls(model: Any, rows: int, tokens: list[int]) -> dict[int, float]:
    """The shortest of some calls of `model` for each number of tokens per row, behind a short text, in seconds.

    They are timed in turns, so that a moment in which the machine is busy elsewhere meets all of them.
    """
    cache = model.new_cache(rows, CONTEXT + max(tokens))
    if hasattr(model, "read"):
        model.read([model.sample_source()] * rows, cache)
    ids_BL = torch.zeros(rows, max(CONTEXT, *tokens), dtype=torch.int64, device=model.device)
    context = min(CONTEXT, model.config.max_seq_len - max(tokens))
    if context > 0:
        model(ids_BL[:, :context], cache=cache, at_BN=ids_BL[:, :0])
        cache.commit(context)

    def once(n_tokens: int) -> float:
        began = perf_counter()
        model(ids_BL[:, :n_tokens], cache=cache)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        seconds = perf_counter() - began
        cache.commit(0)
        return seconds

    for n_tokens in tokens:  # kernels are chosen and memory is found
        once(n_tokens)
    best = dict.fromkeys(tokens, math.inf)
    total, n_rounds = 0.0, 0
    while n_rounds < 2 or total < SHORT or (n_rounds < 5 and total < LONG):
        for n_tokens in tokens:
            seconds = once(n_tokens)
            best[n_tokens], total = min(best[n_tokens], seconds), total + seconds
        n_rounds += 1
    return best


def key_of(model: Any) -> dict[str, Any]:
    """Everything that decides how long a call takes: the machine, PyTorch, and the model's shape and weights' form."""
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else vars(model.config)
    on_gpu = model.device.type == "cuda"
    return {
        "version": 2,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": torch.cuda.get_device_name(model.device) if on_gpu else processor(),
        "device": model.device.type,
        "model": type(model).__name__,
        "weights": forms(model),
        "bit_exact": getattr(model, "bit_exact", False),
        # As text: what a file cannot hold must not make its key differ from the one read back.
        "parameters": sum(p.numel() for p in module_of(model).parameters()),
        "config": json.dumps(config, sort_keys=True, default=str),
    }


def forms(model: Any) -> list[str]:
    """How the model holds its weights: dtypes, and whether and how they are packed."""
    module = module_of(model)
    packed: set[str] = {m.packed.form for m in module.modules() if getattr(m, "packed", None) is not None}  # type: ignore
    return sorted(packed | {str(p.dtype).removeprefix("torch.") for p in module.parameters()})


def module_of(model: Any) -> torch.nn.Module:
    return model if isinstance(model, torch.nn.Module) else model.module


def cache_folder() -> Path | None:
    """Where the user's caches are, by the XDG rules; None if there is no such place."""
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(root) / "modicum" / "costs"
