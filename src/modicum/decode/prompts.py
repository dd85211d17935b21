"""What a caller asks for, checked and spread over prompts, and the batches it is done in."""

import secrets
from collections.abc import Sequence
from typing import Any, TypeVar

from modicum.decode.batch import Request
from modicum.decode.processors import Processor
from modicum.decode.random import stream_key
from modicum.decode.sampling import SamplingParams
from modicum.errors import UsageError

# Rows that are decoded side by side, and the memory that their key-value caches may take together.
MAX_ROWS = 64
MAX_CACHE_BYTES = 2 << 30

T = TypeVar("T")


def encode_prompts(model: Any, prompts: Any) -> list[list[int]]:
    """Prompts as token ids, each checked: not empty, within the vocabulary."""
    several = [prompts] if isinstance(prompts, str) else list(prompts)
    if several and all(isinstance(prompt, int) for prompt in several):
        raise UsageError("prompts is a flat list of integers: give a list of token lists, such as [[1, 2, 3]]")
    texts = [prompt for prompt in several if isinstance(prompt, str)]
    if texts and model.tokenizer is None:
        raise UsageError(
            "this model has no tokenizer files: give prompts as lists of token ids, or add a tokenizer.json"
        )
    ids = []
    for index, prompt in enumerate(several):
        tokens = [int(t) for t in (model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)]
        if not tokens or prompt == "":
            raise UsageError(f"prompt {index} is empty: give at least one token to continue")
        if not 0 <= min(tokens) <= max(tokens) < model.config.vocab_size:
            raise UsageError(
                f"prompt {index} has token ids from {min(tokens)} to {max(tokens)}: "
                f"this model's vocabulary is 0 to {model.config.vocab_size - 1}"
            )
        ids.append(tokens)
    return ids


def reads_apart(model: Any) -> bool:
    """Whether a model reads something as a whole, by `read`, and writes about it."""
    return hasattr(model, "read")


def reads_video(model: Any) -> bool:
    """Whether that is a clip; what it writes then begins with a prompt, as the text of other models does."""
    return getattr(model, "reads_video", False)


def beginning(model: Any, ids: list[int]) -> tuple[list[int], list[int] | None]:
    """What a model's text begins with, given the ids of a prompt, and what it reads apart from that."""
    return model.beginning(ids) if hasattr(model, "beginning") else (ids, None)


def limit_of(model: Any, index: int, prompt: list[int], max_new_tokens: int) -> int:
    """At how many tokens a row ends."""
    context = model.config.max_seq_len
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
    if len(prompt) >= context:
        raise UsageError(
            f"prompt {index} has {len(prompt)} tokens and the model's context is {context}: "
            f"shorten it to at most {context - 1}, so that one can follow"
        )
    return min(len(prompt) + max_new_tokens, context)


def per_prompt(name: str, value: T | Sequence[T], n_prompts: int) -> list[T]:
    """One value for all, or one per prompt, as a list."""
    if not isinstance(value, list | tuple):
        return [value] * n_prompts  # type: ignore[list-item]
    if len(value) != n_prompts:
        raise UsageError(f"{name} has {len(value)} values for {n_prompts} prompts: give one, or one per prompt")
    return list(value)


def check_stops(stop: str | Sequence[str] | None, model: Any) -> tuple[str, ...]:
    """Stop strings, none of them empty, for a model that can write text."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if any(not text for text in stops):
        raise UsageError("a stop string is empty: give at least one character, or leave `stop` out")
    if stops and model.tokenizer is None:
        raise UsageError("stop strings need text and this model has no tokenizer files: leave `stop` out")
    return stops


def stream_keys(seed: int | Sequence[int | tuple[int, int]] | None, n_prompts: int) -> list[int]:
    """The key of each prompt's random stream; without a seed, of streams that nobody can repeat."""
    if isinstance(seed, list | tuple):
        own: list[Any] = per_prompt("seed", list(seed), n_prompts)
        return [stream_key(*value) if isinstance(value, tuple) else stream_key(value, 0) for value in own]
    base: Any = secrets.randbits(63) if seed is None else seed
    return [stream_key(base, index) for index in range(n_prompts)]


def form_requests(
    target: Any,
    ids: list[list[int]],
    sampling: dict[str, Any],
    *,
    limits: list[int],
    keys: list[int],
    stops: tuple[str, ...],
    ignore_eos: bool,
    processors: list[tuple[Processor, ...]],
) -> list[Request]:
    """One request per prompt. `sampling` holds the arguments of `SamplingParams`, each for all or one per prompt."""
    settings = {name: per_prompt(name, value, len(ids)) for name, value in sampling.items()}
    return [
        Request(
            index=index,
            prompt=prompt,
            source=source,
            key=keys[index],
            params=SamplingParams(**{name: values[index] for name, values in settings.items()}),
            max_total=limit_of(target, index, prompt, limits[index]),
            eos_ids=frozenset() if ignore_eos else target.eos_ids,
            stops=stops,
            processors=processors[index],
        )
        for index, (prompt, source) in enumerate(beginning(target, prompt) for prompt in ids)
    ]


def vocabulary(target: Any) -> int:
    """How many token ids may be drawn: rows of the logits beyond the tokenizer are padding."""
    size = target.config.vocab_size
    return size if target.tokenizer is None else min(size, len(target.tokenizer))


def form_batches(requests: list[Request], target: Any, max_rows: int | None) -> list[list[Request]]:
    """Rows of similar length together, as many as fit, at most `max_rows`. What a row becomes does not depend on it."""
    most = min(MAX_ROWS, max_rows or MAX_ROWS)
    batches: list[list[Request]] = []
    for request in sorted(requests, key=lambda r: (r.max_total, read_by(r) or len(r.prompt)), reverse=True):
        if batches and fits(request, batches[-1], most, target):
            batches[-1].append(request)
        else:
            batches.append([request])
    return batches


def read_by(request: Request) -> int:
    """Slots of what it reads apart from its text."""
    return 0 if request.source is None else len(request.source)


def fits(request: Request, batch: list[Request], most: int, target: Any) -> bool:
    """Whether one more row may join a batch, whose first row is its longest."""
    if not target.ragged and len(request.prompt) != len(batch[0].prompt):
        return False
    longest = max(read_by(r) for r in (*batch, request))
    n_bytes = (len(batch) + 1) * (batch[0].max_total + longest) * target.cache_bytes_per_token
    return len(batch) < most and n_bytes <= MAX_CACHE_BYTES
