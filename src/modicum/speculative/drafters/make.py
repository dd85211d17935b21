"""What a caller gives as a draft, and the drafter that it stands for."""

from typing import Any

from modicum.errors import UsageError
from modicum.speculative.drafters.base import Drafter
from modicum.speculative.drafters.early_exit import EarlyExitDrafter
from modicum.speculative.drafters.model import ModelDrafter
from modicum.speculative.drafters.ngram import NgramDrafter


def make_drafter(draft: Any, num_draft_tokens: int | str) -> Drafter | None:
    """What `draft` stands for; checks K as well."""
    if draft is None:
        return None
    whole = isinstance(num_draft_tokens, int) and not isinstance(num_draft_tokens, bool) and num_draft_tokens >= 1
    if not whole and num_draft_tokens != "auto":
        raise UsageError(
            f'num_draft_tokens is {num_draft_tokens!r}: it must be a whole number of at least 1, or "auto"; '
            "for plain decoding leave the draft out"
        )
    if isinstance(draft, str):
        return named_drafter(draft)
    if hasattr(draft, "propose"):
        return draft
    if not hasattr(draft, "for_inference"):
        raise UsageError(f"the draft is {type(draft).__name__}: give what `modicum.load` makes of a folder, or a name")
    draft.for_inference()
    return ModelDrafter(draft)


def is_named_drafter(name: str) -> bool:
    """Whether `named_drafter` knows what to do with a name, which else is a model's."""
    return name == "ngram" or name.startswith("self:")


def named_drafter(name: str) -> Drafter:
    """A drafter that is no model: "ngram", or "self:LAYERS".

    Raises:
        UsageError: neither of them.
    """
    if name == "ngram":
        return NgramDrafter()
    kind, _, layers = name.partition(":")
    if kind == "self":
        if not layers.isdecimal():
            raise UsageError(f"draft `{name}` names no number of layers: write self:LAYERS, such as self:2")
        return EarlyExitDrafter(int(layers))
    raise UsageError(
        f"draft `{name}` is not a drafter's name: use `ngram`, `self:LAYERS`, or what `modicum.load` makes of a folder"
    )
