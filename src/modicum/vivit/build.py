"""Models by name, such as `vivit-b/16x2`, and how fresh weights begin."""

import math
import re
from typing import Any

import torch
from torch import nn

from modicum.config import Variant, VivitConfig, nearest
from modicum.errors import UsageError
from modicum.vivit.model import Encoder, Vivit
from modicum.vivit.tubelets import TubeletEmbedding

# Depth, width and heads (2103.15691, section 4.1, after 2010.11929); the feed-forward is four times as wide.
SIZES = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "h": (32, 1280, 16)}
NAME = re.compile(r"vivit-([a-z]+)/([1-9]\d*)x([1-9]\d*)", re.IGNORECASE)


def named_config(
    name: str,
    variant: Variant = "factorized_encoder",
    num_classes: int = 400,
    num_frames: int = 32,
    image_size: int | tuple[int, int] = 224,
    temporal_layers: int | None = None,
    pooling: str | None = None,
    attention_order: str = "space_time",
    n_kv_heads: int | None = None,
    stochastic_depth: float = 0.0,
    heads: dict[str, int] | None = None,
    sampled_frames: int | None = None,
    stochastic_depth_rule: str = "from_zero",
) -> VivitConfig:
    """The configuration that `build` builds; its arguments.

    Raises:
        UsageError: a name or setting that does not exist, or a combination that cannot be built.
    """
    match = NAME.fullmatch(name)
    if not match or match[1].lower() not in SIZES:
        raise UsageError(
            f"`{name}` is not a ViViT's name: give a size, the patch's side and the tubelet's frames as in "
            f"vivit-b/16x2; sizes are {', '.join(SIZES)}"
        )
    depth, dim, n_heads = SIZES[match[1].lower()]
    patch, frames = int(match[2]), int(match[3])
    if temporal_layers is None:
        temporal_layers = 4 if variant == "factorized_encoder" else 0
    if pooling is None:
        pooling = "token" if variant in ("spacetime", "factorized_encoder") else "gap"
    settings: dict[str, Any] = {
        "variant": variant,
        "image_size": (image_size, image_size) if isinstance(image_size, int) else tuple(image_size),
        "num_frames": num_frames,
        "sampled_frames": sampled_frames,
        "tubelet_size": (frames, patch, patch),
        "dim": dim,
        "n_layers": depth,
        "n_heads": n_heads,
        "n_kv_heads": n_heads if n_kv_heads is None else n_kv_heads,
        "head_dim": dim // n_heads,
        "ffn_dim": 4 * dim,
        "temporal_layers": temporal_layers,
        "attention_order": attention_order,
        "pooling": pooling,
        "num_classes": sum(heads.values()) if heads else num_classes,
        "heads": tuple((heads or {}).items()),
        "stochastic_depth": stochastic_depth,
        "stochastic_depth_rule": stochastic_depth_rule,
    }
    return VivitConfig(**settings)


def build(name: str, variant: Variant = "factorized_encoder", **settings: Any) -> Vivit:
    """A ViViT with fresh weights, in evaluation mode.

    Args:
        name: size, patch side and tubelet length: `vivit-b/16x2`. Sizes: s, b, l, h.
        variant: spacetime | factorized_encoder | factorized_self_attention | factorized_dot_product, Models 1 to 4.
        num_classes: 400 as in Kinetics; or `heads`, such as {"noun": 300, "verb": 97}, for several outputs.
        num_frames, image_size: what the model reads; a side, or (height, width).
        temporal_layers: depth of a factorized encoder's temporal encoder, 4 if not given; 0 averages over time.
        pooling: token | gap | gmp | gsp (mean, max, sum); the class token where the variant has one, else the mean.
        attention_order: space_time | time_space, of a factorized_self_attention block.
        n_kv_heads: fewer key-value heads than query heads: grouped-query attention (2305.13245) in the encoder.
        stochastic_depth: rate of the last layer.
        stochastic_depth_rule: from_zero, as the authors' code, never drops the first layer; equation_10 does.
        sampled_frames: keep this many of the frames, uniformly (section 3.2).

    Raises:
        UsageError: a name or setting that does not exist, or a combination that cannot be built.
    """
    known = named_config.__annotations__
    for key in settings:
        if key not in known:
            raise UsageError(f"build has no setting `{key}`{nearest(key, known)}")
    model = Vivit(named_config(name, variant, **settings))
    initialise(model)
    return model.eval()


@torch.no_grad()
def initialise(model: Vivit, seed: int | None = None) -> None:
    """Weights as the authors' code begins: Glorot for layers, normal(0, 0.02) for positions, zeros for class tokens and
    the head; the tubelet embedding's variance is that of its inputs."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            fan = module.in_features + module.out_features
            bound = math.sqrt(6 / fan)
            module.weight.uniform_(-bound, bound, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Encoder):
            module.positions.normal_(0, 0.02, generator=generator)
    for module in model.modules():
        if isinstance(module, TubeletEmbedding):
            weight = module.project.weight
            weight.normal_(0, 1 / math.sqrt(weight.shape[1]), generator=generator)
    nn.init.zeros_(model.head.weight)
