"""Modified rejection sampling (2302.01318, section 3 and Algorithm 2): tensors in, tensors out, ragged rows.

With target_probs the paper's q and draft_probs its p: a drafted token x stays with probability
min(1, target_probs[x] / draft_probs[x]); the first that does not is replaced by a draw from
max(0, target_probs - draft_probs), renormalised (equation 5); after C accepted tokens one more is drawn from the target.
Theorem 1: what comes out has the target's distribution exactly.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from modicum.decode.random import Purpose
from modicum.decode.sampling import draw, precise


class Acceptance(NamedTuple):
    """Per row: how many drafted tokens stay, the target's token after them, and whether the distributions were valid."""

    n_accepted_B: Tensor
    next_token_B: Tensor
    valid_B: Tensor


def accept(
    target_probs_BNV: Tensor,
    draft_tokens_BC: Tensor,
    draft_probs_BCV: Tensor | None,
    drafted_B: Tensor,
    uniforms_BNP: Tensor,
) -> Acceptance:
    """Algorithm 2 for one loop. N = C + 1 scored positions; both distributions are over the same V ids.

    Where the models' vocabularies are padded to different sizes the caller cuts one and pads the other with probability
    0. Arithmetic is in float32 at least, in float64 when given float64; nothing here waits for the device.

    Args:
        target_probs_BNV: the target's probabilities after the text and 0 ... C drafted tokens.
        draft_tokens_BC: the drafted tokens; row b has `drafted_B[b]` of them, what stands behind is ignored.
        draft_probs_BCV: what each was drawn from, after temperature and filters. None: point masses, as from n-grams
            or greedy drafts; the residual is then the target's distribution without that token.
        uniforms_BNP: float64 in [0, 1), by position and `Purpose`.

    A row is invalid if a drafted token has draft probability 0 or the target's distribution is not one: the caller's
    mistake, or NaN from a model.
    """
    C = draft_tokens_BC.shape[1]
    target_probs_BNV = precise(target_probs_BNV)
    draft_probs_BCV = None if draft_probs_BCV is None else precise(draft_probs_BCV)
    target_BC, draft_BC = drafted_probs(target_probs_BNV, draft_tokens_BC, draft_probs_BCV)
    real_BC = torch.arange(C, device=drafted_B.device) < drafted_B[:, None]
    # u * draft < target instead of u < target / draft: no division, no epsilon, and never true for a target of 0.
    stays_BC = (uniforms_BNP[:, :C, Purpose.COIN] * draft_BC < target_BC) & real_BC
    n_accepted_B = stays_BC.long().cumprod(1).sum(1)
    target_BV = row_at(target_probs_BNV, n_accepted_B)
    weights_BV = target_BV
    if C:
        draft_BV = draft_row(draft_tokens_BC, draft_probs_BCV, n_accepted_B.clamp(max=C - 1), target_BV)
        weights_BV = leftover((target_BV - draft_BV).clamp(min=0), target_BV, n_accepted_B < drafted_B)
    next_token_B = draw_next(weights_BV, n_accepted_B, drafted_B, uniforms_BNP)
    return Acceptance(n_accepted_B, next_token_B, valid(target_BV, target_BC, draft_BC, real_BC))


def drafted_probs(
    target_probs_BNV: Tensor, draft_tokens_BC: Tensor, draft_probs_BCV: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The target's and the draft's probability of every drafted token, [B, C] each."""
    index_BC1 = draft_tokens_BC[..., None]
    target_BC = target_probs_BNV[:, : draft_tokens_BC.shape[1]].gather(-1, index_BC1)[..., 0]
    if draft_probs_BCV is None:
        return target_BC, torch.ones_like(target_BC)
    return target_BC, draft_probs_BCV.gather(-1, index_BC1)[..., 0]


def row_at(probs_BNV: Tensor, at_B: Tensor) -> Tensor:
    """The distribution at position `at_B` of each row: [B, V]."""
    return probs_BNV.gather(1, at_B[:, None, None].expand(-1, 1, probs_BNV.shape[-1]))[:, 0]


def draft_row(tokens_BC: Tensor, probs_BCV: Tensor | None, at_B: Tensor, like_BV: Tensor) -> Tensor:
    """`row_at` of the draft's distributions, which may be point masses."""
    if probs_BCV is None:
        return torch.zeros_like(like_BV).scatter_(1, tokens_BC.gather(1, at_B[:, None]), 1.0)
    return row_at(probs_BCV, at_B)


def leftover(residual_BV: Tensor, target_BV: Tensor, rejected_B: Tensor) -> Tensor:
    """What the next token is drawn from: the residual where a draft was rejected, else the target."""
    # Equal distributions leave nothing over; a rejection there is rounding, and the target itself is right.
    residual_BV = torch.where(residual_BV.sum(-1, keepdim=True) > 0, residual_BV, target_BV)
    return torch.where(rejected_B[:, None], residual_BV, target_BV)


def draw_next(weights_BV: Tensor, n_accepted_B: Tensor, drafted_B: Tensor, uniforms_BNP: Tensor) -> Tensor:
    """The token behind the accepted ones, by the uniform of its place and purpose: [B]."""
    purpose_B = torch.where(n_accepted_B < drafted_B, int(Purpose.RESIDUAL), int(Purpose.BONUS))
    rows_B = torch.arange(len(n_accepted_B), device=n_accepted_B.device)
    return draw(weights_BV, uniforms_BNP[rows_B, n_accepted_B, purpose_B])


def valid(target_BV: Tensor, target_BC: Tensor, draft_BC: Tensor, real_BC: Tensor) -> Tensor:
    """Whether the row drawn from was a distribution and every drafted token could have been drafted: bool [B]."""
    # A sum of NaN is not above 0, wherever in the row it stands.
    return (target_BV.sum(-1) > 0) & ((draft_BC > 0) | ~real_BC).all(1) & ~(target_BC.isnan() & real_BC).any(1)


def accept_greedy(target_tokens_BN: Tensor, draft_tokens_BC: Tensor, drafted_B: Tensor) -> Acceptance:
    """`accept` where both distributions are one-hot: a drafted token stays if it is the target's own choice."""
    C = draft_tokens_BC.shape[1]
    real_BC = torch.arange(C, device=drafted_B.device) < drafted_B[:, None]
    stays_BC = (target_tokens_BN[:, :C] == draft_tokens_BC) & real_BC
    n_accepted_B = stays_BC.long().cumprod(1).sum(1)
    next_token_B = target_tokens_BN.gather(1, n_accepted_B[:, None])[:, 0]
    return Acceptance(n_accepted_B, next_token_B, torch.ones_like(drafted_B, dtype=torch.bool))
