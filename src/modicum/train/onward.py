"""Training a trained model on: a fresh optimizer, a schedule that warms up again, and a run that can be resumed."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.errors import UsageError
from modicum.train.loop import Training, check_fresh
from modicum.train.recipe import OptimSection, RunSection

# The peak, as a share of the original training's, and where that is unknown. Low: the original's schedule ended low, and
# what a higher rate shakes up does not settle again in a few per cent of its steps. Its moments are gone: a short warm-up
# makes new ones.
LR_SHARE = 0.1
LR = 1e-4
WARMUP = 0.05
# T5 (1910.10683) and its descendants were trained for about so many steps.
T5_STEPS = 1_000_000


def schedule(
    tokens: int,
    *,
    batch: int,
    window: float,
    lr: float | None = None,
    original: dict[str, Any] | None = None,
    t5: bool = False,
) -> OptimSection:
    """The optimizer and the steps that a budget of `tokens` is worth.

    AdamW with a short warm-up and a cosine down to a floor; for a T5 Adafactor on T5's schedule, or at a constant `lr`.

    Args:
        original: the `optim` table of the original training; its decay, betas and clipping are kept.

    Raises:
        UsageError: less than a step.
    """
    given = original or {}
    kept = ("accumulate", "weight_decay", "beta1", "beta2", "clip", "bf16", "floor")
    values = {name: given[name] for name in kept if name in given}
    per_step = batch * values.get("accumulate", 1) * window
    steps = round(tokens / per_step)
    if steps < 1:
        raise UsageError(
            f"a budget of {tokens:,} tokens is less than a step of {per_step:,.0f}: raise it, or give a smaller batch or "
            "window"
        )
    if t5:
        rate = {"lr": 1.0, "t5_step": T5_STEPS} if lr is None else {"lr": lr, "floor": 1.0}
        return OptimSection(**{**values, **rate}, steps=steps, batch=batch, warmup=0, optimizer="adafactor")
    peak = lr or (LR_SHARE * given["lr"] if "lr" in given else LR)
    return OptimSection(**values, steps=steps, batch=batch, lr=peak, warmup=math.ceil(WARMUP * steps))


def sitting(folder: Path, optim: OptimSection, seed: int = 0, device: str = "auto") -> RunSection:
    """Saved twenty times, judged four times."""
    save, validate = max(1, optim.steps // 20), max(1, optim.steps // 4)
    return RunSection(folder=str(folder), device=device, seed=seed, save_every=save, validate_every=validate)


@dataclass(frozen=True)
class Outcome:
    """What `train_on` did. `before` and `after` are held-out nats per token."""

    steps: int
    tokens: int
    seconds: float
    before: float
    after: float
    bits_per_byte: float | None  # of text, where it is known of how many bytes it is
    notes: dict[str, float]


def train_on(
    model: Any,
    task: Any,
    optim: OptimSection,
    run: RunSection,
    *,
    settings: dict[str, Any] | None = None,
    notes: dict[str, float] | None = None,
    resume: bool = False,
) -> Outcome | None:
    """Train a model, converted or not, in place; None if interrupted.

    The state before the first step is saved too, so that the conversion need not be made again, or alike, to resume.

    Args:
        model: on its device, in float32. To resume any of the same shapes will do.
        task: work (`train.loop.Work`) in batches of `optim.batch`, whose figures have a `loss`.
        settings: whatever else makes this run what it is; it is resumed only with the same.
        notes: figures that are kept with the run.

    Raises:
        UsageError: the folder holds a run and `resume` is not set, or another run's.
        CheckpointError: `resume` without a saved state.
    """
    check_fresh(Path(run.folder), resume)
    identity = {"settings": settings, "optim": optim.to_dict()}
    training = Training("uptraining", model, task, optim=optim, run=run, settings=identity)
    if not resume:
        Path(run.folder).mkdir(parents=True, exist_ok=True)
        training.begin({**(notes or {}), "before": training.validate().loss})
    result = training.go(resume=True)
    if result is None:
        return None
    progress, after = result
    return Outcome(
        progress.step,
        progress.seen,
        progress.seconds,
        progress.notes["before"],
        after.loss,
        getattr(after, "bits_per_byte", None),
        progress.notes,
    )
