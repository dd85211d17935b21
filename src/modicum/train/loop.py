"""The training loop: steps, validation, saved states; what is trained, and on what, is the caller's."""

import csv
import hashlib
import json
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from modicum.errors import MissingExtraError, UsageError
from modicum.parallel.data import Processes
from modicum.train.optim import Plan, plan_of
from modicum.train.recipe import OptimSection, RunSection
from modicum.train.state import Progress, load_state, previous_path, save_state, saved_progress, usable_state
from modicum.train.task import digest

console = Console(stderr=True)


class Figures(Protocol):
    """What held-out data says of a model, in the measures of its task."""

    def words(self) -> str: ...

    def logged(self) -> Sequence[float | None]:
        """One value for each of the task's `measures`."""
        ...


class Work(Protocol):
    """What is trained on and judged by, in numbered batches: see `Task`, and `ClipsTask`.

    unit, per_batch: what a batch is counted in, and how many of it all processes have in theirs together.
    measures: names of what `quality` finds, columns of the log.
    waited: seconds that this process has waited for data so far; None where data is just there.
    """

    unit: str
    per_batch: int
    measures: tuple[str, ...]

    @property
    def waited(self) -> float | None: ...

    def loss(self, model: Any, number: int) -> torch.Tensor: ...

    def quality(self, model: Any, *, bf16: bool) -> Any: ...

    def identity(self) -> dict[str, Any]: ...


class Training:
    """A model on its way through a task. Its folder holds the state to resume from, and the log.

    Args:
        model: on its device, equal in every process.
        task: of several processes each has its own share of it.
        settings: whatever else makes this run what it is; a run is resumed only with the same.
        notes: figures of what the run begins with, kept in its `Progress`.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        task: Any,
        *,
        optim: OptimSection | Plan,
        run: RunSection,
        settings: dict[str, Any],
        processes: Processes | None = None,
        notes: dict[str, float] | None = None,
    ) -> None:
        self.notes = notes or {}
        self.name, self.model, self.task, self.run = name, model, task, run
        self.plan = optim if isinstance(optim, Plan) else plan_of(optim)
        self.processes = Processes() if processes is None else processes
        self.folder = Path(run.folder)
        self.per_step = self.plan.accumulate * task.per_batch
        self.optimizer = self.plan.optimizer(model.train())
        self.average: AveragedModel | None = None
        if self.plan.average:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self.plan.average))
        identity = {**settings, "run": {"seed": run.seed}, **task.identity()}
        self.fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @property
    def state_path(self) -> Path:
        return state_path(self.folder)

    @property
    def judged_model(self) -> Any:
        """The averaged weights where there are some, else the model's."""
        return self.model if self.average is None else self.average.module

    def begin(self, notes: dict[str, float]) -> None:
        """Save the state before the first step, for models that are costly to make: `go(resume=True)` starts from it.

        Args:
            notes: figures of what the run begins with, kept in its `Progress`.
        """
        self._save(Progress(fingerprint=self.fingerprint, notes=notes))

    def go(self, resume: bool) -> tuple[Progress, Any] | None:
        """Train to the end: how far it came, and the task's figures; None if interrupted.

        Raises:
            UsageError: the state to resume from is another run's, or the loss is no longer a number.
            CheckpointError: `resume` without a saved state.
        """
        progress = self._resumed() if resume else Progress(fingerprint=self.fingerprint, notes=self.notes)
        if self.processes.world > 1:
            self.processes.check_equal(settings=self.fingerprint, step=progress.step, weights=digest(self.model))
        limit, start, steps = self.run.max_seconds, time.perf_counter(), self.plan.steps
        reporting = Reporter(self, progress) if self.processes.first else Silence()
        with interruptible() as interrupted, reporting as reporter:
            while progress.step < steps:
                began = time.perf_counter()
                loss = self._step(progress.step)
                progress.step += 1
                progress.seen += self.per_step
                progress.seconds += time.perf_counter() - began
                reporter.step(progress, loss, self.plan.rate(progress.step - 1))
                last = progress.step == steps
                # Before the state is saved: what comes after it, a resumed run would miss. The last one is the result's.
                if progress.step % self.run.validate_every == 0 and not last:
                    reporter.validated(progress, self.validate())
                late = limit is not None and time.perf_counter() - start >= limit and not last
                # A signal reaches processes at different steps: all stop after the same one.
                stop = self.processes.any(bool(interrupted) or late)
                if stop or progress.step % self.run.save_every == 0 or last:
                    self._save(progress)
                if stop:
                    console.print(f"stopped after step {progress.step}, saved: continue with --resume")
                    return None
            figures = self.validate()
            reporter.validated(progress, figures)
        return progress, figures

    def _save(self, progress: Progress) -> None:
        if self.processes.first:
            save_state(self.state_path, self.model, self.optimizer, progress, self.average_module, keep_previous=True)
        self.processes.wait()

    @property
    def average_module(self) -> torch.nn.Module | None:
        return None if self.average is None else self.average.module

    def _resumed(self) -> Progress:
        path, trouble = usable_state(self.state_path)
        progress = saved_progress(path)
        if progress.fingerprint != self.fingerprint:
            raise UsageError(
                f"the run in {self.folder} was begun with other settings or data: resume it with the same ones"
            )
        if trouble is not None:
            console.print(f"{trouble}; goes on from the state before it, after step {progress.step}", soft_wrap=True)
        load_state(path, self.model, self.optimizer, self.average_module)
        if self.average is not None:
            self.average.n_averaged.fill_(progress.step)
        return progress

    def _step(self, step: int) -> float:
        plan = self.plan
        for group in self.optimizer.param_groups:
            group["lr"] = plan.rate(step)
        total = 0.0
        for part in range(plan.accumulate):
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=plan.bf16):
                loss = self.task.loss(self.model, step * plan.accumulate + part)
            (loss / plan.accumulate).backward()
            total += loss.item() / plan.accumulate
        self.processes.average_gradients(self.model)
        total = self.processes.mean(total)
        if plan.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), plan.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.model)
        if not math.isfinite(total):
            raise UsageError(
                f"the loss of step {step} is {total}: lower the learning rate; the last saved state is unharmed"
            )
        return total

    def validate(self) -> Any:
        """The task's figures of held-out data."""
        return self.task.quality(self.judged_model, bf16=self.plan.bf16)


