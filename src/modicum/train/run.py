"""`modicum train`: from a recipe to a folder that every other command takes."""

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
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from tokenizers import Tokenizer

from modicum import api
from modicum.checkpoint.hf import stock_config, to_stock
from modicum.checkpoint.io import Checkpoint, write_checkpoint
from modicum.checkpoint.tokenizer import Tokenizer as ModelTokenizer
from modicum.config import DecoderConfig, RopeConfig
from modicum.errors import UsageError
from modicum.lm.decoder import Decoder
from modicum.train.objective import causal_lm_loss
from modicum.train.optim import initialise, learning_rate, make_optimizer
from modicum.train.recipe import Recipe, read_recipe
from modicum.train.state import Progress, load_state, save_state
from modicum.train.text import Corpus, Windows, find_corpus, read_text, tokenize
from modicum.train.tokenizer import END_OF_TEXT, tokenizer_files, train_tokenizer

console = Console(stderr=True)


def train(
    recipe_path: str | Path, overrides: list[str] | None = None, dry_run: bool = False, resume: bool = False
) -> Path | None:
    """Run a recipe; returns the folder of the trained model, None after a dry run or an interruption.

    Raises:
        UsageError: the recipe cannot be honoured, or its folder holds a run already and `resume` is not set.
        CheckpointError: `resume` without a saved state.
    """
    recipe = read_recipe(Path(recipe_path), list(overrides or []))
    run = Run(recipe, Path(recipe_path).stem)
    if dry_run:
        run.describe()
        return None
    return run.go(resume)


