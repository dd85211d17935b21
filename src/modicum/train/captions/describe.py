"""`modicum train --dry-run` on a captioner's recipe: what a run would do, and what it needs."""

from pathlib import Path

import torch

from modicum import api
from modicum.captioning.model import Captioner
from modicum.config import CaptionerConfig, DecoderConfig
from modicum.parallel.data import Processes
from modicum.train.captions.build import encoder_config, load_decoder
from modicum.train.captions.data import SYNTHETIC, read_captioned
from modicum.train.captions.recipe import CaptionRecipe
from modicum.train.video.build import activation_bytes
from modicum.train.video.describe import found, say, size
from modicum.vivit.flops import cost


def describe(recipe: CaptionRecipe, folder: Path, processes: Processes, expected: str | None) -> None:
    """Print it; nothing is written.

    Raises:
        UsageError: a batch that cannot be shared out, or data that cannot be used.
    """
    data, optim, clips = recipe.data, recipe.optim, recipe.clips
    config = captioner_config(recipe)
    micro = optim.micro_batch(processes.world)
    if data.format == SYNTHETIC:
        n_training = data.n_clips
        of_data = f"{n_training:,} synthetic scenes, in {data.root}", f"{data.n_held_out:,} of combinations never shown"
    else:
        training, held_out = read_captioned(data)
        n_training, of_data = len(training), (found(training), found(held_out))
    with torch.device("meta"):
        model = Captioner(config)
    of_decoder = sum(p.numel() for p in model.decoder.parameters()) + sum(p.numel() for p in model.project.parameters())
    of_encoder = cost(config.encoder).parameters
    shared = recipe.draft is not None
    frozen = shared or (recipe.encoder is not None and recipe.encoder.frozen)
    whose = f"shared with {recipe.draft.target}" if recipe.draft else ("frozen" if frozen else "trained")
    say("encoder", f"{of_encoder:,} parameters, {config.encoder.variant}, {whose}")
    say("decoder", f"{of_decoder:,} parameters, {config.n_heads}:{config.n_kv_heads} heads")
    say("memory", f"{config.memory_slots} vectors of {config.encoder.dim} per clip: {config.memory}")
    starts = [name for name in (recipe.encoder and recipe.encoder.start, recipe.decoder.start) if name]
    say("begins", f"with {' and '.join(starts)}" if starts else "with fresh weights")
    say("data", of_data[0])
    say("held out", of_data[1])
    rate = "its files' own frames" if clips.clock is None else f"{clips.fps:g} frames per second"
    say("clips", f"{clips.num_frames} frames of {clips.shape[0]}x{clips.shape[1]}, every {clips.stride}. of {rate}")
    say("batch", f"{optim.batch} = {processes.world} processes x {micro} clips x {optim.accumulate} parts")
    per_epoch = n_training // optim.batch
    steps = round(optim.epochs * per_epoch)
    say("steps", f"{steps:,}: {optim.epochs:g} epochs of {per_epoch:,}, after {optim.warmup_epochs:g} of warm-up")
    say("rate", f"{optim.lr:g} at most, {optim.optimizer}")
    if recipe.draft is not None:
        say("teacher", f"{recipe.draft.target}, {recipe.draft.weight:.0%} of the loss")
    trained = of_decoder + (0 if frozen else of_encoder)
    copies = 2 + (2 if optim.optimizer == "adamw" else 1) + (1 if optim.ema else 0)
    held = 0 if frozen else activation_bytes(config.encoder, micro, bf16=optim.bf16, checkpointing=False)
    say("needs", f"{size(4 * trained * copies)} for weights, gradients and moments, about {size(held)} for activations")
    if expected:
        say("expect", expected)
    say("writes to", f"{folder}, and the model to {folder / 'model'}")


def captioner_config(recipe: CaptionRecipe) -> CaptionerConfig:
    """The model that a run would train, its encoder included."""
    section = recipe.decoder
    decoder: DecoderConfig = (
        section.config(section.vocab_size) if section.start is None else load_decoder(section.start).config
    )
    if recipe.draft is not None:
        target = api.check_captioner(api.load(recipe.draft.target, device="cpu")).config
        return CaptionerConfig(
            encoder=target.encoder, decoder=decoder, memory=target.memory, decoder_start_id=target.decoder_start_id
        )
    assert recipe.encoder is not None
    encoder = encoder_config(recipe.encoder, recipe.clips)
    if section.memory == "patches":
        encoder = type(encoder).from_dict({**encoder.to_dict(), "temporal_layers": 0})
    return CaptionerConfig(encoder=encoder, decoder=decoder, memory=section.memory, decoder_start_id=0)
