"""Texts that do not depend on K: every random number belongs to a place in the text, whichever loop comes by it.

Each token is then a function of the text before it and of the numbers at its own place. From a draft's distribution: drawn
with the place's draft number, kept by its coin, or replaced by its residual number. This includes the token behind K
accepted ones, which the usual rule draws from the target alone; so a loop drafts K + 1 tokens, of which the last is not
scored behind. From a point mass: the target's own draw with the place's bonus number, and a proposal stays if it is that
token, which has the probability that the usual rule accepts it with; so those texts are the ones of plain decoding.

It is exact because a loop keeps nothing that depends on the numbers of places behind its last token: whoever meets them
again meets them fresh. Block verification does depend on them (it may keep a prefix because of what follows it), and so
does a K that is chosen by looking at drafts that were thrown away.
"""

from typing import Any

import torch
from torch import Tensor

from modicum.core.exact import exact_view
from modicum.decode.random import Purpose
from modicum.decode.sampling import draw, precise
from modicum.errors import UsageError
from modicum.speculative.accept import Acceptance, accept, accept_greedy
from modicum.speculative.drafters.base import Draft
from modicum.speculative.drafters.model import ModelDrafter


def check_invariant(drafter: Any, num_draft_tokens: Any, verification: str) -> None:
    """Raise UsageError for what cannot give the same text for every K, or not exactly."""
    if verification != "token":
        raise UsageError(
            f"k_invariant needs verification `token`, because `{verification}` keeps tokens for the sake of later ones: "
            "leave one of the two out"
        )
    if isinstance(num_draft_tokens, str):
        raise UsageError(f"k_invariant needs a fixed num_draft_tokens, not `{num_draft_tokens}`: give a number")
    if not getattr(drafter, "k_invariant", False):
        raise UsageError(
            f"k_invariant cannot be kept with {type(drafter).__name__}, whose proposals depend on where a loop starts: "
            "draft with a model, `ngram` or `self:LAYERS`, or leave k_invariant out"
        )


def exact_drafter(drafter: Any, view: Any) -> Any:
    """The drafter of a target's `exact_view`, computing as that does: its proposals have the same bits for every K."""
    if isinstance(drafter, ModelDrafter):
        return ModelDrafter(exact_view(drafter.model.for_inference()))
    drafter.check(view)
    return drafter


def within(draft: Draft, allowed: list[int]) -> Draft:
    """The part of a draft that the target scores a token behind: at most `allowed[b]` tokens per row."""
    counts = [min(count, most) for count, most in zip(draft.counts, allowed, strict=True)]
    width = max(counts)
    probs_BCV = None if draft.probs_BCV is None else draft.probs_BCV[:, :width]
    return Draft(draft.tokens_BC[:, :width], probs_BCV, counts, draft.calls)


def accept_invariant(target_probs_BNV: Tensor, proposed: Draft, scored_B: Tensor, uniforms_BNP: Tensor) -> Acceptance:
    """`accept` by numbers that belong to places. A row's proposal may reach one token beyond its `scored_B` ones.

    Args:
        target_probs_BNV: after the text and 0 ... max(scored_B) drafted tokens.
        uniforms_BNP: from `Batch.noise_by_place`, for one place more than the longest proposal.

    If all tokens of such a row stay, the one beyond is returned as the next token.
    """
    tokens_BC, N = proposed.tokens_BC, target_probs_BNV.shape[1]
    if proposed.probs_BCV is None:
        return _accept_own_draws(target_probs_BNV, tokens_BC[:, : N - 1], scored_B, uniforms_BNP)
    drafted_B = torch.tensor(proposed.counts, device=scored_B.device)
    # What is drawn behind the last proposal of such a row is not used, so any distribution will do there.
    spare_BNV = torch.cat([target_probs_BNV, target_probs_BNV[:, -1:]], dim=1)[:, : tokens_BC.shape[1] + 1]
    got = accept(spare_BNV, tokens_BC, proposed.probs_BCV, drafted_B, uniforms_BNP)
    full_B = got.n_accepted_B > scored_B
    beyond_B = tokens_BC.gather(1, scored_B.clamp(max=tokens_BC.shape[1] - 1)[:, None])[:, 0]
    return Acceptance(
        torch.where(full_B, scored_B, got.n_accepted_B), torch.where(full_B, beyond_B, got.next_token_B), got.valid_B
    )


def _accept_own_draws(
    target_probs_BNV: Tensor, tokens_BC: Tensor, drafted_B: Tensor, uniforms_BNP: Tensor
) -> Acceptance:
    """Point masses: a proposal stays where the target draws the same token."""
    B, N, V = target_probs_BNV.shape
    probs_BNV = precise(target_probs_BNV)
    drawn_BN = draw(probs_BNV.reshape(B * N, V), uniforms_BNP[:, :N, Purpose.BONUS].reshape(-1)).view(B, N)
    got = accept_greedy(drawn_BN, tokens_BC, drafted_B)
    needed_BN = torch.arange(N, device=drafted_B.device) <= got.n_accepted_B[:, None]
    possible_BN = probs_BNV.gather(-1, drawn_BN[..., None])[..., 0] > 0
    return got._replace(valid_B=(possible_BN | ~needed_BN).all(1))
