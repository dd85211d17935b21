"""`modicum compare`: plain and speculative side by side, for every number of drafted tokens."""

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.cli import common
from modicum.errors import UsageError

EXAMPLES = """Examples:

modicum compare modicum-code-target --draft modicum-code-draft --temperature 0

modicum compare ./big --draft ./small --prompts in.jsonl --max-k 5 --out figure.png"""

PROMPTS = (
    "def binary_search(items, wanted):\n",
    "class Queue:\n    def __init__(self):\n",
    "import os\nimport sys\n\ndef main():\n",
)


def compare(
    target: common.Target,
    draft: Annotated[
        str, typer.Option(help="As for `generate`: a smaller model, a trained drafter, `ngram`, `self:LAYERS`.")
    ],
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSONL as for `generate`, or text, one prompt per line; without it a few lines of code."),
    ] = None,
    num_draft_tokens: Annotated[
        list[str] | None,
        typer.Option(
            "-k",
            "--num-draft-tokens",
            metavar="N|auto",
            help="Compare plain decoding with this K only; auto chooses K anew for every call. May be given again.",
        ),
    ] = None,
    max_k: Annotated[int, typer.Option(help="Compare K = 0 (plain) to this.")] = 7,
    verification: common.Verification = "token",
    max_new_tokens: common.MaxNewTokens = 128,
    repeats: Annotated[int, typer.Option(help="How often each K is measured, K by K in turns.")] = 3,
    temperature: common.Temperature = 1.0,
    top_k: common.TopK = None,
    top_p: common.TopP = None,
    seed: common.Seed = 0,
    out: Annotated[Path, typer.Option(help="Where the figure goes.")] = Path("compare.png"),
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    as_json: common.Json = False,
) -> None:
    """Measure plain and speculative decoding over K: the figures behind the choice of a draft, as a table and a PNG."""
    from rich.console import Console

    from modicum.cli import batch
    from modicum.report.figures import load_pyplot, speculation_figure

    if max_k < 1 or repeats < 1:
        raise UsageError(f"--max-k {max_k} --repeats {repeats}: both must be at least 1")
    chosen = [common.parse_k(text) for text in num_draft_tokens or ()]
    for k in chosen:
        if isinstance(k, int) and k < 1:
            raise UsageError(f"-k {k} drafts nothing, which is always compared: give at least 1, or auto")
    common.check_writable(out, force=force)
    load_pyplot()  # a missing matplotlib is refused now, not after minutes of measuring
    texts = list(PROMPTS) if prompts is None else batch.read_texts(prompts)
    models = common.load_pair(target, draft, device, dtype)
    settings = {
        "verification": verification,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "ignore_eos": True,
    }
    ks = [0, *dict.fromkeys(chosen)] if chosen else list(range(max_k + 1))
    rows = measure(models, texts, ks, repeats, settings)
    speculation_figure(rows, out, f"{target} with {draft}")
    if as_json:
        print(json.dumps(rows))
        return
    Console(highlight=False).print(table(rows))
    Console(stderr=True, highlight=False).print(f"figure in {out}")


def measure(
    models: tuple[Any, Any], prompts: list[Any], ks: list[Any], repeats: int, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """One row per K. Prompts run one at a time, K by K in turns, so that a slow moment meets every K."""
    from rich.console import Console
    from rich.progress import track

    from modicum import api

    target, draft = models

    def once(k: Any, prompt: Any) -> Any:
        speculative = {"draft": draft, "num_draft_tokens": k} if k else {}
        return api.generate(target, [prompt], **speculative, **settings).stats

    # The first calls wait for memory and kernels, and "auto" for its calibration.
    once(0, prompts[0]), once("auto" if "auto" in ks else 1, prompts[0])
    runs: dict[Any, list[Any]] = {k: [] for k in ks}
    rounds = [(k, prompt) for _ in range(repeats) for prompt in prompts for k in ks]
    for k, prompt in track(rounds, "measuring", console=Console(stderr=True)):
        runs[k].append(once(k, prompt))
    return [row_of(k, runs[k], settings["max_new_tokens"]) for k in ks]


def row_of(k: Any, runs: list[Any], tokens: int) -> dict[str, Any]:
    """The figures of one K; times scaled to `tokens` tokens, because a text may end at the context."""
    seconds = [run.seconds / run.tokens * tokens for run in runs]
    loops = sum(run.target_calls for run in runs)
    accepted = sum(run.accepted for run in runs)
    judged = accepted + sum(run.rejected for run in runs)
    per_call = sum(run.tokens for run in runs) / loops
    mean_k = sum(n * run.loops_by_k[n] for run in runs for n in run.loops_by_k) / loops if k == "auto" else k
    return {
        "k": k,
        "mean_k": mean_k,
        "tokens": tokens,
        "seconds_mean": statistics.mean(seconds),
        "seconds_sd": statistics.stdev(seconds) if len(seconds) > 1 else 0.0,
        "tokens_per_second": tokens / statistics.median(seconds),
        "acceptance_rate": accepted / judged if judged else None,
        "tokens_per_target_call": per_call,
        "efficiency": per_call / (mean_k + 1),
        "accepted_per_k_plus_1": accepted / loops / (mean_k + 1),
        "ms_per_loop": sum(run.seconds for run in runs) / loops * 1e3,
    }


def table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    # Two lines each, so that the table fits 80 columns.
    heads = ["K", "seconds", "sd", "tokens\n/s", "x plain", "accepted", "tokens\n/call"]
    heads += ["per call\n/(K+1)", "accepted\n/(K+1)", "ms\n/loop"]
    result = Table(*heads, box=None, padding=(0, 1), pad_edge=False)
    for row in rows:
        result.add_row(
            f"auto {row['mean_k']:.1f}" if row["k"] == "auto" else str(row["k"]),
            f"{row['seconds_mean']:.3f}",
            f"{row['seconds_sd']:.3f}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['tokens_per_second'] / rows[0]['tokens_per_second']:.2f}",
            common.percent(row["acceptance_rate"]),
            f"{row['tokens_per_target_call']:.2f}",
            f"{row['efficiency']:.2f}",
            f"{row['accepted_per_k_plus_1']:.2f}",
            f"{row['ms_per_loop']:.2f}",
        )
    return result
