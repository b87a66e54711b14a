"""The synthetic world: scenes, pictures, masks, and sentences whose truth is checked by hand and by mutation."""

import json
import math
import re
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from preprocess.shapes import COLOURS, KINDS, RADII, Scene, Thing, instances, make_scene, scene_from_dict, scene_to_dict
from preprocess.shapes_grammar import FORMS, PLACES, Phrase, Statement, describe, is_true, mentions, parse

SCENES = [make_scene(7, index) for index in range(300)]
SENTENCES = [(sentence, scene) for index, scene in enumerate(SCENES) for sentence in describe(scene, [7, index, 1])]

# Two small red circles above each other on the left, a large blue square in the top right, a small red star below it.
BY_HAND = Scene(
    (
        Thing("circle", "red", "small", x=0.20, y=0.20, radius=0.11),
        Thing("circle", "red", "small", x=0.25, y=0.80, radius=0.11),
        Thing("square", "blue", "large", x=0.78, y=0.25, radius=0.18),
        Thing("star", "red", "small", x=0.80, y=0.75, radius=0.11),
    ),
)
some_index = st.integers(0, 10_000)
repeatable = settings(derandomize=True, deadline=None, max_examples=150)


# Scenes


def test_a_scene_depends_on_its_seed_and_index_only():
    alone = make_scene(7, 250)
    assert alone == SCENES[250]
    assert len({*SCENES, make_scene(8, 250)}) == len(SCENES) + 1


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (0, -1)])
def test_negative_seeds_and_indices_are_refused(seed, index):
    with pytest.raises(ValueError, match="=-1 must not be negative"):
        make_scene(seed, index)


def test_no_two_masks_share_a_pixel_and_none_touches_the_edge():
    for scene in SCENES:
        cover = sum(scene.mask(i, 64).astype(int) for i in range(len(scene.things)))
        assert cover.max() == 1
        assert not cover[[0, -1]].any()
        assert not cover[:, [0, -1]].any()


def test_any_two_centres_are_clearly_in_line_or_clearly_apart_along_each_axis():
    for scene in SCENES:
        for first, second in combinations(scene.things, 2):
            offsets = abs(first.x - second.x), abs(first.y - second.y)
            assert all(offset <= 0.12 + 1e-9 or offset >= 0.15 - 1e-9 for offset in offsets)
            assert max(offsets) >= 0.15 - 1e-9


def test_every_thing_is_far_inside_or_far_outside_every_place():
    for scene in SCENES:
        for thing in scene.things:
            nudges = [(dx, dy) for dx in (-0.039, 0, 0.039) for dy in (-0.039, 0, 0.039)]
            x, y, r = thing.x, thing.y, RADII["small"][0]
            nudged = [replace(thing, size="small", radius=r, x=x + dx, y=y + dy) for dx, dy in nudges]
            assert all(len({holds(near) for near in nudged}) == 1 for holds in PLACES.values())


def test_large_things_have_more_than_one_and_a_half_times_the_radius_of_small_ones():
    radii = {size: [t.radius for s in SCENES for t in s.things if t.size == size] for size in ("small", "large")}
    assert min(radii["large"]) > 1.5 * max(radii["small"])


def test_scenes_hold_one_to_three_things_and_groups_of_two_and_three_equal_ones():
    counts = Counter(len(scene.things) for scene in SCENES)
    assert set(counts) == {1, 2, 3}
    equal = [max(Counter((t.kind, t.colour, t.size) for t in scene.things).values()) for scene in SCENES]
    assert set(equal) == {1, 2, 3}
    looks = {(t.kind, t.colour) for scene in SCENES for t in scene.things}
    assert len(looks) == len(KINDS) * len(COLOURS)


