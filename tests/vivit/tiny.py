"""Tiny ViViTs with random weights, for tests: 3 tubelets in time, 7 x 3 in space, no two sizes alike."""

import torch
from torch import Tensor

from modicum.config import VivitConfig
from modicum.vivit.model import Vivit

M1, M2, M3, M4 = VARIANTS = (
    "spacetime",
    "factorized_encoder",
    "factorized_self_attention",
    "factorized_dot_product",
)
T, S = 3, 21
# Every variant with every way to pool that it has, and both forms of a factorized encoder.
KINDS = (
    {"variant": M1},
    {"variant": M1, "pooling": "gap"},
    {"variant": M1, "pooling": "gmp"},
    {"variant": M1, "pooling": "gsp"},
    {"variant": M2, "temporal_layers": 3},
    {"variant": M2, "temporal_layers": 3, "pooling": "gap"},
    {"variant": M2, "temporal_layers": 3, "pooling": "gmp"},
    {"variant": M2},
    {"variant": M2, "pooling": "gsp"},
    {"variant": M3, "pooling": "gap"},
    {"variant": M3, "pooling": "gmp", "attention_order": "time_space"},
    {"variant": M4, "pooling": "gap"},
    {"variant": M4, "pooling": "gsp"},
)
# One of each.
MODELS = (KINDS[0], KINDS[4], KINDS[9], KINDS[11])


def name_of(kind: dict) -> str:
    """How pytest calls a kind."""
    return "-".join(str(value) for value in kind.values())


def settings(**changes) -> dict:
    return {
        "image_size": (36, 22),  # a row and a column too many for the tubelets
        "num_frames": 11,
        "tubelet_size": (3, 5, 7),
        "dim": 24,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 4,
        "head_dim": 6,
        "ffn_dim": 31,
        "num_classes": 13,
        **changes,
    }


def tiny_vivit(seed: int = 0, *, scale: float = 0.2, **changes) -> Vivit:
    torch.manual_seed(seed)
    model = Vivit(VivitConfig(**settings(**changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1 if "norm.weight" in name else 0, scale)
    return model


def clip(batch: int = 2, frames: int = 11, seed: int = 1) -> Tensor:
    """Float video in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, frames, 36, 22, 3, generator=generator) * 2 - 1
