"""The cache: ragged lengths, truncation, dropped rows, and what a later query can see."""

import pytest
import torch

from modicum.core.cache import KVCache
from modicum.errors import UsageError


def cache(batch=3, capacity=11):
    return KVCache(2, batch, 1, capacity, 1, dtype=torch.float32)


def write(cache, values):
    """Write one number per row and token as key, its negative as value."""
    k = torch.tensor(values, dtype=torch.float32)[:, :, None, None]
    return cache.write(1, cache.positions(k.shape[1]), k, -k)


def test_rows_advance_by_themselves():
    c = cache()
    write(c, [[1, 2], [3, 4], [5, 6]])
    c.commit(torch.tensor([2, 0, 1]), known=[2, 0, 1])
    k, v = write(c, [[7], [8], [9]])
    assert c.lengths_B.tolist() == [2, 0, 1]
    assert k[:, 0, :, 0].tolist() == [[1, 2, 7], [8, 4, 0], [5, 9, 0]]
    assert torch.equal(v, -k)
    # The other layer is untouched.
    assert c.k_NBGMK[0].abs().sum() == 0


def test_lengths_known_late_give_the_same():
    early, late = cache(), cache()
    for c, known in ((early, [2, 0, 1]), (late, None)):
        write(c, [[1, 2], [3, 4], [5, 6]])
        c.commit(torch.tensor([2, 0, 1]), known=known, at_most=2)
        write(c, [[7], [8], [9]])
    assert torch.equal(early.k_NBGMK, late.k_NBGMK)


def test_truncate_and_keep():
    c = cache()
    write(c, [[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    c.commit(3)
    c.truncate(torch.tensor([1, 5, 2]), known=[1, 3, 2])
    assert c.lengths_B.tolist() == [1, 3, 2]
    c.keep([2, 0], known=[2, 1])
    k, _ = write(c, [[10], [11]])
    assert k[:, 0, :, 0].tolist() == [[7, 8, 10], [1, 11, 3]]


def test_full():
    c = cache(capacity=3)
    write(c, [[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    c.commit(3)
    with pytest.raises(UsageError, match="4 tokens do not fit a cache of 3"):
        write(c, [[1], [2], [3]])
