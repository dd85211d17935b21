"""Counter-based randomness: known answers, addresses, uniformity."""

import math

import pytest
import torch

from modicum.decode.random import GOLDEN, MASK, Purpose, UniformsAhead, mix, mix_tensor, signed, stream_key, uniforms

# The first outputs of SplitMix64 for seed 1234567, as published with the algorithm.
SPLITMIX = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]


def test_known_answers():
    states = [(1234567 + (i + 1) * GOLDEN) & MASK for i in range(5)]
    assert [mix(state) for state in states] == SPLITMIX
    tensor = mix_tensor(torch.tensor([signed(state) for state in states]))
    assert tensor.tolist() == [signed(word) for word in SPLITMIX]


def by_hand(key, position, offset, purpose):
    state = mix((key + position * GOLDEN) & MASK)
    return (mix((state + (offset * 16 + purpose + 1) * GOLDEN) & MASK) >> 11) * 2.0**-53


def test_uniforms_equal_plain_integers():
    keys = [stream_key(7, 0), stream_key(-3, 5), stream_key(2**80, 1)]
    drawn = uniforms(torch.tensor(keys), torch.tensor([0, 11, 10**9]), 3, 4)
    for row, position in enumerate([0, 11, 10**9]):
        for offset in range(3):
            for purpose in Purpose:
                assert drawn[row, offset, purpose].item() == by_hand(keys[row], position, offset, purpose)


def test_frozen_answers():
    """Texts of a seed must not change from one version to the next."""
    keys = [stream_key(0, 0), stream_key(-1, 3), stream_key(2**63 + 5, 1)]
    assert keys == [-6411193824288604561, -1347316446087456332, -8133914066529150282]
    drawn = uniforms(torch.tensor(keys), torch.tensor([0, 1, 4096]), 2, 2)
    assert drawn.flatten(1).tolist() == [
        [0.7682768830978309, 0.5392618014680707, 0.797180004152185, 0.2953413985051776],
        [0.1821507458092274, 0.5208505779757089, 0.35508204270811583, 0.09312941367379834],
        [0.003328807639285003, 0.6374150581268994, 0.12210144544683188, 0.518530734256166],
    ]


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 2**64 - 1])
def test_any_64_bit_seed_gives_int64_keys(seed):
    keys = [stream_key(seed, index) for index in range(1000)]
    assert len(set(keys)) == 1000
    assert torch.tensor(keys).dtype == torch.int64


def test_all_purposes_and_offsets_are_uncorrelated():
    n, key = 20_000, stream_key(11, 0)
    drawn = uniforms(torch.full((n,), key), torch.arange(n), 5, len(Purpose)).flatten(1)
    # Neighbouring positions beside each other: 2 x 20 columns; 780 pairs, each coefficient with deviation 1/sqrt(n).
    columns = torch.cat([drawn[:-1], drawn[1:]], dim=1)
    off = (columns.T.corrcoef() - torch.eye(columns.shape[1], dtype=torch.float64)).abs()
    assert off.max() < 5 / math.sqrt(n)
    # The control: a purpose that shares its numbers with another shows at once.
    columns[:, 1] = columns[:, 0]
    assert columns.T.corrcoef()[0, 1] > 0.99


def test_an_address_does_not_depend_on_what_is_asked_for_beside_it():
    keys, positions = torch.tensor([5, 6, 7]), torch.tensor([1, 2, 3])
    wide = uniforms(keys, positions, 9, 4)
    assert torch.equal(uniforms(keys[1:2], positions[1:2], 2, 3)[0], wide[1, :2, :3])


@pytest.mark.parametrize("axis", ["stream", "position", "offset", "purpose", "seed"])
def test_uniform_and_independent_of_the_next_address(axis):
    n = 40_000
    keys = {
        "stream": lambda i: torch.tensor([stream_key(1, k) for k in range(i, i + n)]),
        "seed": lambda i: torch.tensor([stream_key(k, 0) for k in range(i, i + n)]),
    }.get(axis, lambda i: torch.full((n,), stream_key(3, 3)))
    positions = torch.arange(n) if axis in ("position", "offset", "purpose") else torch.zeros(n, dtype=torch.int64)
    here = uniforms(keys(0), positions, 2, 4)
    if axis == "offset":
        first, second = here[:, 0, 0], here[:, 1, 0]
    elif axis == "purpose":
        first, second = here[:, 0, Purpose.COIN], here[:, 0, Purpose.RESIDUAL]
    else:
        shifted = positions + 1 if axis == "position" else positions
        first, second = here[:, 0, 0], uniforms(keys(1), shifted, 2, 4)[:, 0, 0]
    assert 0 <= first.min() < first.max() < 1
    cells = (first * 8).long() * 8 + (second * 8).long()
    counts = torch.bincount(cells, minlength=64).double()
    statistic = ((counts - n / 64) ** 2 / (n / 64)).sum().item()
    # 63 degrees of freedom: mean 63, deviation sqrt(126); five deviations.
    assert abs(statistic - 63) < 5 * math.sqrt(126)


def test_uniforms_made_ahead_are_the_same():
    keys, positions = torch.tensor([5, -7, 11]), [3, 40, 8]
    ahead = UniformsAhead(keys, 4)
    # More offsets than before, steps of each row's own, and far enough that they have to be made again.
    for n_offsets, steps in ((2, (0, 0, 0)), (2, (1, 3, 2)), (5, (0, 31, 4)), (3, (31, 1, 0)), (5, (9, 2, 40))):
        positions = [position + step for position, step in zip(positions, steps, strict=True)]
        got = ahead.at(positions, torch.tensor(positions), n_offsets)
        assert torch.equal(got, uniforms(keys, torch.tensor(positions), n_offsets, 4))
    alone = ahead.select(torch.tensor([1]))
    for position in (70, 72, 101, 102, 134):
        got = alone.at([position], torch.tensor([position]), 3)
        assert torch.equal(got, uniforms(keys[1:2], torch.tensor([position]), 3, 4))
