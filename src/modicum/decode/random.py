"""Random numbers by counter: a pure function of (stream, position, offset, purpose), the same in any batch.

PyTorch's generators hand out numbers in the order in which they are asked for, so a text would depend on its neighbours
in the batch. Here every number has an address and is computed from it by hashing: SplitMix64's finalizer (Steele, Lea
and Flood 2014, with the constants of Stafford's variant 13), in wrapping int64 arithmetic.
"""

from enum import IntEnum
from functools import lru_cache

import torch
from torch import Tensor

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
AHEAD = 32
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Purpose(IntEnum):
    """What a uniform is for. Streams of different purposes are independent, or the text would be biased."""

    DRAFT = 0  # drawing a draft token
    COIN = 1  # accepting it
    RESIDUAL = 2  # replacing it
    BONUS = 3  # the target's own token, when all were accepted or none was drafted


def mix(word: int) -> int:
    """The finalizer on one unsigned 64-bit word."""
    word = ((word ^ (word >> 30)) * FIRST) & MASK
    word = ((word ^ (word >> 27)) * SECOND) & MASK
    return word ^ (word >> 31)


def stream_key(seed: int, index: int) -> int:
    """The key of the stream (seed, index), as a signed 64-bit integer."""
    return signed(mix((mix((seed + GOLDEN) & MASK) + (index + 1) * GOLDEN) & MASK))


def signed(word: int) -> int:
    """An unsigned 64-bit word as the int64 with the same bits."""
    return word - (1 << 64) if word >> 63 else word


def mix_tensor(words: Tensor) -> Tensor:
    """`mix` for every int64 of a tensor, read as unsigned."""
    words = (words ^ shift_right(words, 30)) * signed(FIRST)
    words = (words ^ shift_right(words, 27)) * signed(SECOND)
    return words ^ shift_right(words, 31)


def shift_right(words: Tensor, n_bits: int) -> Tensor:
    """A logical shift: PyTorch's own copies the sign."""
    return (words >> n_bits) & ((1 << (64 - n_bits)) - 1)


@lru_cache(maxsize=64)
def address_table(n_offsets: int, n_purposes: int, device: torch.device) -> Tensor:
    """One constant per (offset, purpose): int64 [n_offsets, n_purposes]."""
    # 16 purposes are room enough, and fixed, so that an address does not depend on how many are asked for.
    rows = [[signed((o * 16 + p + 1) * GOLDEN & MASK) for p in range(n_purposes)] for o in range(n_offsets)]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def uniforms(key_B: Tensor, position_B: Tensor, n_offsets: int, n_purposes: int) -> Tensor:
    """Independent uniforms in [0, 1) with 53 bits: float64 [B, n_offsets, n_purposes].

    Args:
        key_B: int64, from `stream_key`.
        position_B: int64, how long each row was when its loop began.
    """
    return hashed(key_B, position_B, address_table(n_offsets, n_purposes, key_B.device))


def hashed(key_B: Tensor, position_B: Tensor, table_NP: Tensor) -> Tensor:
    """`uniforms` by an `address_table` that the caller holds."""
    state_B = mix_tensor(key_B + position_B * signed(GOLDEN))
    words_BNP = mix_tensor(state_B[:, None, None] + table_NP)
    return shift_right(words_BNP, 11).to(torch.float64) * 2.0**-53


def uniforms_by_place(key_B: Tensor, position_B: Tensor, n_offsets: int, n_purposes: int) -> Tensor:
    """What `uniforms` gives at offset 0 of positions position_B, position_B + 1, ...: float64 [B, n_offsets, n_purposes].

    A place has the same numbers in every loop that comes by it, so they are fresh only for rules that draw nothing from a
    place behind the last token they keep (`speculative.invariant`).
    """
    places_BN = position_B[:, None] + torch.arange(n_offsets, device=key_B.device)
    keys_BN = key_B[:, None].expand_as(places_BN)
    return uniforms(keys_BN.flatten(), places_BN.flatten(), 1, n_purposes).view(*places_BN.shape, n_purposes)


class UniformsAhead:
    """`uniforms` of a batch's next loops: made for the next `AHEAD` places where a loop may start, then looked up.

    Hashing is thirty small operations, which cost the same for one place and for thirty-two.
    """

    def __init__(self, key_B: Tensor, n_purposes: int) -> None:
        self.key_B, self.n_purposes = key_B, n_purposes
        self.starts: list[int] = []
        self.starts_B = key_B
        self.made_BXNP = torch.zeros(len(key_B), 0, 0, n_purposes, device=key_B.device)

    def at(self, positions: list[int], position_B: Tensor, n_offsets: int) -> Tensor:
        """As `uniforms`, [B, n_offsets, n_purposes]; the positions are given on the host too, and rows never go back."""
        X, N = self.made_BXNP.shape[1:3]
        if n_offsets > N or max(at - start for at, start in zip(positions, self.starts, strict=True)) >= X:
            self._make(position_B, n_offsets)
            self.starts = list(positions)
        if len(positions) == 1:
            return self.made_BXNP[:, positions[0] - self.starts[0], :n_offsets]
        rows_B = torch.arange(len(positions), device=self.key_B.device)
        return self.made_BXNP[rows_B, position_B - self.starts_B, :n_offsets]

    def select(self, rows: Tensor) -> "UniformsAhead":
        """For these rows only."""
        return UniformsAhead(self.key_B[rows], self.n_purposes)

    def _make(self, position_B: Tensor, n_offsets: int) -> None:
        self.starts_B = position_B
        position_BX = position_B[:, None] + torch.arange(AHEAD, device=position_B.device)
        key_BX = self.key_B[:, None].expand_as(position_BX)
        made = uniforms(key_BX.flatten(), position_BX.flatten(), n_offsets, self.n_purposes)
        self.made_BXNP = made.unflatten(0, position_BX.shape)
