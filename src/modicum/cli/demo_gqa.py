"""The demo's middle: the reference target is given fewer key-value heads, and trained on for some seconds."""

import json
import tempfile
from pathlib import Path
from typing import Any

KV_HEADS = 2
# Of text that the target was trained on: read to convert, and trained on again; and of text that it never saw.
CALIBRATION, TRAINING, JUDGED = 4096, 65_536, 8192
BATCH, WINDOW, STEPS = 4, 256, 40
FILES = 64


def share(console: Any, target: str, quick: bool = False) -> None:
    """Convert, uptrain briefly, and compare loss, cache and speed."""
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
    optim = schedule(
        (2 if quick else STEPS) * BATCH * WINDOW, batch=BATCH, window=WINDOW, original=record["settings"]["optim"]
    )
    starts = np.linspace(0, len(known) - WINDOW, 2 if quick else CALIBRATION // WINDOW, dtype=int)
    pieces = [known[at : at + WINDOW].tolist() for at in starts]

    def made(checkpoint: Any) -> Any:
        return build(checkpoint, read_config(checkpoint.config), torch.device("cpu"), torch.float32)

    with console.status("converting") as status:
        original = made(source)
        task = Task(CausalLM(WINDOW), known, unknown, None, batch=BATCH, seed=0, teacher=original, teacher_weight=0.9)
        before = task.quality(original, bf16=False)[0]
        model = made(api.convert_to_gqa(source, KV_HEADS, "merged", pieces))
        status.update("training on")
        with tempfile.TemporaryDirectory() as folder:
            run = sitting(Path(folder) / "run", optim, device="cpu")
            outcome: Any = train_on(model, task, optim, run)
        status.update("timing")
        speeds = [speed(each) for each in (original, model)]
    heads = original.config.n_kv_heads
    console.print(
        f"\nThe same target with {KV_HEADS} key-value heads instead of {heads}, converted on {CALIBRATION:,} tokens and "
        f"taught by it on {outcome.tokens:,}, {outcome.tokens / record['tokens']:.1%} of its training:"
    )
    console.print(f"  {'':<12} {'nats/token':>10} {'cache, bytes/token':>19} {'ms/token':>9}")
    for name, nats, each, milliseconds in (
        ("original", before, original, speeds[0]),
        ("converted", outcome.before, model, None),
        ("uptrained", outcome.after, model, speeds[1]),
    ):
        time = "" if milliseconds is None else f"{milliseconds:.2f}"
        console.print(f"  {name:<12} {nats:>10.3f} {each.cache_bytes_per_token:>19,} {time:>9}")


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