def state_path(folder: Path) -> Path:
    """Where a run's folder keeps the state to resume from."""
    return folder / "state.safetensors"


def check_fresh(folder: Path, resume: bool) -> None:
    """Refuse a folder in which a run has begun, unless it is to be resumed."""
    path = state_path(folder)
    if not resume and (path.exists() or previous_path(path).exists()):
        raise UsageError(f"{folder} holds a run already: add --resume, or remove it")


def remove_state(folder: Path) -> None:
    """Once what it was saved for is done."""
    state_path(folder).unlink()
    previous_path(state_path(folder)).unlink(missing_ok=True)


@contextmanager
def heard_from(processes: Processes) -> Iterator[None]:
    """Of several processes only the first says anything."""
    before = console.quiet
    console.quiet = before or not processes.first
    try:
        yield
    finally:
        console.quiet = before


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


def logged_until(path: Path, step: int) -> list[list[str]]:
    """What a log holds of the steps up to `step`: those after the last saved state are about to be run again."""
    if step == 0 or not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.reader(file) if row and row[0].isdigit() and int(row[0]) <= step]


class Reporter:
    """A progress bar in a terminal, lines elsewhere; a CSV of every logged step; TensorBoard if asked for."""

    def __init__(self, training: Training, progress: Progress) -> None:
        self.steps, self.log_every, self.first = training.plan.steps, training.run.log_every, progress.step
        self.work, self.waited = training.task, training.task.waited
        name, path = training.name, training.folder / "log.csv"
        kept = logged_until(path, progress.step)
        self.file = path.open("w", newline="")
        self.csv = csv.writer(self.file)
        unit, share = self.work.unit, [] if self.waited is None else ["waiting"]
        columns = ["step", unit, "loss", "lr", f"{unit}_per_second", *share, *self.work.measures]
        self.before = len(columns) - len(self.work.measures)
        self.csv.writerows([columns, *kept])
        self.file.flush()
        self.writer: Any = None
        if training.run.tensorboard:
            self.writer = summary_writer(training.folder / "tensorboard", progress.seen)
        self.mean = 0.0
        # Of this sitting: what an earlier one waited for is not known.
        self.seconds = progress.seconds
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
        speed = progress.seen / progress.seconds
        note = f"loss {self.mean:.3f}  {speed:,.{1 if speed < 100 else 0}f} {self.work.unit}/s"
        waiting = self.waiting(progress.seconds)
        if waiting is not None:
            note += f"  {waiting:.0%} waiting for data"
        self.bar.update(self.task, completed=progress.step, note=note)
        if progress.step % self.log_every:
            return
        speed_and_share = [f"{speed:.{1 if speed < 100 else 0}f}", *([] if waiting is None else [f"{waiting:.4f}"])]
        row = [progress.step, progress.seen, f"{loss:.5f}", f"{rate:.3e}", *speed_and_share]
        self.csv.writerow([*row, *[""] * len(self.work.measures)])
        self.file.flush()
        if self.writer is not None:
            shown = {"loss": loss, "lr": rate, f"{self.work.unit}_per_second": speed, "waiting": waiting}
            self.plot(shown, progress)
        if self.bar.disable:
            left = (self.steps - progress.step) * progress.seconds / progress.step
            console.print(f"step {progress.step}/{self.steps}  {note}  {left / 60:.1f} min left", soft_wrap=True)

    def waiting(self, seconds: float) -> float | None:
        """The share of this sitting's steps that was spent waiting for data."""
        if self.waited is None:
            return None
        return (self.work.waited - self.waited) / max(seconds - self.seconds, 1e-9)

    def plot(self, values: dict[str, float | None], progress: Progress) -> None:
        for name, value in values.items():
            if value is not None:
                self.writer.add_scalar(name, value, progress.seen)
        # A run that is killed keeps what it has drawn.
        self.writer.flush()

    def validated(self, progress: Progress, figures: Any) -> None:
        """Report a validation."""
        values = figures.logged()
        shown = ["" if value is None else f"{value:.5f}" for value in values]
        self.csv.writerow([progress.step, progress.seen, *[""] * (self.before - 2), *shown])
        self.file.flush()
        if self.writer is not None:
            self.plot(dict(zip(self.work.measures, values, strict=True)), progress)
        console.print(f"step {progress.step}: held out {figures.words()}", soft_wrap=True)


def summary_writer(folder: Path, seen: int) -> Any:
    """TensorBoard's. Of a run that is resumed, what was drawn after the saved state is drawn again.

    Raises:
        MissingExtraError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtraError("tensorboard", "train", "run.tensorboard") from None
    return SummaryWriter(folder, purge_step=seen or None)


class Silence:
    """The reporter of all processes but the first."""

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def step(self, progress: Progress, loss: float, rate: float) -> None:
        pass

    def validated(self, progress: Progress, figures: Any) -> None:
        pass
