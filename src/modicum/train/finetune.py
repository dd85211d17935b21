"""Fine-tuning by recipe (2305.13245, section 3.1): a trained model learns to write a target about an input."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modicum import api, resources
from modicum.assembly import build, empty, pick_device, pick_dtype
from modicum.checkpoint.hub import resolve
from modicum.checkpoint.io import read_checkpoint
from modicum.checkpoint.native import read_config
from modicum.checkpoint.record import RECORD, Record
from modicum.checkpoint.tokenizer import Tokenizer
from modicum.config import CaptionerConfig, EncoderDecoderConfig, VivitConfig
from modicum.errors import UsageError
from modicum.train.dropout import add_dropout
from modicum.train.loop import Training, check_fresh, console
from modicum.train.pairs import Pairs, PairsTask, encode_pairs
from modicum.train.recipe import OptimSection, RunSection, Section, require
from modicum.train.state import Progress, load_state, save_state, saved_progress
from modicum.train.task import TextFigures, digest


@dataclass(frozen=True, kw_only=True)
class SourceSection(Section):
    """The model to begin with: a folder, a hub id, or a name that ships with modicum. `dropout` is T5's."""

    source: str
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.dropout < 1, "dropout", self.dropout, "give the share that is dropped, from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class PairsSection(Section):
    """Files of lines {"input": text, "target": text}; `max_input` and `max_target` are tokens, special ones included."""

    pairs: str
    held_out: str
    max_input: int = 512
    max_target: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_input", "max_target"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class KeepingSection(RunSection):
    """`keep`: the weights with the "best" held-out loss at any validation, or the "last"."""

    keep: str = "best"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.keep in ("best", "last"), "keep", self.keep, "choose best or last")


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(Section):
    """A whole fine-tuning run."""

    model: SourceSection
    data: PairsSection
    optim: OptimSection
    run: KeepingSection


def is_finetuning(values: dict[str, Any]) -> bool:
    """Whether the tables of a recipe are about fine-tuning: they name a model to begin with, or pairs."""
    keys = (("model", "source"), ("data", "pairs"))
    return any(isinstance(values.get(section), dict) and key in values[section] for section, key in keys)


class KeptBest(Training):
    """A training that keeps the weights which the held-out examples have liked best, beside the state."""

    @property
    def best_path(self) -> Path:
        return self.folder / "best.safetensors"

    @property
    def _none(self) -> torch.optim.Optimizer:
        """It holds nothing of any weight: of the best ones nobody needs the moments."""
        return torch.optim.SGD(self.model.parameters())

    def go(self, resume: bool) -> tuple[Progress, TextFigures] | None:
        self.loss, self.step = float("inf"), 0
        if not resume:
            self.best_path.unlink(missing_ok=True)
        return super().go(resume)

    def _resumed(self) -> Progress:
        progress = super()._resumed()
        if self.best_path.exists():
            self.loss = saved_progress(self.best_path).notes["loss"]
        self.step = progress.step
        return progress

    def _step(self, step: int) -> float:
        loss = super()._step(step)
        self.step = step + 1
        return loss

    def validate(self) -> TextFigures:
        figures = super().validate()
        if figures.loss < self.loss:
            self.loss = figures.loss
            progress = Progress(step=self.step, fingerprint=self.fingerprint, notes={"loss": self.loss})
            save_state(self.best_path, self.model, self._none, progress)
        return figures

    def take_best(self) -> tuple[int, float]:
        """Put the best weights into the model: after how many steps they were, and their held-out loss."""
        load_state(self.best_path, self.model, self._none)
        best = saved_progress(self.best_path)
        return best.step, best.notes["loss"]


