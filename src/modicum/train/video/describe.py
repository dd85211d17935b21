"""`modicum train --dry-run` on a video recipe: what a run would do, and what it needs."""

from pathlib import Path

from modicum.config import VivitConfig
from modicum.parallel.data import Processes
from modicum.train.loop import console
from modicum.train.video.build import activation_bytes
from modicum.train.video.recipe import VideoRecipe
from modicum.train.video.sources import SYNTHETIC, read_videos, synthetic_root
from modicum.video.datasets import VideoDataset
from modicum.video.synthetic import LABELS
from modicum.vivit.flops import Cost, cost


def describe(recipe: VideoRecipe, folder: Path, processes: Processes, expected: str | None) -> None:
    """Print it; nothing is written.

    Raises:
        UsageError: a batch that cannot be shared out, or data that cannot be used.
    """
    data, optim, clips, views = recipe.data, recipe.optim, recipe.clips, recipe.views
    n_training, heads = data.per_class * len(LABELS), {"": len(LABELS)}
    if data.format == SYNTHETIC:
        lines = [
            ("data", f"{n_training:,} synthetic clips of {len(LABELS)} classes, in {synthetic_root(data)}"),
            ("held out", f"{data.held_out_per_class * len(LABELS):,} of them"),
        ]
    else:
        training, held_out = read_videos(data)
        n_training, heads = len(training), training.heads
        lines = [("data", found(training)), ("held out", found(held_out))]
    config = recipe.model.config(clips, heads)
    micro = optim.micro_batch(processes.world)
    per_epoch = n_training // optim.batch
    steps = round(optim.epochs * per_epoch)
    of_model = cost(config)
    say("model", f"{of_model.parameters:,} parameters, {config.variant}, {outputs(heads)}")
    say("", f"{of_model.gflops:,.1f} GFLOPs per view in the paper's convention, {of_model.gmacs:,.1f} GMACs")
    start = recipe.model.start
    say("begins", "with fresh weights" if start is None else f"with {start}")
    for name, text in lines:
        say(name, text)
    rate = "its files' own frames" if clips.clock is None else f"{clips.fps:g} frames per second"
    say("clips", f"{clips.num_frames} frames of {clips.shape[0]}x{clips.shape[1]}, every {clips.stride}. of {rate}")
    share = f"{processes.world} processes x {micro} clips x {optim.accumulate} parts"
    say("batch", f"{optim.batch} = {share}")
    say("steps", f"{steps:,}: {optim.epochs:g} epochs of {per_epoch:,}, after {optim.warmup_epochs:g} of warm-up")
    say(
        "rate",
        f"{optim.lr:g} at most, {optim.optimizer}{f', momentum {optim.momentum:g}' * (optim.optimizer == 'sgd')}",
    )
    say("memory", memory(recipe, config, of_model, micro))
    total = 3 * of_model.macs * steps * optim.batch
    say("computes", f"{2 * total:.1e} operations: forward, and backward at twice that")
    temporal, crops = views.views
    say("judged", f"with {temporal}x{crops} views at the end, with one every {recipe.run.validate_every} epochs")
    if expected:
        say("expect", expected)
    say("writes to", f"{folder}, and the model to {folder / 'model'}")


def say(name: str, text: str) -> None:
    console.print(f"{name:12}{text}", soft_wrap=True, markup=False, highlight=False)


def found(dataset: VideoDataset) -> str:
    missing = f"; {len(dataset.missing):,} that are listed are missing" if dataset.missing else ""
    return f"{len(dataset):,} videos, {dataset.name}{missing}"


def outputs(heads: dict[str, int]) -> str:
    return " and ".join(f"{size:,} {f'{name}s' if name else 'classes'}" for name, size in heads.items())


def memory(recipe: VideoRecipe, config: VivitConfig, of_model: Cost, micro: int) -> str:
    """A sentence on what one process needs: exactly for what it keeps, about for what it computes."""
    optim = recipe.optim
    copies = 2 + (2 if optim.optimizer == "adamw" else 1) + (1 if optim.ema else 0)
    kept = 4 * of_model.parameters * copies
    held = activation_bytes(config, micro, bf16=optim.bf16, checkpointing=optim.checkpointing)
    return (
        f"{size(kept)} for weights, gradients and moments, about {size(held)} for the activations of {micro} clips"
        f"{' with checkpointing' if optim.checkpointing else ''}, in each process"
    )


def size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"
