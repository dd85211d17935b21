"""How much of what a synthetic scene shows its caption tells, kind by kind, beside what blind guessing would get right."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modicum.errors import UsageError
from modicum.video.synthetic import FACTS, facts_of, score_facts

ALL = "all"


@dataclass(frozen=True)
class FactScore:
    """The share of captions that have one kind of fact right, of those in which it could be judged.

    `majority_caption` is the same for telling every video the most frequent caption of the training clips,
    `majority_value` for telling the most frequent value of this kind; None where there is none to tell.
    """

    right: float | None
    judged: int
    majority_caption: float | None
    majority_value: float | None


def score_all_facts(captions: Sequence[str], truths: Sequence[str], training: Sequence[str]) -> dict[str, FactScore]:
    """By kind of fact, and "all": the captions in which every fact is right.

    What is right of a kind is `score_facts`' affair. The order is judged in scenes of two events whose objects were both
    named; its value is whether the names stand in the order of the alphabet.

    Args:
        captions: what was written, any text.
        truths: the captions that the clips were made with.
        training: captions of the clips trained on, for the baselines.

    Raises:
        UsageError: not one truth per caption, nothing trained on, or a truth or a training caption outside the grammar.
    """
    if not captions or len(captions) != len(truths) or not training:
        raise UsageError(
            f"{len(captions)} captions, {len(truths)} truths and {len(training)} training captions were given: give a "
            "truth for each caption, and at least one of each"
        )
    true, trained = ([_values(text) for text in texts] for texts in (truths, training))
    usual = Counter(training).most_common(1)[0][0]
    written = [score_facts(truth, caption) for truth, caption in zip(truths, captions, strict=True)]
    blind = [score_facts(truth, usual) for truth in truths]
    scores = {}
    for kind in FACTS:
        told = [score[kind] for score in written if kind in score]
        baseline = [score[kind] for score in blind if kind in score]
        scores[kind] = FactScore(_share(told), len(told), _share(baseline), _majority(kind, true, trained))
    exact = [facts_of(caption) == facts_of(truth) for caption, truth in zip(captions, truths, strict=True)]
    same = _share([truth == usual for truth in truths])
    scores[ALL] = FactScore(_share(exact), len(exact), same, same)
    return scores


def _values(caption: str) -> dict[str, Any]:
    """Facts by kind, without an order where there is none."""
    facts: dict[str, Any] | None = facts_of(caption)
    if facts is None:
        raise UsageError(f"{caption!r} is not a caption of a synthetic scene: facts are known of those only")
    order = facts.pop("order")
    return {**facts, "order": list(order) == sorted(order)} if order else facts


def _majority(kind: str, true: list[dict[str, Any]], trained: list[dict[str, Any]]) -> float | None:
    counts = Counter(facts[kind] for facts in trained if kind in facts)
    if not counts:
        return None
    value = counts.most_common(1)[0][0]
    return _share([facts[kind] == value for facts in true if kind in facts])


def _share(right: Sequence[bool]) -> float | None:
    return sum(right) / len(right) if right else None