class Run:
    """A recipe with its data, model and optimizer."""

    def __init__(self, recipe: Recipe, name: str) -> None:
        self.recipe, self.name = recipe, name
        self.folder = Path(recipe.run.folder)
        data = recipe.data
        self.corpus: Corpus = find_corpus(data.source, data.suffixes, data.exclude, data.held_out)
        self.config = model_config(recipe)

    def describe(self) -> None:
        """Print what a run would do."""
        optim, data = self.recipe.optim, self.recipe.data
        with torch.device("meta"):
            n_parameters = sum(p.numel() for p in Decoder(self.config).parameters())
        per_step = optim.batch * optim.accumulate * data.window
        n_bytes = size_of(self.corpus.training)
        console.print(f"model       {n_parameters:,} parameters, {self.config.n_layers} layers of {self.config.dim}")
        console.print(f"data        {len(self.corpus.training)} files, {n_bytes / 1e6:.1f} MB, from {data.source}")
        console.print(f"held out    {len(self.corpus.held_out)} whole files")
        console.print(f"steps       {optim.steps} of {per_step} tokens: {optim.steps * per_step / 1e6:.1f} M tokens")
        console.print(f"memory      {n_parameters * 16 / 1e6:.0f} MB for weights, gradients and moments")
        console.print(f"writes to   {self.folder}")

    def go(self, resume: bool) -> Path | None:
        """Train to the end, or until interrupted."""
        if not resume and (self.folder / "state.safetensors").exists():
            raise UsageError(f"{self.folder} holds a run already: add --resume, or choose another run.folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._prepare(resume)
        progress = load_state(self.state_path, self.model, self.optimizer) if resume else Progress()
        if resume and progress.fingerprint != self.fingerprint:
            raise UsageError(
                f"the run in {self.folder} was begun with other settings or data: resume it with the same recipe"
            )
        progress.fingerprint = self.fingerprint
        limit, start = self.recipe.run.max_seconds, time.perf_counter()
        with interruptible() as interrupted, Reporter(self.recipe, self.folder, self.name, progress) as reporter:
            while progress.step < self.recipe.optim.steps:
                began = time.perf_counter()
                loss = self._step(progress.step)
                progress.step += 1
                progress.tokens += self.tokens_per_step
                progress.seconds += time.perf_counter() - began
                reporter.step(progress, loss, learning_rate(self.recipe.optim, progress.step - 1))
                last = progress.step == self.recipe.optim.steps
                late = limit is not None and time.perf_counter() - start >= limit and not last
                if interrupted or late or progress.step % self.recipe.run.save_every == 0 or last:
                    save_state(self.state_path, self.model, self.optimizer, progress)
                if interrupted or late:
                    console.print(f"stopped after step {progress.step}, saved: continue with --resume")
                    return None
                # The last validation is the export's.
                if progress.step % self.recipe.run.validate_every == 0 and not last:
                    reporter.validated(progress, *self.validate())
            figures = self.validate()
            reporter.validated(progress, *figures)
        return self._export(progress, *figures)

    def _prepare(self, resume: bool) -> None:
        recipe = self.recipe
        self.tokenizer = self._tokenizer(resume)
        caches = self.folder / "data"
        training = tokenize(self.corpus.training, self.tokenizer, caches / "training.npy")
        self.held_out = tokenize(self.corpus.held_out, self.tokenizer, caches / "held_out.npy")
        self.held_out_bytes = size_of(self.corpus.held_out)
        optim = recipe.optim
        self.windows = Windows(training, recipe.data.window, optim.batch, recipe.run.seed)
        self.tokens_per_step = optim.batch * optim.accumulate * recipe.data.window
        self.device = api.pick_device(recipe.run.device)
        self.model = Decoder(self.config)
        # On the CPU, so that a seed begins with the same weights on every device.
        initialise(self.model, recipe.run.seed)
        if recipe.model.start is not None and not resume:
            start_from(self.model, recipe.model.start)
        self.model.to(self.device).train()
        self.optimizer = make_optimizer(self.model, optim)
        self.teacher: Any = None
        if recipe.teacher is not None:
            self.teacher = api.load(recipe.teacher.model, device=self.device, dtype="float32")
            self._check_teacher(recipe.teacher.model)
        # The tokens and the teacher themselves, not their files' names: others would make another run of it.
        data = [hashlib.sha256(tokens.tobytes()).hexdigest() for tokens in (training, self.held_out)]
        taught = None if self.teacher is None else digest(self.teacher)
        settings = {**recipe.to_dict(), "run": {"seed": recipe.run.seed}, "tokens": data, "teacher_weights": taught}
        self.fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def _check_teacher(self, name: str) -> None:
        theirs, ours = self.teacher.config.vocab_size, self.config.vocab_size
        trouble = f"{theirs} tokens against {ours}" if theirs != ours else None
        if trouble is None and self.teacher.tokenizer is not None:
            trouble = self.teacher.tokenizer.difference(ModelTokenizer(self.tokenizer))
        if trouble:
            raise UsageError(
                f"teacher {name} and its student have different tokenizers ({trouble}): "
                "take the teacher's with data.tokenizer"
            )

    @property
    def state_path(self) -> Path:
        return self.folder / "state.safetensors"

    def _tokenizer(self, resume: bool) -> Tokenizer:
        data, own = self.recipe.data, self.folder / "tokenizer.json"
        if data.tokenizer is not None:
            return self._fitting(Path(data.tokenizer) / "tokenizer.json")
        # One left over from another recipe is never taken for this one's.
        if not (resume and own.exists()):
            texts = (read_text(path) for path in self.corpus.training.values())
            partial = own.with_name("tokenizer.partial.json")
            train_tokenizer(texts, data.vocab_size).save(str(partial))
            partial.replace(own)
        return self._fitting(own)

    def _fitting(self, path: Path) -> Tokenizer:
        """The tokenizer of `path`, refused where its ids do not fit the model."""
        if not path.is_file():
            raise UsageError(f"{path} does not exist: give the folder of a model with a tokenizer as data.tokenizer")
        tokenizer, vocab_size = Tokenizer.from_file(str(path)), self.config.vocab_size
        if tokenizer.get_vocab_size() > vocab_size:
            raise UsageError(
                f"{path} has {tokenizer.get_vocab_size()} tokens and data.vocab_size is {vocab_size}: "
                f"set data.vocab_size={tokenizer.get_vocab_size()}"
            )
        if tokenizer.token_to_id(END_OF_TEXT) is None:
            raise UsageError(f"{path} has no token {END_OF_TEXT}, which closes each text: give one that has it")
        return tokenizer

    def _step(self, step: int) -> float:
        optim = self.recipe.optim
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(optim, step)
        total = 0.0
        for part in range(optim.accumulate):
            tokens = self.windows.at(step * optim.accumulate + part).to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=optim.bf16):
                loss = causal_lm_loss(self.model, tokens, self.teacher, self._teacher_weight)
            (loss / optim.accumulate).backward()
            total += loss.item() / optim.accumulate
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not math.isfinite(total):
            raise UsageError(f"the loss of step {step} is {total}: lower optim.lr; the last saved state is unharmed")
        return total

    @property
    def _teacher_weight(self) -> float:
        return 0.0 if self.recipe.teacher is None else self.recipe.teacher.weight

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """Held-out nats per token and bits per byte of the files, the end-of-text tokens included."""
        self.model.eval()
        ids = torch.from_numpy(self.held_out.astype("int64")).to(self.device)
        window, total = self.recipe.data.window, 0.0
        # Every token is predicted once, from at most a window of context.
        for inputs, targets in zip(ids[:-1].split(window), ids[1:].split(window), strict=True):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.optim.bf16):
                logits = self.model(inputs[None])[0]
            total += torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum").item()
        count = len(ids) - 1
        self.model.train()
        return total / count, total / math.log(2) / self.held_out_bytes

    def _export(self, progress: Progress, loss: float, bits_per_byte: float) -> Path:
        """Write the model as a stock folder, its training's figures beside it."""
        dtype = getattr(torch, self.recipe.model.save_dtype)
        self.model.eval()
        state = {name: tensor.to("cpu", dtype) for name, tensor in self.model.dense_state().items()}
        config = DecoderConfig.from_dict({**self.config.to_dict(), "dtype": self.recipe.model.save_dtype})
        record = {
            "recipe": self.name,
            "steps": progress.step,
            "tokens": progress.tokens,
            "seconds": round(progress.seconds),
            "val_loss": loss,
            "bits_per_byte": bits_per_byte,
            "held_out": list(self.corpus.held_out),
            "settings": self.recipe.to_dict(),
        }
        files = tokenizer_files(self.tokenizer, self.config.max_seq_len)
        files["training.json"] = json.dumps(record, indent=2).encode()
        stock = {**stock_config(config), "eos_token_id": 0, "bos_token_id": None}
        goal = self.folder / "model"
        write_checkpoint(Checkpoint(stock, to_stock(state, config), files), goal, overwrite=True)
        console.print(f"held out: {loss:.4f} nats/token, {bits_per_byte:.4f} bits/byte; model in {goal}")
        return goal


