"""The decoder-only language model behind every native family."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from modicum.config import DecoderConfig
from modicum.core.attend import visibility
from modicum.core.attention import AttentionConfig, Context
from modicum.core.block import Block, norm
from modicum.core.cache import KVCache
from modicum.core.linear import Linear
from modicum.core.positions import Rope
from modicum.errors import UsageError
from modicum.lm.language_model import LanguageModel


class Decoder(LanguageModel):
    """Token ids to logits: Llama, Mistral, Qwen 2 and 3, GPT-2 and GPT-NeoX are settings of `DecoderConfig`.

    `model(ids)` scores a whole text. `model(ids, cache)` scores tokens that follow what the cache holds; it writes their
    keys and values but does not advance the cache: whoever calls decides how many of them to keep (`cache.commit`).

    With `context_dim`, the width of what it reads besides, every block has cross-attention, and `hidden` is given contexts.
    """

    def __init__(self, config: DecoderConfig, context_dim: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.positions = None if config.rope else nn.Embedding(config.max_seq_len, config.dim)
        self.rope = Rope(config.rope) if config.rope else None
        self.blocks = nn.ModuleList(decoder_block(config, layer, context_dim) for layer in range(config.n_layers))
        self.norm = norm(config.norm, config.dim, config.norm_eps)
        self.head = Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.windows = config.windows or (None,) * config.n_layers

    def forward(self, ids_BL: Tensor, cache: KVCache | None = None, *, at_BN: Tensor | None = None) -> Tensor:
        """Score tokens: int64 [B, L] -> logits [B, L, V].

        `at_BN` picks the tokens whose logits are wanted, [B, N] indices into L, so that reading a long prompt does not
        pay for the vocabulary at every token; the result is then [B, N, V].

        Raises:
            UsageError: more tokens than the model has learned positions for.
        """
        x_BLD = self.hidden(ids_BL, cache)
        if at_BN is not None:
            x_BLD = x_BLD.gather(1, at_BN[..., None].expand(-1, -1, x_BLD.shape[-1]))
        return self.score(x_BLD)

    def hidden(
        self,
        ids_BL: Tensor,
        cache: KVCache | None = None,
        *,
        n_layers: int | None = None,
        contexts: Sequence[Context] | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """What the head reads: the last block's output after the final norm, [B, L, D].

        With `n_layers` the output of so many blocks instead; only their part of the cache is read and written. `contexts`
        hold what cross-attention reads, one per layer that runs; `context_mask` hides slots of them, as in `core.attend`.
        """
        L = ids_BL.shape[1]
        if cache is None:
            self._check_length(L)
            positions_BL = torch.arange(L, device=ids_BL.device)[None]
        else:
            positions_BL = cache.positions(L)
        x_BLD = self.embed(ids_BL)
        if self.positions is not None:
            # Rejected drafts may stand beyond the table; what they compute is thrown away.
            x_BLD = x_BLD + self.positions(positions_BL.clamp(max=self.config.max_seq_len - 1))
        rotate = self.rope(positions_BL, x_BLD.dtype) if self.rope is not None else None
        n_slots = L if cache is None else cache.n_slots(L)
        masks = {window: causality(positions_BL, n_slots, window, cache, x_BLD.dtype) for window in set(self.windows)}
        for layer, (block, window) in enumerate(zip(self.blocks, self.windows[:n_layers], strict=False)):
            mask, causal = masks[window]
            read = {} if contexts is None else {"context": contexts[layer], "context_mask": context_mask}
            x_BLD = block(
                x_BLD, rotate=rotate, mask=mask, causal=causal, cache=cache, positions_BL=positions_BL, **read
            )
        return self.norm(x_BLD)

    def score(self, x_BLD: Tensor) -> Tensor:
        """Logits of what `hidden` returns: [..., D] -> [..., V]."""
        return self.head(x_BLD)

    def _check_length(self, n_tokens: int) -> None:
        dynamic = self.config.rope is not None and self.config.rope.scaling == "dynamic"
        if n_tokens > self.config.max_seq_len and (self.positions is not None or dynamic):
            raise UsageError(
                f"{n_tokens} tokens are more than this model's context of {self.config.max_seq_len}: shorten the text"
            )


def decoder_block(config: DecoderConfig, layer: int, context_dim: int | None = None) -> Block:
    """One layer of a decoder; `layer` is its place in the cache."""
    attention = AttentionConfig(
        dim=config.dim,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        qkv_bias=config.qkv_bias,
        out_bias=config.out_bias,
        qk_norm_eps=config.norm_eps if config.qk_norm else None,
    )
    return Block(
        attention,
        layer,
        norm_kind=config.norm,
        norm_eps=config.norm_eps,
        ffn_dim=config.ffn_dim,
        activation=config.activation,
        gated=config.gated,
        ffn_bias=config.ffn_bias,
        parallel=config.parallel,
        context_dim=context_dim,
    )


def causality(
    positions_BL: Tensor, n_slots: int, window: int | None, cache: KVCache | None, dtype: torch.dtype
) -> tuple[Tensor | None, bool]:
    """The cheapest form of "sees itself and what came before": nothing, a causal flag, or a tensor."""
    L = positions_BL.shape[1]
    unlimited = window is None or n_slots <= window
    if unlimited and (cache is None or cache.uniform):
        if L == 1:
            return None, False
        if n_slots == L:
            return None, True
    return visibility(positions_BL, n_slots, window, dtype), False
