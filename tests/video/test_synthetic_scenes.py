"""Captions and their scenes: one to one, held-out combinations apart, every kind of fact scored by itself."""

from itertools import product

import numpy as np
import pytest

from modicum.errors import UsageError
from modicum.video.synthetic import FACTS, Event, Scene, draw_scene, facts_of, score_facts
from modicum.video.synthetic.scenes import COLOURS, COUNTS, MOTIONS, SHAPES

RED, BLUE = Event(2, "red", "circle", "moves left"), Event(1, "blue", "square", "grows")
BOTH = "two red circles move left, then a blue square grows"
ALL = [Event(*facts) for facts in product((1, 2, 3), COLOURS, SHAPES, MOTIONS)]


@pytest.mark.parametrize(
    ("events", "caption"),
    [
        ((RED, BLUE), BOTH),
        ((Event(1, "green", "cross", "stays still"),), "a green cross stays still"),
        ((Event(3, "white", "cross", "stays still"),), "three white crosses stay still"),
        ((Event(2, "purple", "bar", "shrinks"),), "two purple bars shrink"),
        ((Event(1, "yellow", "ring", "blinks"),), "a yellow ring blinks"),
    ],
)
def test_captions_are_grammatical(events: tuple[Event, ...], caption: str) -> None:
    assert Scene(events).caption == caption
    assert facts_of(caption) == Scene(events).facts


def test_facts_by_kind() -> None:
    assert facts_of(BOTH) == {
        "count": (2, 1),
        "colour": ("red", "blue"),
        "shape": ("circle", "square"),
        "motion": ("moves left", "grows"),
        "order": ("red circle", "blue square"),
    }
    single = facts_of(f"  {BLUE.phrase}\n")
    assert single is not None
    assert single["order"] == ()
    assert tuple(single) == FACTS


def test_far_more_than_ten_thousand_captions_each_of_one_scene() -> None:
    singles = {event.phrase: event for event in ALL}
    assert len(singles) == len(ALL) == 3 * 6 * 6 * 8
    # Every tenth of the second events is enough to count, and quick.
    pairs = [(a, b) for a in ALL for b in ALL[::10] if a.name != b.name]
    captions = {Scene(pair).caption for pair in pairs}
    assert len(captions) == len(pairs) > 50_000
    for event in ALL:
        assert facts_of(event.phrase) == Scene((event,)).facts


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "two red circle move left",
        "a red circles moves left",
        "two red circles moves left",
        "a orange circle grows",
        "a circle red grows",
        "a red circle grows then a blue square grows",
        "a red circle grows, then",
        "a red circle grows, then a blue square grows, then a blue ring grows",
        "A red circle grows",
        "a red circle grows a",
    ],
)
def test_sentences_outside_the_grammar_have_no_facts(text: str) -> None:
    assert facts_of(text) is None
    assert score_facts(BOTH, text) == dict.fromkeys(FACTS[:-1], False)


@pytest.mark.parametrize(
    ("text", "wrong", "order"),
    [
        (BOTH, [], True),
        ("a blue square grows, then two red circles move left", [], False),
        ("three red circles move left, then a blue square grows", ["count"], True),
        ("two red circles move left, then a blue square shrinks", ["motion"], True),
        ("a blue square moves left, then two red circles grow", ["motion"], False),
        ("two red circles move left, then a blue ring grows", ["shape"], None),
        ("two green circles move left, then a blue square grows", ["colour"], None),
        # Each word is there, on the wrong objects.
        ("two blue circles move left, then a red square grows", ["colour"], None),
        # Both halves swapped and one word wrong: still known by what they agree in.
        ("a blue square grows, then two red bars move left", ["shape"], None),
        ("two red circles move left", ["count", "colour", "shape", "motion"], None),
    ],
)
def test_each_kind_is_scored_by_itself(text: str, wrong: list[str], order: bool | None) -> None:
    expected = {kind: kind not in wrong for kind in FACTS[:-1]}
    if order is not None:
        expected["order"] = order
    assert score_facts(BOTH, text) == expected
    assert score_facts(Scene((RED, BLUE)), text) == expected


