"""Scenes and their captions: one or two events, each some objects of one kind that do something.

A scene has exactly one caption and a caption exactly one scene: "two red circles move left, then a blue square grows".
Some triples of a colour, a shape and a motion are held out: training shows any two of the three together but never all of
them, and every held-out scene does. (Pairs would not do: of six colours with six shapes each, a model that is trained
without a pair learns above all that the pair does not exist.)
"""

from dataclasses import dataclass
from itertools import product

import numpy as np

from modicum.errors import UsageError

COUNTS = ["a", "two", "three"]
COLOURS = ["red", "green", "blue", "yellow", "purple", "white"]
SHAPES = ["circle", "square", "triangle", "cross", "ring", "bar"]
# One object's words, and several objects'.
MOTIONS = {
    "moves left": "move left",
    "moves right": "move right",
    "moves up": "move up",
    "moves down": "move down",
    "grows": "grow",
    "shrinks": "shrink",
    "blinks": "blink",
    "stays still": "stay still",
}
FACTS = ("count", "colour", "shape", "motion", "order")
_THEN = ", then "


@dataclass(frozen=True)
class Event:
    """`count` (1 to 3) objects of one colour and shape, and what they do, in the words for one object."""

    count: int
    colour: str
    shape: str
    motion: str

    @property
    def name(self) -> str:
        """What tells the events of a scene apart: "red circle"."""
        return f"{self.colour} {self.shape}"

    @property
    def held_out(self) -> bool:
        """Whether training never shows this colour, shape and motion together.

        Going by places in the lists spreads them evenly: a colour and a shape are held out with one or two motions each.
        """
        places = COLOURS.index(self.colour), SHAPES.index(self.shape), list(MOTIONS).index(self.motion)
        return sum(places) % len(SHAPES) == 0

    @property
    def phrase(self) -> str:
        """The event in words."""
        article, noun = COUNTS[self.count - 1], f"{self.colour} {self.shape}"
        if self.count == 1:
            return f"{article} {noun} {self.motion}"
        plural = "es" if noun.endswith("s") else "s"
        return f"{article} {noun}{plural} {MOTIONS[self.motion]}"


_EVENTS = {
    event.phrase: event
    for event in (Event(*facts) for facts in product(range(1, len(COUNTS) + 1), COLOURS, SHAPES, MOTIONS))
}


@dataclass(frozen=True)
class Scene:
    """One or two events, in the order in which they happen.

    Raises:
        UsageError: no events or more than two, or two of objects of the same colour and shape.
    """

    events: tuple[Event, ...]

    def __post_init__(self) -> None:
        names = [event.name for event in self.events]
        if not 1 <= len(names) <= 2 or len(set(names)) < len(names):
            raise UsageError(
                f"a scene was given events of {', '.join(names) or 'nothing'}: give one, or two that differ in colour or "
                "shape"
            )

    @property
    def caption(self) -> str:
        """The one sentence that is true of the scene."""
        return _THEN.join(event.phrase for event in self.events)

    @property
    def facts(self) -> dict[str, tuple[int | str, ...]]:
        """By kind of fact, see `FACTS`, one for each event; the order, of names, is empty if there is one event."""
        return _facts(self.events)

    @property
    def held_out(self) -> bool:
        """Whether it shows something that training never does."""
        return any(event.held_out for event in self.events)


def draw_scene(generator: np.random.Generator, held_out: bool) -> Scene:
    """A scene for training, or one with at least one event that training never shows."""
    two = generator.random() < 2 / 3
    if not held_out:
        first = _draw_event(generator, held_out=False)
        return Scene((first, _draw_event(generator, held_out=False, unlike=first)) if two else (first,))
    first = _draw_event(generator, held_out=True)
    if not two:
        return Scene((first,))
    second = _draw_event(generator, held_out=None, unlike=first)
    return Scene((first, second) if generator.random() < 0.5 else (second, first))


def _draw_event(generator: np.random.Generator, held_out: bool | None, unlike: Event | None = None) -> Event:
    motions = list(MOTIONS)
    while True:
        count, colour, shape, motion = generator.integers(0, [len(COUNTS), len(COLOURS), len(SHAPES), len(motions)])
        event = Event(int(count) + 1, COLOURS[colour], SHAPES[shape], motions[motion])
        if held_out in (None, event.held_out) and (unlike is None or unlike.name != event.name):
            return event


def facts_of(caption: str) -> dict[str, tuple[int | str, ...]] | None:
    """What a caption says, as `Scene.facts`; None for a sentence that the grammar does not have.

    A sentence about the same kind of object twice has facts, though no scene has such a caption.
    """
    events = _events_of(caption)
    return None if events is None else _facts(events)


def score_facts(truth: Scene | str, text: str) -> dict[str, bool]:
    """Which kinds of facts a text has right: all of that kind, for every event.

    Events told in the wrong order are compared with those they fit best, so that only the order counts as wrong. The
    order is judged, and its key there, if there are two events and the text names the colour and shape of both.

    Args:
        truth: a scene or its caption.
        text: any text; outside the grammar, or with another number of events, it has nothing right.

    Raises:
        UsageError: `truth` is a sentence outside the grammar.
    """
    true = truth.events if isinstance(truth, Scene) else _events_of(truth)
    if true is None:
        raise UsageError(f"{truth!r} is not a caption of a scene: give one such as {next(iter(_EVENTS))!r}")
    told = _events_of(text)
    if told is None or len(told) != len(true):
        return dict.fromkeys(FACTS[:-1], False)
    # `max` takes the first of equals: a text that fits both ways is taken as it stands.
    aligned = max((told, told[::-1]), key=lambda events: _agreements(true, events))
    score = {
        kind: all(getattr(a, kind) == getattr(b, kind) for a, b in zip(true, aligned, strict=True))
        for kind in FACTS[:-1]
    }
    if len(true) == 2 and {event.name for event in true} == {event.name for event in told}:
        score["order"] = true[0].name == told[0].name
    return score


def _agreements(one: tuple[Event, ...], other: tuple[Event, ...]) -> int:
    pairs = zip(one, other, strict=True)
    return sum(getattr(a, kind) == getattr(b, kind) for a, b in pairs for kind in FACTS[:-1])


def _events_of(caption: str) -> tuple[Event, ...] | None:
    events = tuple(_EVENTS.get(phrase) for phrase in caption.strip().split(_THEN))
    known = tuple(event for event in events if event is not None)
    return known if len(known) == len(events) <= 2 else None


def _facts(events: tuple[Event, ...]) -> dict[str, tuple[int | str, ...]]:
    facts = {kind: tuple(getattr(event, kind) for event in events) for kind in FACTS[:-1]}
    return facts | {"order": tuple(event.name for event in events) if len(events) > 1 else ()}
