"""Training a drafter by recipe: a network learns to say what its target would, several tokens ahead (1503.02531)."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modicum import api, resources
from modicum.assembly import pick_device
from modicum.checkpoint.hub import resolve
from modicum.checkpoint.io import read_checkpoint
from modicum.checkpoint.native import read_config
from modicum.checkpoint.record import RECORD
from modicum.checkpoint.tokenizer import Tokenizer
from modicum.config import DecoderConfig
from modicum.errors import UsageError
from modicum.speculative.drafters.folder import KINDS, new_network
from modicum.speculative.drafters.trained import DrafterConfig, Network
from modicum.train.loop import Training, check_fresh, console
from modicum.train.recipe import OptimSection, RunSection, Section, require
from modicum.train.state import Progress
from modicum.train.task import TextFigures, TextWork
from modicum.train.text import Corpus, Windows, find_corpus, tokenize

# A drafter is judged on so many held-out tokens at most.
JUDGED_TOKENS = 32_768
# Of a window that the target writes itself, the share that it is given.
GIVEN = 0.25


@dataclass(frozen=True, kw_only=True)
class DrafterSection(Section):
    """`target` is a folder, a hub id, or a name that ships with modicum. `n_layers` is the depth of a parallel drafter.

    `decay`: each drafted place counts by this factor less than the one before it, since it is judged less often.
    """

    kind: str
    target: str
    num_draft_tokens: int = 4
    n_layers: int = 1
    decay: float = 0.8
    save_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.kind in KINDS, "kind", self.kind, f"choose one of {', '.join(KINDS)}")
        require(0 < self.decay <= 1, "decay", self.decay, "give a factor above 0, at most 1")
        kinds = ("float32", "bfloat16", "float16")
        require(self.save_dtype in kinds, "save_dtype", self.save_dtype, f"choose one of {', '.join(kinds)}")


@dataclass(frozen=True, kw_only=True)
class DraftDataSection(Section):
    """Where the text comes from: see `find_corpus`.

    With `sampled_tokens` so many are written by the target itself, at temperature 1 behind beginnings of the texts, and the
    drafter learns from these instead: they are what it will meet (on-policy).
    """

    source: str | tuple[str, ...]
    suffixes: tuple[str, ...] = (".py",)
    exclude: tuple[str, ...] = ()
    held_out: float | str = 0.02
    window: int = 256
    sampled_tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        share = isinstance(self.held_out, str) or 0 < self.held_out < 1
        require(share, "held_out", self.held_out, "give the share of files, between 0 and 1, or where they are")
        require(self.sampled_tokens >= 0, "sampled_tokens", self.sampled_tokens, "it must not be negative")


@dataclass(frozen=True, kw_only=True)
class DraftRecipe(Section):
    """A whole run."""

    drafter: DrafterSection
    data: DraftDataSection
    optim: OptimSection
    run: RunSection

    def __post_init__(self) -> None:
        super().__post_init__()
        least = self.drafter.num_draft_tokens + 2
        require(self.data.window >= least, "window", self.data.window, f"{least} tokens at least show every place")


def is_drafting(values: dict[str, Any]) -> bool:
    """Whether the tables of a recipe are about a drafter."""
    return "drafter" in values


class DraftTask(TextWork):
    """Distillation: at every token of a text, each drafted place learns the target's distribution there.

    The loss is KL(target || drafter) in nats per token, at temperature 1, averaged over the places with their weights.

    Args:
        training, held_out: rows of token ids.
        decay: a place's weight relative to the one before it.
    """

    def __init__(
        self,
        target: Any,
        training: np.ndarray,
        held_out: np.ndarray,
        *,
        window: int,
        batch: int,
        seed: int,
        decay: float,
    ) -> None:
        self.target, self.training, self.judged = target.requires_grad_(False), training, held_out
        self.windows, self.window, self.decay = Windows(training, window, batch, seed), window, decay
        self.per_batch = batch * window

    def loss(self, network: Network, number: int) -> Tensor:
        """Of batch `number`, which this alone decides: a resumed run meets the same batches."""
        ids_BL = self.windows.at(number)[:, :-1].to(network.device)
        total, weights = torch.zeros((), device=network.device), 0.0
        for place, (wanted_BLV, drafted_BLV) in enumerate(self._pairs(network, ids_BL)):
            weight = self.decay**place
            distance = F.kl_div(
                drafted_BLV.flatten(0, 1), wanted_BLV.flatten(0, 1), reduction="batchmean", log_target=True
            )
            total, weights = total + weight * distance, weights + weight
        return total / weights

    def _pairs(self, network: Network, ids_BL: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For each drafted place the logarithms of the target's and of the drafter's probabilities."""
        with torch.no_grad():
            hidden_BLD = self.target.hidden(ids_BL)
            wanted_BLV = self.target.score(hidden_BLD).float().log_softmax(-1)
        for shift, logits_BLV in network.predictions(self.target, ids_BL, hidden_BLD):
            yield wanted_BLV[:, shift:], logits_BLV.float().log_softmax(-1)

    @torch.no_grad()
    def quality(self, network: Network, *, bf16: bool) -> TextFigures:
        """The loss on held-out text."""
        figures = self.by_place(network, bf16=bf16)
        weights = [self.decay**place for place in range(len(figures))]
        return TextFigures(sum(w * nats for w, (nats, _) in zip(weights, figures, strict=True)) / sum(weights))

    @torch.no_grad()
    def by_place(self, network: Network, *, bf16: bool) -> list[tuple[float, float]]:
        """For each drafted place, on held-out text: nats of KL(target || drafter), and the share that would be accepted.

        That share is the sum of min(target, drafter) over the vocabulary: 2302.01318's rule at temperature 1, on drafts
        that continue the text itself.
        """
        training = network.training
        network.eval()
        whole = len(self.judged) // self.window
        places: list[list[tuple[float, float]]] = []
        for start in range(0, whole, -(-whole * self.window // JUDGED_TOKENS)):
            ids = self.judged[start * self.window : (start + 1) * self.window].astype("int64")
            ids_BL = torch.from_numpy(ids)[None].to(network.device)
            with torch.autocast(network.device.type, torch.bfloat16, enabled=bf16):
                pairs = list(self._pairs(network, ids_BL))
            places.append(
                [
                    (
                        float((wanted.exp() * (wanted - drafted)).sum(-1).mean()),
                        float(torch.minimum(wanted, drafted).exp().sum(-1).mean()),
                    )
                    for wanted, drafted in pairs
                ]
            )
        network.train(training)
        return [tuple(np.mean(column, axis=0).tolist()) for column in zip(*places, strict=True)]

    def identity(self) -> dict[str, Any]:
        """The tokens themselves; the target is in the drafter's configuration."""
        data = [hashlib.sha256(tokens.tobytes()).hexdigest() for tokens in (self.training, self.judged)]
        return {"tokens": data, "window": self.window}


class DraftTraining:
    """A recipe with its target's configuration and texts, all checked, nothing done.

    Raises:
        UsageError: a target that is no native decoder or has no tokenizer, or windows longer than its context.
        CheckpointError: the target cannot be read.
    """

    def __init__(self, recipe: DraftRecipe, name: str) -> None:
        self.recipe, self.name, self.folder = recipe, name, Path(recipe.run.folder)
        target, data = recipe.drafter.target, recipe.data
        checkpoint = read_checkpoint(resources.model_presets().get(target) or resolve(target))
        config = read_config(checkpoint.config)
        if not isinstance(config, DecoderConfig):
            raise UsageError(
                f"{target} does not just continue text, and drafters are trained for models that do: give one"
            )
        if data.window > config.max_seq_len:
            raise UsageError(
                f"`window` is {data.window} and the context of {target} {config.max_seq_len}: lower data.window"
            )
        tokenizer = Tokenizer.from_files(checkpoint.files, checkpoint.config)
        if tokenizer is None or not tokenizer.eos_ids:
            raise UsageError(
                f"{target} has no tokenizer files with an end-of-text token, which closes each text: add them"
            )
        self.config, self.tokenizer = config, tokenizer
        self.corpus: Corpus = find_corpus(data.source, data.suffixes, data.exclude, data.held_out)

    def describe(self) -> None:
        """Print what a run would do."""
        recipe, optim, data = self.recipe, self.recipe.optim, self.recipe.data
        drafter, per_step = recipe.drafter, optim.batch * optim.accumulate * data.window
        config = DrafterConfig(
            kind=drafter.kind,  # type: ignore[arg-type]
            num_draft_tokens=drafter.num_draft_tokens,
            n_layers=drafter.n_layers,
            fingerprint="",
            target=self.config,
        )
        with torch.device("meta"):
            n_parameters = sum(p.numel() for p in KINDS[drafter.kind][0](config).parameters())
        sampled = f"; {data.sampled_tokens:,} tokens written by the target" if data.sampled_tokens else ""
        console.print(
            f"drafter     {drafter.kind}, {n_parameters:,} parameters, {drafter.num_draft_tokens} tokens at a time"
        )
        console.print(f"target      {drafter.target}", soft_wrap=True, markup=False)
        console.print(f"data        {len(self.corpus.training)} files, from {data.source}{sampled}", soft_wrap=True)
        console.print(f"held out    {len(self.corpus.held_out)} whole files")
        console.print(f"steps       {optim.steps} of {per_step} tokens: {optim.steps * per_step / 1e6:.1f} M tokens")
        console.print(f"writes to   {self.folder}")

    def go(self, resume: bool) -> Path | None:
        """Train to the end, or until interrupted: the folder of the drafter, or None."""
        check_fresh(self.folder, resume)
        self.folder.mkdir(parents=True, exist_ok=True)
        recipe, optim = self.recipe, self.recipe.optim
        device = pick_device(recipe.run.device)
        training, held_out = self._tokens(device)
        target = api.load(recipe.drafter.target, device=device, dtype="float32")
        drafter = recipe.drafter
        network = new_network(target, drafter.kind, drafter.num_draft_tokens, drafter.n_layers, recipe.run.seed)
        task = DraftTask(
            target,
            training,
            held_out,
            window=recipe.data.window,
            batch=optim.batch,
            seed=recipe.run.seed,
            decay=drafter.decay,
        )
        settings = {**recipe.to_dict(), "drafter": {**drafter.to_dict(), "target": target.fingerprint}}
        run = Training(self.name, network.to(device), task, optim=optim, run=recipe.run, settings=settings)
        result = run.go(resume)
        return None if result is None else self._export(network, task, *result)

    def _tokens(self, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
        """Rows of token ids to train on and to judge by."""
        end, cache = min(self.tokenizer.eos_ids), self.folder / "data"
        training, held_out = (
            tokenize(files, self.tokenizer.backend, end, cache / name)
            for files, name in ((self.corpus.training, "training.npy"), (self.corpus.held_out, "held_out.npy"))
        )
        window = self.recipe.data.window
        if len(held_out) < window:
            raise UsageError(f"{len(held_out)} held-out tokens are less than a window of {window}: hold out more text")
        if self.recipe.data.sampled_tokens:
            training = self._sampled(training, device, cache / "sampled.npy")
        return training, held_out

    def _sampled(self, tokens: np.ndarray, device: torch.device, cache: Path) -> np.ndarray:
        """Text that the target writes itself; kept, so that a resumed run need not write it again."""
        recipe, window = self.recipe, self.recipe.data.window
        given = max(1, int(window * GIVEN))
        n_rows = -(-recipe.data.sampled_tokens // window)
        if len(tokens) <= given:
            raise UsageError(
                f"the texts have {len(tokens)} tokens and data.sampled_tokens begins with {given} of them: "
                "give more text, or a smaller data.window"
            )
        # Packed for inference, which gradients do not pass: it is not the one that is learned from.
        target = api.load(recipe.drafter.target, device=device)
        stamp = hashlib.sha256(f"{target.fingerprint} {window} {n_rows} {recipe.run.seed} ".encode() + tokens.tobytes())
        note = cache.with_suffix(".json")
        if cache.is_file() and note.is_file() and json.loads(note.read_text()) == stamp.hexdigest():
            return np.load(cache)
        starts = np.random.default_rng(recipe.run.seed).integers(len(tokens) - given, size=n_rows)
        prompts = [tokens[start : start + given].astype("int64").tolist() for start in starts]
        console.print(f"the target writes {n_rows} texts of {window} tokens")
        written = api.generate(
            target, prompts, max_new_tokens=window - given, seed=recipe.run.seed, ignore_eos=True
        ).tokens
        rows = np.concatenate([np.array(prompt + text) for prompt, text in zip(prompts, written, strict=True)])
        note.unlink(missing_ok=True)
        np.save(cache, rows.astype(np.uint32))
        note.write_text(json.dumps(stamp.hexdigest()))
        return rows.astype(np.uint32)

    def _export(self, network: Network, task: DraftTask, progress: Progress, judged: TextFigures) -> Path:
        """Write the drafter's folder, its training's figures beside it."""
        figures = task.by_place(network, bf16=self.recipe.optim.bf16)
        record = {
            "recipe": self.name,
            "steps": progress.step,
            "tokens": progress.seen,
            "seconds": round(progress.seconds),
            "val_loss": judged.loss,
            "accepted_by_place": [share for _, share in figures],
            "held_out": list(self.corpus.held_out),
            "settings": self.recipe.to_dict(),
        }
        files = {RECORD: json.dumps(record, indent=2).encode()}
        network = network.to("cpu", getattr(torch, self.recipe.drafter.save_dtype))
        goal = self.folder / "model"
        api.save(KINDS[self.recipe.drafter.kind][1](network, files), goal, overwrite=True)
        shares = " ".join(f"{share:.0%}" for _, share in figures)
        console.print(f"held out: {judged.words()}, accepted by place {shares}; drafter in {goal}", soft_wrap=True)
        return goal
