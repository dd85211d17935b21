"""How good a language model is on text, how far it is from another, and how fast it writes at a given context."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modicum.decode.loop import open_cache
from modicum.decode.prompts import beginning
from modicum.errors import UsageError
from modicum.lm.encoder_decoder import EncoderDecoder
from modicum.lm.objective import objective_of

# The first makes the 512 inputs and 114 targets that T5 was trained on.
T5_WINDOW, DECODER_WINDOW = 568, 1024


@dataclass(frozen=True)
class Quality:
    """Means per predicted token. `divergence` is KL(original || model) in nats, None without an original.

    A decoder predicts the text, a T5 what span corruption drops from it, the same places for every model.
    """

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


def usual_window(model: Any) -> int:
    """How many tokens are read at once where nobody says."""
    return T5_WINDOW if isinstance(model, EncoderDecoder) else min(DECODER_WINDOW, model.config.max_seq_len)


def scored_examples(model: Any, ids: Tensor, window: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor, int]]:
    """A text, [N], as the model's arguments, the targets of its last predictions, and how far the text is then read."""
    if isinstance(model, EncoderDecoder):
        for number, (given, targets_BL) in enumerate(objective_of(model, window).held_out_examples(ids)):
            yield given, targets_BL[0], min((number + 1) * window, len(ids))
        return
    for begin, end, first in scored_windows(len(ids), window):
        yield (ids[None, begin:end],), ids[first + 1 : end + 1], end


@torch.inference_mode()
def quality(model: Any, ids: Tensor, window: int, original: Any = None, on_window: Any = None) -> Quality:
    """Cross-entropy of one text, int64 [N], and the divergence from `original`'s predictions on it.

    Raises:
        UsageError: fewer than two tokens, or a T5 without sentinels.
    """
    if len(ids) < 2:
        raise UsageError(f"the text has {len(ids)} tokens: at least 2 are needed, one to predict from the other")
    nats, divergence, count = 0.0, 0.0, 0
    for given, targets, read in scored_examples(model, ids.to(model.device), window):
        scores = log_probs(model, given)[-len(targets) :]
        nats += F.nll_loss(scores, targets, reduction="sum").item()
        count += len(targets)
        if original is not None:
            wanted = log_probs(original, given)[-len(targets) :]
            # Rows of the vocabulary beyond the other's are padding.
            V = min(scores.shape[-1], wanted.shape[-1])
            divergence += F.kl_div(scores[:, :V], wanted[:, :V], reduction="sum", log_target=True).item()
        if on_window is not None:
            on_window(read)
    return Quality(nats / count, None if original is None else divergence / count, count)


def log_probs(model: Any, given: tuple[Tensor, ...]) -> Tensor:
    return model(*given)[0].double().log_softmax(-1)


@torch.inference_mode()
def seconds_per_token(model: Any, context: int, n_tokens: int = 16) -> float:
    """Median time of one decoding step after `context` tokens, batch 1. What the tokens are does not matter.

    A T5 has read them with its encoder and begins to write.

    Raises:
        UsageError: the model's context is shorter.
    """
    if context + n_tokens > model.config.max_seq_len:
        raise UsageError(
            f"a context of {context} and {n_tokens} tokens to time are more than the model's {model.config.max_seq_len}: "
            "give a shorter one"
        )
    model.for_inference()
    prompt, source = beginning(model, [token % model.config.vocab_size for token in range(context + 1)])
    ids_BM = torch.tensor([prompt], device=model.device)
    known = len(prompt) - 1
    cache = open_cache(model, [] if source is None else [source[:-1]], ids_BM, [known], known + n_tokens)
    times = []
    for step in range(n_tokens):
        began = perf_counter()
        model(ids_BM[:, -1:], cache=cache)[:, -1].argmax(-1).item()
        cache.commit(1, [known + step + 1])
        times.append(perf_counter() - began)
    return median(times)
