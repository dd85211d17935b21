"""Early exit: the target's own first layers draft, in the target's own cache (as in LayerSkip, 2404.16710)."""

from typing import Any

from torch import Tensor

from modicum.core.cache import KVCache
from modicum.decode.batch import Batch
from modicum.errors import UsageError
from modicum.lm.language_model import LanguageModel
from modicum.speculative.drafters.base import Draft
from modicum.speculative.drafters.drawing import Drawing


class EarlyExitDrafter:
    """The first `n_layers` blocks of the target, then its final norm and head. No weights and no cache of its own.

    Drafted tokens' keys and values go into the target's cache beyond its length, where verification writes the same ones
    again. Taking them over instead would save nothing where weights are what is read: the last drafted token would still
    need every layer.
    """

    max_rows: int | None = None
    k_invariant = True  # what it draws a token from depends on the text before that token alone

    def __init__(self, n_layers: int) -> None:
        self.n_layers = n_layers

    def check(self, target: Any) -> None:
        if not isinstance(target, LanguageModel):
            raise UsageError(
                "the target runs through transformers, which shares no cache with a draft: choose another draft"
            )
        held = target.config.n_layers
        if not 1 <= self.n_layers <= held:
            raise UsageError(f"draft `self:{self.n_layers}`: the target has {held} layers, choose from 1 to {held}")
        self.target: Any = target

    def start(self, batch: Batch, capacity: int) -> None:
        """Nothing is kept: what it reads is the target's."""

    def share(self, cache: KVCache) -> None:
        self.cache = cache

    def propose(self, batch: Batch, allowed: list[int], noise_BNP: Tensor | None) -> Draft:
        if not max(allowed):
            return Draft.empty(batch)
        drawing, ahead, ids_B1 = Drawing(batch, noise_BNP, allowed), self.cache.fork(), batch.last_B1
        for offset in range(1, max(allowed) + 1):
            token_B = drawing.draw(batch.clock.call("draft", self._exit, ids_B1, ahead))
            if token_B is None:
                break
            ids_B1 = token_B[:, None]
            ahead.commit(1, [length - 1 + offset for length in batch.lengths])
        return drawing.draft(offset)

    def _exit(self, ids_B1: Tensor, cache: KVCache) -> Tensor:
        """The first layers' logits, [B, V]."""
        return self.target.score(self.target.hidden(ids_B1, cache=cache, n_layers=self.n_layers)[:, -1])

    def keep(self, rows: list[int], lengths: list[int]) -> None:
        """The target's cache has dropped the rows already."""
