"""modicum against `transformers`, side by side in one process, plain and speculative; and against the machine's limits.

    python benchmarks/text_cpu.py                                  the reference pair that ships with modicum
    python benchmarks/text_cpu.py --target FOLDER --draft FOLDER   another pair
    python benchmarks/text_cpu.py --large                          a random Llama of 0.2B: cost only, and how near its limits
    python benchmarks/text_cpu.py --auto                           K chosen by cost, over code, prose and random tokens
    python benchmarks/text_cpu.py --batches                        8 prompts at once against one

Every round runs each system once, in an order that rotates, so that a slow minute of the machine meets all of them.
Reported are medians over the rounds and ratios of medians. Nothing else should run meanwhile.

eta is measured tokens per second, prompt reading apart, over the limit: one read of the weights per call, at the bandwidth
that this machine is seen to have, and the same tokens per call. The random model's drafts are synthetic: its own greedy
text, every token wrong with a given probability, at no cost.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import modicum
from modicum import resources
from modicum.config import DecoderConfig, RopeConfig
from modicum.decode.batch import Batch
from modicum.lm.decoder import Decoder
from modicum.report.machine import machine
from modicum.speculative.drafters.base import Draft

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
    # An end of text is an ordinary token for both, so that all write the same text.
    theirs.generation_config.eos_token_id = None
    hf = {"max_new_tokens": n_tokens, "do_sample": False, "pad_token_id": 0}
    runs: dict[str, Callable[[], object]] = {
        "modicum plain": lambda: modicum.generate(ours, [prompt], **exact),
        "transformers plain": lambda: theirs.generate(ids, attention_mask=torch.ones_like(ids), **hf),
    }
    if draft:
        our_draft = modicum.load(draft, dtype=dtype)
        their_draft = AutoModelForCausalLM.from_pretrained(
            str(resources.model_presets().get(draft, draft)), dtype=dtype
        ).eval()
        their_draft.generation_config.eos_token_id = None
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


class SyntheticDrafter:
    """Proposes each row's known continuation, every token wrong with probability 1 - `acceptance`."""

    max_rows: int | None = None

    def __init__(self, texts: list[list[int]], acceptance: float) -> None:
        self.texts, self.acceptance = texts, acceptance

    def check(self, target: Any) -> None:
        """It knows what comes, whatever the target."""

    def start(self, batch: Batch, capacity: int) -> None:
        self.coins = torch.Generator().manual_seed(0)

    def propose(self, batch: Batch, allowed: list[int], noise_BNP: Any) -> Draft:
        width = max(allowed)
        right = (torch.rand(len(allowed), width, generator=self.coins) < self.acceptance).tolist()
        proposed = []
        for row, keeps in zip(batch.rows, right, strict=True):
            ahead = self.texts[row.request.index][len(row.tokens) :][:width]
            ahead += [0] * (width - len(ahead))
            proposed.append([token if keep else (token + 1) % 1000 for token, keep in zip(ahead, keeps, strict=True)])
        tokens_BC = torch.tensor(proposed, dtype=torch.int64).view(len(allowed), width)
        return Draft(tokens_BC, None, list(allowed), 0)

    def keep(self, rows: list[int], lengths: list[int]) -> None:
        """Rows are found by their index."""


def bytes_per_call(model: Decoder) -> int:
    """What a call reads of the weights: all but the table of embeddings."""
    state = {name: p for name, p in model.dense_state().items() if name != "embed.weight"}
    return sum(p.numel() * p.element_size() for p in state.values())


def decoding_seconds(stats: Any) -> float:
    return stats.seconds - stats.seconds_by_part["prefill"]


def rows_of_a_call(model: Decoder, counts: list[int], rounds: int) -> dict[int, float]:
    """Milliseconds of one call with so many tokens behind a text of 100, in turns."""
    times: dict[int, list[float]] = {count: [] for count in counts}
    with torch.inference_mode():
        cache = model.new_cache(1, 100 + max(counts))
        model(torch.arange(100)[None], cache=cache)
        cache.commit(100, [100])
        for turn in range(20 * rounds):
            for count in counts:
                ids = torch.arange(count)[None]
                began = time.perf_counter()
                model(ids, cache=cache)
                if turn:
                    times[count].append((time.perf_counter() - began) * 1e3)
    return {count: statistics.median(values) for count, values in times.items()}


