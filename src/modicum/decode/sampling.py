"""From logits to probabilities to a token: one function for target and draft, settings row by row.

The filters come in the order of `transformers`: repetition penalty, temperature, top-k, top-p, min-p.
"""

import math
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from modicum.errors import UsageError

# A nucleus is nearly always within this many of the most probable tokens; finding those is far cheaper than sorting.
TOP_CANDIDATES = 128
LEAST_TEMPERATURE = 1e-30
# Logits on a CPU from which numpy's faster search outweighs the way there.
NUMPY_PAYS = 1 << 14


@dataclass(frozen=True)
class SamplingParams:
    """One prompt's settings. `temperature` 0 is greedy: the most probable token, the lowest id of equals."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"temperature is {self.temperature}: it must be 0 (greedy) or a positive number")
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise UsageError(
                f"temperature is {self.temperature}: below {LEAST_TEMPERATURE} logits overflow; give 0 for greedy"
            )
        if self.top_k is not None and not (isinstance(self.top_k, Integral) and self.top_k >= 1):
            raise UsageError(
                f"top_k is {self.top_k}: it must be at least 1 and a whole number; leave it out to keep every token"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}: it must be above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p is {self.min_p}: it must be between 0 and 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise UsageError(f"repetition_penalty is {self.repetition_penalty}: it must be positive, 1 is none")


class Sampler:
    """The settings of a batch's rows as tensors; a filter that no row uses costs nothing."""

    def __init__(self, params: list[SamplingParams], device: torch.device) -> None:
        self.params, self.device = params, device
        self.all_greedy = all(p.temperature == 0 for p in params)
        self.any_greedy = any(p.temperature == 0 for p in params)
        self.penalised = any(p.repetition_penalty != 1 for p in params)
        self.tempered = any(p.temperature not in (0, 1) for p in params)
        self.cut_k = any(p.top_k is not None for p in params)
        self.cut_p = any(p.top_p is not None and p.top_p < 1 for p in params)
        self.cut_p_everywhere = all(p.top_p is not None and p.top_p < 1 for p in params)
        self.cut_min = any(p.min_p for p in params)
        self.penalty_B11 = self._column([p.repetition_penalty for p in params])
        # A greedy row's probabilities are replaced at the end; until then its temperature only has to be harmless.
        self.temperature_B11 = self._column([p.temperature or 1.0 for p in params])
        self.greedy_B11 = self._column([float(p.temperature == 0) for p in params]).bool()
        self.top_k_B11 = self._column([float(p.top_k or math.inf) for p in params])
        self.top_p_B11 = self._column([1.0 if p.top_p is None else p.top_p for p in params])
        self.min_p_B11 = self._column([p.min_p or 0.0 for p in params])
        self.cast: dict[tuple[str, torch.dtype], Tensor] = {}

    def _column(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.device)[:, None, None]

    def _like(self, name: str, scores: Tensor) -> Tensor:
        """A column in the precision of `scores`, cast once."""
        key = name, scores.dtype
        if key not in self.cast:
            self.cast[key] = getattr(self, name).to(scores.dtype)
        return self.cast[key]

    def select(self, rows: list[int]) -> "Sampler":
        """The settings of these rows."""
        return Sampler([self.params[row] for row in rows], self.device)

    def greedy(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """The best token of each row after its repetition penalty: [B, V] -> [B], [B, N, V] -> [B, N]."""
        return greedy(self.penalise(logits, seen).view(logits.shape))

    def probs(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """What each row's next token is drawn from, [B, V] or [B, N, V], float32 (float64 for float64 logits).

        Args:
            logits: of the same shape, any floating dtype; -inf is a token that cannot come.
            seen: bool, broadcastable to it: tokens of the prompt and the text so far, for the repetition penalty.
        """
        scores_BNV = self.penalise(logits, seen)
        best_BN = greedy(scores_BNV) if self.any_greedy else None
        if self.tempered:
            scores_BNV = scores_BNV / self._like("temperature_B11", scores_BNV)
        if self.cut_k:
            scores_BNV = self._keep_top_k(scores_BNV)
        if self.cut_p:
            scores_BNV = self._keep_top_p(scores_BNV)
        probs_BNV = scores_BNV.softmax(dim=-1)
        if self.cut_min:
            least_BN1 = probs_BNV.amax(-1, keepdim=True) * self._like("min_p_B11", probs_BNV)
            # Not divided by its sum: that would change the last bits of rows beside it that have no min-p.
            probs_BNV = scores_BNV.masked_fill(probs_BNV < least_BN1, -math.inf).softmax(dim=-1)
        if best_BN is not None:
            one_hot_BNV = torch.zeros_like(probs_BNV).scatter_(-1, best_BN[..., None], 1.0)
            # NaN has to stay visible in greedy rows too.
            broken_BN1 = scores_BNV.gather(-1, best_BN[..., None]).isnan()
            one_hot_BNV = one_hot_BNV.masked_fill(broken_BN1, math.nan)
            probs_BNV = torch.where(self.greedy_B11, one_hot_BNV, probs_BNV)
        return probs_BNV.view(logits.shape)

    def penalise(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """Logits after the repetition penalty, at least float32: [B, V] or [B, N, V] -> [B, N, V]."""
        scores_BNV = three_axes(precise(logits))
        if seen is None or not self.penalised:
            return scores_BNV
        seen_BNV = three_axes(seen)
        penalty_B11 = self._like("penalty_B11", scores_BNV)
        punished_BNV = torch.where(scores_BNV < 0, scores_BNV * penalty_B11, scores_BNV / penalty_B11)
        return torch.where(seen_BNV, punished_BNV, scores_BNV)

    def _keep_top_k(self, scores_BNV: Tensor) -> Tensor:
        """Ties with the k-th stay; k beyond the vocabulary keeps all."""
        V = scores_BNV.shape[-1]
        largest = min(V, max(p.top_k or 1 for p in self.params))
        top_BNC = scores_BNV.topk(largest, dim=-1).values
        at_B11 = self.top_k_B11.clamp(max=largest).long() - 1
        least_BN1 = top_BNC.gather(-1, at_B11.expand(-1, scores_BNV.shape[1], 1))
        cut_BNV = (scores_BNV < least_BN1) & (self.top_k_B11 < V)
        return scores_BNV.masked_fill(cut_BNV, -math.inf)

    def _keep_top_p(self, scores_BNV: Tensor) -> Tensor:
        """The nucleus (1904.09751): a token stays while the mass before it is below p; equals come in the order of ids.

        Only the end of the nucleus is looked for, not an order of the whole vocabulary: its least score, and how many
        of the tokens with that very score still belong to it.
        """
        ordered_BNC, last_BN1 = self._nucleus(scores_BNV)
        count_BN1 = last_BN1 + 1
        least_BN1 = ordered_BNC.gather(-1, last_BN1)
        outside_BNV = scores_BNV < least_BN1
        # Mostly nothing equals the last; a GPU would take longer to say so than to order what does.
        if not at_hand(scores_BNV) or not bool(
            (outside_BNV.sum(-1, keepdim=True) + count_BN1 == scores_BNV.shape[-1]).all()
        ):
            equal_BNV = scores_BNV == least_BN1
            room_BN1 = count_BN1 - (ordered_BNC > least_BN1).sum(-1, keepdim=True)
            outside_BNV |= equal_BNV & (equal_BNV.cumsum(-1) > room_BN1)
        return scores_BNV.masked_fill(
            outside_BNV if self.cut_p_everywhere else outside_BNV & (self.top_p_B11 < 1), -math.inf
        )

    def _nucleus(self, scores_BNV: Tensor) -> tuple[Tensor, Tensor]:
        """The highest scores in falling order, [B, N, C], and which is the last in every row's nucleus, [B, N, 1]."""
        V = scores_BNV.shape[-1]
        # The mass is measured against the whole vocabulary, so that it does not depend on how much of it was ordered.
        # A log-softmax is one pass; logsumexp takes several.
        best_BN1 = scores_BNV.log_softmax(-1).amax(-1, keepdim=True)
        top_p_B11 = self._like("top_p_B11", scores_BNV)
        # A GPU sorts at once; asking it whether a few were enough would take longer.
        sizes = {V} if not at_hand(scores_BNV) else {min(V, TOP_CANDIDATES), min(V, 16 * TOP_CANDIDATES), V}
        for size in sorted(sizes):
            ordered_BNC = scores_BNV.topk(size, dim=-1).values if size < V else falling(scores_BNV)
            mass_BNC = (ordered_BNC - ordered_BNC[..., :1] + best_BN1).exp().cumsum(-1)
            enough_BN1 = mass_BNC[..., -1:] >= top_p_B11
            if size == V or bool((enough_BN1 if self.cut_p_everywhere else enough_BN1 | (top_p_B11 >= 1)).all()):
                break
        # The sum up to a token is the mass before the next one, and the first is always inside.
        return ordered_BNC, (mass_BNC[..., :-1] < top_p_B11).sum(-1, keepdim=True)


def precise(logits: Tensor) -> Tensor:
    """At least float32, before anything is divided by a temperature."""
    return logits if logits.dtype == torch.float64 else logits.float()


def at_hand(x: Tensor) -> bool:
    """Whether the host can look at numbers without waiting for a device to have computed them."""
    return x.device.type == "cpu"


def three_axes(x: Tensor) -> Tensor:
    """[B, V] -> [B, 1, V]; [B, N, V] as it is."""
    return x if x.dim() == 3 else x[:, None]


def greedy(logits: Tensor) -> Tensor:
    """The highest logit's id along the last axis, the lowest id of equals, which both libraries promise."""
    if at_hand(logits) and logits.numel() >= NUMPY_PAYS:
        # There numpy's is ten times faster, twenty times in bfloat16.
        return torch.from_numpy(np.asarray(precise(logits).detach().numpy().argmax(-1)))
    return logits.argmax(dim=-1)


def falling(scores: Tensor) -> Tensor:
    """Sorted along the last axis, the highest first, NaN before them."""
    if at_hand(scores):  # likewise, and torch sorts several rows more slowly than one after another
        return torch.from_numpy(np.sort(scores.detach().numpy(), axis=-1)).flip(-1)
    return scores.sort(-1, descending=True).values


def draw(weights_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Draw one id per row from non-negative weights by inverting their cumulative sum: [B, V], [B] -> int64 [B].

    An id of weight 0 is never drawn, whatever the rounding: the sum does not rise there. And float64 below 1 is at most
    1 - 2^-53, whose product with the total is always rounded to less than the total, so that the search ends in time.
    """
    cumulative_BV = weights_BV.cumsum(-1, dtype=torch.float64)
    drawn_B1 = torch.searchsorted(cumulative_BV, uniform_B[:, None] * cumulative_BV[:, -1:], right=True)
    # NaN sorts behind everything; the index has to stay one, whoever checks for NaN.
    return drawn_B1[:, 0].clamp(max=weights_BV.shape[-1] - 1)


def seen_prefixes(seen_BV: Tensor, drafted_BC: Tensor) -> Tensor:
    """What has been seen before each scored position: bool [B, C + 1, V]; position i adds the first i drafted tokens."""
    B, C = drafted_BC.shape
    new_BNV = torch.zeros(B, C + 1, seen_BV.shape[-1], dtype=torch.int8, device=seen_BV.device)
    new_BNV[:, 1:].scatter_(-1, drafted_BC[..., None], 1)
    return new_BNV.cumsum(1).bool() | seen_BV[:, None]
