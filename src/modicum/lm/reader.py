"""What models have in common that read something as a whole, once, and write a text about it."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modicum.core.attend import visibility
from modicum.core.attention import Context
from modicum.core.cache import ContextCache, KVCache
from modicum.errors import UsageError
from modicum.lm.language_model import LanguageModel


class Reader(LanguageModel):
    """A decoder with cross-attention to a source, be it a text or a clip.

    `model(source, ids)` scores a whole text. `model(ids, cache=cache)` scores tokens that follow what the cache holds, once
    `model.read(sources, cache)` has put in what they are about; as in `Decoder`, whoever calls commits.
    """

    kind: str  # what it does, after "the model"
    call: str  # how a whole text is scored
    sources: str  # what they are

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """The decoder's, each with cross-attention as `cross`."""

    @abstractmethod
    def context_of(self, source: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """What cross-attention reads: B sources, of which `lengths_B` say how much is no padding -> [B, M, D]."""

    @abstractmethod
    def write(self, ids_BL: Tensor, contexts: list[Context], padding: Tensor | None, cache: KVCache | None) -> Tensor:
        """What the head reads, [B, L, D]; `contexts` hold one per layer that is to run, from the first on."""

    @abstractmethod
    def score(self, x_BLD: Tensor) -> Tensor:
        """Logits of what `hidden` returns: [..., D] -> [..., V]."""

    @abstractmethod
    def gathered(self, sources: Sequence[Any]) -> Tensor:
        """Sources of equal length as one tensor, for `context_of`."""

    @abstractmethod
    def sample_source(self) -> Any:
        """A source of a usual length that says nothing, to measure with."""

    def forward(
        self,
        source: Tensor,
        ids_BL: Tensor | None = None,
        *,
        lengths_B: Tensor | None = None,
        cache: KVCache | None = None,
        at_BN: Tensor | None = None,
    ) -> Tensor:
        """Score the decoder's tokens: sources and int64 [B, L] -> logits [B, L, V]. With a cache: [B, L] -> [B, L, V].

        `lengths_B` says how many of each row's M slots hold its source: what follows is padding that nobody sees. `at_BN`
        picks the tokens whose logits are wanted, as in `Decoder`.
        """
        x_BLD = self.hidden(source, ids_BL, lengths_B=lengths_B, cache=cache)
        if at_BN is not None:
            x_BLD = x_BLD.gather(1, at_BN[..., None].expand(-1, -1, x_BLD.shape[-1]))
        return self.score(x_BLD)

    def hidden(
        self,
        source: Tensor,
        ids_BL: Tensor | None = None,
        *,
        lengths_B: Tensor | None = None,
        cache: KVCache | None = None,
        n_layers: int | None = None,
    ) -> Tensor:
        """What the head reads: the decoder's output after its final norm, [B, L, D]; of its first `n_layers` if given."""
        depth = self.config.n_layers if n_layers is None else n_layers
        if cache is not None:
            if cache.context is None:
                raise UsageError(
                    f"the cache holds nothing to write about: call `model.read({self.sources}, cache)` first"
                )
            kept: list[Context] = [cache.context.read(layer) for layer in range(depth)]
            return self.write(source, kept, cache.context.mask, cache)
        if ids_BL is None:
            raise UsageError(f"this model {self.kind}: call `{self.call}`")
        context_BMD = self.context_of(source, lengths_B)
        return self.write(ids_BL, [context_BMD] * depth, self.padding(context_BMD.shape[1], lengths_B), None)

    def padding(self, n_slots: int, lengths_B: Tensor | None) -> Tensor | None:
        """The mask that hides all but the first `lengths_B` slots; None without any to hide."""
        if lengths_B is None:
            return None
        return visibility(lengths_B[:, None] - 1, n_slots, None, self.embed.weight.dtype)

    def read(self, sources: Sequence[Any], cache: KVCache) -> None:
        """Give the rows of an empty cache a source each: keys and values of every layer, computed here and never again.

        Sources of equal length are read together, so that none is padded.
        """
        c, lengths = self.config, [len(source) for source in sources]
        dtype = self.embed.weight.dtype
        cache.context = ContextCache(c.n_layers, lengths, c.n_kv_heads, c.head_dim, dtype=dtype, device=self.device)
        for length in sorted(set(lengths)):
            rows = [row for row, held in enumerate(lengths) if held == length]
            context_BMD = self.context_of(self.gathered([sources[row] for row in rows]))
            rows_B = torch.tensor(rows, device=self.device)
            for layer, block in enumerate(self.blocks):
                cross: Any = block.cross
                cache.context.write(layer, rows_B, *cross.keys_values(context_BMD))
