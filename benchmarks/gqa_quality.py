"""What fewer key-value heads cost, before and after uptraining, against controls (2305.13245, figures 3 to 5, and beyond).

    python benchmarks/gqa_quality.py jump MODEL       no training: the loss jump of every conversion, what it removes
    python benchmarks/gqa_quality.py uptrain MODEL    conversions x teacher x fractions of the original tokens, control
    python benchmarks/gqa_quality.py scratch MODEL    grouped from the first step: the same recipe with fewer heads
    python benchmarks/gqa_quality.py spikes MODEL     multi-query at the original peak rate: spikes and divergences, counted
    python benchmarks/gqa_quality.py table            everything measured so far, as Markdown

Each result is a line of --results as soon as it is there, and is not measured again: a run may be stopped and gone on with.
MODEL is a folder or a model that ships with modicum; its training.json says what it was trained on, how, and what was held
out. `modicum train recipes/gqa-laboratory.toml` makes one that is small enough for all of it. A seed decides calibration,
the order of the data and what is drawn at random; the converted model and its control see the same batches.
"""

import argparse
import csv
import json
import math
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import modicum
from modicum import resources
from modicum.assembly import build
from modicum.checkpoint.native import read_config
from modicum.checkpoint.record import Record
from modicum.checkpoint.tokenizer import Tokenizer
from modicum.errors import UsageError
from modicum.lm.decoder import Decoder
from modicum.lm.objective import CausalLM
from modicum.report.machine import machine
from modicum.train import loop
from modicum.train.onward import schedule, sitting, train_on
from modicum.train.optim import initialise
from modicum.train.recipe import OptimSection
from modicum.train.task import Task
from modicum.train.text import find_corpus, tokenize

PAPER = ("mean", "first", "random")
BEYOND = ("aligned", "merged")
FRACTIONS = (0.005, 0.01, 0.025, 0.05, 0.1)
CALIBRATION_TOKENS = 16_384
TEACHER_WEIGHT = 0.9
# Forward and backward cost three forwards; a teacher one more.
TEACHER_COST = 4 / 3
# Where a model does not say how its text was chosen.
USUAL = {"suffixes": [".py"], "exclude": ["test", "tests", "lib2to3", "encodings", "pydoc_data"], "held_out": 0.04}
# Peak rates as shares of the original's, each the best of 0.05, 0.1, 0.25 and 0.5 after 5 % (laboratory, 2 heads, seed 0):
# the worse a start, the more it needs. All others, the control among them, have that of `modicum uptrain`.
RATES = dict.fromkeys(PAPER, 0.5)
# A loss this far above the median of the twenty steps before it, looked for in the paper's 5 % of uptraining.
SPIKE = 0.5
SPIKES_AFTER = 0.05

Cell = dict[str, Any]