def test_things_of_one_kind_and_colour_have_one_size():
    for scene in SCENES:
        assert len({(t.kind, t.colour, t.size) for t in scene.things}) == len(
            {(t.kind, t.colour) for t in scene.things}
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "ring"}, "kind='ring' is not one of circle, square"),
        ({"colour": "orange"}, "colour='orange' is not one of red, yellow"),
        ({"size": "huge"}, "size='huge' is not one of small, large"),
        ({"radius": 0.2}, r"radius=0.2 of a small thing must lie in 0.11..0.12"),
        ({"x": 0.05}, "x=0.05 puts a thing of radius 0.11 outside the picture"),
        ({"y": math.nan}, "y=nan puts a thing"),
        ({"angle": 1.0}, "angle=1.0 must lie in -0.15..0.15"),
    ],
)
def test_a_thing_out_of_range_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        replace(BY_HAND.things[0], **change)


def test_overlapping_things_are_refused():
    first = BY_HAND.things[0]
    with pytest.raises(ValueError, match=r"things\[0\] and things\[1\] overlap"):
        Scene((first, replace(first, x=first.x + 0.15)))


def test_a_scene_survives_json():
    for scene in SCENES[:50]:
        assert scene_from_dict(json.loads(json.dumps(scene_to_dict(scene)))) == scene


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d.pop("background"), "scene=.* exactly the keys background, things"),
        (lambda d: d.update(extra=1), "scene=.* exactly the keys background, things"),
        (lambda d: d["things"][0].pop("x"), r"things\[0\]=.* exactly the keys angle, colour"),
        (lambda d: d["things"][1].update(x="0.5"), r"things\[1\]: x='0.5' is of the wrong type"),
        (lambda d: d.update(background="plaid"), "background='plaid' is not one of cream"),
        (lambda d: d.update(things=[]), "at least one thing"),
    ],
)
def test_a_spoilt_scene_description_is_refused_by_name(spoil, message):
    values = scene_to_dict(BY_HAND)
    spoil(values)
    with pytest.raises(ValueError, match=message):
        scene_from_dict(values)


# Pictures and masks


def test_a_picture_is_rgb_of_the_size_asked_for_and_the_same_every_time():
    first, second = SCENES[0].render(96), SCENES[0].render(96)
    assert (first.mode, first.size) == ("RGB", (96, 96))
    assert first.tobytes() == second.tobytes()


def test_a_picture_too_small_for_shapes_is_refused():
    with pytest.raises(ValueError, match="size=8 must be at least 16 pixels"):
        SCENES[0].render(8)


@pytest.mark.parametrize("size", [64, 224])
def test_a_circle_covers_pi_r_squared_around_its_centre(size):
    scene = Scene((Thing("circle", "red", "large", x=0.3, y=0.6, radius=0.18),))
    mask = scene.mask(0, size)
    drawn_radius = 0.9 * 0.18 * size  # circles fill nine tenths of their radius, so as not to look larger than others
    assert mask.sum() == pytest.approx(math.pi * drawn_radius**2, rel=0.02)
    rows, columns = np.nonzero(mask)
    assert columns.mean() + 0.5 == pytest.approx(0.3 * size, abs=0.25)
    assert rows.mean() + 0.5 == pytest.approx(0.6 * size, abs=0.25)


def test_each_thing_shows_its_colour_at_the_centroid_of_its_mask():
    for scene in SCENES[:100]:
        pixels = np.asarray(scene.render(96), dtype=float)
        for index, thing in enumerate(scene.things):
            row, column = (round(axis.mean()) for axis in np.nonzero(scene.mask(index, 96)))
            distances = {name: np.linalg.norm(pixels[row, column] - rgb) for name, rgb in COLOURS.items()}
            assert min(distances, key=distances.__getitem__) == thing.colour
            assert distances[thing.colour] < 15


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_is_what_the_picture_shows(kind):
    # Purple (luminance 104) on cream (245): a pixel at least half covered is darker than the middle between the two.
    # The soft shadow darkens some half-covered pixels below the thing, hence the few that may differ.
    scene = Scene((Thing(kind, "purple", "large", x=0.5, y=0.4, radius=0.18, angle=0.1),))
    mask = scene.mask(0, 224)
    dark = np.asarray(scene.render(224).convert("L")) < (104 + 245) / 2
    assert mask.sum() > 1000
    assert (mask != dark).sum() < 0.02 * mask.sum()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools under NumPy 2
