"""The usual files of captions, read strictly: a fault is a ValueError of one line that names file, line and field."""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TOKEN_LINE = re.compile(r"(.+?)#\d+\t(.*)")
_RESULTS_LINE = re.compile(r"(.+?)\|\s*\d+\s*\|?(.*)")  # the published Flickr30k file lacks one of its second bars
_ROW_WITHIN = re.compile(r"\n[^,\n]*\.\w{2,5},")  # a caption may have two lines, but none that begins as rows do
_FIELDS = ("image", "caption", "split")
_WITH_COMMAS = ("image,caption", "image_name,comment_number,comment")
_WITH_BARS = "image_name|comment_number|comment"
_THEIR_NAMES = {"image_name": "image", "comment_number": "", "comment": "caption"}


def flickr_captions(file: str | Path, text: str) -> Iterator[tuple[str, str, str]]:
    """(file:line, image, caption) of `name#k<TAB>caption`, `name| k| caption` or `image,caption` (also with a number
    between them): the start of the file's text says which.

    Raises:
        ValueError: naming file and line.
    """
    lines = text.split("\n")
    header = lines[0].strip().lower().replace(" ", "")
    if header in _WITH_COMMAS:
        for where, row in csv_rows(file, text, strict=False):
            yield where, row["image"], row["caption"]
        return
    titled = header == _WITH_BARS
    bars = titled or (_RESULTS_LINE.match(lines[0]) is not None and _TOKEN_LINE.match(lines[0]) is None)
    pattern, expected = (_RESULTS_LINE, "name| k| caption") if bars else (_TOKEN_LINE, "name#k<TAB>caption")
    for number, line in enumerate(lines, start=1):
        where = f"{file}:{number}"
        match = pattern.fullmatch(line)
        if match is not None and not (titled and number == 1):
            yield where, match[1].strip(), match[2]
        elif line.strip() and not (titled and number == 1):
            others = "" if number > 1 else f"; or a first line of {' or '.join(map(repr, [*_WITH_COMMAS, _WITH_BARS]))}"
            raise ValueError(f"{where}: expected {expected!r}{others}, found {line[:60]!r}")


def coco_captions(values: Any, file: str | Path, *kinds: type) -> dict[Any, list[str]]:
    """Image id, of one of these types -> captions, of a `captions_*.json`."""
    captions: dict[Any, list[str]] = {}
    for i, annotation in enumerate(entries(values, "annotations", file)):
        where = f"{file}: annotations[{i}]"
        image = field(annotation, "image_id", where, *kinds)
        captions.setdefault(image, []).append(field(annotation, "caption", where, str))
    return captions


def karpathy_images(values: Any, file: str | Path) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    """(file: entry, the entry, captions) of the images of a `dataset_*.json`."""
    for i, entry in enumerate(entries(values, "images", file)):
        where = f"{file}: images[{i}]"
        sentences = enumerate(entries(entry, "sentences", where))
        yield where, entry, [field(sentence, "raw", f"{where}.sentences[{n}]", str) for n, sentence in sentences]


def karpathy_name(entry: dict[str, Any], where: str) -> str:
    """What an image is called: COCO's by their numbers, others by their files."""
    return str(field(entry, "cocoid" if "cocoid" in entry else "filename", where, int, str))


def field(entry: Any, name: str, where: str, *kinds: type) -> Any:
    """A field of a JSON object, of one of these types."""
    value = entry.get(name) if isinstance(entry, dict) else None
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ValueError(f"{where}: {name}={value!r} is not of type {' or '.join(kind.__name__ for kind in kinds)}")
    return value


def entries(entry: Any, name: str, where: object) -> list[dict[str, Any]]:
    """A field of a JSON object that is a list of objects."""
    values = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{where}: has no list of objects {name!r}")
    return values


def csv_rows(file: str | Path, text: str, *, strict: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, fields) below the header. Unless strict, commas too many belong to the caption, the last field."""
    reader = csv.reader(io.StringIO(text), strict=strict)
    try:
        header = [name.strip() for name in next(reader, [])]
        if not strict:
            header = [_THEIR_NAMES.get(name.lower(), name.lower()) for name in header]
        check_names([name for name in header if name], f"{file}:1: the header")
        for values in reader:
            where = f"{file}:{reader.line_num}"
            if not strict:
                values = [*values[: len(header) - 1], ",".join(values[len(header) - 1 :])] if values else []
                if any(_ROW_WITHIN.search(value) for value in values):
                    raise ValueError(f"{where}: a quote that was opened some lines above is never closed")
            if values and len(values) != len(header):
                raise ValueError(f"{where}: {len(values)} fields for {','.join(header)}; quote texts with commas")
            if values:
                yield where, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise ValueError(f"{file}:{reader.line_num}: {error}") from error


def check_names(names: list[str], where: str) -> None:
    """Exactly image, caption and perhaps split."""
    if len(names) == 1 and re.search("[;\t]", names[0]):
        raise ValueError(f"{where} is {names[0]!r}: fields must be separated by commas")
    for name in _FIELDS[:2]:
        if name not in names:
            raise ValueError(f"{where} has no {name!r}; the fields are image, caption and, if wanted, split")
    for name in names:
        if name not in _FIELDS or names.count(name) > 1:
            raise ValueError(f"{where} has {name!r} too many; the fields are image, caption and, if wanted, split")
