"""The sentences of the synthetic world: one table of forms, read both to say what is true and to check what was said.

A sentence fills the slots of one of `FORMS` with the words of the tables below it. What the sentences mean:

- "a small red circle": at least one thing fits; words left out leave their property open.
- "two red circles": exactly two things of the whole scene fit, and what is said of them holds for both.
- "to the left of", "above" ...: the centre lies further that way by at least `CLEAR`, whatever it does along the other
  axis.
- "on the left", "at the top" ...: the centre lies in the outer `EDGE` of the picture on that side; "in the top left":
  on both sides; "in the centre": within `CENTRE` of the middle along both axes.
- A sentence is true if some choice of different things makes all of it true.

In scenes from `make_scene` every centre keeps at least 0.04 from the border of a place, and every pair at least 0.015
from the margin of a relation.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import NamedTuple, TypeVar

import numpy as np

from preprocess.shapes import COLOURS, KINDS, RADII, Scene, Thing

CLEAR = 0.135
EDGE = 0.35
CENTRE = 0.10

FORMS = (  # {one}: "a ...", {many}: "two ..." or "three ..."; {other}: either
    "there is {one}",
    "there are {many}",
    "there is {one} {place}",
    "there are {many} {place}",
    "{one} is {place}",
    "{many} are {place}",
    "{one} is {relation} {other}",
    "{many} are {relation} {other}",
    "{one} and {other}",
    "{many} and {other}",
)
COUNTS = {"a": 1, "two": 2, "three": 3}
PLURALS = {kind: f"{kind}s" for kind in KINDS}
PLACES: dict[str, Callable[[Thing], bool]] = {
    "in the top left": lambda thing: thing.x <= EDGE and thing.y <= EDGE,
    "in the top right": lambda thing: thing.x >= 1 - EDGE and thing.y <= EDGE,
    "in the bottom left": lambda thing: thing.x <= EDGE and thing.y >= 1 - EDGE,
    "in the bottom right": lambda thing: thing.x >= 1 - EDGE and thing.y >= 1 - EDGE,
    "in the centre": lambda thing: max(abs(thing.x - 0.5), abs(thing.y - 0.5)) <= CENTRE,
    "on the left": lambda thing: thing.x <= EDGE,
    "on the right": lambda thing: thing.x >= 1 - EDGE,
    "at the top": lambda thing: thing.y <= EDGE,
    "at the bottom": lambda thing: thing.y >= 1 - EDGE,
}
RELATIONS: dict[str, Callable[[Thing, Thing], bool]] = {
    "to the left of": lambda thing, other: other.x - thing.x >= CLEAR,
    "to the right of": lambda thing, other: thing.x - other.x >= CLEAR,
    "above": lambda thing, other: other.y - thing.y >= CLEAR,
    "below": lambda thing, other: thing.y - other.y >= CLEAR,
}

_COLOUR_SAID, _SIZE_SAID = 0.90, 0.75  # how often a sentence names them
_TRIES = 60

_Item = TypeVar("_Item")


class Phrase(NamedTuple):
    """A noun phrase: how many things of which looks; None leaves a property open."""

    number: int
    size: str | None
    colour: str | None
    kind: str

    def words(self) -> str:
        """The phrase as it is said: "two small red circles"."""
        count = next(word for word, number in COUNTS.items() if number == self.number)
        noun = self.kind if self.number == 1 else PLURALS[self.kind]
        return " ".join(word for word in (count, self.size, self.colour, noun) if word)

    def fits(self, thing: Thing) -> bool:
        """Whether the thing has all the properties that the phrase names."""
        return thing.kind == self.kind and self.colour in (None, thing.colour) and self.size in (None, thing.size)


@dataclass(frozen=True)
class Statement:
    """What a sentence says: one of `FORMS` with its slots filled; `place` and `relation` are keys of their tables."""

    form: str
    subject: Phrase
    other: Phrase | None = None
    place: str | None = None
    relation: str | None = None

    def words(self) -> str:
        """The sentence, lower-case and without a full stop; `parse` gives the statement back."""
        return " ".join(text for text, _ in self.parts())

    def parts(self) -> Iterator[tuple[str, Phrase | None]]:
        """The sentence piece by piece, each with the noun phrase that it is, if any."""
        for piece in self.form.split():
            if piece in ("{one}", "{many}"):
                yield self.subject.words(), self.subject
            elif piece == "{other}" and self.other is not None:
                yield self.other.words(), self.other
            else:
                yield {"{place}": self.place, "{relation}": self.relation}.get(piece) or piece, None


class Mention(NamedTuple):
    """A noun of a sentence: its position among the words, and the indices of the scene's things that it names."""

    word: int
    noun: str
    things: tuple[int, ...]


