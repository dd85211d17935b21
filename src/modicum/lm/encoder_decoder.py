"""The encoder-decoder language model: T5 1.0, 1.1 and Flan."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from modicum.config import EncoderDecoderConfig
from modicum.core.attend import visibility
from modicum.core.attention import AttentionConfig, Context
from modicum.core.block import Block, norm
from modicum.core.cache import KVCache
from modicum.core.linear import Linear
from modicum.core.positions import RelativeBias
from modicum.lm.reader import Reader

# Tokens of a source to measure with.
SAMPLED = 64


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


class EncoderDecoder(Reader):
    """T5 (1910.10683): a text is read as a whole, and another is written about it.

    Its relative positions set no limit to the length of either text; memory does.
    """

    kind = "reads one text and writes another"
    call = "model(ids, decoder_ids)"
    sources = "texts"

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.encoder = Encoder(config)
        self.decoder = TextDecoder(config)
        self.head = Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    @property
    def blocks(self) -> nn.ModuleList:
        return self.decoder.blocks

    def score(self, x_BLD: Tensor) -> Tensor:
        """Logits of what `hidden` returns: [..., D] -> [..., V]."""
        return self.head(x_BLD * self.config.dim**-0.5 if self.config.scale_head else x_BLD)

    def encode(self, ids_BM: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """What the decoder attends to: int64 [B, M] -> [B, M, D]."""
        return self.encoder(self.embed(ids_BM), self.padding(ids_BM.shape[1], lengths_B))

    def context_of(self, source: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        return self.encode(source, lengths_B)

    def write(self, ids_BL: Tensor, contexts: list[Context], padding: Tensor | None, cache: KVCache | None) -> Tensor:
        return self.decoder(self.embed(ids_BL), contexts, padding, cache)

    def gathered(self, sources: Sequence[list[int]]) -> Tensor:
        return torch.tensor(sources, device=self.device)

    def sample_source(self) -> list[int]:
        return [0] * SAMPLED

    def beginning(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """What its text begins with, and what it reads, given a prompt."""
        return [self.config.decoder_start_id], ids
