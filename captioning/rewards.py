"""CIDEr-D of sampled captions, fast: what self-critical training maximises. Vedantam et al. (2015), section 5.

The number is that of pycocoevalcap's `Cider` with the document frequencies of all the references that are given here.
Everything that depends on the references alone is computed once, at the start.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, UInt64

from captioning.data import CaptionData
from captioning.tokenization import tokenize
from captioning.vocabulary import END

N = 4
"""Longest n-gram."""
SIGMA = 6.0
"""Of the Gaussian penalty on the difference in length."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)

Captions = Sequence[Sequence[int]]
"""Captions as word ids, without START and PAD."""


class _Ngrams(NamedTuple):
    """The E different n-grams of each of C captions, caption by caption; n is 0 for single words."""

    keys: UInt64[np.ndarray, " E"]
    counts: Int64[np.ndarray, " E"]
    captions: Int64[np.ndarray, " E"]
    n: Int64[np.ndarray, " E"]
    lengths: Int64[np.ndarray, " C"]


class _Vectors(NamedTuple):
    """tf-idf vectors of C captions: `weights` of c's n-grams from `first[c]` to `first[c + 1]`, norms for each n."""

    ngrams: _Ngrams
    weights: Float64[np.ndarray, " E"]
    norms: Float64[np.ndarray, "C 4"]
    first: Int64[np.ndarray, " C+1"]


class CiderD:
    """CIDEr-D of captions against the references of their image.

    An n-gram is known by a 64-bit number made of its word ids, so two could be taken for one; with ten million
    different n-grams the odds of a single such pair are about 1 in 400,000.

    Args:
        references: image -> its references. All of them together are the corpus of the document frequencies.
    """

    def __init__(self, references: Mapping[int, Captions]):
        self._place = {image: place for place, image in enumerate(references)}
        self._first = np.cumsum([0, *(len(captions) for captions in references.values())])
        ngrams = _ngrams(list(chain.from_iterable(references.values())))
        image_of = np.repeat(np.arange(len(references)), np.diff(self._first))[ngrams.captions]
        pairs = np.lexsort((image_of, ngrams.keys))
        keys, images = ngrams.keys[pairs], image_of[pairs]
        new_image = np.concatenate([[True], (keys[1:] != keys[:-1]) | (images[1:] != images[:-1])])
        self._keys, found_in = np.unique(keys[new_image], return_counts=True)
        self._unseen = math.log(len(references))
        self._idf = self._unseen - np.log(found_in)
        self._references = self._vectors(ngrams)

    def __call__(self, images: Sequence[int], captions: Captions) -> Float64[np.ndarray, " C"]:
        """CIDEr-D, in 0 to 10, of one caption for each of the images; captions of one image should come in a row."""
        found = self._vectors(_ngrams(captions))
        scores = np.zeros(len(captions))
        start = 0
        for stop in range(1, len(captions) + 1):
            if stop == len(captions) or images[stop] != images[start]:
                scores[start:stop] = self._similarity(images[start], found, slice(start, stop))
                start = stop
        return scores

    def _similarity(self, image: int, found: _Vectors, captions: slice) -> Float64[np.ndarray, " K"]:
        """Of K captions of one image: mean over n and over its references, times 10."""
        place, truth = self._place[image], self._references
        references = slice(int(self._first[place]), int(self._first[place + 1]))
        ours = slice(int(found.first[captions.start]), int(found.first[captions.stop]))
        theirs = slice(int(truth.first[references.start]), int(truth.first[references.stop]))
        same = found.ngrams.keys[ours, None] == truth.ngrams.keys[None, theirs]
        i, j = same.nonzero()
        i, j = i + ours.start, j + theirs.start
        caption, reference, n = found.ngrams.captions[i], truth.ngrams.captions[j], found.ngrams.n[i]
        norm = found.norms[caption, n] * truth.norms[reference, n]
        product = np.minimum(found.weights[i], truth.weights[j]) * truth.weights[j]  # counts clipped to the reference's
        cosine = np.divide(product, norm, out=np.zeros_like(product), where=norm > 0)
        count = (captions.stop - captions.start, references.stop - references.start)
        cells = (caption - captions.start) * count[1] + reference - references.start
        total = np.bincount(cells, cosine, minlength=count[0] * count[1]).reshape(count) / N
        lengths = found.ngrams.lengths[captions, None] - truth.ngrams.lengths[None, references]
        return 10 * (total * np.exp(-(lengths**2) / (2 * SIGMA**2))).mean(axis=1)

    def _vectors(self, ngrams: _Ngrams) -> _Vectors:
        place = np.searchsorted(self._keys, ngrams.keys).clip(max=len(self._keys) - 1)
        idf = np.where(self._keys[place] == ngrams.keys, self._idf[place], self._unseen)
        weights = ngrams.counts * idf
        squares = np.bincount(ngrams.captions * N + ngrams.n, weights**2, minlength=len(ngrams.lengths) * N)
        first = np.searchsorted(ngrams.captions, np.arange(len(ngrams.lengths) + 1))
        return _Vectors(ngrams, weights, np.sqrt(squares).reshape(-1, N), first)


def _ngrams(captions: Captions) -> _Ngrams:
    """Count the n-grams of every caption, n = 1 to 4."""
    lengths = np.array([len(caption) for caption in captions], dtype=np.int64)
    words = np.fromiter(chain.from_iterable(captions), np.uint64, int(lengths.sum())) + np.uint64(1)
    caption = np.repeat(np.arange(len(lengths)), lengths)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(words))  # words from here to the caption's end
    numbers, keys, where, which = words, [], [], []
    for n in range(N):
        keys.append(numbers[left > n])
        where.append(caption[left > n])
        which.append(np.full(len(keys[-1]), n))
        numbers = numbers[: max(len(words) - n - 1, 0)] * _MULTIPLIER + words[n + 1 :]  # wraps around: mod 2^64
        left, caption = left[: len(numbers)], caption[: len(numbers)]
    key, place, order = (np.concatenate(parts) for parts in (keys, where, which))
    by = np.lexsort((key, place))
    key, place, order = key[by], place[by], order[by]
    new = np.ones(len(key), dtype=bool)
    new[1:] = (key[1:] != key[:-1]) | (place[1:] != place[:-1])
    starts = np.flatnonzero(new)
    counts = np.diff(np.append(starts, len(key)))
    return _Ngrams(key[starts], counts, place[starts], order[starts], lengths)


def references_with_end(data: CaptionData, split: str) -> dict[int, list[list[int]]]:
    """The references of a split's images as ids, END at the end of each.

    The words are those that are scored: the raw captions', tokenised; the ones that the vocabulary lacks get ids of
    their own, so they never count as said. END is a word like others: without it a caption that breaks off ("a dog in
    a") costs the model nothing, and it learns to do that.
    """
    ids = dict(data.vocabulary.ids)
    return {
        image: [[*(ids.setdefault(word, len(ids)) for word in tokenize(raw)), END] for raw in data.references(image)]
        for image in data.indices(split).tolist()
    }
