"""Uptraining (2305.13245, section 2.1): convert, then go on with the pre-training for a few per cent of its tokens.

From folder to folder. With models and tokens already in memory `train.onward` does the same.
"""

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress as Bar

from modicum import api, resources
from modicum.assembly import build, pick_device, pick_dtype
from modicum.checkpoint.hub import resolve
from modicum.checkpoint.io import check_goal, read_checkpoint
from modicum.checkpoint.native import read_config
from modicum.checkpoint.record import RECORD, Record
from modicum.checkpoint.tokenizer import Tokenizer
from modicum.config import EncoderDecoderConfig, VivitConfig, with_kv_heads
from modicum.errors import UsageError
from modicum.gqa.convert import CALIBRATED, check, check_method
from modicum.gqa.heads import places
from modicum.lm.objective import objective_of
from modicum.train.loop import check_fresh, console, remove_state, state_path
from modicum.train.onward import Outcome, schedule, sitting, train_on
from modicum.train.recipe import DataSection, OptimSection, Section, require
from modicum.train.run import size_of
from modicum.train.state import usable_state
from modicum.train.task import Task, digest, teacher_trouble
from modicum.train.text import SUFFIXES, find_corpus, tokenize

FRACTION = 0.05
T5_WINDOW = 568  # which make the 512 inputs and 114 targets of its training
# What a judgement reads at most.
HELD_OUT_TOKENS = 200_000
# Fields of a recipe's data that do not apply: the source brings its tokenizer.
NOT_OURS = ("tokenizer", "vocab_size")


@dataclass(frozen=True, kw_only=True)
class Settings(Section):
    """What to do; None is "as the original training was done", where that is known.

    fraction: of the original tokens; or `tokens`, the budget itself. original_tokens: what the source does not say.
    calibration: a text for `aligned` and `merged`; pieces of the training text if not given.
    teacher: a model to distil from, with `teacher_weight` of the loss.
    control: leave the source as it is, and train it for the same steps on the same batches; heads and method are not used.
    held_out: a share of the files, or where others are.
    """

    kv_heads: int | None = None
    method: str = "merged"
    data: tuple[str, ...]
    fraction: float | None = None
    tokens: int | None = None
    original_tokens: int | None = None
    calibration: str | None = None
    teacher: str | None = None
    teacher_weight: float = 0.9
    control: bool = False
    lr: float | None = None
    batch: int | None = None
    window: int | None = None
    seed: int = 0
    held_out: float | str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fraction is not None and self.tokens is not None:
            raise UsageError("`fraction` and `tokens` both give the budget: leave one of them out")
        if self.kv_heads is None and not self.control:
            raise UsageError("`kv_heads` is missing: give the number of key-value heads, or ask for the control")
        check_method(self.method)
        if self.calibration is not None and self.method not in CALIBRATED:
            raise UsageError(f"calibration is for {' and '.join(CALIBRATED)}: leave it out with `{self.method}`")
        if self.calibration is not None and not Path(self.calibration).is_file():
            raise UsageError(f"calibration text {self.calibration} does not exist: give a text file, or leave it out")
        for name in ("fraction", "tokens", "original_tokens", "lr", "batch", "window"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "it must be above 0")
        require(0 <= self.teacher_weight <= 1, "teacher_weight", self.teacher_weight, "give a share from 0 to 1")


def budget(settings: Settings, record: Record, source: str) -> int:
    """How many tokens to train on.

    Raises:
        UsageError: nobody says how many the source was trained on.
    """
    if settings.tokens is not None:
        return settings.tokens
    original = settings.original_tokens or record.tokens
    if original is None:
        raise UsageError(
            f"{source} does not say how many tokens it was trained on: give --original-tokens N, or the budget as --tokens N"
        )
    return round(original * (FRACTION if settings.fraction is None else settings.fraction))


def calibration_pieces(training: np.ndarray, width: int, window: int) -> list[list[int]]:
    """Windows spread evenly over a row of tokens: ten tokens per unit of width, and never less than for a text file."""
    count = math.ceil(max(api.CALIBRATION_TOKENS, 10 * width) / window)
    starts = np.linspace(0, max(0, len(training) - window), count, dtype=int)
    return [training[start : start + window].tolist() for start in dict.fromkeys(starts.tolist())]


