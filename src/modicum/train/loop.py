"""The training loop: steps, validation, saved states; what is trained, and on what, is the caller's."""

import csv
import hashlib
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from modicum.errors import UsageError
from modicum.train.optim import learning_rate, make_optimizer
from modicum.train.recipe import OptimSection, RunSection
from modicum.train.state import Progress, load_state, save_state, saved_progress

console = Console(stderr=True)


class Work(Protocol):
    """What is trained on and judged by, in numbered batches: see `Task`, and `PairsTask`."""

    tokens_per_batch: int

    def loss(self, model: Any, number: int) -> torch.Tensor: ...

    def quality(self, model: Any, *, bf16: bool) -> tuple[float, float | None]: ...

    def identity(self) -> dict[str, Any]: ...


class Training:
    """A model on its way through a task. Its folder holds the state to resume from, and the log.

    Args:
        model: on its device.
        settings: whatever else makes this run what it is; a run is resumed only with the same.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        task: Work,
        *,
        optim: OptimSection,
        run: RunSection,
        settings: dict[str, Any],
    ) -> None:
        self.name, self.model, self.task, self.optim, self.run = name, model, task, optim, run
        self.folder = Path(run.folder)
        self.tokens_per_step = optim.accumulate * task.tokens_per_batch
        self.optimizer = make_optimizer(model.train(), optim)
        identity = {**settings, "run": {"seed": run.seed}, **task.identity()}
        self.fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @property
    def state_path(self) -> Path:
        return state_path(self.folder)

    def begin(self, notes: dict[str, float]) -> None:
        """Save the state before the first step, for models that are costly to make: `go(resume=True)` starts from it.

        Args:
            notes: figures of what the run begins with, kept in its `Progress`.
        """
        save_state(self.state_path, self.model, self.optimizer, Progress(fingerprint=self.fingerprint, notes=notes))

    def go(self, resume: bool) -> tuple[Progress, float, float | None] | None:
        """Train to the end: how far it came, held-out nats per token and bits per byte; None if interrupted.

        Raises:
            UsageError: the state to resume from is another run's, or the loss is no longer a number.
            CheckpointError: `resume` without a saved state.
        """
        progress = self._resumed() if resume else Progress(fingerprint=self.fingerprint)
        limit, start = self.run.max_seconds, time.perf_counter()
        with interruptible() as interrupted, Reporter(self, progress) as reporter:
            while progress.step < self.optim.steps:
                began = time.perf_counter()
                loss = self._step(progress.step)
                progress.step += 1
                progress.tokens += self.tokens_per_step
                progress.seconds += time.perf_counter() - began
                reporter.step(progress, loss, learning_rate(self.optim, progress.step - 1))
                last = progress.step == self.optim.steps
                # Before the state is saved: what comes after it, a resumed run would miss. The last one is the result's.
                if progress.step % self.run.validate_every == 0 and not last:
                    reporter.validated(progress, *self.validate())
                late = limit is not None and time.perf_counter() - start >= limit and not last
                if interrupted or late or progress.step % self.run.save_every == 0 or last:
                    save_state(self.state_path, self.model, self.optimizer, progress)
                if interrupted or late:
                    console.print(f"stopped after step {progress.step}, saved: continue with --resume")
                    return None
            figures = self.validate()
            reporter.validated(progress, *figures)
        return progress, *figures

    def _resumed(self) -> Progress:
        progress = saved_progress(self.state_path)
        if progress.fingerprint != self.fingerprint:
            raise UsageError(
                f"the run in {self.folder} was begun with other settings or data: resume it with the same ones"
            )
        load_state(self.state_path, self.model, self.optimizer)
        return progress

    def _step(self, step: int) -> float:
        optim = self.optim
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(optim, step)
        total = 0.0
        for part in range(optim.accumulate):
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=optim.bf16):
                loss = self.task.loss(self.model, step * optim.accumulate + part)
            (loss / optim.accumulate).backward()
            total += loss.item() / optim.accumulate
        if optim.optimizer == "adamw":  # Adafactor clips its updates itself
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not math.isfinite(total):
            raise UsageError(
                f"the loss of step {step} is {total}: lower the learning rate; the last saved state is unharmed"
            )
        return total

    def validate(self) -> tuple[float, float | None]:
        """Held-out nats per token, and bits per byte where it is known of how many bytes the text is."""
        return self.task.quality(self.model, bf16=self.optim.bf16)


def state_path(folder: Path) -> Path:
    """Where a run's folder keeps the state to resume from."""
    return folder / "state.safetensors"


