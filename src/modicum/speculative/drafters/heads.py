"""Heads on the target: several tokens from one hidden state (blockwise decoding, 1811.03115; the heads of 2401.10774)."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from modicum.core.linear import Projections
from modicum.decode.batch import Batch
from modicum.lm.decoder import Decoder
from modicum.speculative.drafters.base import Draft
from modicum.speculative.drafters.drawing import Drawing
from modicum.speculative.drafters.trained import DrafterConfig, Network, TrainedDrafter, last_of


class HeadsNetwork(Network):
    """Head i makes of the hidden state h the one whose unembedding is about i tokens later: h + silu(W_i h + b_i)."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        dim = config.target.dim
        self.heads = Projections(dim, {f"{i}": dim for i in range(1, config.num_draft_tokens + 1)}, bias=True)

    def begin(self, target: Decoder) -> None:
        # At zero every head says what the target's own does.
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """[..., D] -> one [..., D] per head."""
        return tuple(hidden + silu(change) for change in self.heads(hidden))

    def predictions(self, target: Decoder, ids_BL: Tensor, hidden_BLD: Tensor) -> Iterator[tuple[int, Tensor]]:
        for shift, ahead_BLD in enumerate(self(hidden_BLD), 1):
            yield shift, target.score(ahead_BLD[:, :-shift])


class HeadsDrafter(TrainedDrafter):
    """Drafts from the target's last hidden state, without a call of any other model.

    That state has not seen the row's last token, which the target drew from it. Each head draws independently of the
    others: its own distribution is what its token came from, so the text keeps the target's.
    """

    def start(self, batch: Batch, capacity: int) -> None:
        like = self.target.embed.weight
        self.hidden_BD = like.new_zeros(len(batch.rows), self.config.target.dim)
        self.known = [False] * len(batch.rows)  # a prompt of one token has no state before it

    def observe(self, hidden_BLD: Tensor, counts_B: Tensor, counts: list[int]) -> None:
        self.hidden_BD = last_of(hidden_BLD, counts_B, self.hidden_BD)
        self.known = [known or count > 0 for known, count in zip(self.known, counts, strict=True)]

    def propose(self, batch: Batch, allowed: list[int], noise_BNP: Tensor | None) -> Draft:
        most = self.config.num_draft_tokens
        counts = [min(n, most) if known else 0 for n, known in zip(allowed, self.known, strict=True)]
        if not max(counts):
            return Draft.empty(batch)
        drawing = Drawing(batch, noise_BNP, counts)
        drawing.draw_all(batch.clock.call("draft", self._ahead, max(counts)))
        return drawing.draft(1)

    def _ahead(self, n_tokens: int) -> Tensor:
        """Logits of the next tokens, [B, C, V]."""
        return self.target.score(torch.stack(self.network(self.hidden_BD)[:n_tokens], 1))

    def keep(self, rows: list[int], lengths: list[int]) -> None:
        self.hidden_BD = self.hidden_BD[torch.tensor(rows, device=self.hidden_BD.device)]
        self.known = [self.known[row] for row in rows]
