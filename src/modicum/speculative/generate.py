"""From what a caller asked for to texts: the one pipeline behind `generate` and `caption`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from modicum.core.exact import check_width, exact_view
from modicum.decode.batch import Batch, OnToken, Request, Row
from modicum.decode.logprobs import check_logprobs
from modicum.decode.loop import run
from modicum.decode.output import GenerationOutput
from modicum.decode.processors import processors_per_prompt
from modicum.decode.prompts import check_stops, form_batches, form_requests, per_prompt, stream_keys, vocabulary
from modicum.decode.stats import add_seconds
from modicum.errors import UsageError
from modicum.speculative.auto import make_engine
from modicum.speculative.drafters.make import make_drafter
from modicum.speculative.invariant import check_invariant, exact_drafter
from modicum.speculative.loop import VERIFICATIONS


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How texts are written; `modicum.generate` says what each setting does."""

    draft: Any = None
    num_draft_tokens: Any = 4
    max_new_tokens: Any = 128
    temperature: Any = 1.0
    top_k: Any = None
    top_p: Any = None
    min_p: Any = None
    repetition_penalty: Any = 1.0
    seed: Any = None
    stop: Any = None
    ignore_eos: bool = False
    verification: str = "token"
    logprobs: int = 0
    on_token: OnToken | None = None
    logits_processors: Any = None
    k_invariant: bool = False
    bit_exact: bool = False


class Writing:
    """A call, checked and ready: `requests` in the order of the prompts, then `texts` of them.

    Raises:
        UsageError: an argument that cannot be honoured.
    """

    def __init__(self, target: Any, prompts: list[list[int]], settings: Settings) -> None:
        s = settings
        self.began = perf_counter()
        self.target, self.settings = target, s
        if s.verification not in VERIFICATIONS:
            raise UsageError(
                f"verification `{s.verification}` is not known: use {' or '.join(map(repr, VERIFICATIONS))}"
            )
        check_logprobs(s.logprobs, vocabulary(target))
        self.drafter = make_drafter(s.draft, s.num_draft_tokens)
        self.max_rows = None if self.drafter is None else self.drafter.max_rows
        if self.drafter is not None:
            self._check_drafter()
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        self.requests = form_requests(
            target,
            prompts,
            {name: getattr(s, name) for name in names},
            limits=per_prompt("max_new_tokens", s.max_new_tokens, len(prompts)),
            keys=stream_keys(s.seed, len(prompts)),
            stops=check_stops(s.stop, target),
            ignore_eos=s.ignore_eos,
            processors=processors_per_prompt(s.logits_processors, len(prompts)),
        )
        self.by_part: dict[str, float] = {}

    def _check_drafter(self) -> None:
        s, drafter = self.settings, self.drafter
        assert drafter is not None
        drafter.check(self.target)
        if s.k_invariant:
            check_invariant(drafter, s.num_draft_tokens, s.verification)
        if s.bit_exact:
            check_width(s.num_draft_tokens)
        if not self.target.ragged:
            self.target.check_speculation()
            self.max_rows = 1

    def texts(self, parts: Iterable[list[Request]]) -> GenerationOutput:
        """Write the texts of all requests, which may come in parts: the next is asked for when the last is written."""
        rows: list[Row] = []
        in_models: dict[str, float] = {}
        with torch.inference_mode():
            for engine, batch in self._batches(parts):
                rows += run(batch, engine)
                add_seconds(self.by_part, batch.seconds)
                add_seconds(in_models, batch.model_seconds)
        rows.sort(key=lambda row: row.request.index)
        seconds = perf_counter() - self.began
        scored = bool(self.settings.logprobs)
        return GenerationOutput.of(rows, self.target.tokenizer, seconds, self.by_part, in_models, scored)

    def _batches(self, parts: Iterable[list[Request]]) -> Iterator[tuple[Any, Batch]]:
        """Each batch, with what is to write it."""
        s, target, drafter, max_rows = self.settings, self.target, self.drafter, self.max_rows
        target.for_inference()
        if s.bit_exact:
            max_rows, target = 1, exact_view(target)
            if s.k_invariant and drafter is not None:
                drafter = exact_drafter(drafter, target)
        plain = not (s.logprobs or s.bit_exact or any(request.processors for request in self.requests))
        options = {"verification": s.verification, "k_invariant": s.k_invariant}
        new_engine = make_engine(target, drafter, s.num_draft_tokens, capture=plain, **options)
        for part in parts:
            for group in form_batches(part, target, max_rows):
                engine = new_engine(len(group), self.by_part)
                yield (
                    engine,
                    Batch(
                        group,
                        vocab_size=vocabulary(target),
                        device=target.device,
                        tokenizer=target.tokenizer,
                        on_token=s.on_token,
                        logprobs=s.logprobs,
                    ),
                )
