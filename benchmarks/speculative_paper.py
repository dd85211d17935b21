"""The paper's Table 1 and Figure 1 (2302.01318) on a pair of models: speed and quality of plain and speculative sampling.

    python benchmarks/speculative_paper.py [--target FOLDER --draft FOLDER] [--out docs/speculative-paper.md]

Three settings, the paper's: nucleus 0.8, greedy, and temperature 0.8 with nucleus 0.95; K from 0 (plain) to 7. Prompts are
the first lines, about 100 tokens, of Python files that the target's training.json names as held out, each continued by
exactly --tokens. They run one at a time, K by K in turns, so that a slow moment of the machine meets every K. Beside each
speed-up stands quality: the share of texts whose whole lines Python can parse, and the mean log-probability of a token under
the target. Speculation changes neither but by chance: plain and speculative are different samples of one distribution.
"""

import argparse
import codeop
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import modicum
from modicum import resources
from modicum.report.figures import load_pyplot, write_png
from modicum.report.machine import machine
from modicum.train.text import held_out_texts

SETTINGS: dict[str, dict[str, float]] = {
    "nucleus 0.8": {"temperature": 1.0, "top_p": 0.8},
    "greedy": {"temperature": 0.0},
    "T 0.8, nucleus 0.95": {"temperature": 0.8, "top_p": 0.95},
}
PAPER = {"nucleus 0.8": 1.92, "greedy": 2.01, "T 0.8, nucleus 0.95": 2.46}
PROMPT_TOKENS = 100


@dataclass
class Runs:
    """Everything measured of one setting and K."""

    seconds: list[float] = field(default_factory=list)  # of a text, prefill included
    stats: list[Any] = field(default_factory=list)
    parsed: list[bool] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)  # of a text's tokens, mean

    @property
    def ms_per_token(self) -> list[float]:
        return [1e3 * seconds / stats.tokens for seconds, stats in zip(self.seconds, self.stats, strict=True)]

    @property
    def loops(self) -> int:
        return sum(stats.target_calls for stats in self.stats)

    @property
    def tokens_per_loop(self) -> float:
        return sum(stats.tokens for stats in self.stats) / self.loops

    @property
    def ms_per_loop(self) -> float:
        return 1e3 * sum(self.seconds) / self.loops

    def percentile(self, share: float) -> float:
        return quantile(self.ms_per_token, share)


