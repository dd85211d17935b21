"""What a call to `generate` measured, per prompt and for the whole call."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class GenerationStats:
    """Counts and times. A batch's model call counts once for every row in it; reading the prompt is not counted.

    The prefill yields no token: the first loop already scores the prompt's last token together with the draft.

    `seconds_by_part` splits the time from the prefill to the end: "prefill" (reading the prompts), "draft" (proposing),
    "verify" (the target's call, judging, and the one transfer to the host) and "rest" (appending what was kept to tokens,
    text and caches); a call's also "calibrate" (measuring what K costs, the first time). `model_seconds` is what the loops
    spent within calls of a model, "target" or "draft", so that `non_model_share` is what the loop itself costs. On a GPU
    parts end where the device does, not where the host does.

    Where loops are CUDA graphs, drafting and verifying are one part: "loop". Beside it are "idle" (from the end of one loop
    to the beginning of the next on the device) and "capture" (the same, where the host recorded a graph in between).
    Nobody sees when a model is called there: `model_seconds` is empty, and there is no `non_model_share`.
    """

    tokens: int = 0
    target_calls: int = 0
    draft_calls: int = 0
    accepted_by_position: list[int] = field(default_factory=list)
    judged_by_position: list[int] = field(default_factory=list)
    loops_by_k: dict[int, int] = field(default_factory=dict)  # how often each K was chosen; empty where it is fixed
    seconds: float = 0.0
    seconds_by_part: dict[str, float] = field(default_factory=dict)
    model_seconds: dict[str, float] = field(default_factory=dict)
    seconds_per_token: list[float] = field(default_factory=list, repr=False)

    @property
    def accepted(self) -> int:
        return sum(self.accepted_by_position)

    @property
    def rejected(self) -> int:
        return sum(self.judged_by_position) - self.accepted

    @property
    def acceptance_rate(self) -> float | None:
        """accepted / (accepted + rejected): of the drafted tokens that were judged, how many stayed. None: none was."""
        judged = sum(self.judged_by_position)
        return self.accepted / judged if judged else None

    @property
    def acceptance_by_position(self) -> list[float | None]:
        """Acceptance at each draft position, given that all before it were accepted.

        Block verification accepts prefixes: of those that reached position i - 1, the share that reached i as well.
        """
        pairs = zip(self.accepted_by_position, self.judged_by_position, strict=True)
        return [accepted / judged if judged else None for accepted, judged in pairs]

    @property
    def mean_k(self) -> float | None:
        """Drafted tokens asked for per loop, where their number was chosen. None: it was not."""
        loops = sum(self.loops_by_k.values())
        return sum(k * n for k, n in self.loops_by_k.items()) / loops if loops else None

    @property
    def tokens_per_target_call(self) -> float | None:
        return self.tokens / self.target_calls if self.target_calls else None

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None

    @property
    def non_model_share(self) -> float | None:
        """Of the time in loops, the prefill left out, the share that was spent outside calls of target and draft."""
        before = ("prefill", "calibrate")
        loops = sum(seconds for part, seconds in self.seconds_by_part.items() if part not in before)
        return 1 - sum(self.model_seconds.values()) / loops if loops and self.model_seconds else None

    def record_loop(
        self, n_tokens: int, judged: int, accepted: int, draft_calls: int, seconds: float, k: int | None = None
    ) -> None:
        """One target call for this row, which yielded `n_tokens`, the first `accepted` of `judged` from the draft."""
        if k is not None:
            self.loops_by_k[k] = self.loops_by_k.get(k, 0) + 1
        self.tokens += n_tokens
        self.target_calls += 1
        self.draft_calls += draft_calls
        self._reach(judged)
        for position in range(judged):
            self.judged_by_position[position] += 1
            self.accepted_by_position[position] += position < accepted
        self.seconds_per_token += [seconds / n_tokens] * n_tokens

    def add(self, other: "GenerationStats") -> None:
        """Take in another row's counts and per-token times, but not its seconds: rows of a batch share the clock."""
        self.tokens += other.tokens
        self.target_calls += other.target_calls
        self.draft_calls += other.draft_calls
        self._reach(len(other.judged_by_position))
        for position, judged in enumerate(other.judged_by_position):
            self.judged_by_position[position] += judged
            self.accepted_by_position[position] += other.accepted_by_position[position]
        for k, loops in other.loops_by_k.items():
            self.loops_by_k[k] = self.loops_by_k.get(k, 0) + loops
        self.seconds_per_token += other.seconds_per_token

    def _reach(self, n_positions: int) -> None:
        missing = n_positions - len(self.judged_by_position)
        self.judged_by_position += [0] * missing
        self.accepted_by_position += [0] * missing

    def to_dict(self) -> dict[str, Any]:
        """Everything a program may want to read, as JSON types; times in seconds."""
        return {
            "tokens": self.tokens,
            "target_calls": self.target_calls,
            "draft_calls": self.draft_calls,
            "accepted": self.accepted,
            "rejected": self.rejected,
            "acceptance_rate": self.acceptance_rate,
            "acceptance_by_position": self.acceptance_by_position,
            "tokens_per_target_call": self.tokens_per_target_call,
            "mean_k": self.mean_k,
            "loops_by_k": {str(k): self.loops_by_k[k] for k in sorted(self.loops_by_k)},
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "seconds_by_part": self.seconds_by_part,
            "model_seconds": self.model_seconds,
            "non_model_share": self.non_model_share,
            "seconds_per_token": percentiles(self.seconds_per_token),
        }


def add_seconds(total: dict[str, float], spent: dict[str, float]) -> None:
    """Add times by part to a running total; a part that only one of them has is kept."""
    for part, seconds in spent.items():
        total[part] = total.get(part, 0.0) + seconds


def percentiles(values: Iterable[float]) -> dict[str, float]:
    """Mean and nearest-rank P50, P90 and P99; empty for no values."""
    ordered = sorted(values)
    if not ordered:
        return {}
    rank = {name: ordered[min(len(ordered) - 1, len(ordered) * share // 100)] for name, share in PERCENTILES}
    return {"mean": sum(ordered) / len(ordered), **rank}


PERCENTILES = (("p50", 50), ("p90", 90), ("p99", 99))
