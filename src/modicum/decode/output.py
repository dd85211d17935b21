"""What `generate` returns."""

from dataclasses import dataclass
from typing import Any

from modicum.checkpoint.tokenizer import Tokenizer
from modicum.decode.batch import Row
from modicum.decode.logprobs import TokenLogprob
from modicum.decode.stats import GenerationStats


@dataclass(frozen=True)
class GenerationOutput:
    """Continuations in the order of the prompts.

    `tokens` are the new ones only, with the EOS that ended them and the token that completed a stop string; `texts` have
    neither. `finish_reasons`: "eos", "stop", or "length" (max_new_tokens or the context). `texts` is None without a
    tokenizer. `stats` is for the whole call, `row_stats[i]` for prompt i. `logprobs[i]` has a `TokenLogprob` for each of
    its tokens; `logprobs` is None if none were asked for.
    """

    texts: list[str] | None
    tokens: list[list[int]]
    finish_reasons: list[str]
    stats: GenerationStats
    row_stats: list[GenerationStats]
    logprobs: list[list[TokenLogprob]] | None = None

    @classmethod
    def of(
        cls,
        rows: list[Row],
        tokenizer: Tokenizer | None,
        seconds: float,
        by_part: dict[str, float],
        in_models: dict[str, float],
        with_logprobs: bool,
    ) -> "GenerationOutput":
        total = GenerationStats(seconds=seconds, seconds_by_part=by_part, model_seconds=in_models)
        for row in rows:
            total.add(row.stats)
        return cls(
            texts=None if tokenizer is None else [text_of(row, tokenizer) for row in rows],
            tokens=[row.new_tokens for row in rows],
            finish_reasons=[str(row.finish_reason) for row in rows],
            stats=total,
            row_stats=[row.stats for row in rows],
            logprobs=[row.logprobs for row in rows] if with_logprobs else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON types. "logprobs" is there if they were asked for."""
        scored = {}
        if self.logprobs is not None:
            scored["logprobs"] = [[logprob.to_dict() for logprob in row] for row in self.logprobs]
        return {
            "texts": self.texts,
            "tokens": self.tokens,
            "finish_reasons": self.finish_reasons,
            **scored,
            "stats": self.stats.to_dict(),
        }


def text_of(row: Row, tokenizer: Tokenizer) -> str:
    if row.finish_reason == "stop" and row.text is not None:
        return row.text.released
    ended = row.finish_reason == "eos"
    return tokenizer.decode(row.new_tokens[:-1] if ended else row.new_tokens)
