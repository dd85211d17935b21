"""How good captions are, by their words: BLEU-4 and CIDEr-D over one tokenisation, without Java.

Tokens are lower-case words. As in the Penn Treebank, clitics are tokens of their own ("isn't" is "is", "n't"); words keep
their hyphens, all other punctuation is dropped. Published numbers come from Stanford's tokenizer and can differ where
captions hold abbreviations, symbols or quotation marks.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from modicum.errors import MissingExtraError, UsageError

_WORD = re.compile(r"\w+(?:[-'.,]\w+)*")
_CLITIC = re.compile(r"(?<=\w)(?=n't$|'(?:s|m|d|re|ve|ll)$)")
ORDERS = 4  # n-grams of 1 to 4 words
SIGMA = 6.0

Ngram = tuple[str, ...]
# Per order, the weight of every n-gram.
Vector = list[dict[Ngram, float]]


def tokens_of(text: str) -> list[str]:
    """The words of a caption: "A man's T-shirt, 3.5 m!" -> a, man, 's, t-shirt, 3.5, m."""
    words = _WORD.findall(text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    return [part for word in words for part in _CLITIC.split(word) if part]


def bleu4(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU of n-grams up to 4 against any number of references per caption, 0 to 100, by sacrebleu.

    An order without a single match is smoothed as by default there (exponentially); corpora of some size have none.

    Raises:
        UsageError: no captions, or one without a reference.
        MissingExtraError: sacrebleu is not installed.
    """
    check_references(captions, references)
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise MissingExtraError("sacrebleu", "train", "BLEU") from None
    most = max(map(len, references))
    # sacrebleu takes one list per place among the references, in which a missing one is None.
    streams: Any = [
        [" ".join(tokens_of(texts[place])) if place < len(texts) else None for texts in references]
        for place in range(most)
    ]
    written = [" ".join(tokens_of(caption)) for caption in captions]
    # The tokens are made already; `force` keeps sacrebleu from warning that they look so.
    return BLEU(tokenize="none", force=True).corpus_score(written, streams).score


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption, 0 to 10 (1411.5726, section 5): how like its references it is, rare words counting more.

    Words are taken as they are instead of by their stems, and n-grams counted instead of as shares, as in the authors'
    code, on which published numbers rest. Document frequencies are those of `references`. A corpus has the mean of its
    captions; papers print a hundred times that.

    Raises:
        UsageError: fewer than two captions, since every n-gram would then weigh nothing, or one without a reference.
    """
    check_references(captions, references)
    if len(captions) < 2:
        raise UsageError("CIDEr-D weighs n-grams by how few videos have them and one was given: give at least two")
    counted = [[_ngrams(tokens_of(text)) for text in texts] for texts in references]
    frequency: Counter[Ngram] = Counter(ngram for texts in counted for ngram in set().union(*texts))
    videos = math.log(len(captions))

    def vector(counts: Counter[Ngram]) -> Vector:
        orders: Vector = [{} for _ in range(ORDERS)]
        for ngram, count in counts.items():
            # One that no reference has weighs as much as one that a single video's references have.
            orders[len(ngram) - 1][ngram] = count * (videos - math.log(max(1, frequency[ngram])))
        return orders

    scores = []
    for caption, texts in zip(captions, counted, strict=True):
        counts = _ngrams(tokens_of(caption))
        written = vector(counts)
        likeness = (_likeness(written, vector(text), _length(counts) - _length(text)) for text in texts)
        scores.append(10 * math.fsum(likeness) / len(texts))
    return scores


def _ngrams(tokens: Sequence[str]) -> Counter[Ngram]:
    return Counter(tuple(tokens[at : at + n]) for n in range(1, ORDERS + 1) for at in range(len(tokens) - n + 1))


def _length(counts: Counter[Ngram]) -> int:
    return sum(count for ngram, count in counts.items() if len(ngram) == 1)


def _likeness(written: Vector, reference: Vector, difference: int) -> float:
    """The mean over orders of a cosine in which the caption's weights are cut off at the reference's, so that repeating a
    good word does not pay, and which falls with the difference of lengths, so that leaving words out does not."""
    total = 0.0
    for ours, theirs in zip(written, reference, strict=True):
        norms = _norm(ours.values()) * _norm(theirs.values())
        if norms:
            common = (min(ours[ngram], weight) * weight for ngram, weight in theirs.items() if ngram in ours)
            total += math.fsum(common) / norms
    return total / ORDERS * math.exp(-(difference**2) / (2 * SIGMA**2))


def _norm(weights: Iterable[float]) -> float:
    return math.sqrt(math.fsum(weight * weight for weight in weights))


def check_references(captions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Refuse captions that cannot be judged."""
    if not captions or len(captions) != len(references):
        raise UsageError(
            f"{len(captions)} captions and {len(references)} lists of references were given: give one list for each of at "
            "least one caption"
        )
    bare = next((place for place, texts in enumerate(references) if not texts or isinstance(texts, str)), None)
    if bare is not None:
        raise UsageError(f"caption {bare} has no list of references: give at least one text to compare it with")
