"""Tiny models made in memory, for tests of what runs on top of them."""

import torch

from modicum.captioning.model import Captioner
from modicum.config import CaptionerConfig, DecoderConfig, EncoderDecoderConfig, RopeConfig, VivitConfig
from modicum.lm.decoder import Decoder
from modicum.lm.encoder_decoder import EncoderDecoder
from modicum.lm.language_model import LanguageModel


def decoder_config(**changes) -> DecoderConfig:
    """Sizes that differ from each other."""
    settings = {
        "family": "llama",
        "vocab_size": 29,
        "dim": 24,
        "n_layers": 2,
        "n_heads": 6,
        "n_kv_heads": 2,
        "head_dim": 10,
        "ffn_dim": 31,
        "max_seq_len": 97,
        "rope": RopeConfig(rotary_dim=10),
        **changes,
    }
    return DecoderConfig(**settings)


def tiny(seed: int = 0, *, scale: float = 0.3, **changes) -> Decoder:
    """A random float32 decoder."""
    torch.manual_seed(seed)
    return random_weights(Decoder(decoder_config(**changes)), scale)


def tiny_t5(seed: int = 0, *, scale: float = 0.3, **changes) -> EncoderDecoder:
    """A random float32 T5, likewise."""
    settings = {
        "family": "t5",
        "vocab_size": 29,
        "dim": 24,
        "n_encoder_layers": 3,
        "n_layers": 2,
        "n_heads": 6,
        "n_kv_heads": 2,
        "head_dim": 10,
        "ffn_dim": 31,
        "relative_buckets": 8,
        "relative_max_distance": 13,
        "tie_embeddings": False,
        "scale_head": False,
        **changes,
    }
    torch.manual_seed(seed)
    return random_weights(EncoderDecoder(EncoderDecoderConfig(**settings)), scale)


# 4 tubelets in time, 2 x 3 in space; without temporal layers, clips may be shorter or longer.
WATCHING = {
    "variant": "factorized_encoder",
    "image_size": (11, 16),
    "num_frames": 9,
    "tubelet_size": (2, 5, 5),
    "dim": 14,
    "n_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 2,
    "head_dim": 7,
    "ffn_dim": 17,
    "num_classes": 3,
}


def tiny_captioner(seed: int = 0, *, scale: float = 0.3, memory: str = "frames", encoder=None, **changes) -> Captioner:
    """A random float32 captioner; `encoder` changes its ViViT, other settings its decoder. Its encoder has one seed, so that
    captioners of all seeds share it."""
    watching = VivitConfig(**{**WATCHING, **(encoder or {})})
    config = CaptionerConfig(
        encoder=watching, decoder=decoder_config(**changes), memory=memory, decoder_start_id=0, shares_encoder=None
    )
    torch.manual_seed(seed)
    model = random_weights(Captioner(config), scale)
    torch.manual_seed(99)
    random_weights(model.encoder, scale)
    return model


def clips(lengths: list[int], seed: int = 3, size: tuple[int, int] = (11, 16)) -> list[torch.Tensor]:
    """Random uint8 frames, [T, H, W, 3] each, of random hues: noise alone looks alike everywhere."""
    generator = torch.Generator().manual_seed(seed)
    hues = [torch.randint(0, 200, (n, 1, 1, 3), generator=generator) for n in lengths]
    noise = [torch.randint(0, 56, (n, *size, 3), generator=generator) for n in lengths]
    return [(hue + grain).to(torch.uint8) for hue, grain in zip(hues, noise, strict=True)]


def random_weights(model: LanguageModel, scale: float) -> LanguageModel:
    """`model` in evaluation mode with normal weights, norms about 1."""
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, scale)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(1)
    return model


def perturbed(model: LanguageModel, seed: int, scale: float) -> LanguageModel:
    """A draft that mostly agrees with `model`: the same weights with noise, but for a captioner's encoder: it is shared."""
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if not (isinstance(model, Captioner) and name.startswith("encoder.")):
                parameter.add_(torch.randn_like(parameter) * scale)
    return other


def prompts(lengths: list[int], vocab_size: int = 29, seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]