def describe(scene: Scene, rng: np.random.Generator | int | Sequence[int], *, count: int = 5) -> tuple[str, ...]:
    """Says `count` true sentences about a scene, each ending in " .".

    They differ from each other unless the grammar has too few true sentences (no scene of `make_scene` is that poor).

    Args:
        scene: What to describe.
        rng: A generator, or a seed for one; for `make_scene(seed, index)` take [seed, index, 1], a stream of its own.
        count: Number of sentences.
    """
    rng = np.random.default_rng(rng)
    groups = _groups(scene)
    said: dict[str, None] = {}  # a set that keeps its order
    topics = [_say_relation, _say_place, _say_pair, _say_existence, _say_relation] if len(groups) > 1 else []
    topics = topics or [_say_place, _say_existence]
    for attempt in range(_TRIES):
        if len(said) == count:
            break
        for statement in topics[attempt % len(topics)](scene, groups, rng):
            if statement.subject != statement.other and is_true(statement, scene):
                said[statement.words() + " ."] = None
                break
    sentences = list(said)
    return tuple(sentences[number % len(sentences)] for number in range(count))


def parse(sentence: str) -> Statement | None:
    """Reads a sentence by the grammar; a full stop at its end may be missing.

    Returns:
        The one statement that it can be, or None if the grammar has no such sentence.
    """
    text = " ".join(sentence.split()).removesuffix(".").rstrip()
    for form, pattern in _patterns():
        if match := pattern.fullmatch(text):
            slots = match.groupdict()
            return Statement(
                form,
                _phrases()[slots.get("one") or slots["many"]],
                other=_phrases()[slots["other"]] if slots.get("other") else None,
                place=slots.get("place"),
                relation=slots.get("relation"),
            )
    return None


def is_true(statement: Statement, scene: Scene) -> bool:
    """Whether some choice of different things makes every part of the statement true of the scene."""
    return any(True for _ in _assignments(statement, scene))


def mentions(sentence: str | Statement, scene: Scene) -> tuple[Mention, ...]:
    """Finds what each noun of a sentence names in a scene.

    Returns:
        One mention per noun, in the order of the words. Its things are those of every choice that makes the sentence
        true, so none if the sentence is false. Empty if the grammar has no such sentence.
    """
    statement = parse(sentence) if isinstance(sentence, str) else sentence
    if statement is None:
        return ()
    choices = list(_assignments(statement, scene))
    found: list[Mention] = []
    position = 0
    for text, phrase in statement.parts():
        position += len(text.split())
        if phrase is not None:
            role = len(found)  # the subject comes first
            things = sorted({index for choice in choices for index in choice[role]})
            found.append(Mention(position - 1, text.split()[-1], tuple(things)))
    return tuple(found)