class FineTuning:
    """A fine-tuning recipe with its source and examples, all checked, nothing done.

    Raises:
        UsageError: a source that is no native language model or lacks what the recipe needs, or a wrong line of data.
        CheckpointError: the source cannot be read.
    """

    def __init__(self, recipe: FinetuneRecipe, name: str) -> None:
        self.recipe, self.name, self.folder = recipe, name, Path(recipe.run.folder)
        source = recipe.model.source
        self.checkpoint = read_checkpoint(resources.model_presets().get(source) or resolve(source))
        config = read_config(self.checkpoint.config)
        if isinstance(config, VivitConfig):
            raise UsageError(f"{source} is a ViViT, and pairs are text: give a language model as model.source")
        if isinstance(config, CaptionerConfig):
            raise UsageError(f"{source} is a captioner, and pairs are text: give a language model as model.source")
        self.config, self.t5 = config, isinstance(config, EncoderDecoderConfig)
        if recipe.model.dropout and not self.t5:
            raise UsageError(
                f"`dropout` is {recipe.model.dropout} and {source} is a decoder, which has none: set model.dropout=0"
            )
        self.tokenizer = self._tokenizer()
        data, context = recipe.data, config.max_seq_len
        if data.max_input + data.max_target > context:
            raise UsageError(
                f"{data.max_input} tokens of input and {data.max_target} of target follow each other and the context of "
                f"{source} is {context} tokens: lower data.max_input or data.max_target"
            )
        self.training, self.held_out = (self._pairs(path) for path in (data.pairs, data.held_out))

    def _tokenizer(self) -> Tokenizer:
        source, found = self.recipe.model.source, Tokenizer.from_files(self.checkpoint.files, self.checkpoint.config)
        if found is None:
            raise UsageError(f"{source} has no tokenizer files, and the pairs must be read with its own: add them")
        if not found.eos_ids:
            raise UsageError(f"{source} names no end-of-text token, which closes each target: set its `eos_token_id`")
        return found

    def _pairs(self, path: str) -> Pairs:
        data = self.recipe.data
        return encode_pairs(
            Path(path).expanduser(), self.tokenizer, data.max_input, data.max_target, continued=not self.t5
        )

    def describe(self) -> None:
        """Print what a run would do."""
        optim, model = self.recipe.optim, self.recipe.model
        n_parameters = sum(p.numel() for p in empty(self.config).parameters())
        per_step = optim.batch * optim.accumulate
        share = optim.steps * per_step / len(self.training.examples)
        dropout = f", dropout {model.dropout}" if model.dropout else ""
        console.print(f"source      {model.source}, {n_parameters:,} parameters{dropout}", soft_wrap=True, markup=False)
        self._describe_pairs()
        console.print(f"steps       {optim.steps} of {per_step} examples: {share:.1f} passes")
        console.print(f"rate        {optim.lr:.2e} at most, {optim.optimizer}")
        console.print(f"writes to   {self.folder}; of the weights it keeps the {self.recipe.run.keep}", soft_wrap=True)

    def _describe_pairs(self) -> None:
        data = self.recipe.data
        for title, path, pairs in (("data", data.pairs, self.training), ("held out", data.held_out, self.held_out)):
            console.print(
                f"{title:12}{len(pairs.examples):,} examples, from {path}; {pairs.cut_inputs:,} inputs cut at "
                f"{data.max_input} tokens, {pairs.cut_targets:,} targets at {data.max_target}",
                soft_wrap=True,
                markup=False,
            )

    def go(self, resume: bool) -> Path | None:
        """Train to the end, or until interrupted: the folder of the model, or None."""
        check_fresh(self.folder, resume)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._describe_pairs()
        training = self._prepare()
        result = training.go(resume)
        return None if result is None else self._export(training, *result)

    def _prepare(self) -> Training:
        recipe, optim = self.recipe, self.recipe.optim
        model = build(self.checkpoint, self.config, pick_device(recipe.run.device), torch.float32)
        # The source is its weights, not its name, and which weights are kept depends on when they are judged.
        kept = {"keep": recipe.run.keep, "validate_every": recipe.run.validate_every}
        settings = {**recipe.to_dict(), "source": digest(model), "kept": kept}
        if recipe.model.dropout:
            add_dropout(model, recipe.model.dropout)
        task = PairsTask(
            self.training.examples,
            self.held_out.examples,
            start=self.config.decoder_start_id if isinstance(self.config, EncoderDecoderConfig) else None,
            batch=optim.batch,
            accumulate=optim.accumulate,
            seed=recipe.run.seed,
        )
        kind = KeptBest if recipe.run.keep == "best" else Training
        return kind(self.name, model, task, optim=optim, run=recipe.run, settings=settings)

    def _export(self, training: Training, progress: Progress, judged: TextFigures) -> Path:
        """Write the model as a stock folder with all that lay beside its source, and the record of its training."""
        step, loss, model = progress.step, judged.loss, training.model
        if isinstance(training, KeptBest):
            step, loss = training.take_best()
        entry = {
            "recipe": self.name,
            "source": self.recipe.model.source,
            "examples": len(self.training.examples),
            "steps": progress.step,
            "kept_step": step,
            "tokens": progress.seen,
            "seconds": round(progress.seconds),
            "val_loss": loss,
            "settings": self.recipe.to_dict(),
        }
        model.stock_config = self.checkpoint.config
        model.files = {**self.checkpoint.files, RECORD: Record.of(self.checkpoint.files).finetuned(entry)}
        goal = self.folder / "model"
        api.save(model.to(pick_dtype("auto", self.checkpoint)), goal, overwrite=True)
        console.print(f"held out after step {step}: {TextFigures(loss).words()}; model in {goal}", soft_wrap=True)
        return goal
