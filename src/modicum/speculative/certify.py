"""Whether speculative decoding does what it promises, measured on a user's own pair, settings and machine.

Four checks, all through the public call and its batches:

- greedy: the text is the target's own, token for token; where it is not, the plain run's best two logits were as good as
  equal, and kernels that score several tokens at once round otherwise;
- distribution: at sampled contexts, the first token of many rows, and the second behind the most frequent first ones, are
  distributed as the target says (chi-square);
- acceptance: the first drafted token of a row stays with probability 1 - TV(draft, target), the most that any rule
  allows (2302.01318, section 3);
- bits: with `bit_exact`, text and logits are the same to the last bit.

p-values are corrected for how many there are; a check fails below `ALPHA`, so a sound pair fails once in a thousand runs.
"""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from modicum.core.exact import exact_view
from modicum.decode.batch import Batch, Request
from modicum.decode.loop import open_cache
from modicum.decode.prompts import beginning, encode_prompts, reads_apart, vocabulary
from modicum.decode.sampling import Sampler, SamplingParams, precise
from modicum.errors import UsageError
from modicum.speculative.drafters.base import Drafter
from modicum.speculative.loop import SpeculativeEngine
from modicum.speculative.statistics import binomial_tail, chi_square, chi_square_tail, corrected

ALPHA = 1e-3
# How many tokens a context goes on behind its prompt, and how many are compared greedily.
CONTINUED, GREEDY_TOKENS = 24, 32
# Of the second token: behind this many of the most frequent first ones, if they came this often.
STRATA, LEAST_ROWS = 3, 100
# What rounding may do to a probability, relatively, and to the best two logits, against their scale. Low precision makes
# more of it, and a test with enough rows would notice nothing else.
ROUNDING = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5, torch.float64: 1e-5}
NEAR_TIE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4, torch.float64: 1e-4}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is certified: how text is sampled and drafted, and how much of it is looked at."""

    num_draft_tokens: int = 4
    verification: str = "token"
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    samples: int = 8000  # rows over all contexts
    contexts: int = 8
    texts: int = 100  # compared greedily

    @property
    def params(self) -> SamplingParams:
        names = "temperature", "top_k", "top_p", "min_p", "repetition_penalty"
        return SamplingParams(**{name: getattr(self, name) for name in names})

    @property
    def n_steps(self) -> int:
        """How often `certify` reports progress."""
        return 3 + self.contexts * (self.temperature > 0)


@dataclass
class Check:
    """One check's outcome. `passed` is None where there was nothing to check; `summary` says why, or the figures."""

    name: str
    passed: bool | None
    summary: str
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        return {True: "PASS", False: "FAIL", None: "-"}[self.passed]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


