"""The model of a captioner's recipe, as training begins with it."""

import math
from dataclasses import replace
from typing import Any

import torch

from modicum import api, resources
from modicum.captioning.assemble import draft_of, from_parts
from modicum.captioning.model import Captioner
from modicum.checkpoint.tokenizer import Tokenizer
from modicum.config import VivitConfig
from modicum.errors import UsageError
from modicum.lm.decoder import Decoder
from modicum.train.captions.recipe import CaptionRecipe, EncoderSection
from modicum.train.video.build import fresh_model, is_vivit
from modicum.train.video.recipe import ClipsSection
from modicum.vivit.initialization import init_from_video
from modicum.vivit.model import Vivit

# A captioner names no classes; its encoder's configuration has to say how many all the same.
NO_CLASSES = {"": 1}


def fresh_captioner(recipe: CaptionRecipe, files: dict[str, bytes], target: Captioner | None) -> Captioner:
    """A captioner, or a draft of `target`, with its weights as they begin, on the CPU, in float32.

    Args:
        files: of the tokenizer, where the decoder brings none.

    Raises:
        CheckpointError: what it starts from cannot be read.
        UsageError: that does not fit, or is of another kind.
    """
    seed = recipe.run.seed
    decoder = fresh_decoder(recipe, files)
    if target is not None:
        return draft_of(target, decoder, seed)
    assert recipe.encoder is not None
    vivit = fresh_encoder(recipe.encoder, recipe.clips, seed)
    model = from_parts(vivit, decoder, recipe.decoder.memory, seed=seed)
    return model.freeze_encoder(recipe.encoder.frozen)


def fresh_encoder(section: EncoderSection, clips: ClipsSection, seed: int) -> Vivit:
    """The ViViT that watches."""
    if not section.whole:
        return fresh_model(section.config(clips, NO_CLASSES), section, seed)
    source = load_vivit(section.start or "")
    model = Vivit(fitted(source.config, clips))
    return init_from_video(model, source)


def fitted(config: VivitConfig, clips: ClipsSection) -> VivitConfig:
    """The same ViViT for clips of the recipe's size, whose positions are interpolated."""
    return replace(config, num_frames=clips.num_frames, image_size=clips.shape)


def encoder_config(section: EncoderSection, clips: ClipsSection) -> VivitConfig:
    """What `fresh_encoder` would build."""
    if section.whole:
        return fitted(load_vivit(section.start or "").config, clips)
    return section.config(clips, NO_CLASSES)


def load_vivit(start: str) -> Vivit:
    """A ViViT in float32, on the CPU.

    Raises:
        UsageError: something else.
    """
    if not is_vivit(resources.model_presets().get(start) or start):
        raise UsageError(f"encoder.start {start} is no ViViT: give one, or the sizes of one that begins from it")
    return api.load(start, device="cpu", dtype="float32")


def fresh_decoder(recipe: CaptionRecipe, files: dict[str, bytes]) -> Decoder:
    """The text model that writes."""
    section = recipe.decoder
    if section.start is not None:
        return load_decoder(section.start)
    tokenizer = Tokenizer.from_files(files, {})
    assert tokenizer is not None
    model = Decoder(section.config(len(tokenizer)))
    begin(model, recipe.run.seed)
    model.tokenizer, model.files, model.eos_ids = tokenizer, files, tokenizer.eos_ids
    return model


def load_decoder(start: str) -> Decoder:
    """A text model in float32, on the CPU.

    Raises:
        UsageError: it has no decoder of ours, no tokenizer, or no token that ends a text.
    """
    model: Any = api.load(start, device="cpu", dtype="float32")
    if not isinstance(model, Decoder):
        raise UsageError(f"decoder.start {start} is {type(model).__name__}: give a decoder-only language model")
    if model.tokenizer is None or not model.eos_ids:
        raise UsageError(
            f"decoder.start {start} has no tokenizer with an end of text, which closes each caption: add it"
        )
    return model


@torch.no_grad()
def begin(model: Decoder, seed: int) -> None:
    """Weights that keep what they read as large as it is, at any width: normal, with a deviation of 1 / sqrt(inputs).

    What writes into the residual stream is scaled down by the number of writes, as in GPT-2. An embedding that is not the
    head as well is as large as a norm's output.
    """
    generator = torch.Generator().manual_seed(seed)
    residual = 1 / math.sqrt(2 * model.config.n_layers)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            untied = name == "embed.weight" and not model.config.tie_embeddings
            scale = residual if name.endswith(("attention.out.weight", "ffn.down.weight")) else 1.0
            parameter.normal_(0, 1.0 if untied else scale / math.sqrt(parameter.shape[1]), generator=generator)
