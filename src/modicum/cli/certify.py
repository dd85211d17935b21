"""`modicum certify`: whether a draft leaves the target's text and distribution as they are, with figures."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.cli import common, compare
from modicum.errors import UsageError

EXAMPLES = """Examples:

modicum certify modicum-code-target --draft modicum-code-draft

modicum certify ./big --draft ./small -k 5 --temperature 0.8 --top-p 0.95 --samples 40000

modicum certify ./big --draft ngram --prompts mine.jsonl --verification block --json > report.json"""

PROMPTS = (
    *compare.PROMPTS,
    "for i in range(10):\n    print(",
    "# Read a file and count its words\nwith open(path) as",
    "The meeting was moved to Thursday because",
    "Once upon a time, in a village by the sea,",
    "Ingredients: two eggs, a cup of flour,",
    "Q: What is the capital of France?\nA:",
    '{"name": "Ada", "age": 36, "langu',
    "1, 1, 2, 3, 5, 8,",
    "Dear Sir or Madam,\n\nI am writing to",
)


def certify(
    target: common.Target,
    draft: Annotated[
        str, typer.Option(help="As for `generate`: a smaller model, a trained drafter, `ngram`, `self:LAYERS`.")
    ],
    num_draft_tokens: common.NumDraftTokens = 4,
    verification: common.Verification = "token",
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSONL as for `generate`, or text, one prompt per line; without it a few of code and prose."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Rows drawn over all contexts: more find smaller errors.")] = 8000,
    contexts: Annotated[int, typer.Option(help="Places in text where they are drawn.")] = 8,
    texts: Annotated[int, typer.Option(help="Texts compared greedily.")] = 100,
    temperature: common.Temperature = 1.0,
    top_k: common.TopK = None,
    top_p: common.TopP = None,
    min_p: common.MinP = None,
    repetition_penalty: common.RepetitionPenalty = 1.0,
    seed: Annotated[int, typer.Option(help="Of contexts and rows: the same seed repeats the report.")] = 0,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    as_json: common.Json = False,
) -> int:
    """Check, on your own pair and settings, that drafting changes nothing but the speed.

    greedy identity: speculative greedy text against the target's own, token for token; where they part, how close the
    target's best two logits were. distribution: first and second tokens of many rows against the target's probabilities
    (chi-square; p-values corrected for their number, FAIL below 0.001). acceptance: how often a first drafted token stays,
    against 1 - TV(draft, target). bit-exact: text and logits with bit_exact, to the last bit.

    Exit code 0 if every check passes, 1 if one fails.
    """
    from rich.console import Console
    from rich.progress import Progress

    from modicum import api
    from modicum.cli import batch
    from modicum.speculative.certify import Certifier, Settings
    from modicum.speculative.drafters.make import make_drafter

    if num_draft_tokens == "auto":
        raise UsageError(
            "-k auto cannot be certified, because its figures would depend on times: give a number, such as 4"
        )
    if min(samples, contexts, texts) < 1:
        raise UsageError(f"--samples {samples} --contexts {contexts} --texts {texts}: each must be at least 1")
    settings = Settings(
        num_draft_tokens=num_draft_tokens,
        verification=verification,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        samples=samples,
        contexts=contexts,
        texts=texts,
    )
    given = list(PROMPTS) if prompts is None else batch.read_texts(prompts)
    model, drafting = common.load_pair(target, draft, device, dtype)
    drafter: Any = make_drafter(drafting, num_draft_tokens)
    notes = Console(stderr=True, highlight=False)
    with Progress(console=notes) as bar:
        task = bar.add_task("certifying", total=settings.n_steps)
        checks = Certifier(api.generate, model, drafter, given, settings, lambda: bar.advance(task)).run()
    passed = all(check.passed is not False for check in checks)
    if as_json:
        report = {"target": target, "draft": draft, "settings": vars(settings), "passed": passed}
        print(json.dumps({**report, "checks": [check.to_dict() for check in checks]}))
    else:
        show(checks, passed)
    return 0 if passed else 1


def show(checks: list[Any], passed: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 1, 0), pad_edge=False, show_header=False)
    styles = {True: "green", False: "red", None: "dim"}
    for check in checks:
        table.add_row(check.name, f"[{styles[check.passed]}]{check.verdict}[/]", check.summary)
    answer = Console(highlight=False)
    answer.print(table)
    answer.print("PASS: drafting changes nothing but the speed" if passed else "FAIL: see above")
