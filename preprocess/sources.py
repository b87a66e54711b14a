"""The sources of images with captions: each function reads one layout of files into a list of Records.

docs/data_formats.md shows an example of every layout. Captions are kept as their source gives them, but for white space
and control characters, which become single spaces. An image without captions is left out: it has nothing to teach and
nothing to be scored against.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from captioning.caption_files import field, flickr_captions, karpathy_images, karpathy_name
from captioning.data import SPLITS
from captioning.files import read_json, read_text
from captioning.tokenization import clean_text
from preprocess.readers import (
    Restval,
    coco_images,
    inside,
    karpathy_split,
    read_splits,
    rows,
    split_in_name,
    text,
)
from preprocess.shapes import make_scene
from preprocess.shapes_grammar import describe


@runtime_checkable
class Drawing(Protocol):
    """A picture that is drawn instead of read from a file."""

    def render(self, size: int) -> Image.Image:
        """The RGB picture, size x size pixels."""
        ...


@dataclass(frozen=True)
class Record:
    """One image with its captions.

    Args:
        name: what a results file calls the image; unique in its source.
        split: one of captioning.data.SPLITS.
        captions: at least one, none of them empty.
        image: the photo's file, or something that draws the picture.
    """

    name: str
    split: str
    captions: tuple[str, ...]
    image: Path | Drawing


def flickr(captions: Path, images: Path, splits: Path) -> list[Record]:
    """Flickr8k or Flickr30k; images in no split are left out.

    Args:
        captions: the official token file (`name#k<TAB>caption`), Flickr30k's `results.csv` (`name| k| caption`) or
            Kaggle's `captions.txt` (CSV with the header `image,caption` or `image_name,comment_number,comment`).
        images: folder of the photos.
        splits: folder of split lists, or a Karpathy JSON; see `read_splits`.

    Raises:
        ValueError, FileNotFoundError: naming the file and the line.
    """
    split_of = read_splits(splits)
    captions_of: dict[str, list[str]] = {}
    for where, name, caption in flickr_captions(captions, read_text(captions)):
        captions_of.setdefault(inside(name, where), []).append(caption)
    records = []
    for name, lines in captions_of.items():
        split = split_of.get(name) or split_of.get(Path(name).stem)
        if split is not None:
            records += _record(name, split, lines, images / name)
    return _checked(records, f"{captions}: none of its {len(captions_of)} images is in a split of {splits}")


def karpathy(file: Path, images: Path, *, restval: Restval = "train") -> list[Record]:
    """A Karpathy JSON, `dataset_{flickr8k,flickr30k,coco}.json`. COCO's images are called by their numbers.

    Args:
        file: the JSON; `images[]` with filename, split, sentences[].raw, and for COCO filepath and cocoid.
        images: folder of the photos, or the folder that holds the `filepath` folders.
        restval: what COCO's images of the split "restval" are: train, or left out.

    Raises:
        ValueError, FileNotFoundError: naming the file and the entry.
    """
    records = []
    for where, entry, lines in karpathy_images(read_json(file), file):
        name = inside(field(entry, "filename", where, str), where)
        folder = images / inside(str(entry.get("filepath", "")), where)
        split = karpathy_split(entry, restval, where)
        if split is not None:
            path = folder / name if folder.is_dir() else images / name
            records += _record(karpathy_name(entry, where), split, lines, path)
    return _checked(records, f"{file}: holds no images with captions")


def coco(
    captions: Sequence[Path], images: Sequence[Path], splits: Path | None = None, *, restval: Restval = "train"
) -> list[Record]:
    """COCO's own annotation files, of any year. Images are called by their numbers.

    Args:
        captions: one or several `captions_*.json`.
        images: one folder for all, or one for each caption file.
        splits: folder of split lists, or a Karpathy JSON (see `read_splits`); images in no split are left out. By
            default the split stands in the name of the caption file: `captions_train2017.json`.
        restval: what a Karpathy JSON's split "restval" is: train, or left out.

    Raises:
        ValueError, FileNotFoundError: naming the file and the entry.
    """
    if len(images) not in (1, len(captions)):
        raise ValueError(f"--images: give one folder, or one for each of the {len(captions)} files of --captions")
    folders = images if len(images) == len(captions) else [*images] * len(captions)
    split_of = read_splits(splits, restval=restval) if splits is not None else {}
    records = []
    for file, folder in zip(captions, folders, strict=True):
        default = split_in_name(file) if splits is None else None
        if splits is None and default is None:
            raise ValueError(f"--captions {file}: its name holds no train, val or test; say the splits with --splits")
        for number, name, lines in coco_images(file):
            keys = (str(number), Path(name).name, Path(name).stem)
            split = default or next((split_of[key] for key in keys if key in split_of), None)
            if split is not None:
                records += _record(str(number), split, lines, folder / name)
    return _checked(records, f"{', '.join(map(str, captions))}: no image with captions is in a split")


def folder(
    captions: Path, images: Path, *, val_fraction: float = 0.1, test_fraction: float = 0.1, seed: int = 0
) -> list[Record]:
    """Own data: a CSV or JSONL file with the fields image, caption and, if wanted, split. Images are called as there.

    Args:
        captions: one caption a row; the rows of one image are put together.
        images: folder below which the photos lie; no path may leave it.
        val_fraction: share of the images, drawn by the seed, that become val when the file names no splits.
        test_fraction: the same for test.
        seed: of that drawing.

    Raises:
        ValueError, FileNotFoundError: naming file, line and field.
    """
    captions_of: dict[str, list[str]] = {}
    split_of: dict[str, str | None] = {}
    for where, row in rows(captions):
        name = inside(text(row, "image", where), f"{where}: image")
        split = text(row, "split", where) if row.get("split") not in (None, "") else None
        _check_split(split_of, name, split, where)
        split_of[name] = split
        blank = isinstance(row.get("caption"), str) and not clean_text(row["caption"])
        captions_of.setdefault(name, []).append("" if blank else text(row, "caption", where))
    drawn = _draw_splits(len(captions_of), val_fraction, test_fraction, seed)
    records = []
    for (name, lines), split in zip(captions_of.items(), drawn, strict=True):
        records += _record(name, split_of[name] or split, lines, images / name)
    return _checked(records, f"{captions}: has no captions")


def shapes(count: int, *, seed: int = 0) -> list[Record]:
    """The synthetic world: of ten scenes in a row, eight are train, one is val and one test.

    Args:
        count: number of scenes.
        seed: of the world; the same seed gives the same scenes, and more of them with a larger count.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1 (got {count})")
    records = []
    for i in range(count):
        scene = make_scene(seed, i)
        split = {8: "val", 9: "test"}.get(i % 10, "train")
        records.append(Record(f"{i:06d}.png", split, describe(scene, [seed, i, 1]), scene))
    return records