class Subject:
    """A model with its tokens: what is converted, trained and judged."""

    def __init__(self, name: str, cache_folder: Path) -> None:
        folder = resources.model_presets().get(name, Path(name))
        self.checkpoint = modicum.read_checkpoint(folder)
        self.config: Any = read_config(self.checkpoint.config)
        self.tokenizer = Tokenizer.from_files(self.checkpoint.files, self.checkpoint.config)
        self.record = Record.of(self.checkpoint.files)
        data = USUAL | {k: v for k, v in self.record.section("data").items() if k in (*USUAL, "source", "window")}
        self.window = min(data.get("window", 512), self.config.max_seq_len)
        corpus = find_corpus(
            data.get("source", "stdlib"), tuple(data["suffixes"]), tuple(data["exclude"]), data["held_out"]
        )
        end = min(self.tokenizer.eos_ids)
        sides = {"training": corpus.training, "held_out": corpus.held_out}
        place = cache_folder / Path(folder).name
        self.training, self.held_out = (
            tokenize(files, self.tokenizer.backend, end, place / f"{side}.npy") for side, files in sides.items()
        )

    def task(self, optim: OptimSection, seed: int, teacher: Any = None) -> Task:
        weight = 0.0 if teacher is None else TEACHER_WEIGHT
        objective = CausalLM(self.window)
        return Task(
            objective,
            self.training,
            self.held_out,
            None,
            batch=optim.batch,
            seed=seed,
            teacher=teacher,
            teacher_weight=weight,
        )

    def model(self, method: str | None = None, kv_heads: int | None = None, seed: int = 0) -> Any:
        checkpoint = self.checkpoint
        if method is not None:
            calibration = self.calibration(seed) if method in BEYOND else None
            checkpoint = modicum.convert_to_gqa(checkpoint, kv_heads, method, calibration, seed)
        return build(checkpoint, read_config(checkpoint.config), torch.device("cpu"), torch.float32)

    def calibration(self, seed: int) -> list[list[int]]:
        """Windows from all over the training text, others for every seed."""
        starts = np.random.default_rng(seed).integers(
            0, len(self.training) - self.window, CALIBRATION_TOKENS // self.window
        )
        return [self.training[start : start + self.window].tolist() for start in starts]

    def optim(self, fraction: float, share_of_peak: float | None = None) -> OptimSection:
        """The schedule of `modicum uptrain`."""
        original = self.record.section("optim")
        lr = None if share_of_peak is None else share_of_peak * original["lr"]
        tokens = round(fraction * (self.record.tokens or 0))
        batch = original.get("batch", 8)
        return schedule(tokens, batch=batch, window=self.window, lr=lr, original=original)


@cache
def subject(name: str, cache_folder: Path) -> Subject:
    return Subject(name, cache_folder)


def measure(cell: Cell, cache_folder: Path) -> Cell:
    """One cell of the matrix, in a process of its own kind: what was asked for, and what came of it."""
    torch.set_num_threads(cell["threads"])
    loop.console.quiet = True
    own = subject(cell["model"], cache_folder)
    began = time.perf_counter()
    result = PARTS[cell["part"]](own, cell)
    return {**cell, **result, "seconds": round(time.perf_counter() - began, 1)}


def jump(own: Subject, cell: Cell) -> Cell:
    """Held-out loss with no training; MHA where no method is given."""
    began = time.perf_counter()
    model = own.model(cell["method"], cell["kv_heads"], cell["seed"])
    converting = time.perf_counter() - began
    task = own.task(own.optim(1.0), cell["seed"])
    return {"nats": task.quality(model, bf16=False)[0], "converting": round(converting, 1)}


def uptrain(own: Subject, cell: Cell) -> Cell:
    teacher = own.model() if cell["teacher"] else None
    model = own.model(cell["method"], cell["kv_heads"], cell["seed"])
    optim = own.optim(cell["fraction"], cell.get("share_of_peak", RATES.get(cell["method"])))
    return trained(own.task(optim, cell["seed"], teacher), model, optim, cell["seed"])


def scratch(own: Subject, cell: Cell) -> Cell:
    """The original recipe from random weights, with fewer heads or as many."""
    original = own.record.section("optim")
    optim = OptimSection(**original)
    model = Decoder(replace(own.config, n_kv_heads=cell["kv_heads"]))
    initialise(model, cell["seed"])
    return trained(own.task(optim, cell["seed"]), model, optim, cell["seed"])


def trained(task: Task, model: Any, optim: OptimSection, seed: int) -> Cell:
    folder = Path(tempfile.mkdtemp())
    run = replace(
        sitting(folder / "run", optim, seed, "cpu"), log_every=1, save_every=optim.steps, validate_every=optim.steps
    )
    try:
        outcome = train_on(model, task, optim, run)
        assert outcome is not None
        with (folder / "run" / "log.csv").open(newline="") as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    except UsageError as refusal:
        if "the loss of step" not in str(refusal):
            raise
        return {"nats": math.nan, "diverged": True, "spikes": None}
    finally:
        shutil.rmtree(folder)
    return {"nats": outcome.after, "before": outcome.before, "tokens": outcome.tokens, **stability(losses)}


