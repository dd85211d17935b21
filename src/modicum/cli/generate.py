"""`modicum generate`: continue a prompt, streaming, or a file of prompts, resumably."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.cli import common
from modicum.errors import UsageError

EXAMPLES = """Examples:

modicum generate modicum-code-target --prompt 'def fibonacci(n):'

modicum generate ./big --draft ./small -k 4 --temperature 0 --prompt - < prompt.txt

modicum generate ./big --draft ngram --prompts in.jsonl --out out.jsonl --seed 7"""

SOURCE_STYLES = {"draft": "green", "target": "yellow"}
LEGEND = "[green]drafted and accepted[/], [yellow]the target's own[/]"


def generate(
    target: common.Target,
    draft: common.Draft = None,
    num_draft_tokens: common.NumDraftTokens = 4,
    verification: common.Verification = "token",
    prompt: Annotated[str | None, typer.Option(help="The text to continue; `-` reads it from stdin.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='A JSONL file, each line {"prompt": TEXT} or {"tokens": [IDS]}, and any "id".')
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where the lines go, with text, tokens and stats added.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    max_new_tokens: common.MaxNewTokens = 128,
    temperature: common.Temperature = 1.0,
    top_k: common.TopK = None,
    top_p: common.TopP = None,
    min_p: common.MinP = None,
    repetition_penalty: common.RepetitionPenalty = 1.0,
    seed: common.Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the text; may be given again.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end-of-text token.")] = False,
    logprobs: Annotated[
        int, typer.Option(help="Log-probabilities of every token and of the N best in its place, in JSON output.")
    ] = 0,
    k_invariant: Annotated[
        bool, typer.Option("--k-invariant", help="The same seed gives the same text for every -k, up to rounding.")
    ] = False,
    bit_exact: Annotated[
        bool,
        typer.Option(
            "--bit-exact",
            help="Logits to the last bit, whatever is scored with them: greedy text is then the same with any draft and "
            "without. Slower, one prompt at a time; float32 or bfloat16.",
        ),
    ] = False,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    weights: common.Weights = None,
    as_json: common.Json = False,
    no_color: common.NoColor = False,
) -> None:
    """Continue text with a model, and with a draft the same text faster.

    In a terminal, tokens that came from the draft are green and those that the target put in are yellow.
    """
    settings = {
        "num_draft_tokens": num_draft_tokens,
        "verification": verification,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop or None,
        "ignore_eos": ignore_eos,
        "logprobs": logprobs,
        "k_invariant": k_invariant,
        "bit_exact": bit_exact,
    }
    if draft is not None and num_draft_tokens != "auto" and num_draft_tokens < 1:
        raise UsageError(f"-k {num_draft_tokens} drafts nothing: give at least 1, or leave --draft out")
    if (prompt is None) == (prompts is None):
        raise UsageError("give either --prompt TEXT (`-` for stdin), or --prompts FILE.jsonl with --out FILE.jsonl")
    if logprobs and prompts is None and not as_json:
        raise UsageError("--logprobs needs a place to go: add --json, or use --prompts")

    def load() -> tuple[Any, Any]:
        models = common.load_pair(target, draft, device, dtype)
        if weights is not None:
            models[0].for_inference(weights=weights)
        return models

    if prompts is not None:
        from modicum.cli import batch

        if out is None:
            raise UsageError("--prompts needs --out FILE.jsonl to write to")
        common.check_writable(out, force=force)
        named = {"target": target, "draft": draft, "dtype": dtype, "seed": seed, **settings}
        job = batch.Job(prompts, out, named if weights is None else {**named, "weights": weights})
        batch.run(job, load, settings, seed)
        return
    text = sys.stdin.read() if prompt == "-" else str(prompt)
    if not text:
        raise UsageError("the prompt is empty: give at least one character to continue")
    stream(load(), text, {**settings, "seed": seed}, as_json=as_json, color=not no_color)


def stream(models: tuple[Any, Any], text: str, settings: dict[str, Any], *, as_json: bool, color: bool) -> None:
    """Print a continuation as it comes, then what it took on stderr; or everything at the end as JSON."""
    from rich.console import Console

    from modicum import api

    target, draft = models
    answer = Console(highlight=False, soft_wrap=True, no_color=not color or None)
    notes = Console(stderr=True, highlight=False, no_color=not color or None)
    paint = answer.is_terminal and not answer.no_color

    if paint and draft is not None and not as_json:
        notes.print(LEGEND)
    on_token = None if as_json else printer(paint)
    result = api.generate(target, [text], draft=draft, on_token=on_token, **settings)
    if as_json:
        print(json.dumps(result.to_dict()))
        return
    if not result.texts or not result.texts[0].endswith("\n"):
        print(flush=True)
    notes.print(closing_line(result.stats), style="dim", soft_wrap=True)


def printer(paint: bool) -> Callable[[Any], None]:
    """An `on_token` that writes each token to stdout as it comes, coloured by where it came from if `paint`."""
    from rich.style import Style

    styles = {source: Style.parse(style) for source, style in SOURCE_STYLES.items()}

    def show(event: Any) -> None:
        style = styles.get(event.source, Style.null()) if paint else Style.null()
        # Not through a console: it would expand tabs and turn `:x:` into an emoji, and the text is not ours.
        sys.stdout.write(style.render(event.text))
        sys.stdout.flush()

    return show


def closing_line(stats: Any) -> str:
    """Tokens per second, and with a draft how well it did."""
    line = f"{stats.tokens} tokens, {stats.tokens_per_second:.1f} tokens/s"
    if not stats.judged_by_position:
        return line
    positions = " ".join(common.percent(share) for share in stats.acceptance_by_position)
    chosen = "" if stats.mean_k is None else f", K {stats.mean_k:.1f} on average"
    return (
        f"{line}, {stats.tokens_per_target_call:.2f} tokens per target call{chosen}, accepted by position {positions}"
    )
