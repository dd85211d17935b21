"""modicum against `transformers`, side by side in one process: plain and speculative decoding, greedy, batch 1.

    python benchmarks/text_cpu.py                                  the reference pair that ships with modicum
    python benchmarks/text_cpu.py --target FOLDER --draft FOLDER   another pair
    python benchmarks/text_cpu.py --large                          a random Llama of 0.2B with its n-gram drafter: cost only

Every round runs each system once, in an order that rotates, so that a slow minute of the machine meets all of them.
Reported are medians over the rounds and ratios of medians. Nothing else should run meanwhile.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import modicum
from modicum import resources
from modicum.config import DecoderConfig, RopeConfig
from modicum.decode.stats import GenerationStats
from modicum.lm.decoder import Decoder
from modicum.report.machine import machine

os.environ.setdefault("HF_HUB_OFFLINE", "1")

LARGE = DecoderConfig(
    family="llama",
    vocab_size=32_000,
    dim=1024,
    n_layers=11,
    n_heads=16,
    n_kv_heads=16,
    head_dim=64,
    ffn_dim=2816,
    max_seq_len=2048,
    rope=RopeConfig(rotary_dim=64),
    tie_embeddings=False,
    dtype="bfloat16",
)

PROMPT = '''class Stack:
    """A last-in, first-out collection."""

    def __init__(self):
        self.items = []

    def push(self, item):
'''


def make_large(folder: Path) -> None:
    torch.manual_seed(0)
    model = Decoder(LARGE)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.02)
    modicum.save(model.to(torch.bfloat16), folder)


def systems(target: str, draft: str | None, k: int, n_tokens: int, dtype: str) -> dict[str, Callable[[], object]]:
    """One callable per system that generates `n_tokens` greedily from the same prompt."""
    from transformers import AutoModelForCausalLM

    ours = modicum.load(target, dtype=dtype)
    path = str(resources.model_presets().get(target, target))
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    prompt = ours.tokenizer.encode(PROMPT) if ours.tokenizer else list(range(100, 140)) * 2
    ids = torch.tensor([prompt])
    exact = {"max_new_tokens": n_tokens, "temperature": 0, "ignore_eos": True}
    hf = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens, "do_sample": False, "pad_token_id": 0}
    runs: dict[str, Callable[[], object]] = {
        "modicum plain": lambda: modicum.generate(ours, [prompt], **exact),
        "transformers plain": lambda: theirs.generate(ids, attention_mask=torch.ones_like(ids), **hf),
    }
    if draft:
        our_draft = modicum.load(draft, dtype=dtype)
        their_draft = AutoModelForCausalLM.from_pretrained(
            str(resources.model_presets().get(draft, draft)), dtype=dtype
        ).eval()
        their_draft.generation_config.num_assistant_tokens = k
        their_draft.generation_config.num_assistant_tokens_schedule = "constant"
        their_draft.generation_config.assistant_confidence_threshold = 0.0
        runs[f"modicum speculative K={k}"] = lambda: modicum.generate(
            ours, [prompt], draft=our_draft, num_draft_tokens=k, **exact
        )
        runs[f"transformers assisted K={k}"] = lambda: theirs.generate(
            ids, attention_mask=torch.ones_like(ids), assistant_model=their_draft, **hf
        )
    runs[f"modicum ngram K={k}"] = lambda: modicum.generate(ours, [prompt], draft="ngram", num_draft_tokens=k, **exact)
    runs[f"transformers prompt lookup K={k}"] = lambda: theirs.generate(
        ids, attention_mask=torch.ones_like(ids), prompt_lookup_num_tokens=k, **hf
    )
    return runs


def measure(runs: dict[str, Callable[[], object]], n_tokens: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds per token of every system in every round."""
    for run in runs.values():
        run()
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.perf_counter()
            runs[name]()
            times[name].append((time.perf_counter() - began) / n_tokens * 1e3)
    return times


def bandwidth() -> float:
    """Bytes per second that all threads read: best of 5 passes over 1 GB."""
    data = torch.ones(1 << 28, dtype=torch.float32)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - began)
    return data.nbytes / best


def report(runs: dict[str, Callable[[], object]], times: dict[str, list[float]]) -> None:
    plain = statistics.median(times["transformers plain"])
    print(f"{'system':<32} {'ms/token':>9} {'min':>7} {'max':>7} {'x transformers plain':>21}")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:<32} {median:9.3f} {min(values):7.3f} {max(values):7.3f} {plain / median:21.2f}")
    for name, run in runs.items():
        if name.startswith("modicum"):
            stats = run().stats  # type: ignore[attr-defined]
            parts = {part: f"{seconds / stats.seconds:.1%}" for part, seconds in stats.seconds_by_part.items()}
            shares = json.dumps(parts)
            print(f"{name}: {stats.tokens_per_target_call:.2f} tokens per target call, share of the time: {shares}")


def efficiency(model: Decoder, stats: GenerationStats, ms_per_token: float, speed: float) -> float:
    """eta of plain or n-gram decoding: measured tokens/s over the bandwidth's limit, weights read once per call."""
    n_bytes = sum(p.numel() for name, p in model.dense_state().items() if name != "embed.weight")
    n_bytes *= model.embed.weight.element_size()
    return n_bytes / speed / stats.tokens_per_target_call / (ms_per_token / 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="modicum-code-target")
    parser.add_argument("--draft", default="modicum-code-draft")
    parser.add_argument("--large", action="store_true", help="the random 0.2B model instead of a pair")
    parser.add_argument("-k", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        if options.large:
            make_large(Path(folder) / "large")
            options.target, options.draft = str(Path(folder) / "large"), None
        runs = systems(options.target, options.draft, options.k, options.tokens, options.dtype)
        times = measure(runs, options.tokens, options.rounds)
        report(runs, times)
        if options.large:
            speed = bandwidth()
            model = modicum.load(options.target)
            for name in ("modicum plain", f"modicum ngram K={options.k}"):
                stats = runs[name]().stats  # type: ignore[attr-defined]
                eta = efficiency(model, stats, statistics.median(times[name]), speed)
                print(f"{name}: eta {eta:.2f} of one read of the weights per call at {speed / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
