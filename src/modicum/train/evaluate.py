"""How good a language model is on text, how far it is from another, and how fast it writes at a given context."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modicum.decode.loop import prefill
from modicum.errors import UsageError


@dataclass(frozen=True)
class Quality:
    """Means per predicted token. `divergence` is KL(original || model) in nats, None without an original."""

    nats_per_token: float
    divergence: float | None
    n_tokens: int


def scored_windows(n_tokens: int, window: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first): inputs begin ... end - 1 are read and those from `first` on are scored.

    Every token but the first is predicted once, from at least half a window of context where there is so much.
    """
    first = 0
    while first < n_tokens - 1:
        begin = max(0, first - window // 2)
        end = min(begin + window, n_tokens - 1)
        yield begin, end, first
        first = end


@torch.inference_mode()
def quality(model: Any, ids: Tensor, window: int, original: Any = None, on_window: Any = None) -> Quality:
    """Cross-entropy of one text, int64 [N], and the divergence from `original`'s predictions on it.

    Raises:
        UsageError: fewer than two tokens.
    """
    if len(ids) < 2:
        raise UsageError(f"the text has {len(ids)} tokens: at least 2 are needed, one to predict from the other")
    nats = divergence = 0.0
    for begin, end, first in scored_windows(len(ids), window):
        inputs, targets = ids[None, begin:end].to(model.device), ids[first + 1 : end + 1].to(model.device)
        scores = log_probs(model, inputs)[first - begin :]
        nats += F.nll_loss(scores, targets, reduction="sum").item()
        if original is not None:
            wanted = log_probs(original, inputs)[first - begin :]
            # Rows of the vocabulary beyond the other's are padding.
            V = min(scores.shape[-1], wanted.shape[-1])
            divergence += F.kl_div(scores[:, :V], wanted[:, :V], reduction="sum", log_target=True).item()
        if on_window is not None:
            on_window(end)
    count = len(ids) - 1
    return Quality(nats / count, None if original is None else divergence / count, count)


def log_probs(model: Any, ids_BL: Tensor) -> Tensor:
    return model(ids_BL)[0].double().log_softmax(-1)


@torch.inference_mode()
def seconds_per_token(model: Any, context: int, n_tokens: int = 16) -> float:
    """Median time of one decoding step after `context` tokens, batch 1. What the tokens are does not matter.

    Raises:
        UsageError: the model's context is shorter.
    """
    if context + n_tokens > model.config.max_seq_len:
        raise UsageError(
            f"a context of {context} and {n_tokens} tokens to time are more than the model's {model.config.max_seq_len}: "
            "give a shorter one"
        )
    model.for_inference()
    ids_BM = torch.arange(context, device=model.device)[None] % model.config.vocab_size
    cache = model.new_cache(1, context + n_tokens)
    prefill(model, cache, ids_BM, [context])
    times = []
    for step in range(n_tokens):
        began = perf_counter()
        model(ids_BM[:, :1], cache)[:, -1].argmax(-1).item()
        cache.commit(1, [context + step + 1])
        times.append(perf_counter() - began)
    return median(times)
