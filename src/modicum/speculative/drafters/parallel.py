"""A small model that predicts several tokens in one call, the second kind of draft that 2302.01318 (section 2) names."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from modicum.core.block import norm
from modicum.core.cache import KVCache
from modicum.decode.batch import Batch
from modicum.decode.loop import prefill
from modicum.lm.decoder import Decoder, decoder_block
from modicum.speculative.drafters.base import Draft
from modicum.speculative.drafters.drawing import Drawing
from modicum.speculative.drafters.trained import DrafterConfig, Network, TrainedDrafter, copy_weights, run_blocks


class ParallelNetwork(Network):
    """A few layers of the target's kind that read the text, then learned vectors in the place of tokens not yet known.

    The last token answers for the next one, and slot i behind it for the one i places further.
    """

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        t = config.target
        self.blocks = nn.ModuleList(decoder_block(t, layer) for layer in range(config.n_layers))
        self.norm = norm(t.norm, t.dim, t.norm_eps)
        self.slots_CD = nn.Parameter(torch.zeros(config.num_draft_tokens - 1, t.dim))

    @torch.no_grad()
    def begin(self, target: Decoder) -> None:
        for block, theirs in zip(self.blocks, target.blocks, strict=False):
            copy_weights(block, theirs)
        copy_weights(self.norm, target.norm)
        nn.init.normal_(self.slots_CD, std=float(target.embed.weight.std()))

    def forward(
        self,
        target: Decoder,
        x_BLD: Tensor,
        positions_BL: Tensor,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Embeddings and slots [B, L, D] at their positions -> what the target's head is to read, [B, L, D]."""
        return self.norm(run_blocks(self.blocks, target, x_BLD, positions_BL, cache, mask))

    def predictions(self, target: Decoder, ids_BL: Tensor, hidden_BLD: Tensor) -> Iterator[tuple[int, Tensor]]:
        # Behind the text, for every token of it, the slots that would follow if it were the last.
        (B, L), C = ids_BL.shape, len(self.slots_CD)
        slots_BMD = self.slots_CD.repeat_interleave(L, 0).expand(B, -1, -1)
        x_BLD = torch.cat([target.embed(ids_BL), slots_BMD], 1)
        places_CL = torch.arange(C + 1, device=x_BLD.device)[:, None] + torch.arange(L, device=x_BLD.device)
        mask = apart(L, C, x_BLD.dtype, x_BLD.device)
        made_BCLD = self(target, x_BLD, places_CL.flatten()[None], mask=mask).unflatten(1, (C + 1, L))
        for shift in range(C + 1):
            yield shift, target.score(made_BCLD[:, shift, : L - shift])


def apart(n_tokens: int, n_slots: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The mask of a text of L tokens followed by C slots per token, slot by slot: [1, 1, (C + 1) L, (C + 1) L].

    A token sees the text up to itself. A slot sees the text up to its token, and that token's slots up to itself.
    """
    slot = torch.arange(n_slots + 1, device=device).repeat_interleave(n_tokens)
    token = torch.arange(n_tokens, device=device).repeat(n_slots + 1)
    text = (slot[None] == 0) & (token[None] <= token[:, None])
    own = (slot[None] > 0) & (token[None] == token[:, None]) & (slot[None] <= slot[:, None])
    mask = torch.zeros(text.shape, dtype=dtype, device=device)
    return mask.masked_fill_(~(text | own), -torch.inf)[None, None]


class ParallelDrafter(TrainedDrafter):
    """Drafts in one call, with a cache of its own for the text; what slots leave in it is overwritten."""

    def start(self, batch: Batch, capacity: int) -> None:
        # Rows that accepted much have more to read than their neighbours, which are padded as far.
        self.cache = self.new_cache(batch, capacity + self.config.num_draft_tokens)
        self.read = [length - 1 for length in batch.lengths]  # tokens in the cache, per row
        prefill(self._embed_and_run, self.cache, batch.tokens_BM, self.read)

    def _embed_and_run(self, ids_BL: Tensor, cache: KVCache, at_BN: Tensor) -> None:
        self.network(self.target, self.target.embed(ids_BL), cache.positions(ids_BL.shape[1]), cache)

    def propose(self, batch: Batch, allowed: list[int], noise_BNP: Tensor | None) -> Draft:
        counts = [min(n, self.config.num_draft_tokens) for n in allowed]
        if not max(counts):
            return Draft.empty(batch)
        behind = [length - read for length, read in zip(batch.lengths, self.read, strict=True)]
        x_BLD = self._inputs(batch, max(behind), max(counts) - 1)
        positions_BL = self.cache.positions(x_BLD.shape[1])
        made_BLD = batch.clock.call("draft", self.network, self.target, x_BLD, positions_BL, self.cache)
        last_B1 = (batch.lengths_B - self.cache.lengths_B - 1)[:, None]
        places_BC = last_B1 + torch.arange(max(counts), device=batch.device)
        made_BCD = made_BLD.gather(1, places_BC[..., None].expand(-1, -1, made_BLD.shape[-1]))
        self.read = list(batch.lengths)
        self.cache.commit(batch.lengths_B - self.cache.lengths_B, self.read)
        drawing = Drawing(batch, noise_BNP, counts)
        drawing.draw_all(batch.clock.call("draft", self.target.score, made_BCD))
        return drawing.draft(1)

    def _inputs(self, batch: Batch, n_tokens: int, n_slots: int) -> Tensor:
        """Each row's unread tokens, its slots directly behind them, then padding: [B, n_tokens + n_slots, D]."""
        M = batch.tokens_BM.shape[1]
        places_BL = self.cache.positions(n_tokens + n_slots)
        x_BLD = self.target.embed(batch.tokens_BM.gather(1, places_BL.clamp(max=M - 1)))
        if not n_slots:
            return x_BLD
        slot_BL = places_BL - batch.lengths_B[:, None]
        slots_BLD = self.network.slots_CD[slot_BL.clamp(0, n_slots - 1)]
        return torch.where((slot_BL < 0)[..., None], x_BLD, slots_BLD)

    def keep(self, rows: list[int], lengths: list[int]) -> None:
        self.read = [self.read[row] for row in rows]
        self.cache.keep(rows, self.read)
