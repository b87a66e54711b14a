"""What a diagnosis of the attention found: as one line, as a table, as curves, as JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Diagnosis:
    """What a model does with its attention on a split; docs/diagnostics.md says what each number means.

    The fields from `locations` on are None for a model without attention. Entropies are shares of ln L, NLLs nats per
    word. Of several heads the weights are the mean, which may be flat where each of them is sharp.
    """

    images: int
    words: int
    nll: float
    hard: bool = False
    heads: int = 1
    locations: int | None = None
    entropy: float | None = None
    largest: float | None = None
    off_argmax: float | None = None
    mutual_information: float | None = None
    mutual_information_null: float | None = None
    movement_nouns: float | None = None
    movement_words: float | None = None
    apart_one_noun: float | None = None
    apart_two_nouns: float | None = None
    apart_two_images: float | None = None
    entropy_by_class: Mapping[str, float] | None = None
    share_of_class: Mapping[str, float] | None = None
    entropy_by_position: Sequence[float] | None = None
    listening: Mapping[str, float] | None = None
    gradient_snr: float | None = None

    @property
    def listening_gap(self) -> float | None:
        """Nats per word lost when the weights come from another image."""
        return None if self.listening is None else self.listening["exchanged"]

    @property
    def _heads(self) -> str:
        return f"; of the mean of {self.heads} heads" if self.heads > 1 else ""

    @property
    def _other_nouns(self) -> str:
        return f"another noun: {self.apart_two_nouns:.4f}; another image: {self.apart_two_images:.4f}"

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values, rounded, without what is not there."""
        return {name: _rounded(value) for name, value in asdict(self).items() if value is not None}

    def main_numbers(self) -> dict[str, float]:
        """The numbers to follow from validation to validation; those that are there."""
        values = {
            "entropy": self.entropy,
            "largest_alpha": self.largest,
            "off_argmax": self.off_argmax,
            "mutual_information": self.mutual_information,
            "mutual_information_null": self.mutual_information_null,
            "movement_nouns": self.movement_nouns,
            "movement_words": self.movement_words,
            "apart_one_noun": self.apart_one_noun,
            "apart_two_nouns": self.apart_two_nouns,
            "apart_two_images": self.apart_two_images,
            "listening_gap": self.listening_gap,
            "gradient_snr": self.gradient_snr,
        }
        return {name: round(value, 4) for name, value in values.items() if value is not None and math.isfinite(value)}

    def curves(self) -> dict[str, float]:
        """The main numbers, and those that say more of them: entropy by word, what other weights would cost in NLL."""
        words = {f"entropy_of_word_{i}": x for i, x in enumerate(self.entropy_by_position or (), 1)}
        costs = {f"nll_change_{name}": x for name, x in (self.listening or {}).items() if name != "exchanged"}
        return {**self.main_numbers(), **{name: round(x, 4) for name, x in {**words, **costs}.items()}}

    def line(self) -> str:
        """One line for the log."""
        if self.entropy is None:
            return f"attention: none in this model; nll {self.nll:.4f}"
        by_word = " ".join(f"{x:.2f}" for x in self.entropy_by_position or ())
        parts = [f"H/ln L {self.entropy:.3f} (by word {by_word}{self._heads})", f"largest alpha {self.largest:.3f}"]
        if self.off_argmax is not None:
            parts.append(f"samples off the argmax {self.off_argmax:.3f}")
        parts.append(f"mutual information {self.mutual_information:.3f} (shuffled {self.mutual_information_null:.3f})")
        if self.listening is not None:
            others = ", ".join(f"{name} {x:+.3f}" for name, x in self.listening.items() if name != "exchanged")
            parts += [f"listening gap {self.listening_gap:.4f} nats/word ({others})"]
        if self.gradient_snr is not None:
            parts.append(f"gradient signal/noise {self.gradient_snr:.2g}")
        return "attention: " + ", ".join(parts)

    def table(self) -> str:
        """One readable table."""
        rows = [("images, words", f"{self.images}, {self.words}"), ("NLL per word", f"{self.nll:.4f}")]
        if self.entropy is None:
            return _aligned([*rows, ("attention", "none in this model")])
        rows += [
            ("entropy / ln L", f"{self.entropy:.4f}  (L = {self.locations}; uniform: 1{self._heads})"),
            *((f"  {name}", _class_row(self, name)) for name in self.entropy_by_class or {}),
            ("  by position", " ".join(f"{x:.2f}" for x in self.entropy_by_position or ())),
            ("largest alpha", f"{self.largest:.4f}  (uniform: {1 / (self.locations or 1):.4f})"),
        ]
        if self.off_argmax is not None:
            rows.append(("samples off the argmax", f"{self.off_argmax:.4f}"))
        rows += [
            ("mutual information", f"{self.mutual_information:.4f}  (shuffled: {self.mutual_information_null:.4f})"),
            ("moves between nouns", f"{self.movement_nouns:.4f}  (between random words: {self.movement_words:.4f})"),
            ("a noun told again", f"{self.apart_one_noun:.4f}  ({self._other_nouns})"),
        ]
        if self.listening is None:
            rows.append(("listening test", "not possible: several heads, or no attention asked word by word"))
        else:
            rows += [(f"NLL, {name}", f"{change:+.4f}") for name, change in self.listening.items()]
        if self.gradient_snr is not None:
            rows.append(("gradient signal/noise", f"{self.gradient_snr:.3g}"))
        return _aligned(rows)


def _class_row(diagnosis: Diagnosis, name: str) -> str:
    shares, entropies = diagnosis.share_of_class or {}, diagnosis.entropy_by_class or {}
    return f"{entropies[name]:.4f}  ({shares[name]:.0%} of the words)"


def _aligned(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _rounded(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(x) for x in value]
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value
