"""The demo's middle: the reference target is given fewer key-value heads, and trained on for some seconds."""

import csv
import json
import tempfile
from pathlib import Path
from typing import Any

KV_HEADS = 2
# Of text that the target was trained on: read to convert, and trained on again; and of text that it never saw.
CALIBRATION, TRAINING, JUDGED = 4096, 65_536, 8192
BATCH, WINDOW, STEPS = 4, 256, 40
FILES = 64


def share(story: Any, target: str) -> None:
    """Convert, uptrain briefly, and compare loss, cache and speed."""
    with story.step("Share a language model's keys and values") as step:
        import numpy as np
        import torch

        from modicum import api, resources
        from modicum.assembly import build
        from modicum.checkpoint.native import read_config
        from modicum.checkpoint.tokenizer import Tokenizer
        from modicum.lm.objective import CausalLM
        from modicum.train.onward import schedule, sitting, train_on
        from modicum.train.task import Task

        source = api.read_checkpoint(resources.model_presets()[target])
        record = json.loads(source.files["training.json"])
        tokenizer: Any = Tokenizer.from_files(source.files, source.config)
        known, unknown = tokens_of(tokenizer, record, TRAINING), tokens_of(tokenizer, record, JUDGED, held_out=True)
        steps = 2 if step.quick else STEPS
        optim = schedule(steps * BATCH * WINDOW, batch=BATCH, window=WINDOW, original=record["settings"]["optim"])
        starts = np.linspace(0, len(known) - WINDOW, 2 if step.quick else CALIBRATION // WINDOW, dtype=int)
        pieces = [known[at : at + WINDOW].tolist() for at in starts]

        def made(checkpoint: Any) -> Any:
            return build(checkpoint, read_config(checkpoint.config), torch.device("cpu"), torch.float32)

        original = made(source)
        task = Task(CausalLM(WINDOW), known, unknown, None, batch=BATCH, seed=0, teacher=original, teacher_weight=0.9)
        before = task.quality(original, bf16=False)[0]
        with step.bar("convert, by layer", original.config.n_layers) as advance:
            model = made(api.convert_to_gqa(source, KV_HEADS, "merged", pieces, on_layer=advance))
        with tempfile.TemporaryDirectory() as folder:
            run = sitting(Path(folder) / "run", optim, device="cpu")
            outcome = train_on(model, task, optim, run)
            if outcome is None:  # Ctrl-C, which training takes to save its state first
                raise KeyboardInterrupt
            judged = [(0, outcome.before), *validations(Path(run.folder) / "log.csv")]
        with step.bar("time a step", 2) as advance:
            speeds = []
            for each in (original, model):
                speeds.append(speed(each))
                advance()
        trained = (
            f"converted on {sum(map(len, pieces)):,} tokens and taught by the original on {outcome.tokens:,}, "
            f"{outcome.tokens / record['tokens']:.2%} of its training"
        )
        compare(step, original, model, [before, outcome.before, outcome.after], speeds, trained)
        step.section.plot(
            lambda axis: draw_recovery(axis, judged, before),
            f"Held-out loss while the converted model is trained on: from {outcome.before:.3f} to {outcome.after:.3f} nats "
            f"per token, the original at {before:.3f}",
            "Held-out loss over the steps of training after conversion.",
        )


def compare(step: Any, original: Any, model: Any, nats: list[float], speeds: list[float], trained: str) -> None:
    """The table, and its figure."""
    heads, caches = original.config.n_kv_heads, [each.cache_bytes_per_token for each in (original, model)]
    times = (f"{speeds[0]:.2f}", "", f"{speeds[1]:.2f}")  # what trained weights do not change is timed once
    rows = [
        (name, f"{loss:.3f}", f"{caches[name != 'original']:,}", milliseconds)
        for name, loss, milliseconds in zip(("original", "converted", "uptrained"), nats, times, strict=True)
    ]
    step.say(f"{KV_HEADS} key-value heads instead of {heads}, {trained}:")
    step.say(f"{'':<12} {'nats/token':>10} {'cache, bytes/token':>19} {'ms/token':>9}")
    for name, loss, cache, milliseconds in rows:
        step.say(f"{name:<12} {loss:>10} {cache:>19} {milliseconds:>9}")
    step.headline(f"{caches[0] / caches[1]:.0f}× smaller", f"cache, for {nats[2] - nats[0]:+.3f} nats per token")
    section = step.section
    section.text(
        f"While it writes, a model reads the keys and values of everything before. This one has {heads} heads of them. They "
        f"are merged into {KV_HEADS}, each shared by {original.config.n_heads // KV_HEADS} query heads, in the checkpoint "
        "as it is; then the model is trained on for a moment, to find its way back."
    )
    section.table(
        ("", "loss, nats per token", "cache, bytes per token", "ms per token"),
        rows,
        f"Judged on {JUDGED:,} tokens of files that the model never saw; {trained}. Times at three quarters of the context.",
    )


def validations(log: Path) -> list[tuple[int, float]]:
    """(step, held-out nats per token) of a run's log."""
    with log.open(newline="") as file:
        return [(int(row["step"]), float(row["val_loss"])) for row in csv.DictReader(file) if row["val_loss"]]


def draw_recovery(axis: Any, judged: list[tuple[int, float]], original: float) -> None:
    axis.plot(*zip(*judged, strict=True), label=f"{KV_HEADS} key-value heads")
    axis.axhline(original, linestyle="--", color="C1", label="original")
    axis.set_xlabel("steps of training after conversion")
    axis.set_ylabel("nats per token")
    axis.margins(y=0.25)
    axis.legend()


def tokens_of(tokenizer: Any, record: dict[str, Any], count: int, *, held_out: bool = False) -> Any:
    """Tokens of library files, by the rule of the target's training: those it read, or those it did not."""
    import numpy as np

    from modicum.train.text import beginning, find_corpus, spread

    data = record["settings"]["data"]
    corpus = find_corpus(data["source"], tuple(data["suffixes"]), tuple(data["exclude"]), data["held_out"])
    paths = spread((corpus.held_out if held_out else corpus.training).values(), FILES)
    each = -(-count // len(paths))
    return np.array([i for path in paths for i in beginning(path, tokenizer.encode, each)], dtype=np.uint16)


def speed(model: Any) -> float:
    """Milliseconds of one step at three quarters of the context."""
    from modicum.train.evaluate import seconds_per_token

    return 1e3 * seconds_per_token(model, model.config.max_seq_len * 3 // 4, 24)
