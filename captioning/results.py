"""Files of captions: COCO's results format, written and read, and the usual files of references.

An image's key is a string everywhere here: COCO's `image_id` in decimal, or a file name.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from captioning.files import parse_json, read_text, write_text


def write_results(path: str | Path, captions: Mapping[str, str] | Mapping[int, str]) -> None:
    """Writes COCO's results format, a JSON list of {"image_id", "caption"}: either the whole file or nothing.

    Args:
        path: written beside its final name, then renamed.
        captions: `image_id` -> caption. Keys that are all numbers in decimal are written as integers, which COCO's own
            tools want; data sets without numbers have file names.
    """
    path = Path(path)
    numbers = all(str(key).isdecimal() and str(int(key)) == str(key) for key in captions)
    rows = [{"image_id": int(key) if numbers else key, "caption": caption} for key, caption in captions.items()]
    write_text(Path(path), json.dumps(rows, ensure_ascii=False, indent=0) + "\n")


def read_results(path: str | Path) -> dict[str, str]:
    """Reads COCO's results format: a JSON list of {"image_id": integer or string, "caption": string}.

    Returns:
        `image_id` as a string -> caption, in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not this format, empty, or two captions for one image; names file and field.
    """
    rows = parse_json(read_text(path), path)
    if not isinstance(rows, list) or not rows:
        raise ValueError(f'{path}: must be a non-empty JSON list of {{"image_id", "caption"}}')
    captions: dict[str, str] = {}
    for i, row in enumerate(rows):
        key, caption = _image_id(path, f"[{i}]", row), _caption(path, f"[{i}]", row, "caption")
        if key in captions:
            raise ValueError(f"{path}: [{i}].image_id {key!r} has a caption already; one per image is allowed")
        captions[key] = caption
    return captions


def read_references(path: str | Path) -> dict[str, list[str]]:
    """Reads the reference captions of images, in whichever of four formats the file is.

    - COCO's `captions_*.json`: "annotations", a list of {"image_id", "caption"}; keys are image ids.
    - Karpathy's `dataset_*.json`: "images", a list with "sentences" of "raw"; keys are "cocoid", or else "filename".
    - A JSON object: key -> list of captions.
    - `Flickr8k.token.txt`: lines of `name.jpg#0<TAB>caption`; keys are file names.

    Returns:
        Image key -> its captions, each image with at least one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: none of these formats, or a malformed entry; names file and field.
    """
    text = read_text(path)
    if not text.lstrip().startswith(("{", "[")):
        references = _token_lines(path, text)
    else:
        data = parse_json(text, path)
        if not isinstance(data, dict):
            raise ValueError(f'{path}: must be a JSON object ("annotations", "images", or key -> captions), not a list')
        if "annotations" in data:
            references = _coco(path, data["annotations"])
        elif "images" in data:
            references = _karpathy(path, data["images"])
        else:
            references = {key: _mapping_entry(path, key, captions) for key, captions in data.items()}
    if not references:
        raise ValueError(f"{path}: holds no captions")
    return references


def select_references(results: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Returns the references of exactly the images in `results`, which may be a part of all.

    Raises:
        ValueError: results for images without references, up to three of them named.
    """
    unknown = [key for key in results if key not in references]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ValueError(f"image_id {', '.join(map(repr, unknown[:3]))}{more} of the results: not in the references")
    return {key: list(references[key]) for key in results}


def _image_id(path: str | Path, where: str, row: Any) -> str:
    key = row.get("image_id") if isinstance(row, dict) else None
    if isinstance(key, bool) or not isinstance(key, int | str):
        raise ValueError(f"{path}: {where}.image_id must be an integer or a string, not {key!r}")
    return str(key)


def _caption(path: str | Path, where: str, row: Any, field: str) -> str:
    caption = row.get(field) if isinstance(row, dict) else None
    if not isinstance(caption, str):
        raise ValueError(f"{path}: {where}.{field} must be a string, not {caption!r}")
    return caption


def _list(path: str | Path, where: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{path}: {where} must be a list, not {type(value).__name__}")
    return value


def _coco(path: str | Path, annotations: Any) -> dict[str, list[str]]:
    references: dict[str, list[str]] = {}
    for i, row in enumerate(_list(path, "annotations", annotations)):
        where = f"annotations[{i}]"
        references.setdefault(_image_id(path, where, row), []).append(_caption(path, where, row, "caption"))
    return references


def _karpathy(path: str | Path, images: Any) -> dict[str, list[str]]:
    references: dict[str, list[str]] = {}
    for i, image in enumerate(_list(path, "images", images)):
        where = f"images[{i}]"
        key = image.get("cocoid", image.get("filename")) if isinstance(image, dict) else None
        if not isinstance(key, int | str):
            raise ValueError(f"{path}: {where} needs a cocoid or a filename")
        sentences = _list(path, f"{where}.sentences", image.get("sentences"))
        captions = [_caption(path, f"{where}.sentences[{n}]", row, "raw") for n, row in enumerate(sentences)]
        if captions:
            references.setdefault(str(key), []).extend(captions)
    return references


def _mapping_entry(path: str | Path, key: str, captions: Any) -> list[str]:
    if not isinstance(captions, list) or not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{path}: {key!r} must be a non-empty list of captions")
    return captions


def _token_lines(path: str | Path, text: str) -> dict[str, list[str]]:
    references: dict[str, list[str]] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        name, tab, caption = line.partition("\t")
        name, sharp, _ = name.rpartition("#")
        if not tab or not sharp:
            others = "or the file be JSON, or an .h5 file made by preprocess"
            raise ValueError(f"{path}: line {number} must read name.jpg#0<TAB>caption ({others})")
        references.setdefault(name, []).append(caption.strip())
    return references
