"""BLEU-1..4, METEOR, ROUGE-L, CIDEr, and SPICE if asked: the numbers of pycocoevalcap, the field's own scorers.

`score` takes strings. Captions are tokenised first, and how is part of the result: with Java by Stanford's PTB
tokenizer as in the COCO evaluation, without it by `captioning.tokenization`. METEOR and SPICE are Java programs;
without Java they are left out, and the result says so.

pycocoevalcap's `Cider` is CIDEr-D in all but name: counts clipped to the reference's, a Gaussian penalty on the
difference in length with sigma 6, no stemming, times 10, with document frequencies from the references that are passed.
Its number stands here under the name that the field gives it, `CIDEr`; there is no separate `CIDEr-D`.
"""

import contextlib
import io
import shutil
import subprocess
import threading
import zipfile
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from captioning.tokenization import FLICKR8K_AGREEMENT, clean_text, tokenize

TOKENIZERS = ("auto", "ptb", "python")
METRICS = ("BLEU", "METEOR", "ROUGE-L", "CIDEr", "SPICE")
DEFAULT_METRICS = ("BLEU", "METEOR", "ROUGE-L", "CIDEr")
NEED_JAVA = ("METEOR", "SPICE")

PTB_TOKENISATION = "PTB 3.4.1 (Java), lower case, punctuation removed"
PYTHON_TOKENISATION = (
    f"python, PTB-like (as PTB 3.4.1 on {FLICKR8K_AGREEMENT:.2%} of Flickr8k's captions), "
    "lower case, punctuation removed"
)

Sentences = dict[int, list[str]]  # pycocoevalcap's input: image -> sentences of words joined by spaces


@dataclass(frozen=True)
class Scores:
    """Corpus scores of captions, with what one must know to compare them.

    Attributes:
        values: `BLEU-1` .. `BLEU-4`, `METEOR`, `ROUGE-L`, `CIDEr`, `SPICE`, as far as they were computed; all in
            0-1 but CIDEr, which is in 0-10.
        images: number of images that were scored.
        tokenisation: what made words of the captions.
        omitted: one line for each score that was asked for and left out, with the reason.
        per_image: the same scores of each image alone, by key; empty unless asked for.
    """

    values: Mapping[str, float]
    images: int
    tokenisation: str
    omitted: tuple[str, ...] = ()
    per_image: Mapping[Hashable, Mapping[str, float]] = field(default_factory=dict)

    def table(self) -> str:
        """Returns human-readable lines: each score with four decimals, then the conditions."""
        lines = [f"{name:<8} {value:.4f}" for name, value in self.values.items()]
        lines += [f"images: {self.images}", f"tokenisation: {self.tokenisation}"]
        lines += [f"left out: {reason}" for reason in self.omitted]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Returns the scores, `images`, `tokenisation` and `omitted` as one flat dict for JSON, without the images."""
        about = {"images": self.images, "tokenisation": self.tokenisation, "omitted": list(self.omitted)}
        return {**self.values, **about}


def score(
    candidates: Mapping[Any, str],
    references: Mapping[Any, Sequence[str]],
    *,
    tokenizer: str = "auto",
    metrics: Sequence[str] = DEFAULT_METRICS,
    per_image: bool = False,
) -> Scores:
    """Scores one caption per image against the image's references.

    Args:
        candidates: image key -> caption; raw text, it may be empty.
        references: image key -> at least one raw caption; exactly the keys of `candidates`.
        tokenizer: `ptb` (needs Java), `python`, or `auto`: `ptb` if there is Java, else `python`.
        metrics: which of `METRICS` to compute. SPICE downloads its parser when it is first asked for.
        per_image: also keep the scores of each image.

    Raises:
        ValueError: unknown or impossible settings, keys that do not match, images without references.
        RuntimeError: a Java program failed.
    """
    check_settings(tokenizer, metrics)
    _check_captions(candidates, references)
    if tokenizer == "auto":
        tokenizer = "ptb" if java_found() else "python"
    split, tokenisation = {
        "ptb": (_split_ptb, PTB_TOKENISATION),
        "python": (_split_python, PYTHON_TOKENISATION),
    }[tokenizer]
    keys = list(references)
    truth = split([list(references[key]) for key in keys])
    found = split([[candidates[key]] for key in keys])
    if not any(sentence for sentences in truth.values() for sentence in sentences):
        raise ValueError("references hold no word, only punctuation or nothing: there is nothing to compare with")
    results, omitted = _compute(metrics, truth, found)
    rows = {}
    if per_image:
        rows = {key: {name: float(each[i]) for name, (_, each) in results.items()} for i, key in enumerate(keys)}
    values = {name: float(total) for name, (total, _) in results.items()}
    return Scores(values, len(keys), tokenisation, omitted, rows)


def cider(candidates: Mapping[Any, str], references: Mapping[Any, Sequence[str]]) -> float:
    """Returns CIDEr with the Java-free tokenisation: the same on every machine, fast enough for each validation."""
    return score(candidates, references, tokenizer="python", metrics=("CIDEr",)).values["CIDEr"]


def java_found() -> bool:
    """Says whether a `java` is on the PATH."""
    return shutil.which("java") is not None


def check_settings(tokenizer: str, metrics: Sequence[str]) -> None:
    """What was asked of `score` must be known, and Java be there if it needs it.

    Raises:
        ValueError: naming the argument and what is allowed.
    """
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"tokenizer={tokenizer!r} is unknown; use one of {', '.join(TOKENIZERS)}")
    if tokenizer == "ptb" and not java_found():
        raise ValueError("tokenizer='ptb' needs Java, and there is no java on the PATH; use 'auto' or 'python'")
    if isinstance(metrics, str) or not metrics or not set(metrics) <= set(METRICS):
        raise ValueError(f"metrics={metrics!r} must be a sequence of some of {', '.join(METRICS)}")
    if set(metrics) <= set(NEED_JAVA) and not java_found():
        raise ValueError(f"metrics={metrics!r} need Java, and there is no java on the PATH")


def _check_captions(candidates: Mapping[Any, str], references: Mapping[Any, Sequence[str]]) -> None:
    if not candidates:
        raise ValueError("candidates are empty: there is nothing to score")
    for complaint, keys in (
        ("references have no captions for", [key for key in candidates if not references.get(key)]),
        ("candidates have no caption for", [key for key in references if key not in candidates]),
        (
            "references must be lists, not one string, for",
            [key for key in references if isinstance(references[key], str)],
        ),
    ):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(f"{complaint} {', '.join(map(repr, keys[:3]))}{more}")


def _split_python(captions: Sequence[Sequence[str]]) -> Sentences:
    return {i: [" ".join(tokenize(caption)) for caption in group] for i, group in enumerate(captions)}


def _split_ptb(captions: Sequence[Sequence[str]]) -> Sentences:
    """Runs the PTB tokenizer as pycocoevalcap does, but through pipes.

    pycocoevalcap's own wrapper writes a file into the installed package, which need not be writable, and does not
    notice when Java fails. A character that ends a line for Java would shift all captions behind it: hence
    `clean_text`.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    text = "\n".join(clean_text(caption) for group in captions for caption in group)
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=False)  # noqa: S603
    lines = done.stdout.decode().split("\n")
    count = sum(len(group) for group in captions)
    if done.returncode or len(lines) < count:
        raise RuntimeError(f"the PTB tokenizer failed in Java: {_last_line(done.stderr)}; use tokenizer='python'")
    words = ([word for word in line.rstrip().split(" ") if word not in ptbtokenizer.PUNCTUATIONS] for line in lines)
    return {i: [" ".join(next(words)) for _ in group] for i, group in enumerate(captions)}


