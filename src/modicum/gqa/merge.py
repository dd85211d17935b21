"""Closed forms for sharing keys and values: the best shared projection of a group, with every head refitted to it.

Heads may be written in many ways that compute the same (`align`), so what is shared is found from what they compute:

- values and output, the products v_h^T o_h^T of a group side by side: a truncated singular value decomposition;
- keys that RoPE rotates, per frequency: the leading eigenvector of the group's complex Gram matrix;
- other keys, the products q_h^T k_h on top of each other: again a truncated decomposition.

Errors are weighted by second moments of the inputs (`statistics`). Everything is in float64. Where a group's heads compute
with the same keys and values, whatever their form, nothing is lost; and no average of aligned heads is nearer.
"""

from dataclasses import replace

import torch
from torch import Tensor

from modicum.gqa.align import fold_value_bias, shared_form
from modicum.gqa.heads import AttentionWeights, with_bias, without_bias
from modicum.gqa.statistics import LayerStatistics, covariance, energy, roots


def merged_layer(weights: AttentionWeights, n_kv_heads: int, stats: LayerStatistics) -> AttentionWeights:
    """Neighbouring key-value heads merged into `n_kv_heads`; queries and output refitted, biases included. In float64.

    Under QK-norm (Qwen3) a norm stands between keys and scores, and no closed form is exact: keys are aligned and averaged.
    """
    w = fold_value_bias(weights)
    values, outputs = shared_values(w, n_kv_heads, stats)
    if w.k_norm is None:
        queries, keys = shared_keys(w, n_kv_heads, stats)
    else:
        w, keys = shared_form(w, n_kv_heads, stats)
        queries = with_bias(w.q, w.q_bias)
    (q, q_bias), (k, k_bias) = without_bias(queries, w.q_bias), without_bias(keys, w.k_bias)
    v, v_bias = without_bias(values, w.v_bias)
    o = outputs.permute(2, 0, 1)
    return replace(w, q=q, k=k, v=v, o=o, q_bias=q_bias, k_bias=k_bias, v_bias=v_bias)


def shared_values(w: AttentionWeights, n_kv_heads: int, stats: LayerStatistics) -> tuple[Tensor, Tensor]:
    """Values of every group, [n_kv_heads, K, E], and every head's output, [H, K, D]."""
    moment = stats.of_values(centred=w.o_bias is not None)
    values = with_bias(w.v, w.v_bias).repeat_interleave(w.n_heads // w.n_kv_heads, 0)
    groups = zip(values.chunk(n_kv_heads), w.o.permute(1, 2, 0).chunk(n_kv_heads), strict=True)
    shared, outputs = zip(*(merge_values(v, o, moment) for v, o in groups), strict=True)
    return torch.stack(shared), torch.cat(outputs)


def shared_keys(w: AttentionWeights, n_kv_heads: int, stats: LayerStatistics) -> tuple[Tensor, Tensor]:
    """Every head's queries, [H, K, E], and keys of every group, [n_kv_heads, K, E']."""
    R, K = w.rotary_dim, w.q.shape[1]
    queries = with_bias(w.q, w.q_bias)
    keys = with_bias(w.k, w.k_bias).repeat_interleave(w.n_heads // w.n_kv_heads, 0)
    for_queries, shared = torch.zeros_like(queries), keys.new_zeros(n_kv_heads, *keys.shape[1:])
    for g, heads in enumerate(torch.arange(w.n_heads).chunk(n_kv_heads)):
        if R:
            q, k = (torch.complex(x[heads, : R // 2], x[heads, R // 2 : R]) for x in (queries, keys))
            q, k = merge_rotated_keys(q, k, stats)
            for_queries[heads, :R], shared[g, :R] = torch.cat([q.real, q.imag], 1), torch.cat([k.real, k.imag])
        if R < K:
            for_queries[heads, R:], shared[g, R:] = merge_keys(queries[heads, R:], keys[heads, R:], stats)
    return for_queries, shared


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


def merge_rotated_keys(q_HFE: Tensor, k_HFE: Tensor, stats: LayerStatistics) -> tuple[Tensor, Tensor]:
    """Complex queries per head [H, F, E] and shared keys [F, E] of rotated pairs.

    Per frequency k_h ~ c_h k with one complex k; the score q_h conj(k_h) is then (q_h conj(c_h)) conj(k). Errors of k_h
    count by the energy of q_h. With w_h = sqrt(energy) k_h, the best k is the leading eigenvector u of the Gram matrix of
    the w_h, and c_h = conj(u_h) / sqrt(energy).
    """
    moment = stats.inputs.to(k_HFE.dtype)
    strength_HF = energy(q_HFE, stats.queries).sqrt() + 1e-30
    weighted = strength_HF[..., None] * k_HFE
    gram_FHH = torch.einsum("afd,de,bfe->fab", weighted.conj(), moment, weighted)
    u_FH = torch.linalg.eigh(gram_FHH).eigenvectors[..., -1]
    k_FE = torch.einsum("fh,hfe->fe", u_FH, weighted)
    c_HF = u_FH.conj().T / strength_HF
    # The scale between k and the c_h is free: keys keep the size that they had on average.
    size_F = energy(k_HFE, stats.inputs).sqrt().mean(0) / (energy(k_FE, stats.inputs).sqrt() + 1e-30)
    return q_HFE * (c_HF / size_F).conj()[..., None], k_FE * size_F[:, None]


def merge_keys(q_HKE: Tensor, k_HKE: Tensor, stats: LayerStatistics) -> tuple[Tensor, Tensor]:
    """Queries per head [H, K, E] and shared keys [K, E'] where nothing is rotated.

    As `merge_values`, of the products q_h^T k_h on top of each other. What is the same for all keys changes no softmax: keys
    count by their covariance, and need no bias.
    """
    H, K, _ = k_HKE.shape
    root, inverse = roots(covariance(stats.inputs)[:-1, :-1])
    basis, coordinates = torch.linalg.qr(root @ k_HKE[..., :-1].flatten(0, 1).T)
    coordinates_HRK = coordinates.unflatten(1, (H, K)).transpose(0, 1)
    energy_HKK = q_HKE @ stats.queries @ q_HKE.mT
    top = _leading((coordinates_HRK @ energy_HKK @ coordinates_HRK.mT).sum(0), K)
    keys_KD = (inverse @ basis @ top).T
    # Keys keep the size that they had on average; the queries take up the rest.
    size = k_HKE[..., :-1].norm() / (H**0.5 * keys_KD.norm() + 1e-30)
    queries = (top.T @ coordinates_HRK) @ q_HKE / size
    return queries, torch.nn.functional.pad(keys_KD * size, (0, 1))


def _leading(gram: Tensor, count: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues, as columns."""
    return torch.linalg.eigh(gram).eigenvectors[:, -count:]