@torch.no_grad()
def start_from(model: Decoder, name: str) -> None:
    """Copy the weights of another model that have an equal name and shape, such as its embeddings and first layers.

    Raises:
        UsageError: there are none.
    """
    given = api.load(name, device="cpu", dtype="float32").dense_state()
    copied = 0
    for key, parameter in model.named_parameters():
        if key in given and given[key].shape == parameter.shape:
            parameter.copy_(given[key])
            copied += parameter.numel()
    if not copied:
        raise UsageError(f"model.start {name} has no weight of this model's names and shapes: give one of equal width")
    console.print(f"begins with {copied:,} weights of {name}")


def size_of(files: dict[str, Path]) -> int:
    """Bytes of all files together."""
    return sum(path.stat().st_size for path in files.values())


def digest(model: torch.nn.Module) -> str:
    """A hash of a model's weights."""
    result = hashlib.sha256()
    for parameter in model.parameters():
        result.update(parameter.detach().cpu().numpy().tobytes())
    return result.hexdigest()


def model_config(recipe: Recipe) -> DecoderConfig:
    """The decoder a recipe describes."""
    m = recipe.model
    return DecoderConfig(
        family="llama",
        vocab_size=recipe.data.vocab_size,
        dim=m.dim,
        n_layers=m.n_layers,
        n_heads=m.n_heads,
        n_kv_heads=m.n_kv_heads,
        head_dim=m.head_dim,
        ffn_dim=m.ffn_dim,
        max_seq_len=m.max_seq_len,
        rope=RopeConfig(theta=m.rope_theta, rotary_dim=m.head_dim),
        tie_embeddings=m.tie_embeddings,
    )


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

    def __init__(self, recipe: Recipe, folder: Path, name: str, progress: Progress) -> None:
        self.recipe, self.first = recipe, progress.step
        path = folder / "log.csv"
        kept = logged_until(path, progress.step)
        self.file = path.open("w", newline="")
        self.csv = csv.writer(self.file)
        self.csv.writerows([LOG_COLUMNS, *kept])
        self.writer: Any = None
        if recipe.run.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(folder / "tensorboard")
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
        self.task = self.bar.add_task(name, total=recipe.optim.steps, completed=progress.step, note="")

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
        if progress.step % self.recipe.run.log_every:
            return
        self.csv.writerow([progress.step, progress.tokens, f"{loss:.5f}", f"{rate:.3e}", round(speed), "", ""])
        self.file.flush()
        if self.writer is not None:
            self.writer.add_scalar("loss", loss, progress.tokens)
            self.writer.add_scalar("lr", rate, progress.tokens)
        if self.bar.disable:
            left = (self.recipe.optim.steps - progress.step) * progress.seconds / progress.step
            console.print(f"step {progress.step}/{self.recipe.optim.steps}  {note}  {left / 60:.1f} min left")

    def validated(self, progress: Progress, loss: float, bits_per_byte: float) -> None:
        """Report a validation."""
        self.csv.writerow([progress.step, progress.tokens, "", "", "", f"{loss:.5f}", f"{bits_per_byte:.5f}"])
        self.file.flush()
        if self.writer is not None:
            self.writer.add_scalar("val_loss", loss, progress.tokens)
        console.print(f"step {progress.step}: held out {loss:.4f} nats/token, {bits_per_byte:.4f} bits/byte")
