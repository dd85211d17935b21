"""Which heads share: the search against trying everything, and costs against the losses they stand for."""

import itertools

import pytest
import torch

from modicum.config import RopeConfig
from modicum.gqa.grouping import best_order, key_grams, lost, pair_costs, value_grams
from modicum.gqa.heads import places, take
from modicum.gqa.merge import merge_values
from modicum.gqa.statistics import LayerStatistics
from tests.helpers import tiny


def symmetric(n, seed):
    costs = torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (costs + costs.T).fill_diagonal_(0)


def cost(costs, groups):
    return sum(costs[a, b].item() for group in groups for a, b in itertools.combinations(group, 2))


def partitions(heads, size):
    if not heads:
        yield []
        return
    for others in itertools.combinations(heads[1:], size - 1):
        group = (heads[0], *others)
        for rest in partitions([h for h in heads if h not in group], size):
            yield [group, *rest]


@pytest.mark.parametrize(("n", "n_groups"), [(8, 4), (8, 2), (9, 3), (6, 2)])
def test_search_against_trying_everything(n, n_groups):
    for seed in range(10):
        costs, size = symmetric(n, seed), n // n_groups
        order = best_order(costs, n_groups)
        assert sorted(order) == list(range(n))
        found = cost(costs, [order[i : i + size] for i in range(0, n, size)])
        every = sorted(cost(costs, groups) for groups in partitions(list(range(n)), size))
        # Two starts and exchanges are no proof of the best; they are never far from it, and better than standing still.
        assert found <= every[len(every) // 10] + 1e-12
        assert found <= cost(costs, [list(range(i, i + size)) for i in range(0, n, size)]) + 1e-12


def test_alike_heads_are_put_together():
    costs = torch.ones(6, 6, dtype=torch.float64) - torch.eye(6, dtype=torch.float64)
    costs[[0, 4, 2, 5, 1, 3], [4, 0, 5, 2, 3, 1]] = 0
    assert best_order(costs, 3) == [0, 4, 1, 3, 2, 5]
    assert best_order(costs, 6) == best_order(costs, 1) == [0, 1, 2, 3, 4, 5]


def test_halves_are_not_crossed():
    costs = torch.ones(8, 8, dtype=torch.float64)
    costs[[0, 7], [7, 0]] = 0
    costs[[0, 2, 5, 7], [2, 0, 7, 5]] = 0.5
    assert best_order(costs, 4, halves=True) == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("rotary", [None, 4, 10])
def test_costs_are_losses(rotary):
    model = tiny(n_kv_heads=6, rope=None if rotary is None else RopeConfig(rotary_dim=rotary)).double()
    w = take(model.dense_state(), next(places(model.config)))
    stats = LayerStatistics.unknown(24, 24)
    pair = torch.tensor([[1, 4]])
    values = torch.nn.functional.pad(w.v, (0, 1))[[1, 4]]
    outputs = w.o.permute(1, 2, 0)
    shared, refitted = merge_values(values, outputs[[1, 4]], stats.averaged)
    products = (values.mT @ outputs[[1, 4]] - shared.T @ refitted).square().sum()
    total = (w.v.mT @ outputs).square().sum()
    assert lost(value_grams(w, stats), pair)[0].item() == pytest.approx((products / total).item(), rel=1e-4)
    costs = pair_costs(w, stats)
    assert costs[1, 4] == costs[4, 1] == (lost(value_grams(w, stats), pair) + lost(key_grams(w, stats), pair))[0]
    assert costs.diagonal().abs().max() == 0
    # Everything in one group loses more than any pair, and a head alone nothing.
    assert lost(key_grams(w, stats), torch.arange(6)[None]) > lost(key_grams(w, stats), pair)
    assert lost(key_grams(w, stats), torch.tensor([[3]])) < 1e-9
