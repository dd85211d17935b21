"""Closed forms for sharing keys and values: the best shared projection of a group, with every head refitted to it.

A head may be written in many ways without changing what it computes (any invertible matrix between values and output; for
queries and keys any invertible matrix where nothing is rotated, and one complex number per frequency where RoPE rotates).
Averaging heads that are written differently averages noise. What is shared here is therefore found from what heads compute:

- values and output, the products v_h^T o_h^T of a group side by side: a truncated singular value decomposition;
- keys that RoPE rotates, per frequency: the leading eigenvector of the group's complex Gram matrix;
- other keys, the products q_h^T k_h on top of each other: again a truncated decomposition.

Errors are weighted by the second moments C of the inputs (`calibrate.LayerStatistics`); without them C is the identity.
Everything is in float64. Where a group's heads compute with the same keys and values, whatever their form, nothing is lost.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modicum.gqa.heads import AttentionWeights

# Added to C, relative to its mean diagonal: inputs that never vary in some direction make it singular.
RIDGE = 1e-6


@dataclass
class LayerStatistics:
    """Second moments of what a layer reads, with a constant 1 appended: float64.

    inputs: E[(x, 1)^T (x, 1)], [D + 1, D + 1]. averaged: the same of inputs averaged by a group's attention, whose values
    are built from it, [new groups, D + 1, D + 1].
    """

    inputs: Tensor
    averaged: Tensor
    n_tokens: int = 0


def merged_layer(weights: AttentionWeights, n_kv_heads: int, stats: LayerStatistics | None = None) -> AttentionWeights:
    """Neighbouring key-value heads merged into `n_kv_heads`; queries and output refitted, biases included.

    Under QK-norm (Qwen3) keys cannot be rescaled, so theirs are averaged; values and output are merged as elsewhere.
    """
    w = _doubled(weights)
    D = w.q.shape[2]
    eye = torch.eye(D + 1, dtype=torch.float64)
    inputs = eye if stats is None else stats.inputs
    queries, keys, values = (_with_bias(x, b) for x, b in ((w.q, w.q_bias), (w.k, w.k_bias), (w.v, w.v_bias)))
    outputs = w.o.permute(1, 2, 0)  # [H, K, D]
    per_group, per_kv = w.n_heads // n_kv_heads, w.n_heads // w.n_kv_heads
    # A query head sees the present key-value head that it shares.
    keys, values = keys.repeat_interleave(per_kv, 0), values.repeat_interleave(per_kv, 0)
    parts: list[tuple[Tensor, ...]] = []
    for g in range(n_kv_heads):
        heads = slice(g * per_group, (g + 1) * per_group)
        moment = eye if stats is None else stats.averaged[g]
        v, o = merge_values(values[heads], outputs[heads], moment)
        if w.q_norm is not None:
            q, k = queries[heads], keys[heads].mean(0)
        else:
            q, k = merge_keys(queries[heads], keys[heads], inputs, w.rotary_dim)
        parts.append((q, k, v, o))
    q, o = (torch.cat([part[i] for part in parts]) for i in (0, 3))
    k, v = (torch.stack([part[i] for part in parts]) for i in (1, 2))
    result = replace(
        w,
        q=q[..., :D],
        k=k[..., :D],
        v=v[..., :D],
        o=o.permute(2, 0, 1),
        q_bias=None if w.q_bias is None else q[..., D],
        k_bias=None if w.k_bias is None else k[..., D],
        v_bias=None if w.v_bias is None else v[..., D],
    )
    return _cast(result, weights.q.dtype)


def merge_values(values_HKE: Tensor, outputs_HKD: Tensor, moment_EE: Tensor) -> tuple[Tensor, Tensor]:
    """Shared values [K, E] and an output per head [H, K, D] that minimise sum_h |C^1/2 (v_h^T o_h - v^T o'_h)|^2.

    E is D and the bias. The matrices [E, E] are never formed: all of it lies in the span of the H * K value rows.
    """
    H, K, _ = values_HKE.shape
    root, inverse = roots(moment_EE)
    basis, coordinates = torch.linalg.qr(root @ values_HKE.flatten(0, 1).T)  # [E, r], [r, H K]
    products = torch.einsum("rhk,hkd->hrd", coordinates.unflatten(1, (H, K)), outputs_HKD)
    top = _leading(torch.einsum("hrd,hsd->rs", products, products), K)  # [r, K]
    return (inverse @ basis @ top).T, torch.einsum("rk,hrd->hkd", top, products)


def merge_keys(queries_HKE: Tensor, keys_HKE: Tensor, moment_EE: Tensor, rotary_dim: int) -> tuple[Tensor, Tensor]:
    """Queries per head [H, K, E] and shared keys [K, E] whose scores are nearest to the heads' own."""
    queries, keys = [], []
    if rotary_dim:
        half = rotary_dim // 2
        complex_q, complex_k = (torch.complex(x[:, :half], x[:, half:rotary_dim]) for x in (queries_HKE, keys_HKE))
        q, k = _merge_rotated(complex_q, complex_k, moment_EE)
        queries += [q.real, q.imag]
        keys += [k.real, k.imag]
    if rotary_dim < queries_HKE.shape[1]:
        q, k = _merge_unrotated(queries_HKE[:, rotary_dim:], keys_HKE[:, rotary_dim:], moment_EE)
        queries.append(q)
        keys.append(k)
    return torch.cat(queries, 1), torch.cat(keys, 0)


def _merge_rotated(q_HFE: Tensor, k_HFE: Tensor, moment_EE: Tensor) -> tuple[Tensor, Tensor]:
    """Per frequency, k_h ~ c_h k with one complex k; the score q_h conj(k_h) is then (q_h conj(c_h)) conj(k).

    The errors of k_h count by the energy of q_h. With w_h = sqrt(energy) k_h, the best k is the leading eigenvector u of
    the Gram matrix of the w_h, and c_h = conj(u_h) / sqrt(energy).
    """
    moment = moment_EE.to(k_HFE.dtype)

    def energy(x: Tensor) -> Tensor:
        return torch.einsum("hfd,de,hfe->hf", x.conj(), moment, x).real.clamp(min=0)

    strength_HF = energy(q_HFE).sqrt() + 1e-30
    weighted = strength_HF[..., None] * k_HFE
    gram_FHH = torch.einsum("afd,de,bfe->fab", weighted.conj(), moment, weighted)
    u_FH = torch.linalg.eigh(gram_FHH).eigenvectors[..., -1]
    k_FE = torch.einsum("fh,hfe->fe", u_FH, weighted)
    c_HF = u_FH.conj().T / strength_HF
    # The scale between k and the c_h is free: keys keep the size that they had on average.
    size_F = energy(k_HFE).sqrt().mean(0) / (energy(k_FE[None])[0].sqrt() + 1e-30)
    return q_HFE * (c_HF / size_F).conj()[..., None], k_FE * size_F[:, None]


def _merge_unrotated(q_HKE: Tensor, k_HKE: Tensor, moment_EE: Tensor) -> tuple[Tensor, Tensor]:
    """As `merge_values`, of the products q_h^T k_h on top of each other.

    What is the same for all keys changes no softmax: keys count by their covariance, and need no bias.
    """
    H, K, _ = k_HKE.shape
    mean_D = moment_EE[-1, :-1] / moment_EE[-1, -1]
    root, inverse = roots(moment_EE[:-1, :-1] / moment_EE[-1, -1] - torch.outer(mean_D, mean_D))
    basis, coordinates = torch.linalg.qr(root @ k_HKE[..., :-1].flatten(0, 1).T)
    coordinates_HRK = coordinates.unflatten(1, (H, K)).transpose(0, 1)
    energy_HKK = q_HKE @ moment_EE @ q_HKE.mT
    top = _leading((coordinates_HRK @ energy_HKK @ coordinates_HRK.mT).sum(0), K)
    keys_KD = (inverse @ basis @ top).T
    # Keys keep the size that they had on average; the queries take up the rest.
    size = k_HKE[..., :-1].norm() / (H**0.5 * keys_KD.norm() + 1e-30)
    queries = (top.T @ coordinates_HRK) @ q_HKE / size
    return queries, torch.nn.functional.pad(keys_KD * size, (0, 1))


def roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a second moment, slightly lifted, and its inverse."""
    lifted = moment + RIDGE * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    values, vectors = torch.linalg.eigh(lifted)
    scale = values.clamp(min=values[-1] * 1e-12).sqrt()
    return (vectors * scale) @ vectors.T, (vectors / scale) @ vectors.T


def _leading(gram: Tensor, count: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues, as columns."""
    return torch.linalg.eigh(gram).eigenvectors[:, -count:]


def _with_bias(heads: Tensor, bias: Tensor | None) -> Tensor:
    """[H, K, D] and [H, K] -> [H, K, D + 1]: the bias is the weight of a constant input."""
    column = heads.new_zeros(heads.shape[:2]) if bias is None else bias
    return torch.cat([heads, column[..., None]], dim=-1)


_FIELDS = ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "o_bias")


def _doubled(weights: AttentionWeights) -> AttentionWeights:
    return _cast(weights, torch.float64)


def _cast(weights: AttentionWeights, dtype: torch.dtype) -> AttentionWeights:
    held = {field: getattr(weights, field) for field in _FIELDS}
    changes = {field: None if x is None else x.to(dtype) for field, x in held.items()}
    return replace(weights, **changes)  # type: ignore[arg-type]
