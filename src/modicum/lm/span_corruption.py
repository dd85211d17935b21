"""T5's pre-training objective (1910.10683, section 3.1.4 and figure 2): spans of a text are dropped, and asked for.

"Thank you for inviting me to your party last week ." with "for inviting" and "last" dropped:

    inputs   Thank you <0> me to your party <1> week . </s>
    targets  <0> for inviting <1> last </s>

<0>, <1>, ... are sentinels, ids that no text has, counted down from the first. A window of tokens begins with a span that
stays and ends with one that is dropped, so that no sentinel closes the targets, as in T5's own preprocessing.
"""

import numpy as np
import torch
from torch import Tensor

from modicum.errors import UsageError

NOISE_DENSITY = 0.15
MEAN_SPAN = 3.0

Seed = int | tuple[int, ...]


def span_counts(window: int) -> tuple[int, int]:
    """How many of a window's tokens are dropped, and in how many spans; both are the same for every window of a length.

    Raises:
        UsageError: fewer than two tokens.
    """
    if window < 2:
        raise UsageError(f"a window of {window} tokens: at least 2 are needed, one to drop and one to keep")
    n_dropped = min(max(round(window * NOISE_DENSITY), 1), window - 1)
    return n_dropped, max(round(n_dropped / MEAN_SPAN), 1)


def corrupted_lengths(window: int) -> tuple[int, int]:
    """Lengths of the inputs and the targets of a window, the closing token included: 568 -> (512, 114), as T5's."""
    n_dropped, n_spans = span_counts(window)
    return window - n_dropped + n_spans + 1, n_dropped + n_spans + 1


def dropped_tokens(n_rows: int, window: int, seed: Seed) -> Tensor:
    """Which tokens are dropped: bool [B, L], a pure function of the arguments.

    The lengths of the dropped spans, and those of the spans between them, are each uniform among all ways to cut so many
    tokens into so many spans; no span is empty.
    """
    n_dropped, n_spans = span_counts(window)
    generator = np.random.default_rng(seed)
    kept_BN = random_lengths(generator, n_rows, window - n_dropped, n_spans)
    dropped_BN = random_lengths(generator, n_rows, n_dropped, n_spans)
    lengths = np.stack([kept_BN, dropped_BN], axis=-1).reshape(n_rows, -1)
    # A row's spans alternate, so that a token's is odd if it is dropped: each span's beginning adds one.
    begins_BL = np.zeros((n_rows, window), dtype=np.int64)
    np.put_along_axis(begins_BL, lengths.cumsum(axis=1)[:, :-1], 1, axis=1)
    return torch.from_numpy(begins_BL.cumsum(axis=1) % 2 == 1)


def random_lengths(generator: np.random.Generator, n_rows: int, n_items: int, n_parts: int) -> np.ndarray:
    """Cut `n_items` into `n_parts` of at least one, every way as likely, row by row: int64 [B, N]."""
    gaps = np.arange(n_items - 1) < n_parts - 1
    cut = generator.permuted(np.broadcast_to(gaps, (n_rows, n_items - 1)), axis=1)
    ends = np.nonzero(cut)[1].reshape(n_rows, n_parts - 1) + 1
    edges = [np.zeros((n_rows, 1), np.int64), ends, np.full((n_rows, 1), n_items)]
    return np.diff(np.concatenate(edges, axis=1), axis=1)


def corrupt(tokens_BL: Tensor, dropped_BL: Tensor, first_sentinel: int, end: int) -> tuple[Tensor, Tensor]:
    """Windows [B, L] to inputs and targets, each closed by the token `end`. Every row drops as many tokens and spans."""
    inputs = sentinels_for(tokens_BL, dropped_BL, first_sentinel)
    targets = sentinels_for(tokens_BL, ~dropped_BL, first_sentinel)
    closing_B1 = tokens_BL.new_full((len(tokens_BL), 1), end)
    return torch.cat([inputs, closing_B1], dim=1), torch.cat([targets, closing_B1], dim=1)


def sentinels_for(tokens_BL: Tensor, hidden_BL: Tensor, first_sentinel: int) -> Tensor:
    """The windows with a sentinel in place of each hidden span."""
    begins_BL = hidden_BL.clone()
    begins_BL[:, 1:] &= ~hidden_BL[:, :-1]
    sentinels_BL = first_sentinel + 1 - begins_BL.cumsum(dim=1)
    shown_BL = torch.where(begins_BL, sentinels_BL, tokens_BL)
    return shown_BL[begins_BL | ~hidden_BL].view(len(tokens_BL), -1)
