"""Ways of writing a head that leave its function as it is (gauges), and `aligned`: heads brought into one form and averaged.

What a head computes does not fix how it is written. Exact in every digit but rounding:

- values and output: any invertible matrix on the values, its inverse on the output (`gauge_values`);
- keys and queries: any invertible matrix on the keys, its inverse transpose on the queries; where RoPE rotates, one complex
  number per frequency, because that is what commutes with every rotation (`gauge_keys`);
- the order of heads (`permuted`); with an output bias, a constant moved from the values' bias into it (`fold_value_bias`);
- a constant added to all keys of a head without RoPE: it shifts all scores of a query alike.

Under QK-norm (Qwen3) a phase is free only where both norm weights of a pair are equal, of queries and of keys; elsewhere
a sign is.
"""

from dataclasses import replace

import torch
from torch import Tensor

from modicum.gqa.heads import AttentionWeights, with_bias, without_bias
from modicum.gqa.statistics import LayerStatistics, energy, lifted

# Rounds of aligning every head with the mean of the others; two heads need one.
ROUNDS = 20
# Keeps apart from zero what is divided by.
TINY = 1e-12


def gauge_values(weights: AttentionWeights, by_GKK: Tensor) -> AttentionWeights:
    """Values of head g multiplied by `by_GKK[g]`, the output of its query heads by the inverse. Exact."""
    per_kv = weights.n_heads // weights.n_kv_heads
    inverse_HKK = torch.linalg.inv(by_GKK).repeat_interleave(per_kv, 0)
    o = torch.einsum("dhk,hkj->dhj", weights.o, inverse_HKK)
    bias = None if weights.v_bias is None else torch.einsum("gjk,gk->gj", by_GKK, weights.v_bias)
    return replace(weights, v=by_GKK @ weights.v, v_bias=bias, o=o)


def gauge_keys(weights: AttentionWeights, by_GKK: Tensor) -> AttentionWeights:
    """Keys of head g multiplied by `by_GKK[g]`, its queries by the inverse transpose.

    Exact for any invertible matrix where nothing is rotated, and for `complex_matrix` where RoPE rotates.
    """
    per_kv = weights.n_heads // weights.n_kv_heads
    for_q_HKK = torch.linalg.inv(by_GKK).mT.repeat_interleave(per_kv, 0)
    q_bias = None if weights.q_bias is None else torch.einsum("hjk,hk->hj", for_q_HKK, weights.q_bias)
    k_bias = None if weights.k_bias is None else torch.einsum("gjk,gk->gj", by_GKK, weights.k_bias)
    return replace(weights, q=for_q_HKK @ weights.q, k=by_GKK @ weights.k, q_bias=q_bias, k_bias=k_bias)


def complex_matrix(numbers_GF: Tensor) -> Tensor:
    """Complex numbers, one per frequency, as real matrices on half-split pairs: [G, F] -> [G, 2 F, 2 F]."""
    real, imaginary = numbers_GF.real.diag_embed(), numbers_GF.imag.diag_embed()
    return torch.cat([torch.cat([real, -imaginary], -1), torch.cat([imaginary, real], -1)], -2)


