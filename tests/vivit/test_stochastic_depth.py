"""Stochastic depth: whole examples, all their frames, in all four models, growing with depth, never rescaled."""

import pytest
import torch
from torch import Tensor

from modicum.core.block import StochasticDepth
from modicum.errors import UsageError
from tests.vivit.tiny import M2, M3, MODELS, clip, name_of, tiny_vivit


def drops(model) -> list[StochasticDepth]:
    return [module for module in model.modules() if isinstance(module, StochasticDepth)]


def branches(model, video: Tensor) -> list[tuple[float, Tensor, Tensor]]:
    """(rate, branch, what was left of it) of every residual branch of a call."""
    seen: list[tuple[float, Tensor, Tensor]] = []
    hooks = [m.register_forward_hook(lambda m, args, out: seen.append((m.rate, args[0], out))) for m in drops(model)]
    model(video)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("kind", MODELS, ids=name_of)
def test_the_rate_grows_linearly_to_the_last_layer(kind):
    model = tiny_vivit(n_layers=5, stochastic_depth=0.6, **kind)
    rates = [drop.rate for drop in drops(model)]
    # The temporal encoder of a factorized encoder has three layers of its own.
    assert rates == pytest.approx([0, 0.15, 0.3, 0.45, 0.6] + [0, 0.3, 0.6] * (kind["variant"] == M2))
    assert drops(tiny_vivit(n_layers=1, stochastic_depth=0.6, **kind))[0].rate == 0


@pytest.mark.parametrize("kind", MODELS, ids=name_of)
def test_equation_10_drops_the_first_layer_too(kind):
    model = tiny_vivit(n_layers=4, stochastic_depth=0.6, stochastic_depth_rule="equation_10", **kind)
    rates = [drop.rate for drop in drops(model)]
    assert rates == pytest.approx([0.15, 0.3, 0.45, 0.6] + [0.2, 0.4, 0.6] * (kind["variant"] == M2))
    assert (
        drops(tiny_vivit(n_layers=1, stochastic_depth=0.6, stochastic_depth_rule="equation_10", **kind))[0].rate == 0.6
    )
    with torch.no_grad():
        assert torch.equal(model(clip()), tiny_vivit(n_layers=4, **kind)(clip()))  # evaluation drops nothing
        assert not torch.equal(model.train()(clip(5)), model.eval()(clip(5)))


def test_the_rule_has_two_names():
    with pytest.raises(UsageError, match="`stochastic_depth_rule` is 'equation10': did you mean `equation_10`"):
        tiny_vivit(variant=M2, stochastic_depth_rule="equation10")


@pytest.mark.parametrize("kind", MODELS, ids=name_of)
def test_whole_examples_are_dropped_and_nothing_is_rescaled(kind):
    """A row of a branch is exactly itself or exactly zero: over all frames, since its first axis is the batch's."""
    model = tiny_vivit(stochastic_depth=0.5, **kind).train()
    torch.manual_seed(5)
    seen = branches(model, clip(batch=12))
    per_block = 3 if kind["variant"] == M3 else 2
    assert len(seen) == per_block * 2 + 2 * kind.get("temporal_layers", 0)
    patterns = set()
    for rate, branch, left in seen:
        assert branch.shape[0] == 12
        kept = (left != 0).flatten(1).any(1)
        assert torch.equal(left, branch * kept.view(-1, *[1] * (branch.dim() - 1)))
        if rate == 0:
            assert kept.all()
        else:
            assert 0 < kept.sum() < 12
            patterns.add(tuple(kept.tolist()))
    # Attention and feed-forward of one layer, and the layers, draw apart.
    assert len(patterns) == sum(rate > 0 for rate, _, _ in seen)


@pytest.mark.parametrize("kind", MODELS, ids=name_of)
def test_every_branch_can_be_dropped(kind):
    """With rate 1 everywhere, nothing but embedding, positions and norms is left, in Model 3 too."""
    model = tiny_vivit(stochastic_depth=0.5, **kind)
    with torch.no_grad():
        whole = model(clip())
        for drop in drops(model):
            drop.rate = 1.0
        torch.testing.assert_close(model(clip()), whole, rtol=0, atol=0)  # evaluation drops nothing
        dropped = model.train()(clip())
        model.encoder.blocks = torch.nn.ModuleList()
        if model.temporal is not None:
            model.temporal.blocks = torch.nn.ModuleList()
        torch.testing.assert_close(dropped, model(clip()), rtol=0, atol=0)
        assert not torch.allclose(dropped, whole, atol=1e-2)


def test_the_rate_is_the_share_of_examples_that_lose_a_branch():
    drop = StochasticDepth(0.3).train()
    torch.manual_seed(0)
    kept = drop(torch.ones(20_000, 2, 3))
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(kept, kept[:, :1, :1].expand_as(kept))
    # Four standard deviations of a binomial share are 0.013.
    assert (kept == 0).float().mean().item() == pytest.approx(0.3, abs=0.013)


@pytest.mark.parametrize("kind", MODELS, ids=name_of)
def test_training_is_random_and_evaluation_is_not(kind):
    model = tiny_vivit(stochastic_depth=0.5, **kind)
    with torch.no_grad():
        assert torch.equal(model(clip(5)), model(clip(5)))
        model.train()
        assert not torch.equal(model(clip(5)), model(clip(5)))


def test_a_clip_is_dropped_with_all_its_frames():
    """The same frame repeated: after any drop, its vectors still agree, as they would not if frames were drawn apart."""
    model = tiny_vivit(variant=M2, pooling="gap", stochastic_depth=0.5, n_layers=4).train()
    video = clip(9)[:, :1].expand(-1, 11, -1, -1, -1)
    torch.manual_seed(1)
    with torch.no_grad():
        frames_BTD = model(video, features=True).frames
        torch.testing.assert_close(frames_BTD, frames_BTD[:, :1].expand_as(frames_BTD))
        assert not torch.allclose(frames_BTD, model.eval()(video, features=True).frames, atol=1e-2)
