"""Adafactor: the first step by hand, every step against `transformers`, rows that never see a gradient, its schedule."""

import pytest
import torch
from torch import nn

from modicum.train.optim import Adafactor, t5_rate
from modicum.train.state import Progress, load_state, save_state

SHAPES = {"matrix": (7, 5), "vector": (6,), "three axes": (3, 4, 5), "tall": (1, 9), "scalar": ()}


def gradients(shape, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 10.0 ** (step % 5 - 3) for step in range(n)]


def run(make, shape, n=7, *, scale=0.3):
    torch.manual_seed(1)
    weight = nn.Parameter(torch.randn(shape) * scale)
    optimizer, path = make([weight]), []
    for gradient in gradients(shape, n):
        weight.grad = gradient.clone()
        optimizer.step()
        path.append(weight.detach().clone())
    return path


def theirs(parameters):
    from transformers.optimization import Adafactor as Theirs

    return Theirs(parameters, lr=1e-2, relative_step=False, scale_parameter=True)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("scale", [0.3, 1e-5])  # above and below the smallest size of a weight
def test_every_step_is_that_of_transformers(shape, scale):
    ours = run(lambda p: Adafactor(p, lr=1e-2), shape, scale=scale)
    for mine, other in zip(ours, run(theirs, shape, scale=scale), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-9)
    # The comparison sees a rate that is a hundredth off.
    wrong = run(lambda p: Adafactor(p, lr=1.01e-2), shape, scale=scale)
    assert not torch.allclose(wrong[-1], ours[-1], rtol=1e-5, atol=1e-9)


def test_the_first_step_by_hand():
    """At the first step the moments are the gradient's own: a vector moves by its signs, clipped to 1 as they are."""
    weight = nn.Parameter(torch.tensor([3.0, 4.0, 0.0, 0.0]))
    weight.grad = torch.tensor([0.5, -20.0, 1e-4, 0.25])
    Adafactor([weight], lr=0.1).step()
    # The root mean square of the weight is 5 / sqrt(4).
    moved = torch.tensor([3 - 0.25, 4 + 0.25, -0.25, -0.25])
    torch.testing.assert_close(weight.detach(), moved)
    matrix = nn.Parameter(torch.zeros(2, 2))
    matrix.grad = torch.tensor([[1.0, 3.0], [2.0, 6.0]])
    Adafactor([matrix], lr=0.1).step()
    # Rows 5 and 20 with mean 12.5, columns 2.5 and 22.5: row * column / 12.5 is every gradient's square, because it is of
    # rank one. So each update is 1; the weight counts as 1e-3.
    torch.testing.assert_close(matrix.detach(), torch.full((2, 2), -1e-4))


def test_a_token_without_gradient_stays():
    table = nn.Parameter(torch.ones(4, 3))
    optimizer = Adafactor([table], lr=0.1)
    for _ in range(3):
        table.grad = torch.zeros(4, 3)
        table.grad[1] = torch.tensor([1.0, 2.0, -1.0])
        optimizer.step()
    assert torch.equal(table[[0, 2, 3]], torch.ones(3, 3))
    assert bool((table[1] != 1).all())
    # What PyTorch's own makes of it with this epsilon, the reason that there is one here.
    stock = nn.Parameter(torch.ones(4, 3))
    stock.grad = table.grad
    torch.optim.Adafactor([stock], lr=0.1, eps=(1e-30, 1e-3)).step()
    assert stock.isnan().any()


def test_a_saved_state_goes_on_bit_for_bit(tmp_path):
    def make():
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        return model, Adafactor(model.parameters(), lr=1e-2)

    def train(model, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            model(torch.randn(5, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    whole, optimizer = make()
    train(whole, optimizer, range(5))
    first, optimizer = make()
    train(first, optimizer, range(2))
    save_state(tmp_path / "state.safetensors", first, optimizer, Progress(step=2))
    second, optimizer = make()
    load_state(tmp_path / "state.safetensors", second, optimizer)
    train(second, optimizer, range(2, 5))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))
    # Without its moments it would be another run.
    second.load_state_dict(first.state_dict())
    train(second, Adafactor(second.parameters(), lr=1e-2), range(2, 5))
    assert not torch.equal(whole.weight, second.weight)


def test_t5s_schedule():
    assert [t5_rate(step) for step in (0, 9_999, 10_000)] == [0.01] * 3
    assert t5_rate(40_000) == pytest.approx(0.005)
    assert t5_rate(1_000_000) == pytest.approx(1e-3)
