"""Files of captions: COCO's results format, written and read, and the usual files of references.

An image's key is a string everywhere here: COCO's `image_id` in decimal, or a file name.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from captioning.caption_files import coco_captions, field, flickr_captions, karpathy_images, karpathy_name
from captioning.files import parse_json, parse_object, read_text, write_text


def write_results(path: str | Path, captions: Mapping[str, str] | Mapping[int, str]) -> None:
    """Writes COCO's results format, a JSON list of {"image_id", "caption"}: either the whole file or nothing.

    Args:
        path: written beside its final name, then renamed.
        captions: `image_id` -> caption. Keys that are all numbers in decimal are written as integers, which COCO's own
            tools want; data sets without numbers have file names.
    """
    numbers = all(re.fullmatch(r"0|[1-9][0-9]{0,17}", str(key)) for key in captions)
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
        where = f"{path}: [{i}]"
        key, caption = str(field(row, "image_id", where, int, str)), field(row, "caption", where, str)
        if key in captions:
            raise ValueError(f"{where}: image_id={key!r} has a caption already; one per image is allowed")
        captions[key] = caption
    return captions


def read_references(path: str | Path) -> dict[str, list[str]]:
    """Reads the reference captions of images, in whichever of these formats the file is.

    - COCO's `captions_*.json`: "annotations", a list of {"image_id", "caption"}; keys are image ids.
    - Karpathy's `dataset_*.json`: "images", a list with "sentences" of "raw"; keys are "cocoid", or else "filename".
    - A JSON object: key -> list of captions.
    - Flickr8k's and Flickr30k's own files, in all that `flickr_captions` reads; keys are file names.

    Returns:
        Image key -> its captions, each image with at least one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: none of these formats, or a malformed entry; names file and field.
    """
    text = read_text(path)
    references: dict[str, list[str]] = {}
    if not text.lstrip().startswith(("{", "[")):
        try:
            for _, name, caption in flickr_captions(path, text):
                references.setdefault(name, []).append(caption.strip())
        except ValueError as error:
            raise ValueError(f"{error}; or the file must be JSON, or an .h5 file made by preprocess") from error
    else:
        data = parse_object(text, path)
        if "annotations" in data:
            for key, captions in coco_captions(data, path, int, str).items():
                references.setdefault(str(key), []).extend(captions)
        elif "images" in data:
            for where, entry, captions in karpathy_images(data, path):
                if captions:
                    references.setdefault(karpathy_name(entry, where), []).extend(captions)
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


def _mapping_entry(path: str | Path, key: str, captions: Any) -> list[str]:
    if not isinstance(captions, list) or not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{path}: {key!r} must be a non-empty list of captions")
    return captions
