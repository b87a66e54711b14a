import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioning.tokenization import FLICKR8K_AGREEMENT, PUNCTUATION, clean_text, detokenize, tokenize


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("Two dogs run, fast.", "two dogs run fast"),
        ("A man's hat isn't red .", "a man 's hat is n't red"),
        ("They can't see the girls' kites!", "they ca n't see the girls kites"),
        ("I cannot say that they're gonna swim", "i can not say that they 're gon na swim"),
        ('The sign says " GO " and “stop”', "the sign says go and stop"),
        ("it’s a well-worn t-shirt -- nearly new…", "it 's a well-worn t-shirt nearly new"),
        ("a boat (blue) and a [red] one", "a boat -lrb- blue -rrb- and a -lsb- red -rsb- one"),
        ("In the U.S. on 5th Ave. near St. Paul", "in the u.s. on 5th ave. near st. paul"),
        ("A lake. The sun sets..", "a lake the sun sets"),
        ("player #7 of 1,000 at 3.5 km", "player # 7 of 1,000 at 3.5 km"),
        ("rock 'n' roll of the '90s", "rock 'n' roll of the '90s"),
        ("a 'no entry' sign and multi- colored", "a no entry sign and multi colored"),
    ],
)
def test_captions_split_as_the_ptb_tokenizer_splits_them(caption, words):
    assert tokenize(caption) == words.split()


def test_case_and_final_full_stop_do_not_matter():
    plain = tokenize("a Dog near the Fence")
    assert tokenize("A DOG NEAR THE FENCE .") == tokenize("a dog near the fence.") == plain


@pytest.mark.parametrize("caption", ["", "   ", "\n\t", ". . .", "?!", '"', "\x00\u200b", "\ud800"])
def test_captions_without_a_word_become_empty_lists(caption):
    assert tokenize(caption) == []


def test_control_characters_and_line_ends_separate_words():
    assert tokenize("a\nb\x00c\u2028d\x85e\xa0f\rg") == list("abcdefg")


def test_letters_outside_ascii_are_kept():
    assert tokenize("Un café à Zürich, 日本") == ["un", "café", "à", "zürich", "日本"]


@given(st.text(max_size=60))
def test_words_of_any_text_are_lower_case_without_white_space_or_punctuation(text):
    for word in tokenize(text):
        assert word == word.lower()
        assert not re.search(r"\s", word)
        assert word not in PUNCTUATION


def test_the_reserved_words_of_a_vocabulary_cannot_come_out_of_a_caption():
    assert not {"<start>", "<end>", "<unk>", "<pad>"} & set(tokenize("<start> <unk> x<end> <PAD>"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("a man 's hat", "a man's hat"),
        ("dogs do n't fly", "dogs don't fly"),
        ("it ca n't be what they 're gon na do", "it can't be what they're gonna do"),
        ("a boat -lrb- blue -rrb- floats", "a boat (blue) floats"),
        ("rock 'n' roll", "rock 'n' roll"),
        ("", ""),
    ],
)
def test_words_join_to_the_sentence_that_people_write(words, sentence):
    assert detokenize(words.split()) == sentence


def test_tokenising_a_joined_sentence_gives_its_words_back():
    words = tokenize("The cat's owner (a boy) won't say 'hello', he'd rather cannot.")
    assert tokenize(detokenize(words)) == words


def test_clean_text_holds_no_line_end_and_no_lone_surrogate():
    assert clean_text(" a\u2028b\x0b\x0cc\ud800 d\r\n") == "a b c d"


@pytest.mark.data
@pytest.mark.java
def test_flickr8k_captions_agree_with_the_ptb_tokenizer_as_often_as_stated(shared):
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    lines = shared("data", "flickr8k", "Flickr8k.token.txt").read_text(encoding="utf-8").splitlines()
    captions = [line.split("\t")[1] for line in lines]
    ptb = PTBTokenizer().tokenize({i: [{"caption": caption}] for i, caption in enumerate(captions)})
    agree = sum(" ".join(tokenize(caption)) == ptb[i][0] for i, caption in enumerate(captions))
    assert len(captions) == 40_460
    assert agree / len(captions) >= FLICKR8K_AGREEMENT >= 0.999
