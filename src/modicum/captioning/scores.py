"""All figures of a set of captions together."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from modicum.captioning.facts import FactScore, score_all_facts
from modicum.captioning.metrics import bleu4, check_references, cider_d, tokens_of
from modicum.video.synthetic import facts_of


@dataclass(frozen=True)
class CaptionScores:
    """How good captions are. `exact` is the share that is one of its references, word for word.

    `bleu4` is 0 to 100, `cider_d` 0 to 10. `facts` are those of synthetic scenes, by kind; None for other videos.
    """

    captions: int
    exact: float
    bleu4: float
    cider_d: float
    facts: dict[str, FactScore] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def score_captions(
    captions: Sequence[str], references: Sequence[Sequence[str]], training: Sequence[str] | None = None
) -> CaptionScores:
    """BLEU-4, CIDEr-D and exact matches; facts too where every video has one reference, made by our grammar.

    Args:
        captions: one per video.
        references: of each video, what people, or the grammar, say of it.
        training: captions of the videos trained on, for the facts' baselines; without them no facts are scored.

    Raises:
        UsageError: fewer than two captions, or one without a reference.
        MissingExtraError: sacrebleu is not installed.
    """
    check_references(captions, references)
    pairs = list(zip(captions, references, strict=True))
    exact = sum(tokens_of(caption) in map(tokens_of, texts) for caption, texts in pairs) / len(pairs)
    facts = None
    if training and all(len(texts) == 1 and facts_of(texts[0]) is not None for texts in references):
        facts = score_all_facts(captions, [texts[0] for texts in references], training)
    per_caption = cider_d(captions, references)
    return CaptionScores(len(pairs), exact, bleu4(captions, references), sum(per_caption) / len(per_caption), facts)
