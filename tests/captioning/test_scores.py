"""Facts and baselines on scenes counted by hand, and all scores together."""

import io

import numpy as np
import pytest
from rich.console import Console

from modicum.captioning.facts import ALL, score_all_facts
from modicum.captioning.scores import score_captions
from modicum.errors import UsageError
from modicum.report.captions import scores_tables
from modicum.video.synthetic import draw_scene

TRAINING = [
    "a red square grows",
    "a red square grows",
    "two blue rings move up",
    "a white bar blinks, then a green ring grows",
    "a blue ring blinks, then a red bar grows",
    "a white cross grows, then a red bar stays still",
]
TRUTHS = [
    "a red square moves left",
    "two red squares grow",
    "three green bars blink, then a red circle grows",
    "a blue bar blinks, then a red circle grows",
    "a red square grows",
]
WRITTEN = [
    "a red square moves right",  # the motion is wrong
    "two red squares grow",
    "a red circle grows, then three green bars blink",  # only the order is wrong
    "a blue bar blinks",  # an event is missing: nothing is right, and no order can be judged
    "something happens",  # no sentence of the grammar
]


def test_kinds_of_facts_are_scored_apart():
    scores = score_all_facts(WRITTEN, TRUTHS, TRAINING)
    assert {kind: (score.right, score.judged) for kind, score in scores.items()} == {
        "count": (3 / 5, 5),
        "colour": (3 / 5, 5),
        "shape": (3 / 5, 5),
        "motion": (2 / 5, 5),
        "order": (0, 1),
        ALL: (1 / 5, 5),
    }


def test_baselines_by_hand():
    scores = score_all_facts(WRITTEN, TRUTHS, TRAINING)
    # Told of every video: "a red square grows". It has one event, as truths 0, 1 and 4 do.
    captions = {kind: score.majority_caption for kind, score in scores.items()}
    assert captions == {"count": 2 / 5, "colour": 3 / 5, "shape": 3 / 5, "motion": 2 / 5, "order": None, ALL: 1 / 5}
    # Most frequent: counts (1, 1) in three, colour (red,), shape (square,), motion (grows,) in two. Orders: "white bar"
    # before "green ring" is not the alphabet's, nor is the third; the second is. Truths: green, red; blue, red: both are.
    values = {kind: score.majority_value for kind, score in scores.items()}
    assert values == {"count": 1 / 5, "colour": 3 / 5, "shape": 3 / 5, "motion": 2 / 5, "order": 0.0, ALL: 1 / 5}


def test_a_perfect_writer_beats_every_baseline():
    generator = np.random.default_rng(5)
    training = [draw_scene(generator, held_out=False).caption for _ in range(300)]
    truths = [draw_scene(generator, held_out=True).caption for _ in range(200)]
    scores = score_captions(truths, [[truth] for truth in truths], training)
    assert scores.exact == 1
    assert scores.bleu4 == pytest.approx(100)
    assert scores.cider_d == pytest.approx(10)
    for kind, score in scores.facts.items():
        assert score.right == 1
        assert score.majority_value < (0.65 if kind == "order" else 0.4)
    # Someone else's captions, in the same grammar, are about as bad as guessing.
    shifted = score_captions([*truths[1:], truths[0]], [[truth] for truth in truths], training)
    assert shifted.exact < 0.05
    assert shifted.cider_d < 5
    assert all(score.right is None or score.right < 0.7 for score in shifted.facts.values())


def test_facts_are_those_of_synthetic_scenes_only():
    references = [["a man rides a horse", "a rider"], ["a dog"]]
    scores = score_captions(["A rider.", "a dog barks"], references, TRAINING)
    assert scores.facts is None
    assert scores.exact == 0.5
    assert score_captions(TRUTHS, [[truth] for truth in TRUTHS]).facts is None


def test_json_and_tables():
    scores = score_captions(WRITTEN, [[truth] for truth in TRUTHS], TRAINING).to_dict()
    assert scores["facts"]["order"] == {"right": 0.0, "judged": 1, "majority_caption": None, "majority_value": 0.0}
    other = score_captions(TRUTHS, [["a dog"]] * 5).to_dict()
    text = io.StringIO()
    Console(file=text, width=80).print(*scores_tables({"small": scores, "large": other}))
    lines = [line.split() for line in text.getvalue().splitlines()]
    assert ["small", "5", "20.0%", f"{scores['bleu4']:.1f}", f"{scores['cider_d']:.2f}"] in lines
    assert ["large", "5", "0.0%", f"{other['bleu4']:.1f}", "0.00"] in lines
    assert ["motion", "40.0%", "40.0%", "40.0%", "5"] in lines
    assert ["order", "0.0%", "0.0%", "-", "1"] in lines
    assert sum(line[:3] == ["facts", "told", "by"] for line in lines) == 1


def test_refusals():
    with pytest.raises(UsageError, match="5 captions, 4 truths and 6 training captions were given"):
        score_all_facts(WRITTEN, TRUTHS[:4], TRAINING)
    with pytest.raises(UsageError, match="'a dog' is not a caption of a synthetic scene"):
        score_all_facts(["a dog"], ["a dog"], TRAINING)
