"""Tiny models made in memory, for tests of what runs on top of them."""

import torch

from modicum.config import DecoderConfig, RopeConfig
from modicum.lm.decoder import Decoder


def tiny(seed: int = 0, *, scale: float = 0.3, **changes) -> Decoder:
    """A random float32 decoder with sizes that differ from each other."""
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
    torch.manual_seed(seed)
    model = Decoder(DecoderConfig(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, scale)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(1)
    return model


def perturbed(model: Decoder, seed: int, scale: float) -> Decoder:
    """A draft that mostly agrees with `model`: the same weights with noise."""
    other = Decoder(model.config).eval()
    other.load_state_dict(model.state_dict())
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return other


def prompts(lengths: list[int], vocab_size: int = 29, seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]