def quantile(values: list[float], share: float) -> float:
    """Nearest rank."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def parses(text: str) -> bool:
    """Whether the whole lines of `text` are Python that may go on; an open bracket is only unfinished."""
    whole = text[: text.rfind("\n") + 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an odd escape in a string is no failure
        try:
            codeop.compile_command(whole, symbol="exec")
        except (SyntaxError, ValueError, OverflowError):
            return False
    return True


def whole_lines(model: Any, text: str, n_tokens: int) -> list[int] | None:
    """The first lines of a file that have at least `n_tokens` tokens; None if that is all of it, or twice as many."""
    lines = text.splitlines(keepends=True)
    for end in range(1, len(lines)):
        ids = model.tokenizer.encode("".join(lines[:end]))
        if len(ids) >= n_tokens:
            return ids if len(ids) <= 2 * n_tokens else None
    return None


def mean_log_prob(target: Any, prompt: list[int], tokens: list[int]) -> float:
    """Of the tokens of a text under the target's own distribution, temperature 1, nothing filtered."""
    ids = torch.tensor([prompt + tokens], device=target.device)
    with torch.inference_mode():
        log_probs = target(ids)[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return log_probs.gather(-1, ids[0, len(prompt) :, None]).mean().item()


def measure(
    target: Any, draft: Any, prompts: list[list[int]], ks: list[int], n_tokens: int
) -> dict[str, dict[int, Runs]]:
    """Every setting, K and prompt once."""
    found = {name: {k: Runs() for k in ks} for name in SETTINGS}
    for index, (name, settings, prompt, k) in enumerate(turns(prompts, ks)):
        speculative = {"draft": draft, "num_draft_tokens": k} if k else {}
        options = {"max_new_tokens": n_tokens, "ignore_eos": True, "seed": index, **settings, **speculative}
        began = time.perf_counter()
        out = modicum.generate(target, [prompt], **options)
        runs = found[name][k]
        runs.seconds.append(time.perf_counter() - began)
        runs.stats.append(out.stats)
        runs.parsed.append(parses(target.tokenizer.decode(prompt) + out.texts[0]))
        runs.log_probs.append(mean_log_prob(target, prompt, out.tokens[0]))
    return found


def turns(prompts: list[list[int]], ks: list[int]) -> Iterator[tuple[str, dict[str, float], list[int], int]]:
    from rich.console import Console
    from rich.progress import track

    every = [(name, kind, prompt, k) for prompt in prompts for name, kind in SETTINGS.items() for k in ks]
    yield from track(every, "measuring", console=Console(stderr=True))


def best_k(runs: dict[int, Runs]) -> int:
    return min((k for k in runs if k), key=lambda k: statistics.mean(runs[k].ms_per_token))


def table_1(found: dict[str, dict[int, Runs]], k: int) -> list[str]:
    """The paper's columns, and the spread that it describes in words."""
    lines = [
        f"## Table 1: plain, K = {k}, and the best K of each setting",
        "",
        "| setting | method | ms/token | sd | P90 | P99 | speed-up | paper | parse | mean log-probability |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, runs in found.items():
        plain = statistics.mean(runs[0].ms_per_token)
        for shown in dict.fromkeys((0, k, best_k(runs))):
            own = runs[shown]
            mean = statistics.mean(own.ms_per_token)
            log_prob, error = statistics.mean(own.log_probs), standard_error(own.log_probs)
            paper = f"{PAPER[name]:.2f}" if shown == k else ""
            lines.append(
                f"| {name} | {f'speculative, K = {shown}' if shown else 'plain'} | {mean:.2f} "
                f"| {statistics.stdev(own.ms_per_token):.2f} | {own.percentile(0.9):.2f} | {own.percentile(0.99):.2f} "
                f"| {plain / mean:.2f} | {paper} | {statistics.mean(own.parsed):.0%} | {log_prob:.3f} ± {error:.3f} |"
            )
    return [*lines, ""]


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5


def figure_1(found: dict[str, dict[int, Runs]]) -> list[str]:
    """The numbers behind the figure."""
    lines = ["## Figure 1: over K", ""]
    for name, runs in found.items():
        lines += [
            f"### {name}",
            "",
            "| K | ms/token | sd | x plain | accepted | tokens per loop | tokens per loop / (K + 1) | ms per loop |",
            "|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        plain = statistics.mean(runs[0].ms_per_token)
        for k, own in runs.items():
            mean = statistics.mean(own.ms_per_token)
            accepted = sum(stats.accepted for stats in own.stats)
            judged = accepted + sum(stats.rejected for stats in own.stats)
            lines.append(
                f"| {k} | {mean:.2f} | {statistics.stdev(own.ms_per_token):.2f} | {plain / mean:.2f} "
                f"| {f'{accepted / judged:.0%}' if judged else '-'} | {own.tokens_per_loop:.2f} "
                f"| {own.tokens_per_loop / (k + 1):.2f} | {own.ms_per_loop:.2f} |"
            )
        lines.append("")
    return lines


def draw(found: dict[str, dict[int, Runs]], n_tokens: int, path: Path) -> None:
    """Figure 1's three panels, a line per setting. Writes a PNG."""
    figure, (times, shares, loops) = load_pyplot().subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name, runs in found.items():
        ks = list(runs)
        seconds = [[ms * n_tokens / 1e3 for ms in own.ms_per_token] for own in runs.values()]
        times.errorbar(
            ks,
            list(map(statistics.mean, seconds)),
            list(map(statistics.stdev, seconds)),
            marker="o",
            capsize=3,
            label=name,
        )
        shares.plot(ks[1:], [runs[k].tokens_per_loop / (k + 1) for k in ks[1:]], marker="o", label=name)
        loops.plot(ks, [own.ms_per_loop for own in runs.values()], marker="o", label=name)
    for axis, label in (
        (times, f"seconds for {n_tokens} tokens, with standard deviation"),
        (shares, "tokens per loop / (K + 1)"),
        (loops, "milliseconds per loop"),
    ):
        axis.set_ylabel(label)
        axis.set_xlabel("drafted tokens K")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    write_png(figure, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="modicum-code-target")
    parser.add_argument("--draft", default="modicum-code-draft")
    parser.add_argument("-k", type=int, default=4, help="the K of Table 1")
    parser.add_argument("--max-k", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, help="a Markdown file instead of stdout; the figure goes beside it")
    options = parser.parse_args(arguments)
    load_pyplot()  # a missing matplotlib is refused now, not after minutes of measuring
    target, draft = (modicum.load(name, dtype=options.dtype) for name in (options.target, options.draft))
    texts = held_out_texts(Path(resources.model_presets().get(options.target, options.target)))
    prompts = [prompt for text in texts if (prompt := whole_lines(target, text, PROMPT_TOKENS))]
    prompts = prompts[: options.prompts]
    modicum.generate(target, prompts[:1], draft=draft, max_new_tokens=8)  # packed and warm before anything counts
    found = measure(target, draft, prompts, list(range(options.max_k + 1)), options.tokens)
    command = shlex.join(
        ["python", "benchmarks/speculative_paper.py", *(sys.argv[1:] if arguments is None else arguments)]
    )
    lines = [
        "# Speculative sampling's Table 1 and Figure 1, here",
        "",
        f"{machine()}; {options.target} with {options.draft}, {options.dtype}, batch 1; {len(prompts)} held-out prompts, "
        f"{options.tokens} tokens each. `{command}`",
        "",
        "The paper's speed-ups are those of Chinchilla 70B with a draft of 4B on 16 TPU v4, and its quality is ROUGE-2 and",
        "HumanEval. Here it is the share of texts that parse, and a token's mean log-probability under the target, with its",
        "standard error.",
        "",
        *table_1(found, options.k),
        *figure_1(found),
    ]
    if options.out is None:
        print("\n".join(lines))
        return
    picture = options.out.with_suffix(".png")
    draw(found, options.tokens, picture)
    options.out.write_text("\n".join([*lines, f"![Figure 1]({picture.name})", ""]))


if __name__ == "__main__":
    main()
