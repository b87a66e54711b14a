"""Kinds of words from their spelling."""

import pytest

from captioning.word_classes import CLASSES, classify
from preprocess.shapes_grammar import PLURALS


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("a", "article"),
        ("his", "article"),
        ("through", "place"),
        ("left", "place"),
        ("and", "function"),
        ("is", "function"),
        ("brown", "quality"),
        ("two", "quality"),
        ("running", "verb"),
        ("dog", "noun"),
        ("clothing", "noun"),
        ("wing", "noun"),
        ("<end>", "other"),
        ("<unk>", "other"),
        ("4", "other"),
    ],
)
def test_a_word_alone_has_its_class(word, expected):
    assert classify([word]) == [expected]


def test_other_forms_of_a_verb_are_known_by_its_participle():
    forms = ["walks", "walked", "rides", "runs", "carries", "tried", "lies"]
    participles = ["walking", "riding", "running", "carrying", "trying", "lying"]
    assert classify(["grass", "dogs", "shirts", *participles])[:3] == ["noun"] * 3
    assert classify([*participles, *forms])[len(participles) :] == ["verb"] * len(forms)
    assert classify(forms[:-1]) == ["noun"] * (len(forms) - 1)  # nothing tells them from "stairs" and "bed"


def test_what_may_be_noun_or_verb_is_neither():
    assert classify(["swimming", "swim", "lying", "lie"]) == ["verb", "other", "verb", "other"]


def test_every_class_is_one_of_the_known():
    assert set(classify(["a", "in", "and", "red", "running", "dog", "<pad>"])) == set(CLASSES)


def test_the_things_of_the_made_world_are_nouns():
    assert set(classify([*PLURALS, *PLURALS.values()])) == {"noun"}
