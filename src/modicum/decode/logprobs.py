"""Log-probabilities of the tokens that were kept, and of the most probable ones beside them."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modicum.decode.sampling import precise
from modicum.errors import UsageError


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How probable the target found a token, in natural logarithms, and the `top` ids with theirs, best first.

    They are of the model's own distribution: the softmax of its logits in float32 over the tokenizer's vocabulary,
    before repetition penalty, logits processors, temperature and filters. So they depend on the text alone, not on how
    it was sampled: their sum is the text's log-likelihood, a text scored again gets the same values, a draft changes
    none of them (it is no part of that distribution), and a greedy text does not have them all at 0.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types: `top` is a list of [id, logprob]; -inf, which JSON lacks, is null."""
        return {
            "token": self.token,
            "logprob": finite(self.logprob),
            "top": [[token, finite(value)] for token, value in self.top],
        }


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def check_logprobs(n_top: Any, vocab_size: int) -> None:
    """Raise UsageError if so many of the most probable tokens cannot be told."""
    if isinstance(n_top, bool) or not isinstance(n_top, int) or not 0 <= n_top <= vocab_size:
        raise UsageError(
            f"logprobs is {n_top!r}: give 0 for none, or how many of the most probable tokens are wanted beside the "
            f"chosen one, at most the vocabulary's {vocab_size}"
        )


def logprob_columns(logits_BNV: Tensor, tokens_BN: Tensor, n_top: int) -> Tensor:
    """Log-probabilities of `tokens_BN` and of the `n_top` best at every position, as int64 [B, N * (1 + 2 n_top)].

    Bits of float64 among ids, so that they travel with the loop's other integers: a second transfer would be a second
    wait for the device. How many positions a row keeps is not known before, so all of them are computed.
    """
    logits_BNV = precise(logits_BNV)
    top = logits_BNV.topk(n_top, dim=-1)
    scores_BNT = torch.cat([logits_BNV.gather(-1, tokens_BN[..., None]), top.values], -1)
    logprobs_BNT = scores_BNT - logits_BNV.logsumexp(-1, keepdim=True)
    return torch.cat([logprobs_BNT.double().view(torch.int64), top.indices], -1).flatten(1)


def read_logprobs(columns_BX: Tensor, tokens: list[list[int]], n_top: int) -> list[list[TokenLogprob]]:
    """`logprob_columns`, now on the host, for the first tokens of each row that were kept."""
    columns_BNX = columns_BX.unflatten(1, (-1, 1 + 2 * n_top))
    logprobs = columns_BNX[..., : 1 + n_top].contiguous().view(torch.float64).tolist()
    ids = columns_BNX[..., 1 + n_top :].tolist()
    return [
        [
            # Equals in the order of their ids, as everywhere; `topk` promises none.
            TokenLogprob(
                token, values[0], sorted(zip(top, values[1:], strict=True), key=lambda pair: (-pair[1], pair[0]))
            )
            for token, values, top in zip(kept, row_values, row_ids, strict=False)
        ]
        for kept, row_values, row_ids in zip(tokens, logprobs, ids, strict=True)
    ]