def _record(name: str, split: str, captions: Iterable[str], image: Path) -> list[Record]:
    """One record, or none when no caption says anything."""
    texts = tuple(caption for caption in map(clean_text, captions) if caption)
    return [Record(name, split, texts, image)] if texts else []


def _checked(records: list[Record], empty: str) -> list[Record]:
    if not records:
        raise ValueError(empty)
    names = set()
    for record in records:
        if record.name in names:
            raise ValueError(f"the image {record.name} comes twice, the second time as {record.image}")
        names.add(record.name)
    return records


def _check_split(split_of: dict[str, str | None], name: str, split: str | None, where: str) -> None:
    if split is not None and split not in SPLITS:
        raise ValueError(f"{where}: split={split!r} is not one of {', '.join(SPLITS)}")
    if split_of and (split is None) != (next(iter(split_of.values())) is None):
        raise ValueError(f"{where}: split must stand in every row or in none")
    if split_of.get(name, split) != split:
        raise ValueError(f"{where}: split={split!r}, but an earlier row of {name} says {split_of[name]!r}")


def _draw_splits(count: int, val_fraction: float, test_fraction: float, seed: int) -> list[str]:
    if not (val_fraction >= 0 and test_fraction >= 0 and val_fraction + test_fraction < 1):
        shares = f"val_fraction={val_fraction} and test_fraction={test_fraction}"
        raise ValueError(f"{shares} must not be negative and must sum to less than 1")
    val, test = round(count * val_fraction), round(count * test_fraction)
    splits = np.array(["val"] * val + ["test"] * test + ["train"] * (count - val - test))
    return [str(split) for split in np.random.default_rng(seed).permutation(splits)]