def _assignments(statement: Statement, scene: Scene) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every (subject's things, other's things) that makes the statement true."""
    things = scene.things
    for subject in _choices(statement.subject, scene):
        if statement.place and not all(PLACES[statement.place](things[i]) for i in subject):
            continue
        if statement.other is None:
            yield subject, ()
            continue
        for other in _choices(statement.other, scene):
            holds = RELATIONS[statement.relation] if statement.relation else None
            if set(subject).isdisjoint(other) and (
                holds is None or all(holds(things[i], things[j]) for i, j in product(subject, other))
            ):
                yield subject, other


def _choices(phrase: Phrase, scene: Scene) -> list[tuple[int, ...]]:
    fitting = tuple(i for i, thing in enumerate(scene.things) if phrase.fits(thing))
    if phrase.number == 1:
        return [(i,) for i in fitting]
    return [fitting] if len(fitting) == phrase.number else []


@cache
def _phrases() -> dict[str, Phrase]:
    """Every noun phrase by its words."""
    phrases = [Phrase(*look) for look in product(COUNTS.values(), (None, *RADII), (None, *COLOURS), KINDS)]
    return {phrase.words(): phrase for phrase in phrases}


@cache
def _patterns() -> list[tuple[str, re.Pattern[str]]]:
    """`FORMS` as regular expressions, one named group per slot."""
    looks = f"(?:(?:{'|'.join(RADII)}) )?(?:(?:{'|'.join(COLOURS)}) )?"
    one = f"a {looks}(?:{'|'.join(KINDS)})"
    many = f"(?:{'|'.join(word for word in COUNTS if word != 'a')}) {looks}(?:{'|'.join(PLURALS.values())})"
    slots = {"one": one, "many": many, "other": f"{one}|{many}"}
    slots |= {"place": "|".join(PLACES), "relation": "|".join(RELATIONS)}
    groups = {name: f"(?P<{name}>{pattern})" for name, pattern in slots.items()}
    return [(form, re.compile(form.format_map(groups))) for form in FORMS]


def _groups(scene: Scene) -> list[tuple[int, ...]]:
    """The indices of equal things, together."""
    groups: dict[tuple[str, str, str], tuple[int, ...]] = {}
    for index, thing in enumerate(scene.things):
        look = (thing.kind, thing.colour, thing.size)
        groups[look] = (*groups.get(look, ()), index)
    return list(groups.values())


def _name(scene: Scene, group: tuple[int, ...], rng: np.random.Generator) -> Phrase:
    """A phrase that fits the group, at times without its colour or its size."""
    thing = scene.things[group[0]]
    colour = thing.colour if rng.random() < _COLOUR_SAID else None
    size = thing.size if colour is None or rng.random() < _SIZE_SAID else None
    return Phrase(len(group) if len(group) in COUNTS.values() else 1, size, colour, thing.kind)


# Each of these proposes statements on one topic, the most telling first; `describe` says the first that is true.


def _say_existence(scene: Scene, groups: list[tuple[int, ...]], rng: np.random.Generator) -> Iterator[Statement]:
    phrase = _name(scene, _pick(groups, rng), rng)
    yield Statement("there is {one}" if phrase.number == 1 else "there are {many}", phrase)


def _say_pair(scene: Scene, groups: list[tuple[int, ...]], rng: np.random.Generator) -> Iterator[Statement]:
    first, second = _pick_two(groups, rng)
    phrase, other = _name(scene, first, rng), _name(scene, second, rng)
    yield Statement("{one} and {other}" if phrase.number == 1 else "{many} and {other}", phrase, other=other)


def _say_place(scene: Scene, groups: list[tuple[int, ...]], rng: np.random.Generator) -> Iterator[Statement]:
    whole = _pick(groups, rng)
    phrase = _name(scene, whole, rng)
    one, many = ("there is {one} {place}", "there are {many} {place}") if rng.random() < 0.5 else FORMS[4:6]
    for number, group in ((phrase.number, whole), (1, (_pick(whole, rng),))):
        for place, holds in PLACES.items():  # the corners, which tell most, come first
            if all(holds(scene.things[index]) for index in group):
                yield Statement(one if number == 1 else many, phrase._replace(number=number), place=place)
                break


def _say_relation(scene: Scene, groups: list[tuple[int, ...]], rng: np.random.Generator) -> Iterator[Statement]:
    first, second = _pick_two(groups, rng)
    thing, landmark = scene.things[_pick(first, rng)], scene.things[_pick(second, rng)]
    right, down = thing.x - landmark.x, thing.y - landmark.y
    if abs(right) > abs(down):  # the direction that a person would name
        relation = "to the right of" if right > 0 else "to the left of"
    else:
        relation = "below" if down > 0 else "above"
    subject, other = _name(scene, first, rng), _name(scene, second, rng)
    for numbers in ((subject.number, other.number), (1, other.number), (1, 1)):
        form = "{one} is {relation} {other}" if numbers[0] == 1 else "{many} are {relation} {other}"
        phrases = subject._replace(number=numbers[0]), other._replace(number=numbers[1])
        yield Statement(form, phrases[0], other=phrases[1], relation=relation)


def _pick(items: Sequence[_Item], rng: np.random.Generator) -> _Item:
    return items[int(rng.random() * len(items))]


def _pick_two(groups: list[tuple[int, ...]], rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    first = int(rng.random() * len(groups))
    second = (first + 1 + int(rng.random() * (len(groups) - 1))) % len(groups)
    return groups[first], groups[second]
