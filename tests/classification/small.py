"""A small video model with a head that answers, for tests of what runs on top of it."""

import torch

from modicum.config import VivitConfig
from modicum.vivit.model import Vivit

FRAMES, SIDE = 6, 48


def small(variant="factorized_encoder", seed=0, **settings):
    """A model of clips of 6 frames of 48 x 48 with a head that answers."""
    heads = settings.pop("heads", {})
    sizes = {
        "image_size": (SIDE, SIDE),
        "num_frames": FRAMES,
        "tubelet_size": (2, 16, 16),
        "dim": 24,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 4,
        "head_dim": 6,
        "ffn_dim": 31,
        "num_classes": 5,
        "heads": tuple(heads.items()),
        "temporal_layers": 2 if variant == "factorized_encoder" else 0,
        "pooling": "gap" if variant == "factorized_dot_product" else "token",
    }
    torch.manual_seed(seed)
    model = Vivit(VivitConfig(variant=variant, **{**sizes, **settings})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model