def test_instances_are_coco_whose_masks_boxes_and_areas_are_the_scenes():
    scenes = SCENES[:20]
    coco = COCO()
    coco.dataset = json.loads(json.dumps(instances(scenes, 64)))
    coco.createIndex()
    for image_id, scene in enumerate(scenes):
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=[image_id]))
        assert len(annotations) == len(scene.things)
        for index, (annotation, thing) in enumerate(zip(annotations, scene.things, strict=True)):
            mask = scene.mask(index, 64)
            rows, columns = np.nonzero(mask)
            left, top = columns.min(), rows.min()
            assert (coco_mask.decode(annotation["segmentation"]) == mask).all()
            assert annotation["area"] == mask.sum()
            assert annotation["bbox"] == [left, top, columns.max() + 1 - left, rows.max() + 1 - top]
            assert coco.cats[annotation["category_id"]]["name"] == thing.kind
            assert annotation["attributes"] == {"colour": thing.colour, "size": thing.size}
        assert scene_from_dict(coco.imgs[image_id]["scene"]) == scene


def test_instances_take_file_names():
    images = instances(SCENES[:2], 32, file_names=["a.png", "b.png"])["images"]
    assert [image["file_name"] for image in images] == ["a.png", "b.png"]


# Sentences


def test_every_scene_gets_five_different_sentences_the_same_for_the_same_seed():
    for index, scene in enumerate(SCENES):
        sentences = describe(scene, [7, index, 1])
        assert len(set(sentences)) == 5
        assert sentences == describe(scene, np.random.default_rng([7, index, 1]))


def test_every_sentence_parses_and_is_true():
    for sentence, scene in SENTENCES:
        statement = parse(sentence)
        assert statement is not None, sentence
        assert is_true(statement, scene), sentence
        assert statement.words() + " ." == sentence


def test_the_sentences_use_every_form():
    assert {parse(sentence).form for sentence, _ in SENTENCES} == set(FORMS)


def test_sentences_are_short_and_of_few_plain_words():
    words = [sentence.removesuffix(" .").split() for sentence, _ in SENTENCES]
    assert {len(sentence) for sentence in words} <= set(range(4, 14))
    vocabulary = {word for sentence in words for word in sentence}
    assert len(vocabulary) == 37
    assert all(re.fullmatch("[a-z]+", word) for word in vocabulary)


@pytest.mark.parametrize(
    ("sentence", "truth"),
    [
        ("there is a small red star", True),
        ("there is a red circle", True),  # at least one
        ("there is a large star", False),
        ("there is a blue circle", False),
        ("there are two red circles", True),
        ("there are two stars", False),
        ("there are three red circles", False),
        ("a red circle is in the top left", True),
        ("two small circles are on the left", True),
        ("two small circles are in the top left", False),  # one of them is at the bottom
        ("there is a star at the bottom", True),
        ("there is a star in the centre", False),
        ("a blue square is above a red star", True),
        ("a blue square is below a red star", False),
        ("a star is to the right of a small circle", True),
        ("two circles are to the left of a square", True),
        ("two circles are below a square", False),  # the upper one is level with it
        ("a circle is below a square", True),
        ("a circle is above a square", False),  # 0.05 is not clearly above
        ("a square is to the left of a star", False),  # nor is 0.02 clearly to the left
        ("a circle is above a circle", True),
        ("a blue square and a red star", True),
        ("two red circles and a blue square", True),
        ("a red circle and a red circle", True),  # two different ones
        ("a blue square and a large square", False),  # the only square cannot be both
    ],
)
def test_truth_worked_out_by_hand(sentence, truth):
    assert is_true(parse(sentence), BY_HAND) is truth