def test_a_single_event_has_no_order_to_be_judged() -> None:
    assert score_facts(BLUE.phrase, BLUE.phrase) == dict.fromkeys(FACTS[:-1], True)
    assert score_facts(BLUE.phrase, BOTH) == dict.fromkeys(FACTS[:-1], False)


def test_what_is_held_out_is_spread_evenly() -> None:
    """By hand: each sum of places modulo 6 leaves one of 8 motions, or two where it is 0 or 5, so 6 * (4 + 2 * 2) of 288."""
    held_out = [event for event in ALL if event.held_out]
    assert sum(event.count == 1 for event in held_out) == 48
    assert len(held_out) == 3 * 48
    assert Event(1, "red", "circle", "moves left").held_out
    assert Event(2, "red", "circle", "blinks").held_out
    assert Event(3, "white", "square", "shrinks").held_out is False
    assert Event(3, "white", "square", "moves left").held_out
    assert not Event(1, "green", "circle", "moves left").held_out


def triples_of(scene: Scene) -> set[tuple[str, str, str]]:
    return {(e.colour, e.shape, e.motion) for e in scene.events}


def pairs_of(scene: Scene) -> set[tuple[str, str]]:
    triples = triples_of(scene)
    return {pair for colour, shape, motion in triples for pair in ((colour, shape), (colour, motion), (shape, motion))}


def test_training_never_shows_what_held_out_scenes_always_do() -> None:
    generator = np.random.default_rng(0)
    train = [draw_scene(generator, held_out=False) for _ in range(3000)]
    held_out = [draw_scene(generator, held_out=True) for _ in range(1000)]
    trained = set().union(*map(triples_of, train))
    assert len(trained) == 288 - 48
    assert all(triples_of(scene) - trained for scene in held_out)
    assert all(scene.held_out for scene in held_out)
    assert not any(scene.held_out for scene in train)
    # Any two of the three are trained on together.
    assert len(set().union(*map(pairs_of, train))) == 36 + 48 + 48
    words = {word for scene in train for word in scene.caption.replace(",", "").split()}
    assert words == {word for event in ALL for word in event.phrase.split()} | {"then"}


@pytest.mark.parametrize("held_out", [False, True])
def test_scenes_have_one_event_or_two_in_either_order(held_out: bool) -> None:
    generator = np.random.default_rng(1)
    scenes = [draw_scene(generator, held_out) for _ in range(1500)]
    two = [scene for scene in scenes if len(scene.events) == 2]
    # Two thirds, within four standard deviations.
    assert abs(len(two) / 1500 - 2 / 3) < 4 * np.sqrt(2 / 9 / 1500)
    firsts = np.array([scene.events[0].held_out for scene in two])
    seconds = np.array([scene.events[1].held_out for scene in two])
    assert abs(firsts.mean() - seconds.mean()) < 4 * np.sqrt(0.5 / len(two))
    counts = np.array([event.count for scene in scenes for event in scene.events])
    assert np.abs(np.bincount(counts, minlength=4)[1:] / len(counts) - 1 / 3).max() < 4 * np.sqrt(2 / 9 / len(counts))


def test_refusals() -> None:
    twin = Event(3, "red", "circle", "grows")
    for events in ((), (RED, twin), (RED, BLUE, RED)):
        with pytest.raises(UsageError, match="give one, or two that differ in colour or shape"):
            Scene(events)
    with pytest.raises(
        UsageError, match="'a horse gallops' is not a caption of a scene: give one such as 'a red circle"
    ):
        score_facts("a horse gallops", BOTH)


def test_counts_are_words_for_one_two_three() -> None:
    assert [Event(n, "red", "bar", "grows").phrase.split()[0] for n in (1, 2, 3)] == COUNTS
