"""`modicum train`: from a recipe to a folder that every other command takes."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from modicum import api
from modicum.assembly import pick_device
from modicum.checkpoint.hf import stock_config, to_stock
from modicum.checkpoint.io import Checkpoint, write_checkpoint
from modicum.checkpoint.tokenizer import Tokenizer as ModelTokenizer
from modicum.config import DecoderConfig, RopeConfig
from modicum.errors import UsageError
from modicum.lm.decoder import Decoder
from modicum.lm.objective import CausalLM
from modicum.train.captions.recipe import CaptionRecipe, is_captioning
from modicum.train.captions.run import CaptionTraining
from modicum.train.drafting import DraftRecipe, DraftTraining, is_drafting
from modicum.train.finetune import FinetuneRecipe, FineTuning, is_finetuning
from modicum.train.loop import Training, check_fresh, console
from modicum.train.optim import initialise
from modicum.train.recipe import Recipe, expectation, read_values
from modicum.train.state import Progress
from modicum.train.task import Task, TextFigures, teacher_trouble
from modicum.train.text import Corpus, find_corpus, read_text, tokenize
from modicum.train.tokenizer import END_OF_TEXT, tokenizer_files, train_tokenizer
from modicum.train.video.recipe import VideoRecipe, is_video
from modicum.train.video.run import VideoTraining


def train(
    recipe_path: str | Path, overrides: list[str] | None = None, dry_run: bool = False, resume: bool = False
) -> Path | None:
    """Run a recipe; returns the folder of the trained model, None after a dry run or an interruption.

    Raises:
        UsageError: the recipe cannot be honoured, or its folder holds a run already and `resume` is not set.
        CheckpointError: `resume` without a saved state.
    """
    values, name = read_values(Path(recipe_path), list(overrides or [])), Path(recipe_path).stem
    run: Run | FineTuning | DraftTraining | VideoTraining | CaptionTraining
    if is_captioning(values):
        run = CaptionTraining(CaptionRecipe.from_dict(values), name, expectation(Path(recipe_path)))
    elif is_video(values):
        run = VideoTraining(VideoRecipe.from_dict(values), name, expectation(Path(recipe_path)))
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(f"{name} is no video recipe, and others train in one process: run it without torchrun")
    elif is_drafting(values):
        run = DraftTraining(DraftRecipe.from_dict(values), name)
    elif is_finetuning(values):
        run = FineTuning(FinetuneRecipe.from_dict(values), name)
    else:
        run = Run(Recipe.from_dict(values), name)
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
        check_fresh(self.folder, resume)
        self.folder.mkdir(parents=True, exist_ok=True)
        training = self._prepare(resume)
        result = training.go(resume)
        return None if result is None else self._export(training.model, *result)

    def _prepare(self, resume: bool) -> Training:
        recipe = self.recipe
        self.tokenizer = self._tokenizer(resume)
        caches = self.folder / "data"
        device = pick_device(recipe.run.device)
        model = Decoder(self.config)
        # On the CPU, so that a seed begins with the same weights on every device.
        initialise(model, recipe.run.seed)
        if recipe.model.start is not None and not resume:
            start_from(model, recipe.model.start)
        teacher: Any = None
        if recipe.teacher is not None:
            teacher = api.load(recipe.teacher.model, device=device, dtype="float32")
            self._check_teacher(teacher, recipe.teacher.model)
        end = self.tokenizer.token_to_id(END_OF_TEXT)
        task = Task(
            CausalLM(recipe.data.window),
            tokenize(self.corpus.training, self.tokenizer, end, caches / "training.npy"),
            tokenize(self.corpus.held_out, self.tokenizer, end, caches / "held_out.npy"),
            size_of(self.corpus.held_out),
            batch=recipe.optim.batch,
            seed=recipe.run.seed,
            teacher=teacher,
            teacher_weight=0.0 if recipe.teacher is None else recipe.teacher.weight,
        )
        settings = recipe.to_dict()
        return Training(self.name, model.to(device), task, optim=recipe.optim, run=recipe.run, settings=settings)

    def _check_teacher(self, teacher: Any, name: str) -> None:
        trouble = teacher_trouble(teacher, self.config.vocab_size, ModelTokenizer(self.tokenizer))
        if trouble:
            raise UsageError(
                f"teacher {name} and its student have different tokenizers ({trouble}): "
                "take the teacher's with data.tokenizer"
            )

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

    def _export(self, model: Decoder, progress: Progress, judged: TextFigures) -> Path:
        """Write the model as a stock folder, its training's figures beside it."""
        dtype = getattr(torch, self.recipe.model.save_dtype)
        state = {name: tensor.to("cpu", dtype) for name, tensor in model.dense_state().items()}
        config = DecoderConfig.from_dict({**self.config.to_dict(), "dtype": self.recipe.model.save_dtype})
        record = {
            "recipe": self.name,
            "steps": progress.step,
            "tokens": progress.seen,
            "seconds": round(progress.seconds),
            "val_loss": judged.loss,
            "bits_per_byte": judged.bits_per_byte,
            "held_out": list(self.corpus.held_out),
            "settings": self.recipe.to_dict(),
        }
        files = tokenizer_files(self.tokenizer, self.config.max_seq_len)
        files["training.json"] = json.dumps(record, indent=2).encode()
        stock = {**stock_config(config), "eos_token_id": 0, "bos_token_id": None}
        goal = self.folder / "model"
        write_checkpoint(Checkpoint(stock, to_stock(state, config), files), goal, overwrite=True)
        console.print(f"held out: {judged.words()}; model in {goal}")
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