@pytest.mark.parametrize(
    "sentence",
    [
        "",
        ".",
        "a",
        "red",
        "a dog runs",
        "there is a small red circles",
        "there is two red circles",
        "there are a red circle",
        "there are four red circles",
        "a red small circle is at the top",
        "a red circle at the top",
        "a red circle is to the left",
        "a red circle is to the left of",
        "a red circle is to the left of the blue square",
        "a red circle is at the left",
        "a red circle is in the top left of a blue square",
        "a red circle and a blue square and a star",
        "there is a red circle . there is a red circle",
        "There is a red circle",
        "there is a red circle ..",
    ],
)
def test_nonsense_does_not_parse(sentence):
    assert parse(sentence) is None


@given(st.lists(st.sampled_from(sorted({w for s, _ in SENTENCES for w in s.split()})), max_size=14).map(" ".join))
@repeatable
def test_words_in_any_order_never_fail_and_parse_only_to_themselves(text):
    statement = parse(text)
    assert statement is None or statement.words() == text.removesuffix(" .")


@pytest.mark.parametrize("ending", ["", ".", " .", " . \n"])
def test_the_full_stop_may_be_there_or_not(ending):
    assert parse("two red circles are at the top" + ending) == Statement(
        "{many} are {place}",
        Phrase(2, None, "red", "circle"),
        place="at the top",
    )


@given(some_index, st.integers(0, 99), st.sampled_from(sorted(COLOURS)))
@repeatable
def test_a_colour_that_no_thing_has_makes_a_sentence_false(index, seed, colour):
    scene = make_scene(11, index)
    if colour in {thing.colour for thing in scene.things}:
        return
    for sentence in describe(scene, seed):
        statement = parse(sentence)
        assert not is_true(replace(statement, subject=statement.subject._replace(colour=colour)), scene)
        if statement.other:
            assert not is_true(replace(statement, other=statement.other._replace(colour=colour)), scene)


@given(some_index, st.integers(0, 99))
@repeatable
def test_a_wrong_count_makes_a_sentence_false(index, seed):
    scene = make_scene(11, index)
    for sentence in describe(scene, seed):
        swapped = re.sub("two|three", lambda match: {"two": "three", "three": "two"}[match[0]], sentence)
        assert is_true(parse(swapped), scene) is (swapped == sentence)


@given(some_index, st.integers(0, 99))
@repeatable
def test_the_opposite_place_or_relation_is_false_of_the_same_things(index, seed):
    scene = make_scene(11, index)
    opposites = {"left": "right", "right": "left", "top": "bottom", "bottom": "top", "above": "below", "below": "above"}
    for sentence in describe(scene, seed):
        named = {phrase for phrase in (parse(sentence).subject, parse(sentence).other) if phrase}
        if any(sum(phrase.fits(thing) for thing in scene.things) != phrase.number for phrase in named):
            continue  # the opposite may be true of another thing that the same words fit
        turned = " ".join(opposites.get(word, word) for word in sentence.split())
        assert is_true(parse(turned), scene) is (turned == sentence)


# Mentions


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("there is a small red star .", [(5, "star", (3,))]),
        ("two circles are to the left of a square", [(1, "circles", (0, 1)), (8, "square", (2,))]),
        ("a circle is on the left", [(1, "circle", (0, 1))]),  # either will do: both
        ("a circle is in the top left", [(1, "circle", (0,))]),  # only one makes it true
        ("a circle is below a blue square", [(1, "circle", (1,)), (6, "square", (2,))]),
        ("a circle is above a circle", [(1, "circle", (0,)), (5, "circle", (1,))]),
        ("a star is above a square", [(1, "star", ()), (5, "square", ())]),  # false: nothing is named
        ("what is this", []),
    ],
)
def test_mentions_worked_out_by_hand(sentence, expected):
    assert list(mentions(sentence, BY_HAND)) == expected


def test_mentions_point_at_things_of_the_kind_and_colour_said():
    for sentence, scene in SENTENCES:
        words = sentence.split()
        found = mentions(sentence, scene)
        assert len(found) == sum(word.startswith(KINDS) for word in words)
        for mention in found:
            assert words[mention.word] == mention.noun
            assert mention.things
            for thing in (scene.things[index] for index in mention.things):
                assert mention.noun.startswith(thing.kind)
                said = words[mention.word - 1]
                assert said not in COLOURS or said == thing.colour
