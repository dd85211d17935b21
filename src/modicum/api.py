"""Load, save and generate: the only place where files become a module and prompts become text."""

import secrets
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch

from modicum import resources
from modicum.checkpoint.hf import UnknownFamilyError, decoder_config, stock_config, to_native, to_stock
from modicum.checkpoint.hub import resolve
from modicum.checkpoint.io import Checkpoint, read_checkpoint, write_checkpoint
from modicum.checkpoint.tokenizer import Tokenizer, stored_eos_ids
from modicum.decode.batch import Batch, OnToken, Request, Row, TokenEvent
from modicum.decode.loop import Engine, PlainEngine, run
from modicum.decode.output import GenerationOutput
from modicum.decode.random import stream_key
from modicum.decode.sampling import SamplingParams
from modicum.decode.stats import add_seconds
from modicum.errors import UsageError
from modicum.lm.decoder import Decoder
from modicum.lm.hf_adapter import load_adapter
from modicum.speculative.drafters.base import Drafter
from modicum.speculative.drafters.model import ModelDrafter
from modicum.speculative.drafters.ngram import NgramDrafter
from modicum.speculative.loop import SpeculativeEngine

__all__ = ["TokenEvent", "generate", "load", "read_checkpoint", "save", "write_checkpoint"]

# Rows that are decoded side by side, and the memory that their key-value caches may take together.
MAX_ROWS = 64
MAX_CACHE_BYTES = 2 << 30

T = TypeVar("T")


def load(
    path_or_hub_id: str | PathLike[str], device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> Any:
    """A model in evaluation mode, with `.config` and `.tokenizer` (None if its folder has no tokenizer files).

    Args:
        path_or_hub_id: a name of a model that ships with modicum, a local folder, or a Hugging Face hub id.
        device: "auto" is a GPU if there is one, else the CPU.
        dtype: "auto" is what the checkpoint is stored in.

    Raises:
        CheckpointError: the folder is missing, damaged or of a kind that is not supported.
        MissingExtraError: a family without native code, and `transformers` is not installed.
    """
    preset = resources.model_presets().get(str(path_or_hub_id))
    folder = preset or resolve(path_or_hub_id if isinstance(path_or_hub_id, Path) else str(path_or_hub_id))
    checkpoint = read_checkpoint(folder)
    device = pick_device(device)
    try:
        config = decoder_config(checkpoint.config)
    except UnknownFamilyError as unknown:
        model: Any = load_adapter(Path(folder), device, pick_dtype(dtype, checkpoint), unknown)
    else:
        model = build(checkpoint, config, device, pick_dtype(dtype, checkpoint))
    model.tokenizer = Tokenizer.from_files(checkpoint.files, checkpoint.config)
    model.eos_ids = model.tokenizer.eos_ids if model.tokenizer else stored_eos_ids(checkpoint.files, checkpoint.config)
    return model


def build(checkpoint: Checkpoint, config: Any, device: torch.device, dtype: torch.dtype) -> Decoder:
    """(config, state_dict) -> module. Weights are read one at a time; none is held twice."""
    with torch.device("meta"):
        model = Decoder(config)
    for name, tensor in to_native(checkpoint.state_dict, config):
        owner, _, leaf = name.rpartition(".")
        # A copy always: a view of the memory-mapped file would change, or fail, when the model is trained.
        weight = torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)
        model.get_submodule(owner).register_parameter(leaf, torch.nn.Parameter(weight))
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    if model.rope is not None:
        model.rope.frequencies = model.rope.frequencies.to(device)
    model.stock_config, model.files = checkpoint.config, checkpoint.files
    return model.eval()


def save(model: Any, path: str | PathLike[str], overwrite: bool = False) -> None:
    """Write `model` in its family's stock Hugging Face layout; its tokenizer and other files go along.

    Raises:
        CheckpointError: `path` holds something already and `overwrite` is not set, or cannot be written.
    """
    if not isinstance(model, Decoder):
        raise UsageError(f"{type(model).__name__} runs through transformers: save it with its own `save_pretrained`")
    state = model.dense_state()
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    config = type(model.config).from_dict({**model.config.to_dict(), "dtype": dtype})
    stock = stock_config(config, model.stock_config)
    write_checkpoint(Checkpoint(stock, to_stock(state, config), model.files or {}), Path(path), overwrite=overwrite)