def permuted(weights: AttentionWeights, order: list[int]) -> AttentionWeights:
    """Key-value heads in another order, each with its query heads. `order[i]` is the head that comes i-th. Exact.

    Where scores carry a bias per head (T5), its columns have to follow: `query_order`.
    """
    queries = query_order(order, weights.n_heads // weights.n_kv_heads)

    def moved(x: Tensor | None, index: list[int], axis: int = 0) -> Tensor | None:
        return None if x is None else x.index_select(axis, torch.tensor(index, device=x.device))

    w = weights
    changes = {name: moved(getattr(w, name), order) for name in ("k", "v", "k_bias", "v_bias")}
    changes |= {name: moved(getattr(w, name), queries) for name in ("q", "q_bias")}
    return replace(w, o=moved(w.o, queries, 1), **changes)  # type: ignore[arg-type]


def query_order(order: list[int], per_kv: int) -> list[int]:
    """Query heads in the order of the key-value heads that they share."""
    return [head * per_kv + i for head in order for i in range(per_kv)]


def balanced(w: AttentionWeights) -> AttentionWeights:
    """Values as large as the outputs that read them, and keys as their queries, dimension by dimension. Exact.

    Conversions leave them in whatever sizes their algebra ends in. Nothing shows, until an optimizer moves every weight by
    as much: AdamW shakes a small output apart before a large value has moved.
    """
    w = gauge_values(w, balance(rms(w.v), rms(w.o.permute(1, 2, 0)), w.n_kv_heads).diag_embed())
    if w.k_norm is not None:
        return w
    keys, queries, half = rms(w.k), rms(w.q), w.rotary_dim // 2
    if half:
        # Both dimensions of a rotated pair are scaled alike.
        keys, queries = (torch.cat([paired(x, half), x[:, 2 * half :]], 1) for x in (keys, queries))
    return gauge_keys(w, balance(keys, queries, w.n_kv_heads).diag_embed())


def rms(heads: Tensor) -> Tensor:
    """Root mean square of every row: [heads, K, D] -> [heads, K]."""
    return heads.square().mean(-1).sqrt()


def paired(sizes: Tensor, half: int) -> Tensor:
    """The mean size of each rotated pair, for both of its dimensions: [heads, K] -> [heads, 2 half]."""
    return ((sizes[:, :half] + sizes[:, half : 2 * half]) / 2).repeat(1, 2)


def balance(written_GK: Tensor, read_HK: Tensor, n_groups: int) -> Tensor:
    """What to multiply the shared dimensions by, [G, K], so that they become as large as what reads them."""
    readers_GK = read_HK.unflatten(0, (n_groups, -1)).square().mean(1).sqrt()
    return ((readers_GK + TINY) / (written_GK + TINY)).sqrt()


def fold_value_bias(weights: AttentionWeights) -> AttentionWeights:
    """The values' bias moved into the output's, where there is one: attention averages a constant to itself. Exact."""
    if weights.v_bias is None or weights.o_bias is None:
        return weights
    per_kv = weights.n_heads // weights.n_kv_heads
    constant = torch.einsum("dhk,hk->d", weights.o, weights.v_bias.repeat_interleave(per_kv, 0))
    return replace(weights, v_bias=torch.zeros_like(weights.v_bias), o_bias=weights.o_bias + constant)


def aligned_layer(weights: AttentionWeights, n_kv_heads: int, stats: LayerStatistics) -> AttentionWeights:
    """Neighbouring heads brought into one form, then averaged, then scaled back to their size. Weights in float64.

    Every head is first written so that its values, and keys that are not rotated, have unit covariance, and rotated keys
    unit size per frequency; its output and its queries take up the rest. What is left free is an orthogonal matrix or a
    phase: those nearest to the mean of the group (generalised Procrustes analysis). Heads count by the energy of what reads
    them, their outputs or queries. A mean of unlike vectors is shorter than they are, which would flatten attention: it is
    stretched again.
    """
    w = fold_value_bias(weights)
    moment = lifted(stats.of_values(centred=w.o_bias is not None))
    w = gauge_values(w, unit_covariance(with_bias(w.v, w.v_bias), moment))
    strength_G = w.o.square().sum((0, 2)).unflatten(0, (w.n_kv_heads, -1)).sum(1)
    turns, values = orthogonal_form(with_bias(w.v, w.v_bias), strength_G, moment, n_kv_heads)
    w, keys = shared_form(gauge_values(w, turns), n_kv_heads, stats)
    (k, k_bias), (v, v_bias) = without_bias(keys, w.k_bias), without_bias(values, w.v_bias)
    return replace(w, k=k, v=v, k_bias=k_bias, v_bias=v_bias)


def shared_form(w: AttentionWeights, n_kv_heads: int, stats: LayerStatistics) -> tuple[AttentionWeights, Tensor]:
    """The layer with every head's keys and queries in its group's form, and the groups' keys, [n_kv_heads, K, E]."""
    R, free_F = w.rotary_dim, free_phases(w)
    w = gauge_keys(w, unit_keys(w, stats)) if free_F is None else equal_sizes(w, stats)
    queries, keys = with_bias(w.q, w.q_bias), with_bias(w.k, w.k_bias)
    G, K, E = keys.shape
    turns, shared = torch.eye(K, dtype=keys.dtype).repeat(G, 1, 1), keys.new_zeros(n_kv_heads, K, E)
    if R:
        q, k = (torch.complex(x[:, : R // 2], x[:, R // 2 : R]) for x in (queries, keys))
        strength_GF = energy(q, stats.queries).unflatten(0, (G, -1)).sum(1)
        phases, mean = phase_form(k, strength_GF, stats.inputs, n_kv_heads, free_F)
        turns[:, :R, :R], shared[:, :R] = complex_matrix(phases), torch.cat([mean.real, mean.imag], 1)
    if R < K:
        strength_G = energy(queries[:, R:], stats.queries).sum(1).unflatten(0, (G, -1)).sum(1)
        turns[:, R:, R:], shared[:, R:] = orthogonal_form(
            keys[:, R:], strength_G, stats.of_unrotated_keys(), n_kv_heads
        )
    # Under QK-norm too: what turns keys turns queries, and these turns commute with the norm.
    return gauge_keys(w, turns), shared


def unit_keys(w: AttentionWeights, stats: LayerStatistics) -> Tensor:
    """The gauge of keys, [G, K, K], that gives rotated ones unit size per frequency, and the others unit covariance."""
    R, K = w.rotary_dim, w.k.shape[1]
    keys = with_bias(w.k, w.k_bias)
    gauge = torch.eye(K, dtype=keys.dtype).repeat(w.n_kv_heads, 1, 1)
    if R:
        sizes_GF = energy(torch.complex(keys[:, : R // 2], keys[:, R // 2 : R]), stats.inputs).sqrt()
        gauge[:, :R, :R] = torch.cat([sizes_GF, sizes_GF], 1).clamp(min=TINY).reciprocal().diag_embed()
    if R < K:
        gauge[:, R:, R:] = unit_covariance(keys[:, R:], lifted(stats.of_unrotated_keys()))
    return gauge


def unit_covariance(heads_GKE: Tensor, moment_EE: Tensor) -> Tensor:
    """Matrices [G, K, K] under which heads have unit covariance."""
    covariances = lifted(heads_GKE @ moment_EE @ heads_GKE.mT, TINY)
    return torch.linalg.inv(torch.linalg.cholesky(covariances))


def equal_sizes(w: AttentionWeights, stats: LayerStatistics) -> AttentionWeights:
    """Keys of all heads brought to one size, which the norm that follows takes away again."""
    sizes_G = energy(with_bias(w.k, w.k_bias), stats.inputs).sum(-1).sqrt()
    factor_G = sizes_G.mean() / (sizes_G + TINY)
    return replace(
        w, k=w.k * factor_G[:, None, None], k_bias=None if w.k_bias is None else w.k_bias * factor_G[:, None]
    )


def free_phases(w: AttentionWeights) -> Tensor | None:
    """Under QK-norm, the frequencies whose phase is free, bool [R / 2]; None without it: all, and their sizes too."""
    if w.q_norm is None or w.k_norm is None:
        return None
    half = w.rotary_dim // 2
    return (w.q_norm[:half] == w.q_norm[half : 2 * half]) & (w.k_norm[:half] == w.k_norm[half : 2 * half])


def orthogonal_form(heads_GKE: Tensor, strength_G: Tensor, moment_EE: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    """Orthogonal matrices that turn heads to the mean of their group, [G, K, K], and the means in full size, [n, K, E]."""
    heads = heads_GKE.unflatten(0, (n_groups, -1))
    share = shares(strength_G, n_groups)[..., None, None]
    mean = heads[:, 0]
    for _ in range(ROUNDS):
        u, _, vh = torch.linalg.svd(torch.einsum("nke,ef,nrjf->nrkj", mean, moment_EE, heads))
        turns = u @ vh
        mean = (share * (turns @ heads)).sum(1)
    before, after = (energy(x, moment_EE).sum(-1) for x in (heads, mean))
    stretch = ((share[..., 0, 0] * before).sum(1) / (after + TINY)).sqrt()
    return turns.flatten(0, 1), mean * stretch[:, None, None]


def phase_form(
    keys_GFE: Tensor, strength_GF: Tensor, moment_EE: Tensor, n_groups: int, free_F: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Phases that turn rotated keys to the mean of their group, [G, F], and the means in full size, [n, F, E].

    Where `free_F` says no, a phase is a sign.
    """
    heads = keys_GFE.unflatten(0, (n_groups, -1))
    share = shares(strength_GF, n_groups)
    mean = heads[:, 0]
    for _ in range(ROUNDS):
        overlap = torch.einsum("nfd,de,nrfe->nrf", mean, moment_EE.to(heads.dtype), heads.conj())
        if free_F is not None:
            overlap = torch.where(free_F, overlap, overlap.real.to(overlap.dtype))
        phases = torch.polar(torch.ones_like(overlap.real), overlap.angle())
        mean = ((share * phases)[..., None] * heads).sum(1)
    before, after = (energy(x, moment_EE) for x in (heads, mean))
    stretch = ((share * before).sum(1) / (after + TINY)).sqrt()
    return phases.flatten(0, 1), mean * stretch[..., None]


def shares(strength_G: Tensor, n_groups: int) -> Tensor:
    """What each head counts in its group: [G, ...] -> [n_groups, G / n_groups, ...], adding up to 1."""
    strength = strength_G.unflatten(0, (n_groups, -1)) + TINY
    return strength / strength.sum(1, keepdim=True)
