"""The files of caption sets, read strictly: a fault is a ValueError of one line that names file, line and field."""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

from captioning.data import SPLITS
from captioning.files import parse_json, read_text
from captioning.tokenization import clean_text

Restval = Literal["train", "drop"]
_SPLIT_NAMES = {"train": "train", "dev": "val", "val": "val", "test": "test"}
_ROW_WITHIN = re.compile(r"\n[^,\n]*\.\w{2,5},")  # a caption may have two lines, but none that begins as rows do
_SPLIT_FILE = re.compile(r"(?<![a-z])(train|dev|val|test)", re.IGNORECASE)
_TOKEN_LINE = re.compile(r"(.+?)#\d+\t(.*)")
_RESULTS_LINE = re.compile(r"(.+?)\|\s*\d+\s*\|?(.*)")  # the published Flickr30k file lacks one of its second bars
_FIELDS = ("image", "caption", "split")
_WITH_COMMAS = ("image,caption", "image_name,comment_number,comment")
_WITH_BARS = "image_name|comment_number|comment"
_THEIR_NAMES = {"image_name": "image", "comment_number": "", "comment": "caption"}


def inside(name: str, where: str) -> str:
    """The name, if it cannot lead out of the folder of the images.

    Raises:
        ValueError: it is absolute or holds `..`; begins with `where`.
    """
    path = PureWindowsPath(name)  # knows both slashes, and drives
    if path.anchor or ".." in path.parts or "\0" in name:
        raise ValueError(f"{where}: {name!r} is no path below the folder of the images")
    return name


def flickr_captions(file: Path) -> Iterator[tuple[str, str, str]]:
    """(file:line, image, caption) of `name#k<TAB>caption`, `name| k| caption` or `image,caption` (also with a number
    between them): the start says which.

    Raises:
        ValueError, FileNotFoundError: naming file and line.
    """
    lines = read_text(file).split("\n")
    header = lines[0].strip().lower().replace(" ", "")
    if header in _WITH_COMMAS:
        for where, row in _csv_rows(file, strict=False):
            yield where, inside(row["image"], where), row["caption"]
        return
    titled = header == _WITH_BARS
    bars = titled or (_RESULTS_LINE.match(lines[0]) is not None and _TOKEN_LINE.match(lines[0]) is None)
    pattern, expected = (_RESULTS_LINE, "name| k| caption") if bars else (_TOKEN_LINE, "name#k<TAB>caption")
    for number, line in enumerate(lines, start=1):
        where = f"{file}:{number}"
        match = pattern.fullmatch(line)
        if match is not None and not (titled and number == 1):
            yield where, inside(match[1].strip(), where), match[2]
        elif line.strip() and not (titled and number == 1):
            others = "" if number > 1 else f"; or a first line of {' or '.join(map(repr, [*_WITH_COMMAS, _WITH_BARS]))}"
            raise ValueError(f"{where}: expected {expected!r}{others}, found {line[:60]!r}")


def rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, fields) of a CSV or JSONL file with image, caption and perhaps split.

    Raises:
        ValueError, FileNotFoundError: naming file, line and field.
    """
    if file.suffix.lower() == ".csv":
        yield from _csv_rows(file, strict=True)
    elif file.suffix.lower() in (".jsonl", ".ndjson"):
        for number, line in enumerate(read_text(file).split("\n"), start=1):
            if line.strip():
                where = f"{file}:{number}"
                row = parse_json(line, where)
                _check_names(entry_names(row, where), where)
                yield where, row
    else:
        raise ValueError(f"--captions {file}: expected a .csv or .jsonl file")


def text(row: dict[str, Any], name: str, where: str) -> str:
    """A field that must hold text."""
    value = row.get(name)
    if not isinstance(value, str) or not clean_text(value):
        raise ValueError(f"{where}: {name}={value!r} is not a text")
    return value.strip()


def read_json(file: Path) -> Any:
    """The value of a JSON file.

    Raises:
        ValueError, FileNotFoundError: naming the file.
    """
    return parse_json(read_text(file), file)


def field(entry: Any, name: str, kind: type, where: str) -> Any:
    """A field of a JSON object, of the right type."""
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"{where}: {name}={value!r} is not a {kind.__name__}")
    return value


def entries(entry: Any, name: str, where: object) -> list[dict[str, Any]]:
    """A field of a JSON object that is a list of objects."""
    values = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{where}: has no list of objects {name!r}")
    return values


def entry_names(entry: Any, where: str) -> list[str]:
    """The names of a JSON object's fields."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object with image and caption, got {type(entry).__name__}")
    return list(entry)


