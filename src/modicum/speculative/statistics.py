"""The tests that `certify` decides by: chi-square with rare cells pooled, an exact binomial, Bonferroni's correction."""

import math

import torch
from torch import Tensor

# Cells that are expected fewer times than this are counted together: the statistic's distribution holds only above.
LEAST_EXPECTED = 5.0


def chi_square(counts_V: Tensor, probs_V: Tensor) -> tuple[float, int]:
    """Pearson's statistic of counts against probabilities, and its degrees of freedom; 0 of them: nothing to test.

    Rare outcomes form one cell, which joins the least of the others if it is rare itself.
    """
    expected_V = probs_V.double() / probs_V.double().sum() * counts_V.sum()
    regular_V = expected_V >= LEAST_EXPECTED
    observed, expected = counts_V[regular_V].double(), expected_V[regular_V]
    rare = torch.stack([counts_V[~regular_V].double().sum(), expected_V[~regular_V].sum()])
    if rare[1] >= LEAST_EXPECTED:
        observed, expected = torch.cat([observed, rare[:1]]), torch.cat([expected, rare[1:]])
    elif len(expected):
        least = int(expected.argmin())
        observed[least] += rare[0]
        expected[least] += rare[1]
    if len(expected) < 2:
        return 0.0, 0
    return float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1


def chi_square_tail(statistic: float, freedom: int) -> float:
    """The probability of a chi-square statistic at least this large; 1 for no degrees of freedom."""
    if freedom == 0:
        return 1.0
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def binomial_tail(count: int, n: int, probability: float) -> float:
    """The probability, of n trials, of a count that is no more probable than this one (two-sided, exact)."""
    if probability <= 0 or probability >= 1:
        return float(count == n * round(probability))
    k = torch.arange(n + 1, dtype=torch.float64)
    n_t = torch.tensor(float(n), dtype=torch.float64)
    log_pmf = torch.lgamma(n_t + 1) - torch.lgamma(k + 1) - torch.lgamma(n_t - k + 1)
    log_pmf = log_pmf + k * math.log(probability) + (n_t - k) * math.log1p(-probability)
    return min(1.0, float(log_pmf[log_pmf <= log_pmf[count] + 1e-9].exp().sum()))


def corrected(p_values: list[float]) -> float:
    """The probability that the least of so many p-values is as small by chance (Bonferroni: at most); 1 for none."""
    return min(1.0, min(p_values) * len(p_values)) if p_values else 1.0
