"""Words and their ids."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioning.tokenization import clean_text
from captioning.vocabulary import END, PAD, SPECIAL, START, UNK, Vocabulary

CAPTIONS = [["a", "dog"], ["a", "cat"], ["a", "dog", "runs"]]


def test_the_special_words_have_the_first_ids():
    vocabulary = Vocabulary(SPECIAL)
    assert [vocabulary.ids[word] for word in ("<pad>", "<start>", "<end>", "<unk>")] == [PAD, START, END, UNK]
    assert (PAD, START, END, UNK) == (0, 1, 2, 3)


def test_frequent_words_come_first_and_ties_in_alphabetical_order():
    assert Vocabulary.build(CAPTIONS).words == (*SPECIAL, "a", "dog", "cat", "runs")  # 3, 2, 1, 1


def test_rare_words_are_left_out():
    assert Vocabulary.build(CAPTIONS, min_count=2).words == (*SPECIAL, "a", "dog")


def test_the_size_counts_no_special_words():
    assert Vocabulary.build(CAPTIONS, max_size=3).words == (*SPECIAL, "a", "dog", "cat")


def test_a_caption_with_a_special_word_adds_no_second_one():
    assert Vocabulary.build([["<end>", "a", "<pad>"]]).words == (*SPECIAL, "a")


def test_unknown_words_become_unk():
    assert Vocabulary.build(CAPTIONS).encode(["a", "zebra"]) == [4, UNK]


def test_decoding_stops_at_the_end_and_skips_start_and_padding():
    assert Vocabulary.build(CAPTIONS).decode([START, 4, PAD, 5, END, 6]) == ["a", "dog"]


printed = st.characters(codec="utf-8").filter(lambda letter: clean_text(letter) == letter)
words = st.text(printed, min_size=1).filter(lambda word: word not in SPECIAL)


@given(st.lists(st.lists(words, max_size=5), max_size=5))
def test_what_was_counted_decodes_to_itself(captions):
    vocabulary = Vocabulary.build(captions)
    for caption in captions:
        assert vocabulary.decode(vocabulary.encode(caption)) == caption


def test_saving_and_loading_gives_the_same_vocabulary(tmp_path):
    vocabulary = Vocabulary([*SPECIAL, "naïve", '"', "日本"])
    vocabulary.save(tmp_path / "v.json")
    loaded = Vocabulary.load(tmp_path / "v.json")
    assert loaded == vocabulary
    assert hash(loaded) == hash(vocabulary)
    assert len(loaded) == 7


def test_vocabularies_differ_by_their_order():
    assert Vocabulary([*SPECIAL, "a", "b"]) != Vocabulary([*SPECIAL, "b", "a"])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["a", "b", "c", "d"], "must begin with <pad> <start> <end> <unk>"),
        (SPECIAL[:3], "must begin with"),
        ([*SPECIAL, "a", "b", "a"], "'a' is twice"),
        ([*SPECIAL, ""], "not empty"),
    ],
)
def test_a_wrong_list_of_words_is_refused(words, named):
    with pytest.raises(ValueError, match=named):
        Vocabulary(words)


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "[1]",
        "{}",
        json.dumps({"words": 3}),
        json.dumps({"words": [*SPECIAL, 3]}),
        json.dumps({"words": ["a"]}),
        json.dumps({"words": None}),
        "[" * 100_000,
    ],
)
def test_a_malformed_file_is_named(content, tmp_path):
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(ValueError, match=r"v\.json: (not a vocabulary|is not JSON|must be a JSON object)"):
        Vocabulary.load(tmp_path / "v.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        Vocabulary.load(tmp_path / "absent.json")


@pytest.mark.parametrize("word", ["one\nphoto.jpg\tred", "\x1b[31mred", "two words", " red", "a\u2028b"])
def test_a_word_can_neither_end_its_line_nor_speak_to_the_terminal(word):
    with pytest.raises(ValueError, match="no spaces and no control characters"):
        Vocabulary([*SPECIAL, word])
