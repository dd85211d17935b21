"""Logits equal those of `transformers` on tiny random checkpoints of every native family."""

import copy

import pytest
import torch
import transformers

import modicum
from tests.parity.families import CASES, VOCAB, make


@pytest.fixture(params=CASES)
def pair(request, tmp_path):
    theirs = make(request.param, tmp_path / "model")
    return theirs, modicum.load(tmp_path / "model"), tmp_path


def tokens(*shape):
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(7))


def exact_and_error(theirs, ids):
    """The reference's float64 logits, and how far its own float32 is from float64 at most, over 19 texts."""
    double = copy.deepcopy(theirs).double()
    sample = tokens(19, ids.shape[1])
    with torch.no_grad():
        return double(ids).logits, (theirs(sample).logits - double(sample).logits).abs().max()


def test_full_sequence(pair):
    theirs, ours, _ = pair
    ids = tokens(3, 17)
    exact, error = exact_and_error(theirs, ids)
    with torch.no_grad():
        assert (ours(ids) - exact).abs().max() <= 2 * error
        # The comparison can fail: another weight is another function.
        ours.blocks[1].attention.out.weight[0, 0] += 0.1
        assert (ours(ids) - exact).abs().max() > 2 * error


def test_step_by_step_and_ragged(pair):
    theirs, ours, _ = pair
    ids = tokens(3, 17)
    exact, error = exact_and_error(theirs, ids)
    cache = ours.new_cache(3, 31)
    with torch.no_grad():
        first = ours(ids[:, :7], cache)
        cache.commit(7)
        step = ours(ids[:, 7:8], cache)
        cache.commit(1)
        assert (torch.cat([first, step], 1) - exact[:, :8]).abs().max() <= 2 * error
        # Four more are scored, and each row keeps another number of them.
        assert (ours(ids[:, 8:12], cache) - exact[:, 8:12]).abs().max() <= 2 * error
        kept = [4, 0, 2]
        cache.commit(torch.tensor(kept), known=[8 + n for n in kept])
        following = torch.stack([ids[row, 8 + n : 8 + n + 3] for row, n in enumerate(kept)])
        expected = torch.stack([exact[row, 8 + n : 8 + n + 3] for row, n in enumerate(kept)])
        assert (ours(following, cache) - expected).abs().max() <= 2 * error


def test_packed(pair):
    theirs, ours, _ = pair
    ids = tokens(3, 17)
    exact, error = exact_and_error(theirs, ids)
    with torch.no_grad():
        assert (ours.for_inference()(ids) - exact).abs().max() <= 2 * error


@pytest.mark.parametrize("packed", [False, True])
def test_written_back(pair, packed):
    theirs, ours, folder = pair
    ids = tokens(2, 11)
    if packed:
        ours.for_inference()
    modicum.save(ours, folder / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "again").eval()
    assert type(again) is type(theirs)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, theirs(ids).logits)