class Certifier:
    """Runs the checks. `generate` is `modicum.generate`, handed in because this room lies below it."""

    def __init__(
        self,
        generate: Callable[..., Any],
        target: Any,
        drafter: Drafter,
        prompts: list[Any],
        settings: Settings,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self.generate, self.target, self.drafter, self.settings, self.tick = generate, target, drafter, settings, tick
        self.prompts = [ids[: target.config.max_seq_len // 2] for ids in encode_prompts(target, prompts)]
        self.dtype = target.embed.weight.dtype if hasattr(target, "embed") else target.module.dtype

    def run(self) -> list[Check]:
        """All checks, in the order in which they are described above."""
        contexts = self.make_contexts(max(self.settings.texts, self.settings.contexts))
        self.tick()
        checks = [self.greedy(contexts[: self.settings.texts])]
        self.tick()
        if self.settings.temperature > 0:
            checks += self.sampled(contexts[: self.settings.contexts])
        checks.append(self.bits(contexts[: max(1, self.settings.texts // 10)]))
        self.tick()
        return checks

    def make_contexts(self, n: int) -> list[list[int]]:
        """Different places to write from: prompts, continued by the target for a while. Texts that are read: as given."""
        chosen = list(itertools.islice(itertools.cycle(self.prompts), n))
        if reads_apart(self.target):
            return chosen
        rng = random.Random(self.settings.seed)
        lengths = [rng.randint(1, CONTINUED) for _ in chosen]
        room = [
            max(1, min(n, self.target.config.max_seq_len - len(c) - 40)) for n, c in zip(lengths, chosen, strict=True)
        ]
        # Not with the seed that is certified: contexts and texts would share their numbers.
        seed = self.settings.seed + 1_000_003
        more = self.generate(self.target, chosen, max_new_tokens=room, temperature=1.0, ignore_eos=True, seed=seed)
        return [context + tokens for context, tokens in zip(chosen, more.tokens, strict=True)]

    @property
    def drafted(self) -> dict[str, Any]:
        s = self.settings
        return {"draft": self.drafter, "num_draft_tokens": s.num_draft_tokens, "verification": s.verification}

    def greedy(self, contexts: list[list[int]]) -> Check:
        """Greedy identity, with the gap between the best two logits where texts part."""
        penalty = self.settings.repetition_penalty
        call = {"max_new_tokens": GREEDY_TOKENS, "temperature": 0, "repetition_penalty": penalty, "ignore_eos": True}
        plain = self.generate(self.target, contexts, **call).tokens
        drafted = self.generate(self.target, contexts, **self.drafted, **call).tokens
        gaps = [
            self.gap(context, ours, theirs)
            for context, ours, theirs in zip(contexts, plain, drafted, strict=True)
            if ours != theirs
        ]
        allowed = NEAR_TIE[self.dtype]
        wrong = sum(gap > allowed for gap in gaps)
        summary = f"{len(contexts) - len(gaps)} of {len(contexts)} texts of {GREEDY_TOKENS} tokens are the target's own"
        if gaps:
            summary += (
                f"; {len(gaps) - wrong} part at a near-tie (top two logits within {allowed:g} of their scale, "
                f"widest {max(gaps):.2g}), {wrong} for no such reason"
            )
        figures = {"texts": len(contexts), "identical": len(contexts) - len(gaps), "unexplained": wrong, "gaps": gaps}
        return Check("greedy identity", wrong == 0, summary, figures)

    def gap(self, context: list[int], plain: list[int], drafted: list[int]) -> float:
        """How far the plain run's choice was ahead of the other, against the scale of its logits."""
        at = next(i for i, (a, b) in enumerate(zip(plain, drafted, strict=True)) if a != b)
        # Differences of log probabilities are those of logits, the penalty included.
        penalty = SamplingParams(repetition_penalty=self.settings.repetition_penalty)
        log_probs_V = self.probs(context, plain[:at], penalty).log()
        logits_V = self.logits(context, plain[:at])[-1]
        scale = logits_V[logits_V.isfinite()].abs().max()
        return float((log_probs_V.max() - log_probs_V[drafted[at]]) / scale)

    def sampled(self, contexts: list[list[int]]) -> list[Check]:
        """The distribution and the acceptance at each context, from the same rows."""
        accepted, impossible, tested = [], 0, []
        found: list[float | None] = []
        n = -(-self.settings.samples // len(contexts))
        for index, context in enumerate(contexts):
            tokens, kept = self.rows(context, n, 2 * index, self.settings.num_draft_tokens)
            p_first, outside = self.first_token(context, tokens)
            p_second = self.second_token(context, tokens)
            found += [p_first, p_second]
            impossible += outside
            tested.append({"rows": n, "p_first": p_first, "p_second": p_second})
            accepted.append(self.acceptance_at(context, n, index, kept))
            self.tick()
        p_values = [p for p in found if p is not None]
        worst = corrected(p_values)
        summary = f"{n * len(contexts)} rows at {len(contexts)} contexts: "
        summary += f"{len(p_values)} chi-square tests, least p {min(p_values, default=1.0):.2g}, corrected {worst:.2g}"
        if impossible:
            summary += f"; {impossible} tokens that the target makes impossible"
        figures = {"contexts": tested, "p_values": p_values, "p_corrected": worst, "impossible": impossible}
        checks = [Check("distribution", worst >= ALPHA and not impossible, summary, figures)]
        return [*checks, self.acceptance([a for a in accepted if a is not None])]

    def rows(self, context: list[int], n: int, stream: int, k: int) -> tuple[list[list[int]], int]:
        """Many continuations of one context, drafted k at a time, and how many kept their first drafted token."""
        s = self.settings
        firsts: dict[int, str] = {}
        call = {**asdict(s.params), **self.drafted, "num_draft_tokens": k, "max_new_tokens": k + 1, "ignore_eos": True}
        seeds = [(s.seed + 7919 * (stream + 1), row) for row in range(n)]
        out = self.generate(
            self.target,
            [context] * n,
            seed=seeds,
            on_token=lambda event: firsts.setdefault(event.row, event.source),
            **call,
        )
        return out.tokens, Counter(firsts.values())["draft"]

    def first_token(self, context: list[int], tokens: list[list[int]]) -> tuple[float | None, int]:
        """p of the first tokens' chi-square, and how many of them the filters exclude by more than rounding."""
        counts_V = self.counts(row[0] for row in tokens)
        possible_V = self.probs(context, [], loosened(self.settings.params)) > 0
        p = self.p_value([chi_square(counts_V, self.probs(context, []))], len(tokens))
        return p, int(counts_V[~possible_V].sum())

    def second_token(self, context: list[int], tokens: list[list[int]]) -> float | None:
        """p of the second tokens' chi-square, each against the target behind its first token."""
        found = []
        for first, times in Counter(row[0] for row in tokens if len(row) > 1).most_common(STRATA):
            if times >= LEAST_ROWS:
                counts_V = self.counts(row[1] for row in tokens if row[0] == first and len(row) > 1)
                found.append(chi_square(counts_V, self.probs(context, [first])))
        return self.p_value(found, len(tokens))

    def p_value(self, tests: list[tuple[float, int]], n: int) -> float | None:
        """The tail of independent chi-square statistics together; None if they have no degree of freedom."""
        statistic, freedom = sum(s for s, _ in tests), sum(f for _, f in tests)
        if not freedom:
            return None
        # Relative errors of the probabilities add n * error^2 to what is expected of the statistic (noncentrality).
        allowance = 1 + n * ROUNDING[self.dtype] ** 2 / freedom
        return chi_square_tail(statistic / allowance, freedom)

    def acceptance_at(self, context: list[int], n: int, index: int, kept: int) -> dict[str, Any] | None:
        """How often the first drafted token stayed, and how often it should; None without a proposal."""
        draft_probs_V = self.draft_probs(context)
        if draft_probs_V is None:
            return None
        if self.settings.verification != "token":
            # A block's first token stays for the sake of later ones too; alone it is a block by itself.
            _, kept = self.rows(context, n, 2 * index + 1, 1)
        theory = float(torch.minimum(draft_probs_V, self.probs(context, [])).sum())
        slack = ROUNDING[self.dtype]
        p = binomial_tail(kept, n, min(max(kept / n, theory - slack), theory + slack))
        return {"rows": n, "measured": kept / n, "theory": theory, "p": p}

    def acceptance(self, found: list[dict[str, Any]]) -> Check:
        """The first drafted token's acceptance against 1 - TV(draft, target)."""
        if not found:
            return Check("acceptance", None, "nothing was drafted at the contexts")
        worst = corrected([f["p"] for f in found])
        measured, theory = (sum(f[name] for f in found) / len(found) for name in ("measured", "theory"))
        widest = max(abs(f["measured"] - f["theory"]) for f in found)
        summary = (
            f"first drafted token: measured {measured:.3f}, 1 - TV {theory:.3f}, over {len(found)} contexts; "
            f"widest difference {widest:.3f}, corrected p {worst:.2g}"
        )
        return Check("acceptance", worst >= ALPHA, summary, {"contexts": found, "p_corrected": worst})

    def bits(self, contexts: list[list[int]]) -> Check:
        """Greedy text and logits under `bit_exact`, beside how many logits round by company without it."""
        call = {"max_new_tokens": GREEDY_TOKENS, "temperature": 0, "ignore_eos": True, "bit_exact": True}
        try:
            plain = self.generate(self.target, contexts, **call).tokens
            drafted = self.generate(self.target, contexts, **self.drafted, **call).tokens
            view = exact_view(self.target)
        except UsageError as refusal:
            return Check("bit-exact", None, str(refusal))
        same = sum(a == b for a, b in zip(plain, drafted, strict=True))
        text = plain[0]
        exact, usual = (self.differing(model, contexts[0], text) for model in (view, self.target))
        summary = (
            f"{same} of {len(contexts)} greedy texts identical; logits that change with company: "
            f"{exact} of {len(text)} with bit_exact, {usual} without"
        )
        figures = {"texts": len(contexts), "identical": same, "differing": exact, "differing_without": usual}
        return Check("bit-exact", same == len(contexts) and exact == 0, summary, figures)

    def differing(self, model: Any, context: list[int], text: list[int]) -> int:
        """How many tokens' logits have other bits when `text` is scored K + 1 tokens at a time than one at a time."""
        alone, together = (
            self.logits(context, text, model, width) for width in (1, self.settings.num_draft_tokens + 1)
        )
        return int((alone != together).any(-1).sum())

    @torch.inference_mode()
    def logits(self, context: list[int], text: list[int], model: Any = None, width: int = 0) -> Tensor:
        """The target's logits before each token of `text` and behind it, [len(text) + 1, V]; `width` tokens a call."""
        model = self.target if model is None else model
        prompt, source = beginning(model, context)
        ids = [*prompt, *text]
        ids_1L = torch.tensor([ids], device=model.device)
        cache = open_cache(model, [source] if source else [], ids_1L, [len(prompt) - 1], len(ids) + 1)
        at, rows = len(prompt) - 1, []
        for start in range(at, len(ids), width or len(ids)):
            end = min(start + (width or len(ids)), len(ids))
            rows.append(precise(model(ids_1L[:, start:end], cache=cache)[0, :, : vocabulary(model)]))
            cache.commit(end - start)
        return torch.cat(rows)

    def seen(self, context: list[int], text: list[int]) -> Tensor:
        """Which ids the repetition penalty counts, bool [V]."""
        prompt, _ = beginning(self.target, context)
        seen_V = torch.zeros(vocabulary(self.target), dtype=torch.bool, device=self.target.device)
        seen_V[torch.tensor([*prompt, *text], device=seen_V.device)] = True
        return seen_V

    def probs(self, context: list[int], text: list[int], params: SamplingParams | None = None) -> Tensor:
        """What the target draws from behind `context` and `text`, float32 [V], on the host."""
        logits_V = self.logits(context, text)[-1]
        sampler = Sampler([params or self.settings.params], logits_V.device)
        return sampler.probs(logits_V[None], self.seen(context, text)[None])[0].cpu()

    @torch.inference_mode()
    def draft_probs(self, context: list[int]) -> Tensor | None:
        """What the drafter draws its first token from behind a context, [V]; None if it proposes nothing."""
        k = self.settings.num_draft_tokens
        prompt, source = beginning(self.target, context)
        request = Request(
            index=0,
            prompt=prompt,
            source=source,
            key=0,
            params=self.settings.params,
            max_total=len(prompt) + k + 1,
            eos_ids=frozenset(),
        )
        batch = Batch([request], vocab_size=vocabulary(self.target), device=self.target.device)
        SpeculativeEngine(self.target, self.drafter, k).start(batch)
        draft = self.drafter.propose(batch, [k], batch.noise(k + 1))
        if not draft.counts[0]:
            return None
        if draft.probs_BCV is None:
            return torch.zeros(batch.vocab_size).index_fill_(0, draft.tokens_BC[0, :1].cpu(), 1.0)
        return draft.probs_BCV[0, 0].float().cpu()

    def counts(self, tokens: Iterator[int]) -> Tensor:
        return torch.bincount(torch.tensor(list(tokens)), minlength=vocabulary(self.target))


def loosened(params: SamplingParams) -> SamplingParams:
    """Filters that also keep what rounding may keep: a token excluded even so must never come."""
    return replace(
        params,
        top_k=None if params.top_k is None else params.top_k + 1 + params.top_k // 20,
        top_p=None if params.top_p is None else min(1.0, params.top_p * 1.03),
        min_p=None if params.min_p is None else params.min_p * 0.9,
    )