class Uptraining:
    """From one folder to another. Made, it has checked what it can and done nothing; `facts` say what `go` will do.

    The run's state, its log and the tokens lie beside the destination, in a folder named like it with `.run` added. When
    the destination is written the state is removed.

    Raises:
        UsageError: settings that cannot be honoured, a source that is no native language model or has no tokenizer.
        CheckpointError: the source cannot be read.
    """

    def __init__(self, source: str, destination: Path, settings: Settings) -> None:
        self.source, self.destination, self.settings = source, destination.expanduser().resolve(), settings
        self.folder = self.destination.with_name(self.destination.name + ".run")
        self.checkpoint = read_checkpoint(resources.model_presets().get(source) or resolve(source))
        config = read_config(self.checkpoint.config)
        if isinstance(config, VivitConfig):
            raise UsageError(f"{source} is a ViViT, and uptraining reads text: train it on its videos instead")
        self.config: Any = config
        self.kv_heads = config.n_kv_heads if settings.control else int(settings.kv_heads or 0)
        check(config, self.kv_heads)
        self.tokenizer = self._tokenizer()
        self.record = Record.of(self.checkpoint.files)
        self.optim = self._plan()
        self.run = sitting(self.folder, self.optim, settings.seed, settings.device)
        self.dtype = pick_dtype("auto", self.checkpoint)

    def _plan(self) -> OptimSection:
        """Find the data; what is to be done with it."""
        self.t5 = isinstance(self.config, EncoderDecoderConfig)
        self.data = self._data()
        self.corpus = find_corpus(self.data.source, self.data.suffixes, self.data.exclude, self.data.held_out)
        original = {} if self.t5 else self.record.section("optim")
        return schedule(
            budget(self.settings, self.record, self.source),
            batch=self.settings.batch or original.get("batch", 8),
            window=self.data.window,
            lr=self.settings.lr,
            original=original,
            t5=self.t5,
        )

    def _tokenizer(self) -> Tokenizer:
        found = Tokenizer.from_files(self.checkpoint.files, self.checkpoint.config)
        if found is None:
            raise UsageError(f"{self.source} has no tokenizer files, and the text must be read with its own: add them")
        if not found.eos_ids:
            raise UsageError(
                f"{self.source} names no end-of-text token, which closes each text: set its `eos_token_id`"
            )
        return found

    def _data(self) -> DataSection:
        """Sources that the original was trained on are read by its own rule, so that what was held out stays so."""
        s, context = self.settings, self.config.max_seq_len
        rule = self.record.data_of(s.data) or {"suffixes": SUFFIXES}
        values: dict[str, Any] = {name: rule[name] for name in ("suffixes", "exclude", "held_out") if name in rule}
        if s.held_out is not None:
            values["held_out"] = s.held_out
        usual = T5_WINDOW if self.t5 else self.record.section("data").get("window", 512)
        window = s.window or min(usual, context)
        require(window <= context, "window", window, f"the model's context is {context} tokens")
        return DataSection.from_dict({**values, "source": s.data, "window": window})

    @property
    def facts(self) -> dict[str, Any]:
        """What `go` does, as numbers and names."""
        optim, tokens = self.optim, self.optim.steps * self.optim.batch * self.optim.accumulate * self.data.window
        method = None if self.settings.control else self.settings.method
        return {
            "source": self.source,
            "destination": str(self.destination),
            "control": self.settings.control,
            "method": method,
            "kv_heads": [self.config.n_kv_heads, self.kv_heads],
            "original_tokens": self.settings.original_tokens or self.record.tokens,
            "tokens": tokens,
            "steps": optim.steps,
            "teacher": self.settings.teacher,
            "settings": {
                "teacher_weight": self.settings.teacher_weight if self.settings.teacher else None,
                "data": {name: value for name, value in self.data.to_dict().items() if name not in NOT_OURS},
                "optim": optim.to_dict(),
                "seed": self.settings.seed,
            },
        }

    def describe(self) -> None:
        """Say what `go` does."""
        for name, text in self._lines():
            console.print(f"{name:12}{text}", soft_wrap=True, markup=False)

    def _lines(self) -> Iterator[tuple[str, str]]:
        s, optim, facts, corpus = self.settings, self.optim, self.facts, self.corpus
        before, after = facts["kv_heads"]
        by = f"{s.method}, calibrated on {s.calibration or 'the training text'}" if s.method in CALIBRATED else s.method
        yield (
            "source",
            f"{self.source}, {before} key-value heads" + (": the control" if s.control else f" -> {after} by {by}"),
        )
        yield "data", f"{len(corpus.training)} files, {size_of(corpus.training) / 1e6:.1f} MB, from {', '.join(s.data)}"
        rule = (
            "as in the original training" if s.held_out is None and self.record.data_of(s.data) else self.data.held_out
        )
        yield "held out", f"{len(corpus.held_out)} whole files ({rule})"
        tokens, original = facts["tokens"], facts["original_tokens"]
        share = "" if original is None else f", {tokens / original:.2%} of the original's"
        yield "steps", f"{optim.steps} of {tokens // optim.steps:,} tokens: {tokens:,} tokens{share}"
        rate = "T5's" if optim.t5_step else f"{optim.lr:.2e} after {optim.warmup} steps of warm-up"
        yield "rate", f"{rate}, {optim.optimizer}"
        if s.teacher is not None:
            yield "teacher", f"{s.teacher}, {s.teacher_weight:.0%} of the loss"
        yield "writes to", f"{self.destination}; until then the run is in {self.folder}"

    def go(self, resume: bool = False, force: bool = False) -> dict[str, Any] | None:
        """Do it; returns the facts with the figures, None if interrupted.

        Raises:
            UsageError: there is something at the destination and `force` is not set, or a run and `resume` is not; or the
                run to resume is another.
            CheckpointError: `resume` without a saved state, or the destination cannot be written.
        """
        check_goal(self.destination, overwrite=force)
        check_fresh(self.folder, resume)
        if resume:
            usable_state(state_path(self.folder))
        device = pick_device(self.settings.device)
        original = self._built(self.checkpoint, device)
        source_weights = digest(original)
        task = self._task(original)
        notes, model = {}, None
        if resume:
            model = self._prepared(type(original)(with_kv_heads(self.config, self.kv_heads)).to(device))
        elif self.settings.control:
            model = self._prepared(self._built(self.checkpoint, device))
        else:
            notes = {"original": task.quality(original, bf16=self.optim.bf16).loss}
            # Unless it teaches, nothing needs it any more: room for the moments.
            del original
            model = self._prepared(self._built(self._converted(task), device))
        identity = {
            **self.facts,
            "source": source_weights,
            "destination": None,
            "calibration": self._calibration_hash(),
        }
        outcome = train_on(model, task, self.optim, self.run, settings=identity, notes=notes, resume=resume)
        return None if outcome is None else self._export(model, outcome, force)

    def _built(self, checkpoint: Any, device: torch.device) -> Any:
        model = build(checkpoint, read_config(checkpoint.config), device, torch.float32)
        model.tokenizer = self.tokenizer
        return model

    def _prepared(self, model: Any) -> Any:
        """What is to be trained of a model."""
        return model

    def _task(self, original: Any) -> Any:
        # Where there are several, the plain end of a text comes before those of conversations.
        end = None if self.t5 else min(self.tokenizer.eos_ids)
        rows = [
            tokenize(files, self.tokenizer.backend, end, self.folder / "data" / name)
            for files, name in ((self.corpus.training, "training.npy"), (self.corpus.held_out, "held_out.npy"))
        ]
        whole = len(rows[1]) <= HELD_OUT_TOKENS
        return Task(
            objective_of(original, self.data.window),
            rows[0],
            rows[1][:HELD_OUT_TOKENS],
            size_of(self.corpus.held_out) if whole else None,
            batch=self.optim.batch,
            seed=self.settings.seed,
            teacher=self._teacher(original),
            teacher_weight=self.settings.teacher_weight,
        )

    def _teacher(self, original: Any) -> Any:
        name = self.settings.teacher
        if name is None or name == self.source:
            return None if name is None else original
        teacher = api.load(name, device=original.device, dtype="float32")
        if not isinstance(teacher, type(original)):
            raise UsageError(f"teacher {name} is a {type(teacher).__name__}: give a {type(original).__name__}")
        trouble = teacher_trouble(teacher, self.config.vocab_size, self.tokenizer)
        if trouble:
            raise UsageError(
                f"teacher {name} has another tokenizer than {self.source} ({trouble}): give one with the same"
            )
        return teacher

    def _calibration(self, task: Any) -> Any:
        """Some of what is trained on, for methods that look at it."""
        window = min(api.CALIBRATION_WINDOW, self.config.max_seq_len)
        return calibration_pieces(task.training, self.config.dim, window)

    def _converted(self, task: Any) -> Any:
        s = self.settings
        calibration: Any = s.calibration
        if calibration is None and s.method in CALIBRATED:
            calibration = self._calibration(task)
        with Bar(console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
            layers = bar.add_task("converting", total=len(list(places(self.config))), visible=calibration is not None)
            return api.convert_to_gqa(
                self.checkpoint, self.kv_heads, s.method, calibration, s.seed, lambda: bar.advance(layers)
            )

    def _calibration_hash(self) -> str | None:
        path = self.settings.calibration
        return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()

    def _export(self, model: Any, outcome: Outcome, force: bool) -> dict[str, Any]:
        """Write the model as a stock folder, with the record of its training, and report."""
        control = self.settings.control
        facts = self.facts | {
            "seconds": round(outcome.seconds),
            "nats_per_token": {
                "original": outcome.before if control else outcome.notes["original"],
                "converted": None if control else outcome.before,
                "uptrained": outcome.after,
            },
            "bits_per_byte": outcome.bits_per_byte,
        }
        entry = {name: value for name, value in facts.items() if name != "destination"}
        record = self._recorded(outcome) | {"uptrained": [*self.record.uptrained, entry]}
        model.stock_config = self.checkpoint.config
        model.files = {**self.checkpoint.files, RECORD: json.dumps(record, indent=2).encode()}
        api.save(model.to(self.dtype), self.destination, overwrite=force)
        remove_state(self.folder)
        shutil.rmtree(self.folder / "data", ignore_errors=True)
        numbers = [model.cache_bytes_per_token * heads // self.kv_heads for heads in facts["kv_heads"]]
        return facts | {"kv_bytes_per_token": numbers}

    def _recorded(self, outcome: Outcome) -> dict[str, Any]:
        """What training.json says from now on, but for the list of what was done."""
        return {
            **self.record.values,
            "tokens": self.facts["original_tokens"],
            "val_loss": outcome.after,
            "bits_per_byte": outcome.bits_per_byte,
            "held_out": list(self.corpus.held_out),
        }
