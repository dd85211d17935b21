"""The encoder-decoder language model: T5 1.0, 1.1 and Flan."""

from typing import Any

import torch
from torch import Tensor, nn

from modicum.config import EncoderDecoderConfig
from modicum.core.attend import visibility
from modicum.core.attention import AttentionConfig, Context
from modicum.core.block import Block, norm
from modicum.core.cache import ContextCache, KVCache
from modicum.core.linear import Linear
from modicum.core.positions import RelativeBias
from modicum.errors import UsageError
from modicum.lm.language_model import LanguageModel


class Stack(nn.Module):
    """The blocks of an encoder, or with `cross` those of a decoder, with one table of relative positions for all."""

    def __init__(self, config: EncoderDecoderConfig, n_layers: int, n_kv_heads: int, *, cross: bool) -> None:
        super().__init__()
        c = config
        self.relative = RelativeBias(c.n_heads, c.relative_buckets, c.relative_max_distance, bidirectional=not cross)
        # T5 does not divide its scores by sqrt(head_dim): its initialisation does.
        attention = AttentionConfig(dim=c.dim, n_heads=c.n_heads, n_kv_heads=n_kv_heads, head_dim=c.head_dim, scale=1.0)
        self.blocks = nn.ModuleList(
            Block(
                attention,
                layer,
                norm_kind="rms",
                norm_eps=c.norm_eps,
                ffn_dim=c.ffn_dim,
                activation=c.activation,
                gated=c.gated,
                ffn_bias=False,
                context_dim=c.dim if cross else None,
            )
            for layer in range(n_layers)
        )
        self.norm = norm("rms", c.dim, c.norm_eps)


class Encoder(Stack):
    """Every token sees every other: [B, M, D] -> [B, M, D]."""

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__(config, config.n_encoder_layers, config.n_heads, cross=False)

    def forward(self, x_BMD: Tensor, padding: Tensor | None = None) -> Tensor:
        M = x_BMD.shape[1]
        mask = self.relative(torch.arange(M, device=x_BMD.device)[None], M)
        mask = mask if padding is None else mask + padding
        for block in self.blocks:
            x_BMD = block(x_BMD, mask=mask)
        return self.norm(x_BMD)


class TextDecoder(Stack):
    """Every token sees itself, what is before it and the whole context: [B, L, D] -> [B, L, D]."""

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__(config, config.n_layers, config.n_kv_heads, cross=True)

    def forward(self, x_BLD: Tensor, contexts: list[Context], padding: Tensor | None, cache: KVCache | None) -> Tensor:
        """`contexts` holds one per layer that is to run, from the first on; `padding` hides slots of them, as `mask` in
        `core.attend`."""
        L = x_BLD.shape[1]
        if cache is None:
            positions_BL, n_slots = torch.arange(L, device=x_BLD.device)[None], L
        else:
            positions_BL, n_slots = cache.positions(L), cache.n_slots(L)
        # Rows of equal length share one mask.
        rows = 1 if cache is None or cache.uniform else len(x_BLD)
        mask = self.relative(positions_BL[:rows], n_slots)
        mask = mask + visibility(positions_BL[:rows], n_slots, None, mask.dtype)
        for block, context in zip(self.blocks, contexts, strict=False):
            x_BLD = block(
                x_BLD, context=context, context_mask=padding, mask=mask, cache=cache, positions_BL=positions_BL
            )
        return self.norm(x_BLD)

    def read(self, context_BMD: Tensor, cache: ContextCache, rows_B: Tensor) -> None:
        """Put the keys and values that every layer makes of a context into the cache of its rows."""
        for layer, block in enumerate(self.blocks):
            cross: Any = block.cross
            cache.write(layer, rows_B, *cross.keys_values(context_BMD))


class EncoderDecoder(LanguageModel):
    """T5 (1910.10683): a text is read as a whole, and another is written about it.

    `model(ids, decoder_ids)` scores a whole text. `model(decoder_ids, cache=cache)` scores tokens that follow what the
    cache holds, once `model.read(texts, cache)` has put in what they are about; as in `Decoder`, whoever calls commits.
    Its relative positions set no limit to the length of either text; memory does.
    """

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.encoder = Encoder(config)
        self.decoder = TextDecoder(config)
        self.head = Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(
        self,
        ids_BL: Tensor,
        decoder_ids_BL: Tensor | None = None,
        *,
        lengths_B: Tensor | None = None,
        cache: KVCache | None = None,
        at_BN: Tensor | None = None,
    ) -> Tensor:
        """Score the decoder's tokens: int64 [B, M], [B, L] -> logits [B, L, V]. With a cache: [B, L] -> [B, L, V].

        `lengths_B` says how many of each row's M tokens are text: what follows is padding that nobody sees. `at_BN` picks
        the tokens whose logits are wanted, as in `Decoder`.
        """
        x_BLD = self.hidden(ids_BL, decoder_ids_BL, lengths_B=lengths_B, cache=cache)
        if at_BN is not None:
            x_BLD = x_BLD.gather(1, at_BN[..., None].expand(-1, -1, x_BLD.shape[-1]))
        return self.score(x_BLD)

    def score(self, x_BLD: Tensor) -> Tensor:
        """Logits of what `hidden` returns: [..., D] -> [..., V]."""
        return self.head(x_BLD * self.config.dim**-0.5 if self.config.scale_head else x_BLD)

    def hidden(
        self,
        ids_BL: Tensor,
        decoder_ids_BL: Tensor | None = None,
        *,
        lengths_B: Tensor | None = None,
        cache: KVCache | None = None,
        n_layers: int | None = None,
    ) -> Tensor:
        """What the head reads: the decoder's output after its final norm, [B, L, D]; of its first `n_layers` if given."""
        depth = self.config.n_layers if n_layers is None else n_layers
        if cache is not None:
            if cache.context is None:
                raise UsageError("the cache holds no text to write about: call `model.read(texts, cache)` first")
            contexts: list[Context] = [cache.context.read(layer) for layer in range(depth)]
            return self.decoder(self.embed(ids_BL), contexts, cache.context.mask, cache)
        if decoder_ids_BL is None:
            raise UsageError("this model reads one text and writes another: call `model(ids, decoder_ids)`")
        contexts = [self.encode(ids_BL, lengths_B)] * depth
        return self.decoder(self.embed(decoder_ids_BL), contexts, self._padding(ids_BL, lengths_B), None)

    def encode(self, ids_BM: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """What the decoder attends to: int64 [B, M] -> [B, M, D]."""
        return self.encoder(self.embed(ids_BM), self._padding(ids_BM, lengths_B))

    def _padding(self, ids_BM: Tensor, lengths_B: Tensor | None) -> Tensor | None:
        if lengths_B is None:
            return None
        return visibility(lengths_B[:, None] - 1, ids_BM.shape[1], None, self.embed.weight.dtype)

    def read(self, texts: list[list[int]], cache: KVCache) -> None:
        """Read one text per row of an empty cache. Texts of equal length are read together, so that none is padded."""
        c, lengths = self.config, [len(text) for text in texts]
        dtype = self.embed.weight.dtype
        cache.context = ContextCache(c.n_layers, lengths, c.n_kv_heads, c.head_dim, dtype=dtype, device=self.device)
        for length in sorted(set(lengths)):
            rows = [row for row, text in enumerate(texts) if len(text) == length]
            ids_BM = torch.tensor([texts[row] for row in rows], device=self.device)
            self.decoder.read(self.encode(ids_BM), cache.context, torch.tensor(rows, device=self.device))