def check_fresh(folder: Path, resume: bool) -> None:
    """Refuse a folder in which a run has begun, unless it is to be resumed."""
    if not resume and state_path(folder).exists():
        raise UsageError(f"{folder} holds a run already: add --resume, or remove it")


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM finish the step under way: they only fill the list that this yields."""
    received: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.signal(kind, lambda number, _: received.append(number)) for kind in kinds}
    try:
        yield received
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


LOG_COLUMNS = ["step", "tokens", "loss", "lr", "tokens_per_second", "val_loss", "bits_per_byte"]


def logged_until(path: Path, step: int) -> list[list[str]]:
    """What a log holds of the steps up to `step`: those after the last saved state are about to be run again."""
    if step == 0 or not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.reader(file) if row and row[0].isdigit() and int(row[0]) <= step]


class Reporter:
    """A progress bar in a terminal, lines elsewhere; a CSV of every logged step; TensorBoard if asked for."""

    def __init__(self, training: Training, progress: Progress) -> None:
        self.steps, self.log_every, self.first = training.optim.steps, training.run.log_every, progress.step
        name, path = training.name, training.folder / "log.csv"
        kept = logged_until(path, progress.step)
        self.file = path.open("w", newline="")
        self.csv = csv.writer(self.file)
        self.csv.writerows([LOG_COLUMNS, *kept])
        self.writer: Any = None
        if training.run.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(training.folder / "tensorboard")
        self.mean = 0.0
        self.bar = Bar(
            TextColumn(name),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not sys.stderr.isatty(),
        )
        self.task = self.bar.add_task(name, total=self.steps, completed=progress.step, note="")

    def __enter__(self) -> "Reporter":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        self.file.close()
        if self.writer is not None:
            self.writer.close()

    def step(self, progress: Progress, loss: float, rate: float) -> None:
        """Report a finished step."""
        seen = progress.step - self.first
        self.mean += (loss - self.mean) / min(seen, 50)
        speed = progress.tokens / progress.seconds
        note = f"loss {self.mean:.3f}  {speed:,.0f} tokens/s"
        self.bar.update(self.task, completed=progress.step, note=note)
        if progress.step % self.log_every:
            return
        self.csv.writerow([progress.step, progress.tokens, f"{loss:.5f}", f"{rate:.3e}", round(speed), "", ""])
        self.file.flush()
        if self.writer is not None:
            self.writer.add_scalar("loss", loss, progress.tokens)
            self.writer.add_scalar("lr", rate, progress.tokens)
        if self.bar.disable:
            left = (self.steps - progress.step) * progress.seconds / progress.step
            console.print(f"step {progress.step}/{self.steps}  {note}  {left / 60:.1f} min left")

    def validated(self, progress: Progress, loss: float, bits_per_byte: float | None) -> None:
        """Report a validation."""
        bits = "" if bits_per_byte is None else f"{bits_per_byte:.5f}"
        self.csv.writerow([progress.step, progress.tokens, "", "", "", f"{loss:.5f}", bits])
        self.file.flush()
        if self.writer is not None:
            self.writer.add_scalar("val_loss", loss, progress.tokens)
        console.print(f"step {progress.step}: held out {quality_line(loss, bits_per_byte)}")


def quality_line(loss: float, bits_per_byte: float | None) -> str:
    return f"{loss:.4f} nats/token" + ("" if bits_per_byte is None else f", {bits_per_byte:.4f} bits/byte")
