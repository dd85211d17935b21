"""The optimizer, its schedule, and how weights begin."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modicum.lm.decoder import Decoder
from modicum.train.recipe import OptimSection


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a loop does with gradients.

    accumulate: batches that make one step.
    rate: the learning rate of a step, counted from 0.
    optimizer: makes one for a model.
    clip: the norm that a step's gradient is scaled down to; None where the optimizer does its own.
    average: decay of the weights' running mean, by which the model is then judged; 0 is none.
    """

    steps: int
    accumulate: int
    rate: Callable[[int], float]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    clip: float | None
    bf16: bool
    average: float = 0.0


def plan_of(settings: OptimSection) -> Plan:
    """What a recipe's settings mean."""
    return Plan(
        steps=settings.steps,
        accumulate=settings.accumulate,
        rate=lambda step: learning_rate(settings, step),
        optimizer=lambda model: make_optimizer(model, settings),
        clip=None if settings.optimizer == "adafactor" else settings.clip,  # which clips its updates itself
        bf16=settings.bf16,
    )


def learning_rate(settings: OptimSection, step: int) -> float:
    """The rate of `step`, counted from 0: linear to `lr` over `warmup` steps, half a cosine to `lr * floor`; or T5's."""
    if settings.t5_step is not None:
        return settings.lr * t5_rate(settings.t5_step + step)
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return settings.lr * (settings.floor + (1 - settings.floor) * cosine)


def make_optimizer(model: nn.Module, settings: OptimSection) -> torch.optim.Optimizer:
    """AdamW (1711.05101), where matrices decay, norms and biases do not; or Adafactor."""
    parameters = list(model.parameters())
    if settings.optimizer == "adafactor":
        return Adafactor(parameters, settings.lr)
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=True)


def t5_rate(step: int) -> float:
    """T5's rate for pre-training with Adafactor (1910.10683, section 3.1.2), at a step counted from its beginning.

    Fine-tuning has a constant 1e-3, which is where a million steps end.
    """
    return 1 / math.sqrt(max(step, 10_000))


class Adafactor(torch.optim.Optimizer):
    """Adafactor (1804.04235, algorithms 4 to 6) without momentum: the rate is relative to the size of each weight.

    Second moments of matrices, and of the last two axes of larger tensors, are a row and a column; an update is scaled
    down to a root mean square of at most 1. `torch.optim.Adafactor` holds the rate below 1 / sqrt(step), and with the
    paper's first epsilon it makes NaN of a token that no batch has shown yet.

    Args:
        lr: the relative rate; a weight moves by up to lr * max(1e-3, its root mean square).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    size = root_mean_square(parameter).clamp(min=1e-3)
                    parameter.sub_(self._direction(parameter) * (group["lr"] * size))

    def _direction(self, parameter: nn.Parameter) -> Tensor:
        """The gradient over its estimated root mean square, clipped."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            # On the CPU, as PyTorch's own count, so that no step waits for a device.
            state["step"] = torch.zeros((), device="cpu")
            if gradient.dim() > 1:
                state["row"] = torch.zeros_like(gradient[..., 0])
                state["column"] = torch.zeros_like(gradient[..., 0, :])
            else:
                state["square"] = torch.zeros_like(gradient)
        state["step"] += 1
        fresh = state["step"].item() ** -0.8
        squared = gradient.square() + 1e-30
        if gradient.dim() > 1:
            row = state["row"].lerp_(squared.mean(-1), fresh)
            column = state["column"].lerp_(squared.mean(-2), fresh)
            row_factor = (row / row.mean(-1, keepdim=True)).rsqrt()
            update = gradient * row_factor[..., None] * column.rsqrt()[..., None, :]
        else:
            update = gradient * state["square"].lerp_(squared, fresh).rsqrt()
        return update / root_mean_square(update).clamp(min=1.0)


def root_mean_square(x: Tensor) -> Tensor:
    return x.norm() / math.sqrt(x.numel())


@torch.no_grad()
def initialise(model: Decoder, seed: int) -> None:
    """Normal(0, 0.02); what writes into the residual stream is scaled down by the number of writes, as in GPT-2."""
    generator = torch.Generator().manual_seed(seed)
    residual = 1 / math.sqrt(2 * model.config.n_layers)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            scale = residual if name.endswith(("attention.out.weight", "ffn.down.weight")) else 1.0
            parameter.normal_(0, 0.02 * scale, generator=generator)
