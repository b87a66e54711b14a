"""Words to ids and back."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from captioning.files import read_json
from captioning.tokenization import clean_text

PAD, START, END, UNK = range(4)
SPECIAL = ("<pad>", "<start>", "<end>", "<unk>")


class Vocabulary:
    """A fixed list of words; a word's id is its place in the list.

    Args:
        words: the special words `<pad> <start> <end> <unk>`, then the others, each once.

    Raises:
        ValueError: the special words are not the first four, or a word comes twice or is no text.
    """

    def __init__(self, words: Sequence[str]):
        if tuple(words[: len(SPECIAL)]) != SPECIAL:
            raise ValueError(f"a vocabulary must begin with {' '.join(SPECIAL)}")
        if not all(isinstance(word, str) and word for word in words):
            raise ValueError("a vocabulary holds words: text that is not empty")
        strange = next((word for word in words if clean_text(word) != word or " " in word), None)
        if strange is not None:
            raise ValueError(f"a word has no spaces and no control characters (got {strange!r})")
        self.words = tuple(words)
        self.ids = {word: i for i, word in enumerate(self.words)}
        if len(self.ids) != len(self.words):
            twice = next(word for word, count in Counter(self.words).items() if count > 1)
            raise ValueError(f"the word {twice!r} is twice in the vocabulary")

    @classmethod
    def build(
        cls, captions: Iterable[Sequence[str]], *, min_count: int = 1, max_size: int | None = None
    ) -> "Vocabulary":
        """The words that occur at least `min_count` times, the most frequent first; ties in alphabetical order.

        Args:
            captions: tokenised captions, of the train split only.
            min_count: rarer words become `<unk>`.
            max_size: keep at most so many words, the special ones not counted (the paper: 10,000).
        """
        counts = Counter(word for caption in captions for word in caption if word not in SPECIAL)
        ordered = sorted((word for word in counts if counts[word] >= min_count), key=lambda word: (-counts[word], word))
        return cls([*SPECIAL, *ordered[:max_size]])

    def __len__(self) -> int:
        return len(self.words)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.words == other.words

    def __hash__(self) -> int:
        return hash(self.words)

    def encode(self, words: Iterable[str]) -> list[int]:
        """Ids of the words; unknown ones become UNK. Adds no START or END."""
        return [self.ids.get(word, UNK) for word in words]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Words of the ids up to END, without START and PAD."""
        words = []
        for i in ids:
            if i == END:
                break
            if i not in (PAD, START):
                words.append(self.words[i])
        return words

    def save(self, path: Path) -> None:
        """Write the words as JSON."""
        path.write_text(json.dumps({"words": self.words}, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Vocabulary":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError, ValueError: naming the file.
        """
        values = read_json(path)
        try:
            return cls(values["words"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a vocabulary: {error}") from error
