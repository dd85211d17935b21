"""`modicum train` on a video recipe: from videos and a start to a folder that `modicum classify` takes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from modicum import api
from modicum.checkpoint.record import RECORD
from modicum.classification.predict import Protocol
from modicum.config import VivitConfig
from modicum.errors import UsageError
from modicum.parallel.data import Processes, joined
from modicum.train.loop import Training, check_fresh, console, heard_from
from modicum.train.optim import Plan
from modicum.train.state import Progress
from modicum.train.video.build import fresh_model, hold_less
from modicum.train.video.describe import describe
from modicum.train.video.judge import Judge, VideoFigures
from modicum.train.video.recipe import VideoOptimSection, VideoRecipe, rate
from modicum.train.video.report import group_means, print_classes, write_report
from modicum.train.video.shuffle import Augmentation
from modicum.train.video.sources import SYNTHETIC, groups_of, read_videos, shuffles, write_synthetic
from modicum.train.video.task import ClipsTask, ClipsWork
from modicum.video.datasets import VideoDataset
from modicum.video.loader import ClipLoader
from modicum.video.pixels import import_av
from modicum.vivit.model import Vivit

LISTED = 10  # broken or missing videos


class SharedTraining(Training):
    """A training that may go on in another number of processes, or parts, than it began in."""

    def _resumed(self) -> Progress:
        progress = super()._resumed()
        if progress.notes != self.notes:
            before, now = (
                f"{notes['processes']:.0f} processes x {notes['accumulate']:.0f} parts"
                for notes in (progress.notes, self.notes)
            )
            console.print(
                f"begun in {before}, goes on in {now}: the same batches, but not bit for bit, as each part draws for itself",
                soft_wrap=True,
            )
        return progress


class VideoTraining:
    """A video recipe, checked as far as it can be without its videos.

    Args:
        expected: what the recipe's header says of the accuracy to expect.

    Raises:
        UsageError: a model that cannot be built.
        MissingExtraError: PyAV is not installed.
    """

    def __init__(self, recipe: VideoRecipe, name: str, expected: str | None = None) -> None:
        self.recipe, self.name, self.expected = recipe, name, expected
        self.folder = Path(recipe.run.folder)
        recipe.model.config(recipe.clips, {"": 2})
        import_av()

    def describe(self) -> None:
        """Print what a run would do."""
        with joined(self.recipe.run.device) as processes, heard_from(processes):
            describe(self.recipe, self.folder, processes, self.expected)

    def go(self, resume: bool) -> Path | None:
        """Train to the end, or until interrupted: the folder of the model, or None.

        Raises:
            UsageError: data that cannot be used, a batch that cannot be shared out, or another run's folder.
        """
        check_fresh(self.folder, resume)
        with joined(self.recipe.run.device) as processes, heard_from(processes):
            self.recipe.micro_batch(processes.world)
            training, held_out = self._videos(processes)
            self.folder.mkdir(parents=True, exist_ok=True)
            report_missing(training, held_out)
            config = self.recipe.model.config(self.recipe.clips, training.heads)
            run = self._training(config, training, held_out, processes, resume)
            result = run.go(resume)
            broken = self._broken(run.task.loader, processes)
            if result is None:
                return None
            figures = self._judge(config, held_out, self.recipe.views.views, processes)(
                run.judged_model, bf16=self.recipe.optim.bf16
            )
            if not processes.first:
                return self.folder / "model"
            return self._export(run, result[0], figures, len(broken))

    def _videos(self, processes: Processes) -> tuple[VideoDataset, VideoDataset]:
        if self.recipe.data.format == SYNTHETIC:
            if processes.first:
                write_synthetic(self.recipe.data)
            processes.wait()
        return read_videos(self.recipe.data)

    def _judge(
        self, config: VivitConfig, held_out: VideoDataset, views: tuple[int, ...], processes: Processes
    ) -> Judge:
        recipe = self.recipe
        protocol = Protocol(
            views=(views[0], views[1]),
            stride=recipe.clips.stride,
            fps=recipe.clips.clock,
            short_side=recipe.views.short_side or recipe.augment.short_side,
        )
        return Judge(
            held_out,
            config,
            protocol,
            workers=recipe.data.workers,
            batch=recipe.micro_batch(processes.world),
            processes=processes,
            shuffle=(recipe.run.seed,) if shuffles(recipe.data) else None,
        )

    def _training(
        self,
        config: VivitConfig,
        training: VideoDataset,
        held_out: VideoDataset,
        processes: Processes,
        resume: bool,
    ) -> Training:
        recipe = self.recipe
        optim, clips = recipe.optim, recipe.clips
        augmentation = Augmentation(recipe.augment, clips.shape, shuffles(recipe.data))
        loader = loader_of(recipe, training, augmentation, recipe.augment.short_side, processes)
        task = ClipsTask(recipe, loader, self._judge(config, held_out, (1, 1), processes), processes)
        # What the state holds need not be read, or downloaded, again.
        section = replace(recipe.model, start=None) if resume else recipe.model
        model = fresh_model(config, section, recipe.run.seed).to(processes.device)
        if optim.checkpointing:
            hold_less(model)
        return training_of(recipe, self.name, model, task, self._settings())

    def _settings(self) -> dict[str, Any]:
        """What makes the run what it is. How many decode, and where files lie, changes nothing."""
        values = self.recipe.to_dict()
        for name in ("annotations", "root", "held_out_annotations", "held_out_root", "labels", "workers", "prefetch"):
            values["data"].pop(name)
        for name in ("checkpointing", "accumulate"):
            values["optim"].pop(name)
        return values

    def _broken(self, loader: ClipLoader, processes: Processes) -> dict[str, str]:
        """Videos that no process could read in this sitting, and why; some of them are printed."""
        broken: dict[str, str] = {}
        for found in processes.gathered(loader.broken):
            broken |= found
        if broken:
            say(f"{len(broken):,} of {len(loader.dataset):,} videos could not be read; others stood in:")
            for _, reason in sorted(broken.items())[:LISTED]:
                say(f"  {reason}")
        return broken

    def _export(self, run: Training, progress: Progress, figures: VideoFigures, n_broken: int) -> Path:
        """Write the model with its labels and the record of its training, and say how good it is."""
        recipe, dataset = self.recipe, run.task.loader.dataset
        groups = groups_of(recipe.data)
        write_report(self.folder, figures, dataset, groups)
        record = {
            "recipe": self.name,
            "steps": progress.step,
            "epochs": recipe.optim.epochs,
            "clips": progress.seen,
            "seconds": round(progress.seconds),
            "processes": run.processes.world,
            "views": list(recipe.views.views),
            **figures.named(),
            "videos": {"train": len(dataset), "held_out": figures.n},
            "groups": group_means(figures, dataset, groups),
            "broken": {"train": n_broken, "held_out": len(figures.broken)},
            "settings": recipe.to_dict(),
        }
        model: Vivit = run.judged_model
        model.labels = dataset.labels or None
        model.files = {RECORD: json.dumps(record, indent=2).encode()}
        goal = self.folder / "model"
        api.save(model.to("cpu", getattr(torch, recipe.model.save_dtype)), goal, overwrite=True)
        print_classes(figures, dataset, groups)
        for reason in list(figures.broken.values())[:LISTED]:
            say(f"  not judged: {reason}")
        views = "x".join(map(str, recipe.views.views))
        console.print(f"held out, {views} views: {figures.words()}; model in {goal}", soft_wrap=True)
        return goal


def loader_of(
    recipe: Any, dataset: VideoDataset, augment: Augmentation | None, short_side: int | None, processes: Processes
) -> ClipLoader:
    """This process's share of a data set, as the tables `[clips]`, `[optim]`, `[data]` and `[run]` of a recipe say."""
    clips, optim, data = recipe.clips, recipe.optim, recipe.data
    return ClipLoader(
        dataset,
        num_frames=clips.num_frames,
        stride=clips.stride,
        fps=clips.clock,
        size=clips.shape,
        augment=augment,
        batch=optim.batch,
        parts=optim.accumulate,
        seed=recipe.run.seed,
        workers=data.workers,
        prefetch=data.prefetch,
        rank=processes.rank,
        world=processes.world,
        short_side=short_side,
    )


