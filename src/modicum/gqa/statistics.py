"""Second moments of what an attention layer reads, which weight errors of its queries, keys and values. All in float64."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

# Added to a moment, relative to its mean diagonal: inputs that never vary in some direction make it singular.
RIDGE = 1e-6


@dataclass
class LayerStatistics:
    """E[(x, 1)^T (x, 1)] of a layer's inputs, [E, E] with E = D + 1: the constant stands for biases.

    queries: of what queries are made from. inputs: of what keys are made from; another text's in cross-attention, else the
    same. averaged: of the inputs as attention averages them, which is what values are weighted by.
    """

    queries: Tensor
    inputs: Tensor
    averaged: Tensor
    n_tokens: int = 0

    @classmethod
    def unknown(cls, q_dim: int, kv_dim: int) -> Self:
        """Of inputs nothing is known about: all directions alike."""
        queries, inputs = (torch.eye(dim + 1, dtype=torch.float64) for dim in (q_dim, kv_dim))
        return cls(queries, inputs, inputs)

    def of_values(self, centred: bool) -> Tensor:
        """What values are weighted by; `centred` where an output bias takes up every constant."""
        return covariance(self.averaged) if centred else self.averaged

    def of_unrotated_keys(self) -> Tensor:
        """What keys are weighted by where nothing is rotated: a constant in all keys changes no softmax."""
        return covariance(self.inputs)


def covariance(moment_EE: Tensor) -> Tensor:
    """A second moment about the mean: its last row and column, of the constant, are zero."""
    mean_E = moment_EE[-1] / moment_EE[-1, -1]
    return moment_EE - moment_EE[-1, -1] * torch.outer(mean_E, mean_E)


def moment(x: Tensor) -> Tensor:
    """Sum over all rows of x^T x: [..., E] -> [E, E]."""
    rows = x.flatten(0, -2)
    return rows.T @ rows


def energy(rows: Tensor, moment_EE: Tensor) -> Tensor:
    """E|row x|^2 of real or complex rows, [..., E] -> [...], given the second moment of x."""
    return torch.einsum("...d,de,...e->...", rows.conj(), moment_EE.to(rows.dtype), rows).real.clamp(min=0)


def lifted(moment: Tensor, ridge: float = RIDGE) -> Tensor:
    """A second moment that has an inverse, [..., E, E]."""
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return moment + (ridge * mean + 1e-300) * torch.eye(moment.shape[-1], dtype=moment.dtype)


def roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a second moment, slightly lifted, and its inverse."""
    values, vectors = torch.linalg.eigh(lifted(moment))
    scale = values.clamp(min=values[-1] * 1e-12).sqrt()
    return (vectors * scale) @ vectors.T, (vectors / scale) @ vectors.T