def coco_images(file: Path) -> Iterator[tuple[int, str, list[str]]]:
    """(number, file name, captions) of the images of one `captions_*.json`, in its order."""
    values = read_json(file)
    captions: dict[int, list[str]] = {}
    for i, annotation in enumerate(entries(values, "annotations", file)):
        where = f"{file}: annotations[{i}]"
        number = field(annotation, "image_id", int, where)
        captions.setdefault(number, []).append(field(annotation, "caption", str, where))
    for i, image in enumerate(entries(values, "images", file)):
        where = f"{file}: images[{i}]"
        number = field(image, "id", int, where)
        yield number, inside(field(image, "file_name", str, where), where), captions.get(number, [])


def karpathy_split(entry: dict[str, Any], restval: Restval, where: str) -> str | None:
    """The split of one image of a Karpathy JSON; None when it is left out."""
    split = field(entry, "split", str, where)
    if split == "restval":
        return None if restval == "drop" else "train"
    if split not in SPLITS:
        raise ValueError(f"{where}: split={split!r} is not one of {', '.join(SPLITS)}, restval")
    return split


def split_in_name(file: Path) -> str | None:
    """The split that a file's name tells (`captions_val2017.json`), if any."""
    match = _SPLIT_FILE.search(file.stem)
    return _SPLIT_NAMES[match[1].lower()] if match else None


def read_splits(path: Path, *, restval: Restval = "train") -> dict[str, str]:
    """Which image is in which split.

    Args:
        path: a Karpathy JSON, or a folder of text files with one name a line, whose file names hold train, dev, val or
            test (`Flickr_8k.devImages.txt`, `test.txt`). A name is a file name, with or without its extension, or a
            COCO number.
        restval: what a Karpathy JSON's split "restval" is.

    Returns:
        Name -> train, val or test.
    """
    split_of: dict[str, str] = {}
    for where, name, split in _listed(path) if path.is_dir() else _karpathy_listed(path, restval):
        if split_of.setdefault(name, split) != split:
            raise ValueError(f"{where}: {name} is in the splits {split_of[name]} and {split}")
    if not split_of:
        raise ValueError(f"--splits {path}: no split lists; expected a JSON or e.g. train.txt, val.txt, test.txt")
    return split_of


def _listed(path: Path) -> Iterator[tuple[str, str, str]]:
    for file in sorted(path.glob("*.txt")):
        split = None if file.name.startswith(".") else split_in_name(file)  # macOS leaves ._train.txt beside train.txt
        for line in read_text(file).splitlines() if split else ():
            if split and line.strip():
                yield str(file), Path(line.strip()).name, split


def _karpathy_listed(file: Path, restval: Restval) -> Iterator[tuple[str, str, str]]:
    for i, entry in enumerate(entries(read_json(file), "images", file)):
        where = f"{file}: images[{i}]"
        split = karpathy_split(entry, restval, where)
        if split is not None:
            yield where, field(entry, "filename", str, where), split
            if "cocoid" in entry:
                yield where, str(entry["cocoid"]), split


def _csv_rows(file: Path, *, strict: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, fields) below the header. Unless strict, commas too many belong to the caption, the last field."""
    reader = csv.reader(io.StringIO(read_text(file)), strict=strict)
    try:
        header = [name.strip() for name in next(reader, [])]
        if not strict:
            header = [_THEIR_NAMES.get(name.lower(), name.lower()) for name in header]
        _check_names([name for name in header if name], f"{file}:1: the header")
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


def _check_names(names: list[str], where: str) -> None:
    """Exactly image, caption and perhaps split."""
    if len(names) == 1 and re.search("[;\t]", names[0]):
        raise ValueError(f"{where} is {names[0]!r}: fields must be separated by commas")
    for name in _FIELDS[:2]:
        if name not in names:
            raise ValueError(f"{where} has no {name!r}; the fields are image, caption and, if wanted, split")
    for name in names:
        if name not in _FIELDS or names.count(name) > 1:
            raise ValueError(f"{where} has {name!r} too many; the fields are image, caption and, if wanted, split")