def training_of(recipe: Any, name: str, model: Any, task: ClipsWork, settings: dict[str, Any]) -> Training:
    """The training of a model on clips, epochs turned into steps."""
    processes, optim, per_epoch = task.processes, recipe.optim, task.loader.batches_per_epoch
    return SharedTraining(
        name,
        model,
        task,
        optim=plan(optim, per_epoch),
        run=replace(recipe.run, validate_every=recipe.run.validate_every * per_epoch),
        settings=settings,
        processes=processes,
        notes={"processes": processes.world, "accumulate": optim.accumulate},
    )


def plan(optim: VideoOptimSection, per_epoch: int) -> Plan:
    """What the loop does, in steps.

    Raises:
        UsageError: less than a step.
    """
    steps = round(optim.epochs * per_epoch)
    if steps < 1:
        raise UsageError(f"{optim.epochs} epochs of {per_epoch} steps are less than one: raise optim.epochs")
    return Plan(
        steps=steps,
        accumulate=optim.accumulate,
        rate=lambda step: rate(optim, step, steps, per_epoch),
        optimizer=lambda model: make_optimizer(model, optim),
        clip=optim.clip,
        bf16=optim.bf16,
        average=optim.ema,
    )


def make_optimizer(model: torch.nn.Module, optim: VideoOptimSection) -> torch.optim.Optimizer:
    """SGD with momentum, as the paper, or AdamW; where weights decay, only matrices do."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if optim.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), fused=True)


def report_missing(*datasets: VideoDataset) -> None:
    """What annotations list and nobody has."""
    for dataset in datasets:
        if dataset.missing:
            listed = len(dataset) + len(dataset.missing)
            say(f"{dataset.name}: {len(dataset.missing):,} of {listed:,} are missing:")
            for name, reason in dataset.missing[:LISTED]:
                say(f"  {name}: {reason}")


def say(text: str) -> None:
    console.print(text, soft_wrap=True, markup=False, highlight=False)
