"""Block verification (2403.10444, Algorithm 2): the drafted tokens of a loop are judged together, not one by one.

Token-wise, a token that the draft finds more likely than the target does is rejected with a probability of its own. Here
its surplus can be made up by the tokens before it: P_i, the running product of target / draft ratios cut at 1, is the
weight that the target grants the first i tokens together. A loop keeps the longest prefix whose coin is below

    h_i = S_i / (S_i + 1 - P_i),  S_i = sum_x max(0, P_i target(x) - draft(x)),  and h = P at the last drafted token,

and goes on with a draw from max(0, P_i target - draft). What comes out has the target's distribution exactly, and no
rule that looks at one drafted text keeps more tokens on average (their Theorems 1 and 2).
"""

import torch
from torch import Tensor

from modicum.decode.random import Purpose
from modicum.decode.sampling import precise
from modicum.speculative.accept import Acceptance, draft_row, drafted_probs, draw_next, leftover, row_at, valid


def accept_block(
    target_probs_BNV: Tensor,
    draft_tokens_BC: Tensor,
    draft_probs_BCV: Tensor | None,
    drafted_B: Tensor,
    uniforms_BNP: Tensor,
) -> Acceptance:
    """One loop's block verification; arguments, precision and validity as in `accept.accept`.

    Rows may draft fewer than C tokens: the last that a row did draft counts as the end of its block. One-hot rows accept
    what greedy decoding would, and point masses as many tokens, in distribution, as token by token.
    """
    C = draft_tokens_BC.shape[1]
    target_probs_BNV = precise(target_probs_BNV)
    draft_probs_BCV = None if draft_probs_BCV is None else precise(draft_probs_BCV)
    target_BC, draft_BC = drafted_probs(target_probs_BNV, draft_tokens_BC, draft_probs_BCV)
    offsets_C = torch.arange(C, device=drafted_B.device)
    real_BC = offsets_C < drafted_B[:, None]
    weight_BN = prefix_weights(target_BC, draft_BC)

    # S_1 ... S_(C-1), behind which a token was drafted. The sums are in float64: thousands of terms, and a difference.
    before_BC1, last_BC = weight_BN[:, :C, None], offsets_C + 1 == drafted_B[:, None]
    if draft_probs_BCV is None:
        mass_BC = target_probs_BNV[:, :C].sum(-1, dtype=torch.float64)
        surplus_BC = weight_BN[:, :C] * (mass_BC - target_BC.double()).clamp(min=0)
    else:
        scaled_BCV = before_BC1.to(target_probs_BNV.dtype) * target_probs_BNV[:, :C]
        surplus_BC = (scaled_BCV - draft_probs_BCV).clamp(min=0).sum(-1, dtype=torch.float64)
    surplus_BC = torch.cat([surplus_BC[:, 1:], torch.zeros_like(surplus_BC[:, :1])], dim=1)
    missing_BC = 1 - weight_BN[:, 1:]
    coin_BC = uniforms_BNP[:, :C, Purpose.COIN]
    # u < S / (S + 1 - P) without the division: 0 / 0, equal distributions, is 1.
    inner_BC = (coin_BC * (surplus_BC + missing_BC) < surplus_BC) | ((surplus_BC == 0) & (missing_BC == 0))
    stays_BC = torch.where(last_BC, coin_BC < weight_BN[:, 1:], inner_BC) & real_BC
    # The longest prefix that stays, whatever became of the shorter ones.
    n_accepted_B = torch.nn.functional.pad(stays_BC * (offsets_C + 1), (1, 0)).amax(1)

    target_BV = row_at(target_probs_BNV, n_accepted_B)
    weights_BV = target_BV
    if C:
        draft_BV = draft_row(draft_tokens_BC, draft_probs_BCV, n_accepted_B.clamp(max=C - 1), target_BV)
        granted_B1 = weight_BN.gather(1, n_accepted_B[:, None]).to(target_BV.dtype)
        weights_BV = leftover((granted_B1 * target_BV - draft_BV).clamp(min=0), target_BV, n_accepted_B < drafted_B)
    next_token_B = draw_next(weights_BV, n_accepted_B, drafted_B, uniforms_BNP)
    return Acceptance(n_accepted_B, next_token_B, valid(target_BV, target_BC, draft_BC, real_BC))


def prefix_weights(target_BC: Tensor, draft_BC: Tensor) -> Tensor:
    """P_0 ... P_C of each row, float64 [B, C + 1]: P_0 = 1, P_i = min(1, P_(i-1) * target_i / draft_i)."""
    weights = [torch.ones(len(target_BC), dtype=torch.float64, device=target_BC.device)]
    for target_B, draft_B in zip(target_BC.double().unbind(1), draft_BC.double().unbind(1), strict=True):
        scaled_B = weights[-1] * target_B
        # Compared before it is divided, so that no quotient exceeds 1; 0 / 0 stands only behind a row's own tokens.
        weights.append(torch.where(scaled_B < draft_B, scaled_B / draft_B, torch.ones_like(scaled_B)))
    return torch.stack(weights, 1)