def pick_device(device: str | torch.device) -> torch.device:
    """ "auto" -> a GPU if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UsageError(f"`{device}` is not a device: use auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device `{device}` asks for a GPU and PyTorch sees none: use `cpu` or `auto`")
    return chosen


def pick_dtype(dtype: str | torch.dtype, checkpoint: Checkpoint) -> torch.dtype:
    """ "auto" -> what the checkpoint's weights are stored in."""
    if isinstance(dtype, torch.dtype):
        return dtype
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if dtype == "auto":
        # Some checkpoints store masks, as bytes, beside the weights.
        return next(tensor.dtype for tensor in checkpoint.state_dict.values() if tensor.is_floating_point())
    if dtype not in known:
        raise UsageError(f"`{dtype}` is not a dtype for a model: use auto, {', '.join(known)}")
    return known[dtype]


def generate(
    target: Any,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    draft: Any = None,
    num_draft_tokens: int = 4,
    max_new_tokens: int | Sequence[int] = 128,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int | None] | None = None,
    top_p: float | Sequence[float | None] | None = None,
    min_p: float | Sequence[float | None] | None = None,
    repetition_penalty: float | Sequence[float] = 1.0,
    seed: int | Sequence[int | tuple[int, int]] | None = None,
    stop: str | Sequence[str] | None = None,
    ignore_eos: bool = False,
    verification: str = "token",
    logprobs: int = 0,
    on_token: OnToken | None = None,
) -> GenerationOutput:
    """Continue prompts, with a draft by speculative sampling (2302.01318): the same distribution, in fewer target calls.

    Args:
        target: a model from `load`.
        prompts: text, texts, or lists of token ids; any number, batches are formed inside.
        draft: a model with the same tokenizer, a `Drafter`, "ngram" (prompt lookup), or None for plain decoding.
        num_draft_tokens: K of the paper: tokens proposed per target call.
        max_new_tokens: exact, unless EOS, a stop string or the context comes first.
        temperature: 0 is greedy. It and the filters take one value, or one per prompt, in the order of `transformers`:
            repetition penalty (prompt included), temperature, top-k, top-p, min-p.
        seed: prompt i draws from the stream (seed, i), whatever else is in the call. A list gives
            each its own: s is (s, 0), and a pair names any stream.
        stop: strings that end a text; they are cut from it, the tokens keep the one that completed it.
        ignore_eos: treat EOS as an ordinary token.
        on_token: called with a `TokenEvent` for every token as it is kept.

    Raises:
        UsageError: an argument that cannot be honoured, an empty prompt, one longer than the context, a draft with
            another tokenizer.
        GenerationError: the model returned NaN.
    """
    began = perf_counter()
    if verification != "token":
        raise UsageError(f"verification `{verification}` is not known: use `token`, the rule of 2302.01318")
    if logprobs:
        raise UsageError(f"logprobs={logprobs} cannot be returned: leave it at 0")
    ids = encode_prompts(target, prompts)
    drafter = make_drafter(draft, num_draft_tokens)
    if drafter is not None:
        drafter.check(target)
        if not target.ragged:
            target.check_speculation()
    tokenizer = target.tokenizer
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if any(not text for text in stops):
        raise UsageError("a stop string is empty: give at least one character, or leave `stop` out")
    if stops and tokenizer is None:
        raise UsageError("stop strings need text and this model has no tokenizer files: leave `stop` out")
    spread: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    settings = {name: per_prompt(name, value, len(ids)) for name, value in spread.items()}
    limits = per_prompt("max_new_tokens", max_new_tokens, len(ids))
    keys = stream_keys(seed, len(ids))
    requests = [
        Request(
            index=index,
            prompt=prompt,
            key=keys[index],
            params=SamplingParams(**{name: values[index] for name, values in settings.items()}),
            max_total=limit_of(target, index, prompt, limits[index]),
            eos_ids=frozenset() if ignore_eos else target.eos_ids,
            stops=stops,
        )
        for index, prompt in enumerate(ids)
    ]
    target.for_inference()
    rows: list[Row] = []
    by_part: dict[str, float] = {}
    with torch.inference_mode():
        for group in form_batches(requests, target, drafter):
            batch = Batch(
                group,
                vocab_size=vocabulary(target),
                device=target.device,
                tokenizer=tokenizer,
                on_token=on_token,
            )
            engine: Engine = (
                PlainEngine(target) if drafter is None else SpeculativeEngine(target, drafter, num_draft_tokens)
            )
            rows += run(batch, engine)
            add_seconds(by_part, batch.seconds)
    rows.sort(key=lambda row: row.request.index)
    return GenerationOutput.of(rows, tokenizer, perf_counter() - began, by_part)


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


