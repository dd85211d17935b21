"""Every kind of drafter on held-out text: how many tokens the target accepts at each place, and what that is worth in time.

    python benchmarks/drafters.py modicum-code-target --draft modicum-code-draft ngram self:2 runs/draft-heads/model
    python benchmarks/drafters.py TARGET --draft SMALL-MODEL ngram --data held-out.txt --temperature 0 0.8

Without --data the texts are the files that the target's training.json names as held out, from the running Python's library.
Prompts are pieces of the texts, and run one at a time in float32; every round asks each drafter once, in an order that
rotates, so that a slow minute of the machine meets all of them. Reported are medians over the rounds. A drafter loses to
whatever writes more tokens per second without it: plain decoding, a small model, or the n-gram drafter.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import modicum
from modicum import resources
from modicum.decode.stats import GenerationStats
from modicum.errors import ModicumError
from modicum.report.machine import machine
from modicum.speculative.drafters.make import is_named_drafter
from modicum.speculative.drafters.trained import TrainedDrafter
from modicum.train.text import held_out_texts

PROMPT_TOKENS = 100
# Where in a text a prompt begins: behind what every file begins with.
SKIPPED_TOKENS = 100


def texts_of(target: str, data: list[Path]) -> list[str]:
    """The texts to draft on, none of which the target has seen."""
    if data:
        return [path.read_text(encoding="utf-8") for path in data]
    folder = Path(resources.model_presets().get(target, target))
    if not (folder / "training.json").is_file():
        raise SystemExit(f"{target} has no training.json that names held-out files: give texts with --data")
    return held_out_texts(folder)


def pieces(model: Any, texts: list[str], n_prompts: int) -> list[list[int]]:
    """Up to so many prompts of equal length, one from each text while there are enough."""
    found: list[list[int]] = []
    encoded = [model.tokenizer.encode(text) for text in texts]
    for start in range(SKIPPED_TOKENS, max(map(len, encoded)), 4 * PROMPT_TOKENS):
        found += [ids[start : start + PROMPT_TOKENS] for ids in encoded if len(ids) >= start + PROMPT_TOKENS]
        if len(found) >= n_prompts:
            break
    if not found:
        raise SystemExit(f"no text has {SKIPPED_TOKENS + PROMPT_TOKENS} tokens: give longer ones with --data")
    return found[:n_prompts]


def kind_of(name: str, draft: Any) -> str:
    """What a drafter is, for the table."""
    if isinstance(draft, str):
        return "early exit" if draft.startswith("self:") else "n-gram"
    return draft.config.kind if isinstance(draft, TrainedDrafter) else "small model"


def measure(
    target: Any, drafts: dict[str, Any], prompts: list[list[int]], options: argparse.Namespace, temperature: float
) -> dict[str, list[GenerationStats]]:
    """By drafter, the figures of every round."""
    rounds: dict[str, list[GenerationStats]] = {name: [] for name in drafts}
    names = list(drafts)
    for turn in range(-1, options.rounds):  # the first packs weights and warms up, and is not counted
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            speculative = {} if drafts[name] is None else {"draft": drafts[name], "num_draft_tokens": options.k}
            total = GenerationStats()
            for prompt in prompts if turn >= 0 else prompts[:1]:
                stats = modicum.generate(
                    target,
                    [prompt],
                    max_new_tokens=options.tokens,
                    temperature=temperature,
                    seed=0,
                    ignore_eos=True,
                    **speculative,
                ).stats
                total.add(stats)
                total.seconds += stats.seconds
            if turn >= 0:
                rounds[name].append(total)
    return rounds


def table(rounds: dict[str, list[GenerationStats]], drafts: dict[str, Any]) -> list[str]:
    """A Markdown table, the fastest first; every drafter is told what it loses to."""
    speeds = {name: statistics.median(s.tokens_per_second or 0.0 for s in runs) for name, runs in rounds.items()}
    kinds = {name: "plain" if draft is None else kind_of(name, draft) for name, draft in drafts.items()}
    rows = [
        "| drafter | kind | accepted | by place | tokens per target call | tokens/s | against plain | verdict |",
        "|---|---|---:|---|---:|---:|---:|---|",
    ]
    for name in sorted(speeds, key=lambda name: -speeds[name]):
        stats, kind = rounds[name][0], kinds[name]
        lost = [
            rival
            for rival in ("plain", "small model", "n-gram")
            if rival != kind and max((speeds[n] for n in speeds if kinds[n] == rival), default=0.0) > speeds[name]
        ]
        verdict = "" if kind == "plain" else f"loses to {', '.join(lost)}" if lost else "wins"
        places = " ".join("-" if share is None else f"{share:.2f}" for share in stats.acceptance_by_position)
        rate = "" if stats.acceptance_rate is None else f"{stats.acceptance_rate:.2f}"
        rows.append(
            f"| {name} | {kind} | {rate} | {places} | {stats.tokens_per_target_call or 0:.2f} | {speeds[name]:.0f} "
            f"| {speeds[name] / speeds['plain']:.2f} | {verdict} |"
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--draft", nargs="+", default=["modicum-code-draft", "ngram", "self:2"])
    parser.add_argument("--data", nargs="+", type=Path, default=[])
    parser.add_argument("-k", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--temperature", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    load = {"dtype": options.dtype, "device": options.device}
    try:
        target = modicum.load(options.target, **load)
        drafts: dict[str, Any] = {"plain": None}
        for name in options.draft:
            drafts[name] = name if is_named_drafter(name) else modicum.load(name, **load)
        prompts = pieces(target, texts_of(options.target, options.data), options.prompts)
        print(f"{machine(target.device.type)}, {options.dtype}")
        print(f"{options.target}, {len(prompts)} prompts, {options.tokens} tokens each, K = {options.k}\n")
        for temperature in options.temperature:
            print(f"Temperature {temperature:g}:\n")
            print("\n".join(table(measure(target, drafts, prompts, options, temperature), drafts)) + "\n")
    except ModicumError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
