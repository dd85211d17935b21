"""What a language model is trained to do: predict a text, fill in what was dropped of it, or what a teacher would say."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modicum.errors import UsageError
from modicum.lm.encoder_decoder import EncoderDecoder
from modicum.lm.span_corruption import Seed, corrupt, dropped_tokens, span_counts

# The span corruption of held-out text is the same in every run and on every machine.
HELD_OUT_SEED = 1910_10683


def draw_by(seed: Seed) -> None:
    """What a model itself draws, such as dropout, is decided here: a resumed run draws the same."""
    torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))


class Objective(ABC):
    """Windows of tokens become what the model is called with and what it is to predict; the loss is the same for all."""

    def __init__(self, window: int) -> None:
        self.window = window

    @abstractmethod
    def example(self, tokens_BL: Tensor, seed: Seed) -> tuple[tuple[Tensor, ...], Tensor]:
        """Windows int64 [B, L + 1] -> the model's arguments and the tokens that its logits are for.

        The last token of a window is the first of the next. Equal arguments give equal examples.
        """

    @abstractmethod
    def held_out_examples(self, ids: Tensor) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """A text, int64 [N], as examples of one row each, always the same."""

    def loss(self, model: Any, tokens_BL: Tensor, seed: Seed, teacher: Any = None, weight: float = 0.0) -> Tensor:
        """Mean nats per predicted token.

        With a teacher: weight * KL(teacher || model) + (1 - weight) * cross-entropy (1503.02531, at temperature 1, which
        is what speculative sampling accepts by).
        """
        given, targets_BL = self.example(tokens_BL, seed)
        draw_by(seed)
        logits_BLV = model(*given).float()
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten())
        if teacher is None:
            return loss
        with torch.no_grad():
            wanted_BLV = teacher(*given).float().log_softmax(-1)
        distance = F.kl_div(
            logits_BLV.log_softmax(-1).flatten(0, 1), wanted_BLV.flatten(0, 1), reduction="batchmean", log_target=True
        )
        return weight * distance + (1 - weight) * loss

    @torch.no_grad()
    def held_out(self, model: Any, ids: Tensor) -> tuple[float, int]:
        """Nats of a text, int64 [N] on the model's device, summed, and the number of tokens predicted."""
        nats, n_tokens = 0.0, 0
        for given, targets_BL in self.held_out_examples(ids):
            logits_LV = model(*given)[0].float()
            nats += F.cross_entropy(logits_LV, targets_BL[0], reduction="sum").item()
            n_tokens += targets_BL.numel()
        return nats, n_tokens


class CausalLM(Objective):
    """Every token from those before it in its window."""

    def example(self, tokens_BL: Tensor, seed: Seed) -> tuple[tuple[Tensor, ...], Tensor]:
        return (tokens_BL[:, :-1],), tokens_BL[:, 1:]

    def held_out_examples(self, ids: Tensor) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """Every token but the first is predicted once, from at most a window of context."""
        for inputs, targets in zip(ids[:-1].split(self.window), ids[1:].split(self.window), strict=True):
            yield (inputs[None],), targets[None]


class SpanCorruption(Objective):
    """T5's: the spans dropped from a window (`lm.span_corruption`), for an `EncoderDecoder`.

    Args:
        window: tokens that one example is made of; 568 become the 512 inputs and 114 targets of T5's own training.
        sentinels: ids of <extra_id_0>, <extra_id_1>, ..., each one less than the one before.
        end: closes inputs and targets.
        start: what the decoder reads before the first target.

    Raises:
        UsageError: more spans in a window than there are sentinels.
    """

    def __init__(self, window: int, sentinels: range, end: int, start: int) -> None:
        super().__init__(window)
        self.sentinels, self.end, self.start = sentinels, end, start
        n_spans = span_counts(window)[1]
        if n_spans > len(sentinels):
            raise UsageError(
                f"a window of {window} tokens loses {n_spans} spans and the tokenizer has {len(sentinels)} sentinels to "
                "mark them: give a shorter window"
            )

    def example(self, tokens_BL: Tensor, seed: Seed) -> tuple[tuple[Tensor, ...], Tensor]:
        return self._corrupted(tokens_BL[:, :-1], seed)

    def held_out_examples(self, ids: Tensor) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """Window after window; of a last token that is alone nothing could be dropped."""
        for number, tokens in enumerate(ids.split(self.window)):
            if len(tokens) > 1:
                yield self._corrupted(tokens[None], (HELD_OUT_SEED, number))

    def _corrupted(self, tokens_BL: Tensor, seed: Seed) -> tuple[tuple[Tensor, ...], Tensor]:
        dropped_BL = dropped_tokens(len(tokens_BL), tokens_BL.shape[1], seed).to(tokens_BL.device)
        inputs_BM, targets_BL = corrupt(tokens_BL, dropped_BL, self.sentinels[0], self.end)
        # The decoder reads each target before it predicts the next.
        return (inputs_BM, F.pad(targets_BL[:, :-1], (1, 0), value=self.start)), targets_BL


def objective_of(model: Any, window: int) -> Objective:
    """What a language model of this kind was pre-trained to do, on windows of so many tokens.

    Raises:
        UsageError: an encoder-decoder whose tokenizer lacks T5's sentinels or end of text, or has too few.
    """
    if not isinstance(model, EncoderDecoder):
        return CausalLM(window)
    number = None if model.tokenizer is None else model.tokenizer.backend.token_to_id
    first, end = (None, None) if number is None else (number("<extra_id_0>"), number("</s>"))
    if number is None or first is None or end is None:
        raise UsageError(
            "span corruption marks what it drops with <extra_id_0>, <extra_id_1>, ... and closes with </s>, which this "
            "model's tokenizer does not have: give a T5 with its own tokenizer"
        )
    n_sentinels = next(n for n in count(1) if number(f"<extra_id_{n}>") != first - n)
    return SpanCorruption(window, range(first, first - n_sentinels, -1), end, model.config.decoder_start_id)