def limits(options: argparse.Namespace) -> None:
    """The random model: rows of a call, plain decoding and synthetic drafts against the bandwidth's limit."""
    model = modicum.load(options.target, dtype=options.dtype).for_inference()
    counts = [1, 2, 3, 5, 9, 17]
    cost = rows_of_a_call(model, counts, options.rounds)
    shown = "  ".join(f"{count}: {cost[count]:.2f} ms ({cost[count] / cost[1]:.2f})" for count in counts)
    print(f"rows of a call, and times one row's: {shown}")
    speed = bandwidth()
    bound = bytes_per_call(model) / speed
    print(
        f"a call reads {bytes_per_call(model) / 1e6:.0f} MB; at {speed / 1e9:.1f} GB/s that takes {bound * 1e3:.2f} ms"
    )
    prompt = list(range(100, 140)) * 2
    exact = {"max_new_tokens": options.tokens, "temperature": 0, "ignore_eos": True}
    text = prompt + modicum.generate(model, [prompt], **exact).tokens[0]
    systems: dict[str, dict[str, Any]] = {"plain": {}}
    for acceptance in (0.6, 0.75, 0.9):
        drafter = SyntheticDrafter([text], acceptance)
        for k in (options.k, 2 * options.k):
            systems[f"synthetic {acceptance}, K={k}"] = {"draft": drafter, "num_draft_tokens": k}
    found: dict[str, list[Any]] = {name: [] for name in systems}
    for _ in range(options.rounds):
        for name, settings in systems.items():
            found[name].append(modicum.generate(model, [prompt], **settings, **exact).stats)
    plain = statistics.median(decoding_seconds(stats) for stats in found["plain"])
    print(f"{'':<24} {'ms/token':>9} {'x plain':>8} {'tokens/call':>12} {'eta':>6} {'besides models':>15}")
    for name, runs in found.items():
        seconds = statistics.median(map(decoding_seconds, runs))
        calls = runs[0].target_calls
        share = statistics.median(stats.non_model_share for stats in runs)
        print(
            f"{name:<24} {seconds / options.tokens * 1e3:9.2f} {plain / seconds:8.2f} {options.tokens / calls:12.2f} "
            f"{bound * calls / seconds:6.2f} {share:15.1%}"
        )


PROSE = """The river had been falling for a week, and the boats that had come up with the flood lay tilted on the mud below
the town. Nobody spoke of moving them. In the mornings"""


def chosen(options: argparse.Namespace) -> None:
    """K chosen by cost against plain and the given K, text by text: `auto` should nowhere be slower than plain."""
    target = modicum.load(options.target, dtype=options.dtype)
    drafts = {"draft": modicum.load(options.draft, dtype=options.dtype), "ngram": "ngram"}
    random = torch.randint(target.config.vocab_size, (80,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = {"code": target.tokenizer.encode(PROMPT), "prose": target.tokenizer.encode(PROSE), "random": random}
    print(f"{'':<34} {'ms/token':>9} {'x plain':>8} {'mean K':>7}")
    for temperature in (0.0, 1.0):
        for kind, prompt in prompts.items():
            runs: dict[str, Callable[[], Any]] = {}
            exact = {"max_new_tokens": options.tokens, "temperature": temperature, "ignore_eos": True, "seed": 0}
            for name in (None, *drafts):
                for k in (options.k,) if name is None else (options.k, "auto"):
                    drafting = {} if name is None else {"draft": drafts[name], "num_draft_tokens": k}
                    label = "plain" if name is None else f"{name} K={k}"

                    def run(prompt: Any = prompt, settings: Any = exact | drafting) -> Any:
                        return modicum.generate(target, [prompt], **settings)

                    runs[label] = run
            times = measure(runs, options.tokens, options.rounds)
            plain = statistics.median(times["plain"])
            for label, values in times.items():
                median, stats = statistics.median(values), runs[label]().stats
                drafted = (stats.accepted + stats.rejected) / stats.target_calls
                case = f"{kind}, T {temperature:g}, {label}"
                print(f"{case:<34} {median:9.3f} {plain / median:8.2f} {drafted:7.2f}")


def batches(options: argparse.Namespace) -> None:
    """Tokens per second of one prompt and of eight, plain and with a draft."""
    target, draft = (modicum.load(name, dtype=options.dtype) for name in (options.target, options.draft))
    text = target.tokenizer.encode(PROMPT)
    prompts = [text[: len(text) - shift] for shift in range(8)]
    exact = {"max_new_tokens": options.tokens, "temperature": 0, "ignore_eos": True}
    runs: dict[str, Callable[[], Any]] = {}
    for count in (1, 8):
        own = prompts[:count]
        runs[f"plain, batch {count}"] = lambda own=own: modicum.generate(target, own, **exact)
        runs[f"K={options.k}, batch {count}"] = lambda own=own: modicum.generate(
            target, own, draft=draft, num_draft_tokens=options.k, **exact
        )
    times = measure(runs, options.tokens, options.rounds)
    print(f"{'':<20} {'tokens/s':>9} {'x batch 1':>10}")
    for name in times:
        kind, _, count = name.rpartition(" ")
        rate, single = (int(n) / statistics.median(times[f"{kind} {n}"]) * 1e3 for n in (count, "1"))
        print(f"{name:<20} {rate:9.0f} {rate / single:10.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="modicum-code-target")
    parser.add_argument("--draft", default="modicum-code-draft")
    parser.add_argument("--large", action="store_true", help="the random 0.2B model instead of a pair")
    parser.add_argument("--auto", action="store_true", help="K chosen by cost")
    parser.add_argument("--batches", action="store_true", help="8 prompts at once")
    parser.add_argument("-k", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    print(machine())
    if options.auto or options.batches:
        (chosen if options.auto else batches)(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.large:
            make_large(Path(folder) / "large")
            options.target, options.draft = str(Path(folder) / "large"), None
        runs = systems(options.target, options.draft, options.k, options.tokens, options.dtype)
        report(runs, measure(runs, options.tokens, options.rounds))
        if options.large:
            limits(options)


if __name__ == "__main__":
    main()
