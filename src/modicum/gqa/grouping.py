"""Which heads share keys and values: those that lose least by it.

What a group loses are the tails beyond the K leading directions of its value-output products and of its query-key
products (`merge`), as shares of the whole layer's, keys and values counted alike. While searching, the cost of a group is
the sum over its pairs: it found partitions as good as the groups' own tails did, and needs no decomposition per step.
"""

import torch
from torch import Tensor

from modicum.gqa.heads import AttentionWeights, with_bias
from modicum.gqa.statistics import LayerStatistics, covariance, energy

# Inner products of all heads' vectors, [B, G k, G k], and the number k of a head's vectors: as many as a group may keep.
Gram = tuple[Tensor, int]


def key_grams(w: AttentionWeights, stats: LayerStatistics) -> list[Gram]:
    """Of keys, weighted by the queries that read them: rotated ones per frequency, and the others."""
    queries, keys, R = with_bias(w.q, w.q_bias), with_bias(w.k, w.k_bias), w.rotary_dim
    result = []
    if R:
        pairs_q, pairs_k = (torch.complex(x[:, : R // 2], x[:, R // 2 : R]) for x in (queries, keys))
        strength_GF = energy(pairs_q, stats.queries).unflatten(0, (w.n_kv_heads, -1)).sum(1).sqrt()
        weighted = strength_GF[..., None] * pairs_k
        moment = stats.inputs.to(weighted.dtype)
        result.append((torch.einsum("afd,de,bfe->fab", weighted.conj(), moment, weighted), 1))
    if w.q.shape[1] > R:
        rest_q = queries[:, R:]
        energy_HKK = rest_q @ stats.queries @ rest_q.mT
        result.append(product_gram(keys[:, R:], covariance(stats.inputs), energy_HKK))
    return result


def value_grams(w: AttentionWeights, stats: LayerStatistics) -> list[Gram]:
    """Of values, weighted by the outputs that they have."""
    outputs = w.o.permute(1, 2, 0)
    return [product_gram(with_bias(w.v, w.v_bias), stats.of_values(w.o_bias is not None), outputs @ outputs.mT)]


def product_gram(heads_GKE: Tensor, moment_EE: Tensor, energy_HKK: Tensor) -> Gram:
    """Of products [E, K] [K, any] whose right factors have the inner products `energy_HKK`, summed over a group's heads."""
    G, K, _ = heads_GKE.shape
    values, vectors = torch.linalg.eigh(energy_HKK.unflatten(0, (G, -1)).sum(1))
    root_GKK = vectors * values.clamp(min=0).sqrt()[:, None]
    rows = (root_GKK.mT @ heads_GKE).flatten(0, 1)
    return (rows @ moment_EE @ rows.T)[None], K


def lost(grams: list[Gram], groups_PR: Tensor) -> Tensor:
    """What each group of R heads would lose by sharing, [P], as shares of what all heads have together."""
    tails = torch.zeros(len(groups_PR), dtype=torch.float64)
    total = 0.0
    for gram, k in grams:
        rows = (groups_PR[..., None] * k + torch.arange(k)).flatten(1)
        blocks = gram[:, rows[:, :, None], rows[:, None, :]]
        tails += torch.linalg.eigvalsh(blocks)[..., :-k].clamp(min=0).sum((0, 2))
        total += gram.diagonal(dim1=-2, dim2=-1).sum().real.item()
    return tails / (total + 1e-300)


def pair_costs(w: AttentionWeights, stats: LayerStatistics) -> Tensor:
    """What every two key-value heads would lose by sharing, [G, G]."""
    G = w.n_kv_heads
    pairs = torch.combinations(torch.arange(G), 2)
    costs = torch.zeros(G, G, dtype=torch.float64)
    if len(pairs):
        costs[pairs[:, 0], pairs[:, 1]] = lost(key_grams(w, stats), pairs) + lost(value_grams(w, stats), pairs)
    return costs + costs.T


def best_order(costs_GG: Tensor, n_groups: int, halves: bool = False) -> list[int]:
    """An order of heads in which neighbours share: `n_groups` groups of one size and of least cost.

    Two starts, heads as they stand and groups grown around the cheapest pairs, each improved by the best exchange of two
    heads for as long as one helps. `halves`: no group crosses the middle.
    """
    if halves:
        half = len(costs_GG) // 2
        first = best_order(costs_GG[:half, :half], n_groups // 2)
        second = best_order(costs_GG[half:, half:], n_groups // 2)
        return first + [half + head for head in second]
    G = len(costs_GG)
    size = G // n_groups
    if size in (1, G):
        return list(range(G))
    costs_GG = costs_GG.clone().fill_diagonal_(0)
    as_they_stand = torch.arange(G) // size
    starts = [as_they_stand, _grown(costs_GG, size)]
    label_G = min((_exchanged(costs_GG, start) for start in starts), key=lambda label: _cost(costs_GG, label))
    groups = [torch.nonzero(label_G == g)[:, 0].tolist() for g in range(n_groups)]
    return [head for group in sorted(groups) for head in group]


def _cost(costs_GG: Tensor, label_G: Tensor) -> float:
    return costs_GG[label_G[:, None] == label_G].sum().item()


def _grown(costs_GG: Tensor, size: int) -> Tensor:
    """A label per head: groups begun with the cheapest pair that is left and grown by the head that adds least."""
    G = len(costs_GG)
    label_G = torch.full((G,), -1)
    for group in range(G // size):
        free = torch.nonzero(label_G < 0)[:, 0]
        among = costs_GG[free][:, free] + torch.eye(len(free), dtype=torch.float64) * costs_GG.max() * 2
        pair = divmod(int(among.argmin()), len(free))
        members = free[list(pair)].tolist()
        while len(members) < size:
            rest = [head for head in free.tolist() if head not in members]
            members.append(min(rest, key=lambda head: costs_GG[head, members].sum().item()))
        label_G[members] = group
    return label_G


def _exchanged(costs_GG: Tensor, label_G: Tensor) -> Tensor:
    """The labels after the best exchanges of two heads, until none lowers the cost."""
    label_G = label_G.clone()
    while True:
        # Of each head to all of each group; and what an exchange of a and b would save.
        to_group = costs_GG @ torch.nn.functional.one_hot(label_G).double()
        own = to_group.gather(1, label_G[:, None])
        there = to_group[:, label_G]
        saving = own + own.T - there - there.T + 2 * costs_GG
        saving[label_G[:, None] == label_G] = 0
        a, b = divmod(int(saving.argmax()), len(label_G))
        if saving[a, b] <= 1e-12 * costs_GG.max():
            return label_G
        label_G[[a, b]] = label_G[[b, a]]
