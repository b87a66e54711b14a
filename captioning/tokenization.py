"""Captions to words and back, without Java.

`tokenize` makes the words that the model is trained on, and the words that are scored where Java is missing. It
imitates the tokenisation of the COCO caption evaluation (Stanford's PTB tokenizer 3.4.1 as wrapped by pycocoevalcap):
lower case, clitics split off ("man 's", "do n't"), brackets spelled out ("-lrb-"), COCO's list of punctuation removed.
The share of Flickr8k's captions on which the two agree is `FLICKR8K_AGREEMENT`; a test measures it again.
"""

import re
from collections.abc import Iterable
from functools import cache, lru_cache
from typing import Any

FLICKR8K_AGREEMENT = 0.9998  # measured: 40,455 of 40,460

# pycocoevalcap's list without its brackets: it has them in upper case after a lower-casing tokenizer, so they all stay.
PUNCTUATION = frozenset(["", "''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

BRACKETS = {"-lrb-": "(", "-rrb-": ")", "-lsb-": "[", "-rsb-": "]", "-lcb-": "{", "-rcb-": "}"}

# Words that keep their full stop: the usual abbreviations, and two or more letters that each have one ("u.s.").
_ABBREVIATION = re.compile(
    r"(?:ave|blvd|co|corp|dr|etc|ft|inc|jr|ltd|mr|mrs|ms|mt|prof|rd|sgt|sr|st|vs)\.|(?:[a-z]\.){2,}"
)
_CLITIC = re.compile(r"'(?:s|re|ve|ll|d|m|t|n|n'|em|\d\ds)")  # what may begin with an apostrophe
_NUMBER = re.compile(r"[-.]?\d.*\d|[-.]?\d")
_PLAIN = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
_CONTRACTIONS = {  # the plain words that Treebank splits all the same
    "cannot": ("can", "not"),
    "gimme": ("gim", "me"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "lemme": ("lem", "me"),
    "wanna": ("wan", "na"),
}

_INVISIBLE = dict.fromkeys((*range(0x20), *range(0x7F, 0xA1), 0x200B, 0xFEFF, *range(0xD800, 0xE000)), " ")
_TYPOGRAPHIC = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": " -- ", "—": " -- ", "…": " ... "})

_JOINED = re.compile(r" (?=(?:'s|'re|'ve|'ll|'d|'m|n't)(?: |$))")
_APART = re.compile(rf"\b({'|'.join(' '.join(parts) for parts in _CONTRACTIONS.values())})\b")


def clean_text(text: str) -> str:
    """Replaces every run of white space, control characters and lone surrogates by one space, and strips the ends."""
    return " ".join(text.translate(_INVISIBLE).split())


def tokenize(caption: str) -> list[str]:
    """Splits a caption into lower-case words without punctuation, as the COCO caption evaluation does.

    Args:
        caption: any string; line breaks and control characters count as spaces.

    Returns:
        The words, none of them empty or with white space inside; an empty list if there is no word.
    """
    text = caption.translate(_INVISIBLE).translate(_TYPOGRAPHIC).lower()
    return [word for chunk in text.split() for word in _words(chunk)]


def detokenize(words: Iterable[str]) -> str:
    """Joins words into a sentence for display: "man 's" becomes "man's", "do n't" becomes "don't"."""
    text = _JOINED.sub("", " ".join(words))
    text = _APART.sub(lambda match: match[0].replace(" ", ""), text)
    for name, bracket in BRACKETS.items():
        text = text.replace(f"{name} " if bracket in "([{" else f" {name}", bracket)
    return text


@lru_cache(maxsize=1 << 16)
def _words(chunk: str) -> tuple[str, ...]:
    """Splits what stands between two spaces; captions repeat such chunks, so nearly all come from the cache."""
    if _keeps_marks(chunk):
        return (chunk,)
    chunk = chunk.rstrip(".")
    if _PLAIN.fullmatch(chunk):
        return _CONTRACTIONS.get(chunk, (chunk,))
    tokens = _treebank().tokenize(f"{chunk} .", convert_parentheses=True)  # its rules expect a sentence to end in " ."
    words = (token if _keeps_marks(token) else token.strip(".-'`") for token in map(str.lower, tokens))
    return tuple(word for word in words if word not in PUNCTUATION)


def _keeps_marks(token: str) -> bool:
    """Says whether the full stops, hyphens and apostrophes at the ends of a token belong to it."""
    return token in BRACKETS or any(kind.fullmatch(token) for kind in (_ABBREVIATION, _CLITIC, _NUMBER))


@cache
def _treebank() -> Any:
    """Imports nltk when the first caption is split: showing a caption needs no nltk."""
    from nltk.tokenize import TreebankWordTokenizer

    return TreebankWordTokenizer()
