"""BLEU and CIDEr-D against numbers worked out by hand, and against those of the COCO caption evaluation."""

import math
import sys

import pytest

from modicum.captioning import metrics
from modicum.captioning.metrics import bleu4, cider_d, tokens_of
from modicum.errors import MissingExtraError, UsageError

CAPTIONS = [
    "a man is riding a brown horse",
    "two dogs play with a ball ball ball in the park",
    "a woman is cooking an onion",
    "a a a a a man is playing a guitar on the beach with two dogs",
    "cat",
]
REFERENCES = [
    ["A man is riding a horse on the beach.", "a man rides his brown horse along a beach", "someone on a horse"],
    ["Two dogs are playing with a red ball in the park", "two brown dogs play ball"],
    [
        "a woman slices an onion, then fries it",
        "the woman is cooking",
        "a woman is slicing an onion in the kitchen and then she fries the onion in a pan",
    ],
    ["a man is playing a guitar"],
    ["the dog runs"],
]
# By pycocoevalcap 1.2 on the same tokens: its Cider(), and Bleu(4) times 100.
COCO_CIDER_D = [2.373067453850194, 2.0954825321648394, 2.064936448964155, 1.0808402920210334, 0.0]
COCO_BLEU4 = 40.88692021931462


def test_tokens():
    assert tokens_of("A man’s T-shirt, 3.5 m!") == ["a", "man", "'s", "t-shirt", "3.5", "m"]
    assert tokens_of("They're \"fine\", isn't it? -- (yes)") == ["they", "'re", "fine", "is", "n't", "it", "yes"]
    assert tokens_of("O'Neill can't café") == ["o'neill", "ca", "n't", "café"]
    assert tokens_of(" .,! ") == []


def test_cider_d_of_a_perfect_caption_counts_the_orders_that_it_has():
    # Two words have unigrams and a bigram: two cosines of 1 among four, times 10.
    assert cider_d(["a b", "x"], [["a b"], ["c"]]) == pytest.approx([5.0, 0.0])
    assert cider_d(["a b c d", "x"], [["A b c D."], ["e"]]) == pytest.approx([10.0, 0.0])


def test_cider_d_cuts_off_repeated_words_and_weighs_length():
    # "c c" has 2 log 2, its reference log 2: clipped, the cosine is 1/2, and one word too many costs exp(-1 / 72).
    scores = cider_d(["x", "c c"], [["a b"], ["c"]])
    assert scores == pytest.approx([0, 10 / 4 / 2 * math.exp(-1 / 72)])


def test_cider_d_weighs_words_by_how_few_videos_have_them():
    # "the" is in every video and weighs nothing, though it appears five times in one; three references are averaged.
    scores = cider_d(["the", "dog"], [["the the the", "the cat", "the"], ["the dog", "bird", "the"]])
    # Only "the dog" is like "dog", which is one word shorter: a cosine of 1 in one order of four.
    assert scores == pytest.approx([0, 10 / 4 * math.exp(-1 / 72) / 3])


def test_cider_d_is_that_of_the_coco_evaluation():
    assert cider_d(CAPTIONS, REFERENCES) == pytest.approx(COCO_CIDER_D, rel=1e-12)


def test_cider_d_would_differ_with_another_sigma_or_order(monkeypatch):
    monkeypatch.setattr(metrics, "SIGMA", 5.0)
    assert cider_d(CAPTIONS, REFERENCES)[0] != pytest.approx(COCO_CIDER_D[0], rel=1e-3)


def test_bleu_by_hand():
    # Of the n-grams 4/5, 3/4, 2/3 and 1/2 are right, and the lengths agree: their product is 1/5.
    assert bleu4(["A b, c d e"], [["a b c d f"]]) == pytest.approx(100 * 0.2**0.25)
    # Four words for five: all n-grams right, brevity exp(1 - 5 / 4).
    assert bleu4(["a b c d"], [["a b c d e"]]) == pytest.approx(100 * math.exp(-1 / 4))


def test_bleu_takes_references_of_differing_number():
    assert bleu4(CAPTIONS, REFERENCES) == pytest.approx(COCO_BLEU4, rel=1e-8)
    assert bleu4(CAPTIONS, [texts[:1] for texts in REFERENCES]) < COCO_BLEU4


def test_a_missing_sacrebleu_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(MissingExtraError, match=r"BLEU needs `sacrebleu`, .* run `pip install 'modicum\[train\]'`"):
        bleu4(["a"], [["a"]])


def test_refusals():
    with pytest.raises(UsageError, match="2 captions and 1 lists of references were given"):
        cider_d(["a", "b"], [["a"]])
    with pytest.raises(UsageError, match="caption 1 has no list of references"):
        bleu4(["a", "b"], [["a"], []])
    with pytest.raises(UsageError, match="caption 0 has no list of references"):
        bleu4(["a"], ["a"])
    with pytest.raises(UsageError, match="one was given: give at least two"):
        cider_d(["a"], [["a"]])
