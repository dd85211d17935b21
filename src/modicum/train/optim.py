"""The optimizer, its schedule, and how weights begin."""

import math

import torch
from torch import nn

from modicum.lm.decoder import Decoder
from modicum.train.recipe import OptimSection


def learning_rate(settings: OptimSection, step: int) -> float:
    """The rate of `step`, counted from 0: linear to `lr` over `warmup` steps, then half a cosine to `lr * floor`."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return settings.lr * (settings.floor + (1 - settings.floor) * cosine)


def make_optimizer(model: nn.Module, settings: OptimSection) -> torch.optim.AdamW:
    """AdamW (1711.05101); matrices decay, norms and biases do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=True)


@torch.no_grad()
def initialise(model: Decoder, seed: int) -> None:
    """Normal(0, 0.02); what writes into the residual stream is scaled down by the number of writes, as in GPT-2."""
    generator = torch.Generator().manual_seed(seed)
    residual = 1 / math.sqrt(2 * model.config.n_layers)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            scale = residual if name.endswith(("attention.out.weight", "ffn.down.weight")) else 1.0
            parameter.normal_(0, 0.02 * scale, generator=generator)