def stability(losses: list[float]) -> Cell:
    """Spikes: steps far above the twenty before them. Diverged: the last steps are worse than the first."""
    spikes = sum(
        loss > statistics.median(losses[step - 20 : step]) + SPIKE for step, loss in enumerate(losses) if step >= 20
    )
    tenth = max(1, len(losses) // 10)
    diverged = statistics.mean(losses[-tenth:]) > statistics.mean(losses[:tenth])
    return {"spikes": spikes, "diverged": diverged}


PARTS = {"jump": jump, "uptrain": uptrain, "scratch": scratch, "spikes": uptrain}


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """What a part of the benchmark consists of."""
    base = {"part": options.part, "model": options.model, "threads": options.threads}
    if options.share_of_peak is not None:
        base["share_of_peak"] = options.share_of_peak
    for seed in range(options.seeds):
        if options.part == "jump":
            if seed == 0:
                yield base | {"method": None, "kv_heads": None, "seed": 0}
            for method in (*PAPER, *BEYOND):
                # Only these depend on a seed.
                if seed == 0 or method in ("random", *BEYOND):
                    for heads in options.groups:
                        yield base | {"method": method, "kv_heads": heads, "seed": seed}
        elif options.part == "uptrain":
            for fraction in options.fractions:
                yield base | uptrained(None, None, fraction, seed)
                for heads in options.groups:
                    for method in options.methods:
                        for teacher in (False, True) if method in options.taught else (False,):
                            yield base | uptrained(method, heads, fraction, seed, teacher)
        elif options.part == "scratch":
            for heads in options.groups:
                yield base | {"kv_heads": heads, "seed": seed}
        else:
            for method in ("mean", "merged"):
                for share in (1.0, 2.0):
                    yield base | uptrained(method, 1, SPIKES_AFTER, seed) | {"share_of_peak": share}


def uptrained(method: str | None, kv_heads: int | None, fraction: float, seed: int, teacher: bool = False) -> Cell:
    return {"method": method, "kv_heads": kv_heads, "fraction": fraction, "seed": seed, "teacher": teacher}


def key_of(cell: Cell) -> str:
    asked = ("part", "model", "method", "kv_heads", "fraction", "seed", "teacher", "share_of_peak")
    return json.dumps({name: cell.get(name) for name in asked})


def read_results(path: Path) -> list[Cell]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(options: argparse.Namespace) -> None:
    done = {key_of(cell) for cell in read_results(options.results)}
    todo = [cell for cell in cells(options) if key_of(cell) not in done]
    print(f"{len(todo)} of {len(list(cells(options)))} to measure", file=sys.stderr)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    subject(options.model, options.cache)  # the tokens are cached before several processes ask for them
    with ProcessPoolExecutor(options.workers, mp_context=spawn) as pool:
        futures = [pool.submit(measure, cell, options.cache) for cell in todo]
        for count, future in enumerate(as_completed(futures), 1):
            cell = future.result()
            with options.results.open("a") as file:
                file.write(json.dumps(cell) + "\n")
            name = " ".join(str(cell.get(x)) for x in ("method", "kv_heads", "fraction", "seed", "teacher"))
            print(
                f"{count}/{len(todo)}  {cell['part']} {name}: {cell['nats']:.4f}  {cell['seconds']} s", file=sys.stderr
            )


def table(results: list[Cell]) -> str:
    """Everything measured, model by model."""
    lines = ["# What fewer key-value heads cost", "", machine(), ""]
    for model in dict.fromkeys(cell["model"] for cell in results):
        own = [cell for cell in results if cell["model"] == model]
        path = Path(model)
        lines += [f"## {path.parent.name if path.name == 'model' else path.name}", ""]
        for part in (jump_table, uptrain_table, scratch_table, spikes_table):
            lines += part(own)
    return "\n".join(lines) + "\n"


def select(results: list[Cell], **wanted: Any) -> list[float]:
    return [cell["nats"] for cell in results if all(cell.get(name) == value for name, value in wanted.items())]


def figure(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def jump_table(results: list[Cell]) -> list[str]:
    found = [cell for cell in results if cell["part"] == "jump"]
    if not found:
        return []
    mha = statistics.mean(select(found, method=None) or [math.nan])
    lines = [
        f"### No training: nats per token (MHA {mha:.4f}), share of the mean's jump removed",
        "",
        "| key-value heads | " + " | ".join((*PAPER, *BEYOND)) + " |",
        "|---" * (1 + len(PAPER + BEYOND)) + "|",
    ]
    for heads in sorted({cell["kv_heads"] for cell in found if cell["kv_heads"]}, reverse=True):
        entries = []
        worst = statistics.mean(select(found, method="mean", kv_heads=heads) or [math.nan])
        for method in (*PAPER, *BEYOND):
            values = select(found, method=method, kv_heads=heads)
            share = statistics.mean((worst - value) / (worst - mha) for value in values) if values else math.nan
            entries.append(figure(values) + ("" if method == "mean" or not values else f" ({share:.1%})"))
        lines.append(f"| {heads} | " + " | ".join(entries) + " |")
    seconds = [cell["converting"] for cell in found if cell["method"] == "merged"]
    took = [f"merged, calibration and refits included, took {statistics.median(seconds):.0f} s.", ""] if seconds else []
    return [*lines, "", *took]


def uptrain_table(results: list[Cell]) -> list[str]:
    found = [cell for cell in results if cell["part"] == "uptrain"]
    if not found:
        return []
    fractions = sorted({cell["fraction"] for cell in found})
    head = "| start | " + " | ".join(f"{fraction:.1%}" for fraction in fractions) + " |"
    control = {f: select(found, method=None, fraction=f) for f in fractions}
    lines = ["### Uptrained: nats per token above the multi-head control of the same steps", ""]
    lines += [head, "|---" * (1 + len(fractions)) + "|"]
    lines.append("| the control itself | " + " | ".join(figure(control[f]) for f in fractions) + " |")
    for heads in sorted({cell["kv_heads"] for cell in found if cell["kv_heads"]}, reverse=True):
        starts = dict.fromkeys((cell["method"], cell["teacher"]) for cell in found if cell["kv_heads"] == heads)
        for method, teacher in starts:
            own = [
                cell
                for cell in found
                if (cell["method"], cell["teacher"], cell["kv_heads"]) == (method, teacher, heads)
            ]
            entries = [figure(above(own, found, fraction)) for fraction in fractions]
            lines.append(f"| {heads} heads, {method}{', taught' if teacher else ''} | " + " | ".join(entries) + " |")
    return [*lines, "", *reach_lines(found), ""]


def above(own: list[Cell], found: list[Cell], fraction: float) -> list[float]:
    """Loss beyond that of the control of the same seed and steps."""
    control = {c["seed"]: c["nats"] for c in found if c["method"] is None and c["fraction"] == fraction}
    return [c["nats"] - control[c["seed"]] for c in own if c["fraction"] == fraction and c["seed"] in control]


def compute_to_reach(own: list[Cell], goal: float, cost: float) -> float | None:
    """The fraction of the original compute at which the mean loss meets `goal`, between measured ones on a log scale."""
    points = sorted({cell["fraction"] for cell in own})
    losses = [statistics.mean(select(own, fraction=fraction)) for fraction in points]
    if not points or not math.isfinite(goal) or losses[-1] > goal:
        return None
    if losses[0] <= goal:
        return points[0] * cost
    at = next(i for i, loss in enumerate(losses) if loss <= goal)
    share = (losses[at - 1] - goal) / (losses[at - 1] - losses[at])
    return cost * points[at - 1] * (points[at] / points[at - 1]) ** share


def reach_lines(found: list[Cell]) -> list[str]:
    """For every start: the compute at which it is as good as the mean after 5 %."""
    lines = [
        "Compute, as a share of the original's and a teacher's included, to reach what the mean reaches with 5 %:",
        "",
    ]
    for heads in sorted({cell["kv_heads"] for cell in found if cell["kv_heads"]}, reverse=True):
        goals = select(found, method="mean", teacher=False, kv_heads=heads, fraction=0.05)
        if not goals:
            continue
        entries = []
        for method, teacher in dict.fromkeys((c["method"], c["teacher"]) for c in found if c["kv_heads"] == heads):
            own = [c for c in found if (c["method"], c["teacher"], c["kv_heads"]) == (method, teacher, heads)]
            reached = compute_to_reach(own, statistics.mean(goals), TEACHER_COST if teacher else 1.0)
            least = reached is not None and reached <= min(c["fraction"] for c in own) * TEACHER_COST
            text = "not reached" if reached is None else f"{'at most ' if least else ''}{reached:.2%}"
            entries.append(f"{method}{' taught' if teacher else ''} {text}")
        lines.append(f"- {heads} heads: " + ", ".join(entries))
    return lines


def scratch_table(results: list[Cell]) -> list[str]:
    found = [cell for cell in results if cell["part"] == "scratch"]
    if not found:
        return []
    lines = [
        "### Grouped from the first step: the whole original training",
        "",
        "| key-value heads | nats per token |",
        "|---|---|",
    ]
    for heads in sorted({cell["kv_heads"] for cell in found}, reverse=True):
        lines.append(f"| {heads} | {figure(select(found, kv_heads=heads))} |")
    return [*lines, ""]


def spikes_table(results: list[Cell]) -> list[str]:
    found = [cell for cell in results if cell["part"] == "spikes"]
    if not found:
        return []
    lines = ["### Multi-query in uptraining: spikes and divergences", ""]
    lines += ["| start | peak rate | runs | spikes | diverged | nats per token |", "|---" * 6 + "|"]
    for method, share in dict.fromkeys((cell["method"], cell["share_of_peak"]) for cell in found):
        own = [cell for cell in found if (cell["method"], cell["share_of_peak"]) == (method, share)]
        spikes, diverged = sum(cell["spikes"] or 0 for cell in own), sum(cell["diverged"] for cell in own)
        values = [cell["nats"] for cell in own if math.isfinite(cell["nats"])]
        lines.append(f"| {method} | {share:g} x | {len(own)} | {spikes} | {diverged} | {figure(values)} |")
    return [*lines, ""]


def numbers(kind: type) -> Any:
    return lambda text: [kind(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "table"])
    parser.add_argument("model", nargs="?", default="runs/gqa-laboratory/model")
    parser.add_argument("--groups", type=numbers(int), default=[4, 2, 1], help="numbers of key-value heads")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["mean", "first", "random", "merged"])
    parser.add_argument(
        "--taught", type=lambda text: text.split(","), default=["mean", "merged"], help="with a teacher too"
    )
    parser.add_argument("--fractions", type=numbers(float), default=list(FRACTIONS), help="of the original tokens")
    parser.add_argument("--share-of-peak", type=float, help="of the original's rate; else that of `modicum uptrain`")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="cells measured at once")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--results", type=Path, default=Path("runs/gqa-quality/results.jsonl"))
    parser.add_argument("--cache", type=Path, default=Path("runs/gqa-quality"))
    parser.add_argument("--out", type=Path, help="of table: a file instead of stdout")
    options = parser.parse_args()
    if options.part != "table":
        run(options)
        return
    text = table(read_results(options.results))
    if options.out is None:
        print(text, end="")
    else:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
