"""`modicum demo`: the main job on the models that ship with modicum."""

import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.cli.demo_gqa import share
from modicum.cli.demo_video import watch
from modicum.errors import GenerationError, MissingExtraError, UsageError

TARGET, DRAFT = "modicum-code-target", "modicum-code-draft"
K = 4
BUILT_IN = (
    'class Stack:\n    """A last-in, first-out collection."""\n\n    def __init__(self):\n        self.items = []\n'
)
NEXT_STEPS = """Try next:
  modicum generate modicum-code-target --draft modicum-code-draft --prompt 'def fibonacci(n):'
  modicum compare modicum-code-target --draft modicum-code-draft --temperature 0 --dtype float32
  modicum generate YOUR-CHECKPOINT --draft YOUR-SMALLER-ONE --prompt 'Once upon a time'
  modicum convert modicum-code-target --report --calibration stdlib --plot losses.png
  modicum uptrain YOUR-CHECKPOINT GROUPED --kv-heads 8 --data YOUR-TEXTS --tokens 50_000_000
  modicum inspect vivit-b/16x2
  modicum classify YOUR-VIVIT YOUR-VIDEO.mp4"""


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="One prompt, few tokens: only whether it runs.")] = False,
) -> None:
    """Complete real Python code, plain and with a draft, share the target's keys and values, and name the motions in fresh
    videos; all of it measured now."""
    from rich.console import Console

    from modicum import api, resources

    presets = resources.model_presets()
    if TARGET not in presets or DRAFT not in presets:
        raise UsageError(f"{TARGET} and {DRAFT} are not in this installation: install modicum from its repository")
    console = Console(highlight=False, emoji=False)
    # float32: in lower precision the kernels for one row and for five may differ in the last bit of a near-tie.
    target, draft = (api.load(name, dtype="float32") for name in (TARGET, DRAFT))
    prompts = held_out_prompts(presets[TARGET], 1 if quick else 4)
    settings: dict[str, Any] = {"max_new_tokens": 24 if quick else 160, "temperature": 0, "ignore_eos": True}
    show(console, target, draft, prompts[0], settings)
    plain_times, draft_times, stats, same = [], [], [], True
    for _ in range(1 if quick else 5):
        for prompt in prompts:
            seconds, plain = timed(lambda p=prompt: api.generate(target, [p], **settings))
            plain_times.append(seconds)
            seconds, fast = timed(
                lambda p=prompt: api.generate(target, [p], draft=draft, num_draft_tokens=K, **settings)
            )
            draft_times.append(seconds)
            stats.append(fast.stats)
            same = same and plain.tokens == fast.tokens
    n_tokens = settings["max_new_tokens"]
    plain_speed, fast_speed = (n_tokens / statistics.median(times) for times in (plain_times, draft_times))
    accepted = sum(s.accepted for s in stats) / sum(s.accepted + s.rejected for s in stats)
    per_call = sum(s.tokens for s in stats) / sum(s.target_calls for s in stats)
    console.print(f"\n{len(prompts)} beginnings of files held out from training, {n_tokens} tokens each, greedy:")
    console.print(f"  plain         {plain_speed:7.1f} tokens/s")
    console.print(f"  with draft    {fast_speed:7.1f} tokens/s, {fast_speed / plain_speed:.2f} times plain")
    console.print(
        f"  accepted      {accepted:.0%} of the drafted tokens, {per_call:.2f} tokens per target call (K = {K})"
    )
    console.print(f"  same tokens   {'yes, all of them' if same else 'NO'}\n")
    if not same:
        raise GenerationError("speculative and plain text differ: please report this with the output of `modicum demo`")
    share(console, TARGET, quick)
    try:
        watch(console, quick)
    except MissingExtraError as missing:
        console.print(f"{missing}\n", markup=False, soft_wrap=True)
    console.print(NEXT_STEPS, markup=False, soft_wrap=True)


def show(console: Any, target: Any, draft: Any, prompt: str, settings: dict[str, Any]) -> None:
    """One completion, its drafted and corrected tokens coloured."""
    from modicum import api
    from modicum.cli.generate import LEGEND, printer

    console.print(f"A prompt, and how the target completes it: {LEGEND}.\n")
    console.out(prompt, style="dim", end="", highlight=False)
    paint = console.is_terminal and not console.no_color
    api.generate(target, [prompt], draft=draft, num_draft_tokens=K, on_token=printer(paint), **settings)
    console.print()


def held_out_prompts(folder: Path, n_prompts: int) -> list[str]:
    """The first lines of library files that the target has never seen; a built-in one, said so, if there are none."""
    from modicum.train.text import held_out_texts

    prompts = []
    for text in held_out_texts(folder):
        if len(text) > 1500:
            # A file begins with its documentation; the code is further on.
            middle = text[len(text) // 2 :]
            start = middle.find("\n") + 1
            end = middle.find("\n", start + 400) + 1
            prompts.append(middle[start:end])
    if not prompts:
        typer.echo("none of the held-out files is in this Python: completing a built-in prompt instead", err=True)
        return [BUILT_IN]
    return prompts[:n_prompts]


def timed(work: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result
