"""The key-value cache: preallocated, ragged, and unable to disagree with itself."""

import copy

import torch
from torch import Tensor

from modicum.core.attend import visibility
from modicum.errors import UsageError


class KVCache:
    """Keys and values of B rows, each with a length of its own.

    `lengths_B` is the only truth. `write` puts new keys and values at slots lengths ... lengths + L - 1 of each row and
    does not advance; `commit` does, by as many tokens per row as were kept. What lies beyond a row's length is never
    seen by a later query before it is overwritten, so a rejected draft needs no undo.

    The lengths are known on the host too when the caller says so (`commit(n, known=[...])`): then attention reads only
    the slots in use and, where all rows agree, needs no mask to decode. No method waits for the device.
    """

    def __init__(
        self,
        n_layers: int,
        batch: int,
        n_kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.capacity = capacity
        shape = (n_layers, batch, n_kv_heads, capacity, head_dim)
        self.k_NBGMK = torch.zeros(shape, dtype=dtype, device=device)
        self.v_NBGMK = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self.rows_B1 = torch.arange(batch, device=device)[:, None]
        self.longest = 0
        self.uniform = True
        self.context: ContextCache | None = None  # of a decoder with cross-attention

    def positions(self, n_tokens: int) -> Tensor:
        """Positions of the next `n_tokens` tokens of every row: int64 [B, L]."""
        return self.lengths_B[:, None] + torch.arange(n_tokens, device=self.lengths_B.device)

    def n_slots(self, n_tokens: int) -> int:
        """How many slots the next `n_tokens` tokens can see at most.

        Raises:
            UsageError: rows that all have the same length would outgrow the cache.
        """
        end = self.longest + n_tokens
        if self.uniform and end > self.capacity:
            raise UsageError(f"{end} tokens do not fit a cache of {self.capacity}: create it with a larger capacity")
        return min(end, self.capacity)

    def write(self, layer: int, positions_BL: Tensor, k_BLGK: Tensor, v_BLGK: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values at `positions_BL`; return all of the layer's that are in use, [B, G, M, K] each."""
        k_BGMK, v_BGMK = self.k_NBGMK[layer], self.v_NBGMK[layer]
        n_tokens = k_BLGK.shape[1]
        end = self.n_slots(n_tokens)
        if self.uniform:
            k_BGMK[:, :, end - n_tokens : end] = k_BLGK.transpose(1, 2)
            v_BGMK[:, :, end - n_tokens : end] = v_BLGK.transpose(1, 2)
        else:
            k_BGMK[self.rows_B1, :, positions_BL] = k_BLGK
            v_BGMK[self.rows_B1, :, positions_BL] = v_BLGK
        return k_BGMK[:, :, :end], v_BGMK[:, :, :end]

    def commit(self, n_B: Tensor | int, known: list[int] | None = None, *, at_most: int = 0) -> None:
        """Keep the first `n_B` tokens written to each row.

        `known` are the new lengths where the host knows them; otherwise no row grows by more than `at_most`.
        """
        self.lengths_B = self.lengths_B + n_B
        self._measure(known, self.longest + (n_B if isinstance(n_B, int) else at_most), isinstance(n_B, int))

    def truncate(self, lengths_B: Tensor, known: list[int] | None = None) -> None:
        """Forget whatever lies beyond `lengths_B`; rows that are shorter stay as they are."""
        self.lengths_B = torch.minimum(self.lengths_B, lengths_B)
        self._measure(known, self.longest, False)

    def keep(self, rows: list[int], known: list[int] | None = None) -> None:
        """Drop all rows but these; `known` are the lengths of those that stay, where the host knows them."""
        index = torch.tensor(rows, device=self.lengths_B.device)
        self.k_NBGMK, self.v_NBGMK = self.k_NBGMK[:, index], self.v_NBGMK[:, index]
        self.lengths_B, self.rows_B1 = self.lengths_B[index], self.rows_B1[: len(rows)]
        self._measure(known, self.longest, True)
        if self.context is not None:
            self.context.keep(rows)

    def fork(self) -> "KVCache":
        """The same slots under lengths of their own: whoever drafts ahead in them leaves this cache's lengths alone.

        What a fork writes lies beyond those lengths, so that the next `write` here overwrites it.
        """
        return copy.copy(self)

    def fixed(self, n_slots: int) -> "KVCache":
        """A fork for calls that are all alike: they read the first `n_slots` slots, however many of them are in use.

        Its lengths stay where they are in memory (`place`). Nothing checks that what is written fits `n_slots`.
        """
        fork = self.fork()
        fork.k_NBGMK, fork.v_NBGMK = self.k_NBGMK[..., :n_slots, :], self.v_NBGMK[..., :n_slots, :]
        fork.capacity = fork.longest = n_slots
        fork.uniform = False
        fork.lengths_B = self.lengths_B.clone()
        return fork

    def place(self, lengths_B: Tensor) -> None:
        """Make these the lengths of a `fixed` cache."""
        self.lengths_B.copy_(lengths_B)

    def take(self, other: "KVCache", rows_B: Tensor) -> None:
        """Make the slots of these rows of a cache of the same capacity this one's own, in place; lengths stay apart."""
        self.k_NBGMK.copy_(other.k_NBGMK[:, rows_B])
        self.v_NBGMK.copy_(other.v_NBGMK[:, rows_B])

    def _measure(self, known: list[int] | None, bound: int, same: bool) -> None:
        self.longest = bound if known is None else max(known)
        self.uniform = (self.uniform and same) if known is None else min(known) == max(known)


class ContextCache:
    """Keys and values for cross-attention: of what B rows read, such as an encoder's output, computed once per request.

    Row b has `lengths[b]` slots and is padded to the longest; `mask` hides the padding, [B, 1, 1, M], None without any.
    """

    def __init__(
        self,
        n_layers: int,
        lengths: list[int],
        n_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.lengths = lengths
        shape = (n_layers, len(lengths), n_kv_heads, max(lengths), head_dim)
        self.k_NBGMK = torch.zeros(shape, dtype=dtype, device=device)
        self.v_NBGMK = torch.zeros(shape, dtype=dtype, device=device)
        self.mask = self._mask()

    def write(self, layer: int, rows_B: Tensor, k_BGMK: Tensor, v_BGMK: Tensor) -> None:
        """Store a layer's keys and values of these rows, [B, G, M, K] each, from slot 0 on."""
        n_slots = k_BGMK.shape[2]
        self.k_NBGMK[layer, rows_B, :, :n_slots] = k_BGMK
        self.v_NBGMK[layer, rows_B, :, :n_slots] = v_BGMK

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values, [B, G, M, K] each."""
        return self.k_NBGMK[layer], self.v_NBGMK[layer]

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these."""
        self.lengths = [self.lengths[row] for row in rows]
        index, longest = torch.tensor(rows, device=self.k_NBGMK.device), max(self.lengths)
        self.k_NBGMK = self.k_NBGMK[:, index, :, :longest]
        self.v_NBGMK = self.v_NBGMK[:, index, :, :longest]
        self.mask = self._mask()

    def _mask(self) -> Tensor | None:
        if min(self.lengths) == max(self.lengths):
            return None
        last_B1 = torch.tensor(self.lengths, device=self.k_NBGMK.device)[:, None] - 1
        return visibility(last_B1, max(self.lengths), None, self.k_NBGMK.dtype)