# What a scorer makes of (references, candidates): label -> (corpus score, list or array of the score of each image).
_Results = dict[str, tuple[float, Any]]


def _compute(metrics: Sequence[str], truth: Sentences, found: Sentences) -> tuple[_Results, tuple[str, ...]]:
    """Runs the scorers that were asked for, in the order of `METRICS`; the second result names what cannot run."""
    results: _Results = {}
    omitted = []
    for name in METRICS:
        if name not in metrics:
            continue
        if name in NEED_JAVA and not java_found():
            omitted.append(f"{name}: needs Java, and there is no java on the PATH")
            continue
        try:
            results |= _SCORERS[name](truth, found)
        except _SpiceError as error:
            omitted.append(f"SPICE: {error}")
    return results, tuple(omitted)


def _bleu(truth: Sentences, found: Sentences) -> _Results:
    from pycocoevalcap.bleu.bleu import Bleu

    totals, each = Bleu(4).compute_score(truth, found, verbose=0)
    return {f"BLEU-{n}": (totals[n - 1], each[n - 1]) for n in range(1, 5)}


def _rouge_l(truth: Sentences, found: Sentences) -> _Results:
    from pycocoevalcap.rouge.rouge import Rouge

    return {"ROUGE-L": Rouge().compute_score(truth, found)}


def _cider(truth: Sentences, found: Sentences) -> _Results:
    from pycocoevalcap.cider.cider import Cider

    return {"CIDEr": Cider().compute_score(truth, found)}


def _meteor(truth: Sentences, found: Sentences) -> _Results:
    # "|||" separates METEOR's fields. pycocoevalcap removes it from candidates only; in a reference it would make two.
    truth = {i: [sentence.replace("|||", "") for sentence in sentences] for i, sentences in truth.items()}
    with _meteor_process() as scorer:
        return {"METEOR": scorer.compute_score(truth, found)}


@contextlib.contextmanager
def _meteor_process() -> Iterator[Any]:
    """Starts METEOR's Java process and ends it whatever happens.

    pycocoevalcap's scorer never reads Java's stderr (a full pipe would block Java for ever), and after an error keeps
    the lock that its own destructor waits for: both would hang the program.
    """
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    process = scorer.meteor_p
    said: list[bytes] = []
    reader = threading.Thread(target=lambda: said.extend(process.stderr), daemon=True)
    reader.start()
    try:
        yield scorer
    except (OSError, ValueError) as error:  # a closed pipe; or an empty answer, which is no number
        process.kill()
        reader.join(timeout=5)
        raise RuntimeError(f"METEOR failed in Java: {_last_line(b''.join(said))}") from error
    finally:
        process.kill()
        process.wait()
        reader.join(timeout=5)
        with contextlib.suppress(OSError):  # what it did not read cannot be written any more
            process.stdin.close()
        process.stdout.close()
        process.stderr.close()
        if scorer.lock.locked():
            scorer.lock.release()


class _SpiceError(Exception):
    """SPICE cannot be computed on this machine; the message says why in one line."""


def _spice(truth: Sentences, found: Sentences) -> _Results:
    from pycocoevalcap.spice.spice import Spice

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # a progress display of its download
            total, each = Spice().compute_score(truth, found)
    except (OSError, zipfile.BadZipFile, subprocess.CalledProcessError, ValueError) as error:
        raise _SpiceError(f"its download or its Java program failed ({_last_line(str(error).encode())})") from error
    return {"SPICE": (total, [image["All"]["f"] for image in each])}


def _last_line(output: bytes) -> str:
    lines = output.decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


_SCORERS = {"BLEU": _bleu, "METEOR": _meteor, "ROUGE-L": _rouge_l, "CIDEr": _cider, "SPICE": _spice}
