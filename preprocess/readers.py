"""Splits, photo names and own captions from files, read strictly.

A fault is a ValueError of one line that names file, line and field.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

from captioning.caption_files import check_names, coco_captions, csv_rows, entries, field, karpathy_name
from captioning.data import SPLITS
from captioning.files import parse_json, read_json, read_text
from captioning.tokenization import clean_text

Restval = Literal["train", "drop"]
_SPLIT_NAMES = {"train": "train", "dev": "val", "val": "val", "test": "test"}
_SPLIT_FILE = re.compile(r"(?<![a-z])(train|dev|val|test)", re.IGNORECASE)


def inside(name: str, where: str) -> str:
    """The name, if it is text and cannot lead out of the folder of the images.

    Raises:
        ValueError: it is absolute or holds `..`, or half a surrogate pair; begins with `where`.
    """
    path = PureWindowsPath(name)  # knows both slashes, and drives
    if path.anchor or ".." in path.parts or "\0" in name or name.encode(errors="replace").decode() != name:
        raise ValueError(f"{where}: {name!r} is no path below the folder of the images")
    return name


def rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, fields) of a CSV or JSONL file with image, caption and perhaps split.

    Raises:
        ValueError, FileNotFoundError: naming file, line and field.
    """
    if file.suffix.lower() == ".csv":
        yield from csv_rows(file, read_text(file), strict=True)
    elif file.suffix.lower() in (".jsonl", ".ndjson"):
        for number, line in enumerate(read_text(file).split("\n"), start=1):
            if line.strip():
                where = f"{file}:{number}"
                row = parse_json(line, where)
                check_names(entry_names(row, where), where)
                yield where, row
    else:
        raise ValueError(f"--captions {file}: expected a .csv or .jsonl file")


def text(row: dict[str, Any], name: str, where: str) -> str:
    """A field that must hold text."""
    value = row.get(name)
    if not isinstance(value, str) or not clean_text(value):
        raise ValueError(f"{where}: {name}={value!r} is not a text")
    return value.strip()


def entry_names(entry: Any, where: str) -> list[str]:
    """The names of a JSON object's fields."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object with image and caption, got {type(entry).__name__}")
    return list(entry)


def coco_images(file: Path) -> Iterator[tuple[int, str, list[str]]]:
    """(number, file name, captions) of the images of one `captions_*.json`, in its order."""
    values = read_json(file)
    captions = coco_captions(values, file, int)
    for i, image in enumerate(entries(values, "images", file)):
        where = f"{file}: images[{i}]"
        number = field(image, "id", where, int)
        yield number, inside(field(image, "file_name", where, str), where), captions.get(number, [])


def karpathy_split(entry: dict[str, Any], restval: Restval, where: str) -> str | None:
    """The split of one image of a Karpathy JSON; None when it is left out."""
    split = field(entry, "split", where, str)
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
            yield where, field(entry, "filename", where, str), split
            if "cocoid" in entry:
                yield where, karpathy_name(entry, where), split