def make_drafter(draft: Any, num_draft_tokens: int) -> Drafter | None:
    """What `draft` stands for; checks K as well."""
    if draft is None:
        return None
    if isinstance(num_draft_tokens, bool) or not isinstance(num_draft_tokens, int) or num_draft_tokens < 1:
        raise UsageError(
            f"num_draft_tokens is {num_draft_tokens!r}: it must be a whole number of at least 1; "
            "for plain decoding leave the draft out"
        )
    if isinstance(draft, str):
        if draft != "ngram":
            raise UsageError(f"draft `{draft}` is not a drafter's name: use `ngram`, or a model from `modicum.load`")
        return NgramDrafter()
    if hasattr(draft, "propose"):
        return draft
    draft.for_inference()
    return ModelDrafter(draft)


def per_prompt(name: str, value: T | Sequence[T], n_prompts: int) -> list[T]:
    """One value for all, or one per prompt, as a list."""
    if not isinstance(value, list | tuple):
        return [value] * n_prompts  # type: ignore[list-item]
    if len(value) != n_prompts:
        raise UsageError(f"{name} has {len(value)} values for {n_prompts} prompts: give one, or one per prompt")
    return list(value)


def stream_keys(seed: int | Sequence[int | tuple[int, int]] | None, n_prompts: int) -> list[int]:
    """The key of each prompt's random stream; without a seed, of streams that nobody can repeat."""
    if isinstance(seed, list | tuple):
        own: list[Any] = per_prompt("seed", list(seed), n_prompts)
        return [stream_key(*value) if isinstance(value, tuple) else stream_key(value, 0) for value in own]
    base: Any = secrets.randbits(63) if seed is None else seed
    return [stream_key(base, index) for index in range(n_prompts)]


def vocabulary(target: Any) -> int:
    """How many token ids may be drawn: rows of the logits beyond the tokenizer are padding."""
    size = target.config.vocab_size
    return size if target.tokenizer is None else min(size, len(target.tokenizer))


def form_batches(requests: list[Request], target: Any, drafter: Drafter | None) -> list[list[Request]]:
    """Rows of similar length together, as many as fit. What a row becomes does not depend on it."""
    most = MAX_ROWS
    if drafter is not None:
        most = min(most, drafter.max_rows or most, most if target.ragged else 1)
    batches: list[list[Request]] = []
    for request in sorted(requests, key=lambda r: (r.max_total, len(r.prompt)), reverse=True):
        if batches and fits(request, batches[-1], most, target):
            batches[-1].append(request)
        else:
            batches.append([request])
    return batches


def fits(request: Request, batch: list[Request], most: int, target: Any) -> bool:
    """Whether one more row may join a batch, whose first row is its longest."""
    if not target.ragged and len(request.prompt) != len(batch[0].prompt):
        return False
    n_bytes = (len(batch) + 1) * batch[0].max_total * target.cache_bytes_per_token
    return len(batch) < most and n_bytes <= MAX_CACHE_BYTES
