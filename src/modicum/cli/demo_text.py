"""The demo's last step: real code, written by the target alone and with its draft, token for token the same."""

import statistics
from pathlib import Path
from typing import Any

import typer

from modicum.cli.demo_story import timed, tokens_seen
from modicum.errors import GenerationError

K = 4
# Rounds over all prompts; no more are begun after so many seconds.
ROUNDS, SECONDS = 5, 45
BUILT_IN = (
    'class Stack:\n    """A last-in, first-out collection."""\n\n    def __init__(self):\n        self.items = []\n'
)


def write(story: Any, target_name: str, draft_name: str) -> None:
    """Complete files that were held out from training, plain and with the draft, and compare times and tokens."""
    with story.step("Write code with a draft") as step:
        from modicum import api, resources

        # float32: in lower precision the kernels for one row and for five may differ in the last bit of a near-tie.
        target, draft = (api.load(name, dtype="float32") for name in (target_name, draft_name))
        prompts = held_out_prompts(resources.model_presets()[target_name], 1 if step.quick else 4)
        rounds = 1 if step.quick else ROUNDS
        settings: dict[str, Any] = {"max_new_tokens": 24 if step.quick else 160, "temperature": 0, "ignore_eos": True}
        drafting = {"draft": draft, "num_draft_tokens": K}
        show(step, target, prompts[0], {**settings, **drafting})
        plain_times: list[float] = []
        draft_times: list[float] = []
        stats: list[Any] = []
        with step.bar("plain and with draft", rounds * len(prompts)) as advance:
            for _ in range(rounds):
                if sum(plain_times + draft_times) > SECONDS:
                    break
                for prompt in prompts:
                    seconds, plain = timed(lambda p=prompt: api.generate(target, [p], **settings))
                    plain_times.append(seconds)
                    seconds, fast = timed(lambda p=prompt: api.generate(target, [p], **drafting, **settings))
                    draft_times.append(seconds)
                    stats.append(fast.stats)
                    if plain.tokens != fast.tokens:
                        raise GenerationError(
                            "speculative and plain text differ: please report this with the output of `modicum demo`"
                        )
                    advance()
        speeds = [settings["max_new_tokens"] / statistics.median(times) for times in (plain_times, draft_times)]
        files = "The beginning of a file" if len(prompts) == 1 else f"{len(prompts)} beginnings of files"
        compare(
            step, speeds, stats, f"{files} held out from training, {settings['max_new_tokens']} tokens each, greedy"
        )


def show(step: Any, target: Any, prompt: str, settings: dict[str, Any]) -> None:
    """One completion, its drafted and corrected tokens coloured, here and in the report."""
    from modicum import api
    from modicum.cli.generate import LEGEND, printer
    from modicum.report.html import Token

    console, events = step.story.console, []
    console.print(f"   A prompt, and how the target completes it: {LEGEND}.\n", soft_wrap=True)
    console.out(prompt, style="dim", end="", highlight=False)
    paint = printer(console.is_terminal and not console.no_color)

    def on_token(event: Any) -> None:
        events.append(event)
        paint(event)

    api.generate(target, [prompt], on_token=on_token, **settings)
    console.print("\n")
    step.section.text(
        "A language model writes one token per call, and a call takes as long for five tokens as for one, or nearly. So a "
        "small draft proposes a few, the target scores them all in one call, and what it would not have written itself is "
        "replaced by its own choice. The text stays the target's, token for token."
    )
    step.section.tokens(
        [Token(prompt, "prompt"), *tokens_seen(events)],
        "The beginning of a file that neither model was trained on, in grey, and how it is continued.",
        code=True,
    )


def compare(step: Any, speeds: list[float], stats: list[Any], measured: str) -> None:
    """Times, acceptance, and tokens per call."""
    plain, fast = speeds
    accepted = sum(s.accepted for s in stats) / sum(s.accepted + s.rejected for s in stats)
    per_call = sum(s.tokens for s in stats) / sum(s.target_calls for s in stats)
    step.say(f"{measured}:")
    step.say(f"plain       {plain:7.1f} tokens/s")
    step.say(f"with draft  {fast:7.1f} tokens/s")
    step.say(f"accepted    {accepted:.0%} of the drafted tokens, {per_call:.2f} tokens per target call (K = {K})")
    step.headline(f"{fast / plain:.2f}×", "as fast with a draft, the same tokens")
    section = step.section
    times = "one run each" if len(stats) == 1 else f"the median of {len(stats)} runs each"
    section.bars(
        [(name, speed, f"{speed:,.1f} tokens/s") for name, speed in (("plain", plain), ("with draft", fast))],
        f"{measured}; {times}. The tokens were the same every time.",
    )
    section.text(
        f"Of the drafted tokens {accepted:.0%} were accepted. With {K} drafted at a time, a call of the target yielded "
        f"{per_call:.2f} tokens on average, where without a draft it yields one."
    )
    section.plot(
        lambda axis: draw_acceptance(axis, positions_of(stats)),
        "Acceptance by position: " + ", ".join(f"{share:.0%} at {i}" for i, share in enumerate(positions_of(stats), 1)),
        "How often each of the drafted tokens was accepted, given that those before it were.",
    )


def positions_of(stats: list[Any]) -> list[float]:
    """Acceptance by position over several runs."""
    accepted = map(sum, zip(*(each.accepted_by_position for each in stats), strict=True))
    judged = map(sum, zip(*(each.judged_by_position for each in stats), strict=True))
    return [kept / seen for kept, seen in zip(accepted, judged, strict=True)]


def draw_acceptance(axis: Any, shares: list[float]) -> None:
    places = range(1, len(shares) + 1)
    axis.bar(places, [100 * share for share in shares], width=0.55)
    for place, share in zip(places, shares, strict=True):
        axis.annotate(f"{share:.0%}", (place, 100 * share), ha="center", textcoords="offset points", xytext=(0, 4))
    axis.set_xticks(list(places))
    axis.set_ylim(0, 110)
    axis.grid(visible=False, axis="x")
    axis.set_xlabel("position in the draft")
    axis.set_ylabel("accepted, %")


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
