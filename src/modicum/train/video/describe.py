"""`modicum train --dry-run` on a video recipe: what a run would do, and what it needs."""

from pathlib import Path

from modicum.config import VivitConfig
from modicum.errors import UsageError
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
        UsageError: a batch that cannot be shared out, or, when the rest has been said, data that cannot be used.
    """
    optim, clips, views = recipe.optim, recipe.clips, recipe.views
    micro = recipe.micro_batch(processes.world)
    try:
        n_training, heads, lines = data_lines(recipe)
        trouble = None
    except UsageError as error:
        n_training, heads, lines, trouble = 0, {"": 1}, [("data", str(error))], error
    config = recipe.model.config(clips, heads)
    of_model = cost(config)
    known = f"{of_model.parameters:,} parameters, {config.variant}, {outputs(heads)}"
    # Of how many classes is not known without the data.
    bare = f"{of_model.parameters - config.dim - 1:,} parameters without its head, {config.variant}"
    say("model", bare if trouble else known)
    say("", f"{of_model.gflops:,.4g} GFLOPs per view in the paper's convention, {of_model.gmacs:,.4g} GMACs")
    start = recipe.model.start
    say("begins", "with fresh weights" if start is None else f"with {start}")
    for name, text in lines:
        say(name, text)
    clock = "of a file" if clips.clock is None else f"of {clips.fps:g} per second"
    say("clips", f"{clips.num_frames} frames of {clips.shape[0]}x{clips.shape[1]}, one in {clips.stride} {clock}")
    say("batch", f"{optim.batch} = {processes.world} process(es) x {micro} clips x {optim.accumulate} part(s)")
    rising = f"the first {optim.warmup_epochs:g} of warm-up"
    if trouble is None:
        per_epoch = n_training // optim.batch
        steps = round(optim.epochs * per_epoch)
        say("steps", f"{steps:,}: {optim.epochs:g} epochs of {per_epoch:,}, {rising}")
        passes = 4 if optim.checkpointing else 3
        forward = "forward twice" if optim.checkpointing else "forward"
        operations = 2 * passes * of_model.macs * steps * optim.batch
        say("computes", f"{operations:.1e} operations: {forward}, and backward at twice that")
        if steps < 1:
            trouble = UsageError(
                f"{n_training:,} videos in batches of {optim.batch} make less than one step: lower optim.batch, raise "
                "optim.epochs, or add videos"
            )
    else:
        say("steps", f"{optim.epochs:g} epochs, {rising}")
    momentum = f", momentum {optim.momentum:g}" if optim.optimizer == "sgd" else ""
    say("rate", f"{optim.lr:g} at most, {optim.optimizer}{momentum}")
    say("memory", memory(recipe, config, of_model, micro))
    temporal, crops = views.views
    say("judged", f"with {temporal}x{crops} views at the end, with one view every {recipe.run.validate_every} epoch(s)")
    if expected:
        say("expect", expected.removeprefix("Expect "))
    say("writes to", f"{folder}, and the model to {folder / 'model'}")
    if trouble is not None:
        raise trouble


def data_lines(recipe: VideoRecipe) -> tuple[int, dict[str, int], list[tuple[str, str]]]:
    """Of the data: how many videos are trained on, the classes by head, and what there is to say."""
    data = recipe.data
    if data.format == SYNTHETIC:
        where = f"{data.per_class * len(LABELS):,} synthetic clips of {len(LABELS)} classes, in {synthetic_root(data)}"
        lines = [("data", where), ("held out", f"{data.held_out_per_class * len(LABELS):,} more")]
        return data.per_class * len(LABELS), {"": len(LABELS)}, lines
    training, held_out = read_videos(data)
    return len(training), training.heads, [("data", found(training)), ("held out", found(held_out))]


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
