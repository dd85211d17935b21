"""What a ViViT costs, from its configuration alone: parameters, tokens, multiply-adds and the paper's GFLOPs.

The paper (2103.15691, tables 2, 5 and 6, figures 7 and 8) counts a multiply-add as one operation, not as two, and every
cheap elementwise operation (norms, biases, GELU, residuals, softmax) as a half: a compiler's count divided by two. So its
GFLOPs lie a little above the multiply-adds. Both are counted here, for one clip.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from modicum.config import VivitConfig
from modicum.vivit.model import CHANNELS, Vivit

# Elementwise work in the paper's convention, fitted to its figures: 2 per softmax element; 30 per token and width of a
# block, 37 where it has a second attention. So an attention branch costs 7 per width, and a feed-forward branch 23 per
# width at the paper's ratio of 4, nearly all of it in the GELU.
SOFTMAX = 2
ATTENTION = 7
FEED_FORWARD = 23 / 4


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one clip.

    tokens: patches as (time, space), class tokens not counted.
    macs: multiply-adds of every matrix product, attention's included.
    flops: `macs` and the elementwise work, in the paper's convention.
    """

    parameters: int
    tokens: tuple[int, int]
    macs: int
    flops: float

    @property
    def gmacs(self) -> float:
        return self.macs / 1e9

    @property
    def gflops(self) -> float:
        """In the paper's convention: a multiply-add is one, an elementwise operation a half."""
        return self.flops / 1e9


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Equal layers over `tokens` tokens in all. `scores` are the softmax's elements in one layer."""

    layers: int
    tokens: int
    dim: int
    q_dim: int
    kv_dim: int
    head_dim: int
    ffn_dim: int
    scores: int
    attentions: int = 1

    @property
    def macs(self) -> int:
        projections = self.attentions * 2 * self.tokens * self.dim * (self.q_dim + self.kv_dim)
        attended = 2 * self.scores * self.head_dim
        return self.layers * (projections + attended + 2 * self.tokens * self.dim * self.ffn_dim)

    @property
    def elementwise(self) -> float:
        per_token = self.attentions * ATTENTION * self.dim + FEED_FORWARD * self.ffn_dim
        return self.layers * (SOFTMAX * self.scores + self.tokens * per_token)


def cost(config: VivitConfig) -> Cost:
    """Count a model of this configuration without building its weights; tubelet embedding and head are included."""
    c = config
    T, S = c.grid[0], c.grid[1] * c.grid[2]
    t, h, w = c.tubelet_size
    embedding = T * S * t * h * w * CHANNELS * c.dim
    head = c.dim * c.pre_logits + c.pre_logits * c.num_classes if c.pre_logits else c.dim * c.num_classes
    encoders = list(stacks(c, T, S))
    macs = embedding + head + sum(stack.macs for stack in encoders)
    flops = macs + sum(stack.elementwise for stack in encoders)
    return Cost(parameters=count_parameters(c), tokens=(T, S), macs=macs, flops=flops)


def stacks(config: VivitConfig, T: int, S: int) -> Iterator[Stack]:
    """The encoders over a grid of T tubelets in time and S in space, each with its class tokens."""
    c, H = config, config.n_heads
    token = int(c.pooling == "token")
    q_dim = H * c.head_dim

    def stack(layers: int, n_heads: int, ffn_dim: int, tokens: int, scores: int, attentions: int = 1) -> Stack:
        # A temporal encoder with other heads divides the same width among them, in groups of the same size.
        head_dim = q_dim // n_heads
        n_kv_heads = max(1, n_heads * c.n_kv_heads // H)
        return Stack(
            layers=layers,
            tokens=tokens,
            dim=c.dim,
            q_dim=head_dim * n_heads,
            kv_dim=head_dim * n_kv_heads,
            head_dim=head_dim,
            ffn_dim=ffn_dim,
            scores=scores,
            attentions=attentions,
        )

    if c.variant == "spacetime":
        N = T * S + token
        yield stack(c.n_layers, H, c.ffn_dim, N, H * N * N)
    elif c.variant == "factorized_encoder":
        N = S + token
        yield stack(c.n_layers, H, c.ffn_dim, T * N, H * T * N * N)
        if c.temporal_layers:
            N = T + token
            heads = c.temporal_heads or H
            yield stack(c.temporal_layers, heads, c.temporal_ffn_dim or c.ffn_dim, N, heads * N * N)
    elif c.variant == "factorized_self_attention":
        yield stack(c.n_layers, H, c.ffn_dim, T * S, H * T * S * (S + T), attentions=2)
    else:
        yield stack(c.n_layers, H, c.ffn_dim, T * S, H // 2 * T * S * (S + T))


def count_parameters(config: VivitConfig) -> int:
    """How many numbers a model of this configuration learns."""
    with torch.device("meta"):
        model = Vivit(config)
    return sum(parameter.numel() for parameter in model.parameters())
