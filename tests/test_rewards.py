"""The reward is CIDEr-D as pycocoevalcap computes it, over the words that are scored and END."""

import numpy as np
import pytest
from pycocoevalcap.cider.cider import Cider

from captioning.data import CaptionData
from captioning.rewards import CiderD, _ngrams, references_with_end
from captioning.tokenization import tokenize
from captioning.vocabulary import END


def pycocoevalcap(references, captions):
    """CIDEr of each image's caption; ids stand as words."""
    truth = {i: [" ".join(map(str, caption)) for caption in found] for i, found in references.items()}
    found = {i: [" ".join(map(str, caption))] for i, caption in captions.items()}
    return Cider().compute_score(truth, found)[1]


@pytest.mark.parametrize("seed", range(5))
def test_it_equals_pycocoevalcap_on_the_same_corpus(seed):
    rng = np.random.default_rng(seed)

    def captions(count):
        return [rng.integers(4, 12, rng.integers(0, 15)).tolist() for _ in range(count)]

    references = {image: captions(int(rng.integers(1, 6))) for image in (7, 3, 11, 5, 30, 2)}
    candidates = dict(zip(references, captions(len(references)), strict=True))
    candidates[3] = references[3][0]  # one that is right, and words that no reference has
    candidates[5] = [*references[5][0], 99, 98]
    ours = CiderD(references)(list(candidates), list(candidates.values()))
    np.testing.assert_allclose(ours, pycocoevalcap(references, candidates), rtol=1e-12, atol=1e-12)


def test_several_captions_of_an_image_are_scored_each_by_itself():
    reward = CiderD({0: [[4, 5, 6, 2], [4, 6, 2]], 1: [[7, 8, 2]], 2: [[9, 2]]})
    captions = [[4, 5, 2], [6, 4, 2], [7, 8, 2], [], [4, 5, 6, 2]]
    images = [0, 0, 1, 1, 0]
    apart = [reward([image], [caption])[0] for image, caption in zip(images, captions, strict=True)]
    np.testing.assert_array_equal(reward(images, captions), apart)
    assert apart[3] == 0


def test_a_reward_by_hand():
    # Two images, one reference each: "4 5 END" and "6 END". END is in both, so its idf is ln(2/2) = 0; every other
    # n-gram is in one: idf ln 2. Of "4 END": words 4 (ln 2) and END (0), pair (4, END), which no reference has.
    # Cosine of single words: min(ln2, ln2) ln2 / (ln2 * sqrt(2) ln2) = 1/sqrt(2); 0 for pairs, and there are no longer
    # ones. One word shorter: exp(-1 / 72). Mean over n = 1..4, times 10.
    reward = CiderD({0: [[4, 5, END]], 1: [[6, END]]})
    expected = 10 * (1 / np.sqrt(2)) / 4 * np.exp(-1 / 72)
    np.testing.assert_allclose(reward([0], [[4, END]]), [expected], rtol=1e-12)


def test_a_caption_that_breaks_off_is_worth_less_than_one_that_ends():
    reward = CiderD({0: [[4, 5, 6, 7, END], [4, 5, 6, 8, END]], 1: [[9, 10, END]]})
    ended, broken_off = reward([0, 0], [[4, 5, 6, 7, END], [4, 5, 6, 7, 4]])
    assert ended > broken_off
    without_end = CiderD({0: [[4, 5, 6], [4, 5, 6]], 1: [[9, 10]]})
    assert without_end([0], [[4, 5, 6]])[0] > 0


def test_references_are_the_words_that_are_scored_and_end(tiny_data):
    data = CaptionData(tiny_data)
    references = references_with_end(data, "train")
    assert list(references) == data.indices("train").tolist()
    for image, captions in references.items():
        assert [data.vocabulary.decode(ids) for ids in captions] == [tokenize(raw) for raw in data.references(image)]
        assert all(ids[-1] == END for ids in captions)


def test_words_outside_the_vocabulary_match_nothing_that_can_be_said(tiny_data):
    data = CaptionData(tiny_data)
    data._raw[data.captions_of(0)[0]] = "A zebra meets another zebra."
    first = references_with_end(data, "train")[0][0]
    size = len(data.vocabulary)
    unknown = [word for word in ("a", "zebra", "meets", "another") if word not in data.vocabulary.ids]
    assert "zebra" in unknown
    assert sorted({i for i in first if i >= size}) == list(range(size, size + len(unknown)))
    assert first[1] == first[4] >= size


def test_different_pairs_of_words_have_different_numbers():
    found = _ngrams([[a, b] for a in range(4, 304) for b in range(4, 304)])
    pairs, words = set(found.keys[found.n == 1].tolist()), set(found.keys[found.n == 0].tolist())
    assert len(pairs) == 300**2
    assert not pairs & words
