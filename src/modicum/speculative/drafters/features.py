"""A drafter fed with the target's features, one layer deep, that goes on from the features it predicts (2401.15077)."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from modicum.core.block import norm
from modicum.core.cache import KVCache
from modicum.core.linear import Linear
from modicum.decode.batch import Batch
from modicum.lm.decoder import Decoder, decoder_block
from modicum.speculative.drafters.base import Draft
from modicum.speculative.drafters.drawing import Drawing
from modicum.speculative.drafters.trained import (
    DrafterConfig,
    Network,
    TrainedDrafter,
    copy_weights,
    last_of,
    run_blocks,
)


class FeaturesNetwork(Network):
    """The feature at token t and the token after it make the feature at t + 1, by one layer of the target's kind.

    A feature is what the target's head reads. Both inputs are normalised, since their sizes have nothing in common.
    """

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        t = config.target
        self.feature_norm, self.embed_norm = norm(t.norm, t.dim, t.norm_eps), norm(t.norm, t.dim, t.norm_eps)
        self.fuse = Linear(2 * t.dim, t.dim, bias=False)
        self.block = decoder_block(t, 0)
        self.norm = norm(t.norm, t.dim, t.norm_eps)

    @torch.no_grad()
    def begin(self, target: Decoder) -> None:
        # It begins as an early exit behind the first layer, and learns what to make of the features.
        nn.init.constant_(self.embed_norm.weight, float(target.embed.weight.square().mean().sqrt()))  # type: ignore[arg-type]
        from_feature, from_embedding = self.fuse.weight.chunk(2, dim=1)
        nn.init.zeros_(from_feature)
        nn.init.eye_(from_embedding)
        copy_weights(self.block, target.blocks[0])
        copy_weights(self.norm, target.norm)

    def forward(
        self, target: Decoder, features_BLD: Tensor, next_ids_BL: Tensor, cache: KVCache | None = None
    ) -> Tensor:
        """[B, L, D], and the tokens after those they belong to -> the features at these tokens."""
        L = next_ids_BL.shape[1]
        positions_BL = torch.arange(L, device=next_ids_BL.device)[None] if cache is None else cache.positions(L)
        inputs = self.feature_norm(features_BLD), self.embed_norm(target.embed(next_ids_BL))
        # Under autocast a product is in bfloat16, and the residual stream must not be.
        fused_BLD = self.fuse(torch.cat(inputs, -1)).to(features_BLD.dtype)
        x_BLD = run_blocks([self.block], target, fused_BLD, positions_BL, cache)
        return self.norm(x_BLD)

    def predictions(self, target: Decoder, ids_BL: Tensor, hidden_BLD: Tensor) -> Iterator[tuple[int, Tensor]]:
        # Each pass goes on from the features that the one before it predicted, as drafting will.
        for shift in range(1, self.config.num_draft_tokens + 1):
            hidden_BLD = self(target, hidden_BLD[:, :-1], ids_BL[:, shift:])
            yield shift, target.score(hidden_BLD)


class FeaturesDrafter(TrainedDrafter):
    """Drafts token by token. Its own cache holds one entry per feature that the target really computed."""

    def start(self, batch: Batch, capacity: int) -> None:
        self.batch, self.cache = batch, self.new_cache(batch, capacity)
        self.read = [0] * len(batch.rows)  # features in the cache, per row
        # What it predicts after those: the feature at the row's last token.
        self.next_BD = self.target.embed.weight.new_zeros(len(batch.rows), self.config.target.dim)
        self.waiting: tuple[Tensor, Tensor, list[int]] | None = None

    def observe(self, hidden_BLD: Tensor, counts_B: Tensor, counts: list[int]) -> None:
        # A feature is read with the token after it, and the last of these is not in the batch yet.
        self._read_waiting()
        self.waiting = (hidden_BLD, counts_B, counts)

    def _read_waiting(self) -> None:
        if self.waiting is None:
            return
        (hidden_BLD, counts_B, counts), self.waiting = self.waiting, None
        tokens_BM = self.batch.tokens_BM
        columns_BL = self.cache.positions(hidden_BLD.shape[1]) + 1
        ids_BL = tokens_BM.gather(1, columns_BL.clamp(max=tokens_BM.shape[1] - 1))
        made_BLD = self.batch.clock.call("draft", self.network, self.target, hidden_BLD, ids_BL, self.cache)
        self.next_BD = last_of(made_BLD, counts_B, self.next_BD)
        self.read = [read + count for read, count in zip(self.read, counts, strict=True)]
        self.cache.commit(counts_B, self.read)

    def propose(self, batch: Batch, allowed: list[int], noise_BNP: Tensor | None) -> Draft:
        self._read_waiting()
        most = self.config.num_draft_tokens
        counts = [min(n, most) if read else 0 for n, read in zip(allowed, self.read, strict=True)]
        if not max(counts):
            return Draft.empty(batch)
        drawing, ahead, feature_BD = Drawing(batch, noise_BNP, counts), self.cache.fork(), self.next_BD
        call = batch.clock.call
        token_B = drawing.draw(call("draft", self.target.score, feature_BD))
        while token_B is not None and len(drawing.tokens) < max(drawing.counts):
            feature_BD = call("draft", self.network, self.target, feature_BD[:, None], token_B[:, None], ahead)[:, 0]
            ahead.commit(1, [read + len(drawing.tokens) for read in self.read])
            token_B = drawing.draw(call("draft", self.target.score, feature_BD))
        return drawing.draft(max(counts))

    def keep(self, rows: list[int], lengths: list[int]) -> None:
        index = torch.tensor(rows, device=self.next_BD.device)
        self.read = [self.read[row] for row in rows]
        self.next_BD = self.next_BD[index]
        self.cache.keep(rows, self.read)
        if self.waiting is not None:
            hidden_BLD, counts_B, counts = self.waiting
            self.waiting = (hidden_BLD[index], counts_B[index], [counts[row] for row in rows])
