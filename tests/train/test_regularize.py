"""Soft targets against numbers worked out by hand, and draws that only their key decides."""

import math

import numpy as np
import pytest
import torch

from modicum.errors import UsageError
from modicum.train.regularize import mixing_weight, mixup, one_hot, smooth, soft_cross_entropy
from tests.vivit.tiny import clip, tiny_vivit

HEADS = {"noun": 5, "verb": 3}


def test_one_hot():
    assert one_hot(torch.tensor([2, 0]), {"": 3}).tolist() == [[0, 0, 1], [1, 0, 0]]
    by_head = one_hot(torch.tensor([[4, 0], [1, 2]]), HEADS)
    assert by_head["noun"].tolist() == [[0, 0, 0, 0, 1], [0, 1, 0, 0, 0]]
    assert by_head["verb"].tolist() == [[1, 0, 0], [0, 0, 1]]
    assert by_head["verb"].dtype == torch.float32


def test_smoothing_by_hand():
    # 0.7 * 1 + 0.3 / 4 and 0.3 / 4.
    smoothed = smooth(one_hot(torch.tensor([1]), {"": 4}), 0.3)
    torch.testing.assert_close(smoothed, torch.tensor([[0.075, 0.775, 0.075, 0.075]]))
    # Each head shares its rate among its own classes.
    by_head = smooth(one_hot(torch.tensor([[4, 0]]), HEADS), 0.2)
    torch.testing.assert_close(by_head["noun"], torch.tensor([[0.04, 0.04, 0.04, 0.04, 0.84]]))
    torch.testing.assert_close(by_head["verb"], torch.tensor([[0.8 + 0.2 / 3, 0.2 / 3, 0.2 / 3]]))


def test_mixup_by_hand():
    """Three clips: the first and the last are partners, the middle one is its own."""
    key = (3, 17)
    weight = mixing_weight(0.3, key)
    video = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1, 1).expand(3, 2, 5, 7, 3)
    mixed, targets = mixup(video, one_hot(torch.tensor([0, 3, 1]), {"": 4}), 0.3, key)
    assert mixed.dtype == torch.float32
    expected = torch.tensor([-weight + (1 - weight), 51 / 127.5 - 1, weight - (1 - weight)])
    torch.testing.assert_close(mixed, expected.view(3, 1, 1, 1, 1).expand(3, 2, 5, 7, 3))
    torch.testing.assert_close(
        targets, torch.tensor([[weight, 1 - weight, 0, 0], [0, 0, 0, 1], [1 - weight, weight, 0, 0]])
    )
    again, _ = mixup(mixed, targets, 0.3, (3, 18))
    assert again.dtype == torch.float32
    assert not torch.equal(again, mixed)


def test_heads_are_mixed_with_one_weight():
    targets = one_hot(torch.tensor([[4, 0], [1, 2]]), HEADS)
    weight = mixing_weight(0.1, (5,))
    _, mixed = mixup(torch.zeros(2, 1, 1, 1, 3), targets, 0.1, (5,))
    torch.testing.assert_close(mixed["noun"][0], torch.tensor([0, 1 - weight, 0, 0, weight]))
    torch.testing.assert_close(mixed["verb"][1], torch.tensor([1 - weight, 0, weight]))


def test_no_mixup_leaves_everything_as_it_is():
    video, targets = torch.zeros(2, 1, 1, 1, 3, dtype=torch.uint8), torch.eye(2)
    same, kept = mixup(video, targets, 0.0, (1,))
    assert same is video
    assert kept is targets


def test_the_key_alone_decides_the_weight():
    torch.manual_seed(0)
    np.random.seed(0)
    first = mixing_weight(0.3, (1, 2))
    torch.rand(3)
    np.random.rand(3)
    assert mixing_weight(0.3, (1, 2)) == first
    others = {mixing_weight(0.3, key) for key in ((1, 3), (2, 2), (1, 2, 0), (2, 1))}
    assert len(others | {first}) == 5


def test_the_weight_is_beta_distributed():
    weights = np.array([mixing_weight(0.3, (7, step)) for step in range(4000)])
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)) = 0.15625; four standard errors are 0.025 and about 0.006.
    assert weights.mean() == pytest.approx(0.5, abs=0.025)
    assert weights.var() == pytest.approx(0.15625, abs=0.007)


def test_cross_entropy_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]])
    # Probabilities 1/4, 3/4 and 4/5, 1/5.
    targets = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    first = -0.5 * math.log(1 / 4) - 0.5 * math.log(3 / 4)
    second = -math.log(1 / 5)
    assert soft_cross_entropy(logits, targets).item() == pytest.approx((first + second) / 2)
    three = torch.zeros(2, 3)
    loss = soft_cross_entropy({"a": logits, "b": three}, {"b": torch.eye(3)[:2], "a": targets})
    assert loss.item() == pytest.approx(((first + second) / 2 + math.log(3)) / 2)


def test_a_model_with_heads_trains_on_them():
    model = tiny_vivit(variant="factorized_encoder", heads=(("noun", 5), ("verb", 3)), num_classes=8).train()
    targets = smooth(one_hot(torch.tensor([[4, 0], [1, 2]]), dict(model.config.heads)), 0.2)
    video, targets = mixup(clip(), targets, 0.3, (1,))
    loss = soft_cross_entropy(model(video), targets)
    loss.backward()
    assert model.head.weight.grad.abs().min(1).values.gt(0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: one_hot(torch.tensor([3]), {"": 3}), "targets lie in 3 ... 3 and the model has 3 classes"),
        (lambda: one_hot(torch.tensor([[-1, 0]]), HEADS), "targets lie in -1 ... -1 and head `noun` has 5 classes"),
        (lambda: one_hot(torch.tensor([1]), HEADS), "1 targets for 2 heads"),
        (lambda: smooth(torch.eye(2), 1.2), "`label_smoothing` is 1.2"),
        (lambda: mixup(torch.zeros(2, 1), torch.eye(2), -0.1, (1,)), "`mixup` is -0.1"),
        (lambda: mixup(torch.zeros(2, 1), torch.eye(2), math.nan, (1,)), "`mixup` is nan"),
        (lambda: soft_cross_entropy({"a": torch.eye(2)}, torch.eye(2)), "the targets are for heads ['']"),
        (lambda: soft_cross_entropy({"a": torch.eye(2)}, {"b": torch.eye(2)}), "the model has ['a']"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(UsageError) as refusal:
        call()
    assert message in str(refusal.value)
