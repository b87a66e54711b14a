"""What lies on the disk: the folder of an unfinished run, and the HDF5 file that is made from it in one pass.

An HDF5 file that a killed process had open can be broken, and its bytes depend on when it was written to. So images go
to a plain file of equal records first, with a journal of whole batches beside it; after a crash both are cut back to
the last whole batch. The HDF5 file is written in one go from these, so its bytes know nothing of interruptions.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

import h5py
import numpy as np
from torch import Tensor

from captioning.config import EncoderConfig, to_dict
from captioning.console import one_line
from captioning.data import (
    ENCODER,
    FIRST_CAPTION,
    FIRST_WORD,
    IMAGE_SPLIT,
    NAMES,
    PIXELS,
    RAW,
    SCHEMA,
    SPLITS,
    VOCABULARY,
    WORDS,
    annotations_name,
)
from captioning.files import hold, to_disk, write_text
from captioning.model_config import all_views
from captioning.vocabulary import Vocabulary
from preprocess.sources import Record

_LOCK = "lock"


class Partial:
    """The folder `OUTPUT.partial`: finished batches of images, which a later run of the same command goes on with.

    Args:
        folder: made when it is not there.
        key: fingerprint of the settings and records.
        shape: of one image.
        dtype: of its values.
        restart: throw away what another command left instead of refusing.

    Raises:
        ValueError: another command left the folder, or is at work there now.
    """

    def __init__(self, folder: Path, key: str, *, shape: tuple[int, ...], dtype: type[np.generic], restart: bool):
        self.folder = folder
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.image_bytes = self.dtype.itemsize * int(np.prod(shape))
        self.kept = 0
        self.batches = 0
        self.broken: list[tuple[int, str]] = []
        self._images = folder / "images.bin"
        self._journal = folder / "journal.jsonl"
        self._lock = self._alone()
        self._claim(key, restart)
        self._recover()

    def _alone(self) -> TextIO:
        """Hold the folder, made if it is not there, against other processes as long as this object lives."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            return hold(self.folder / _LOCK)
        except BlockingIOError as error:
            raise ValueError(f"{self.folder}: another process is writing there now") from error

    def remove(self) -> None:
        """The folder has done its work."""
        self._lock.close()  # a network file system keeps what is open, and its folder with it
        shutil.rmtree(self.folder)

    def _empty(self) -> None:
        for path in self.folder.iterdir():
            if path.name != _LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _claim(self, key: str, restart: bool) -> None:
        file = self.folder / "key"
        if file.is_file() and file.read_text() != key:
            if not restart:
                raise ValueError(
                    f"{self.folder}: left by a run with other settings, captions or photos; delete it, "
                    "or start afresh with --overwrite"
                )
            self._empty()
        if not file.is_file():
            self._empty()
            self._images.touch()
            self._journal.touch()
            write_text(file, key)

    def _recover(self) -> None:
        """Count the batches that are whole, and cut off what came after them."""
        size = self._images.stat().st_size
        length = 0
        for line in self._journal.read_bytes().splitlines(keepends=True):
            entry = _entry(line)
            if entry is None or (self.kept + entry["kept"]) * self.image_bytes > size:
                break
            length += len(line)
            self._count(entry)
        os.truncate(self._journal, length)
        os.truncate(self._images, self.kept * self.image_bytes)

    def _count(self, entry: dict[str, Any]) -> None:
        self.batches += 1
        self.kept += entry["kept"]
        self.broken += [(int(i), str(reason)) for i, reason in entry["broken"]]

    def append(self, images: np.ndarray, broken: Sequence[tuple[int, str]]) -> None:
        """Add the next batch: its images, and the records that had none with the reason. It is on the disk after."""
        entry = {"kept": len(images), "broken": [list(pair) for pair in broken]}
        for path, content in ((self._images, images.tobytes()), (self._journal, json.dumps(entry).encode() + b"\n")):
            with open(path, "ab") as file:
                file.write(content)
                _flush(file)
        self._count(entry)

    def blocks(self, size: int = 64) -> Iterator[np.ndarray]:
        """All kept images, in order, some at a time."""
        with open(self._images, "rb") as file:
            for start in range(0, self.kept, size):
                count = min(size, self.kept - start)
                values = np.frombuffer(file.read(count * self.image_bytes), self.dtype)
                yield values.reshape(count, *self.shape)


def _entry(line: bytes) -> dict[str, Any] | None:
    """A line of the journal, if it was written whole."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


class Captions(NamedTuple):
    """The captions of all images in a row, and the words they are made of."""

    first_caption: list[int]
    raw: list[str]
    first_word: list[int]
    words: list[int]


class Network(NamedTuple):
    """What made the annotation vectors."""

    config: EncoderConfig
    state: dict[str, Tensor]
    grids: tuple[tuple[int, int], ...]
    mirror: bool


def write_file(
    path: Path,
    partial: Partial,
    records: Sequence[Record],
    *,
    captions: Captions,
    vocabulary: Vocabulary,
    attributes: dict[str, dict[str, Any]],
    network: Network | None,
) -> None:
    """Write the HDF5 file of docs/data_formats.md, in one pass and always in the same order.

    Args:
        path: a new file.
        partial: the images of the records.
        records: what is stored, in order.
        captions: their captions.
        vocabulary: of the train split.
        attributes: `source` and `settings`.
        network: None when the images are pixels.
    """
    try:
        with h5py.File(path, "w") as file:
            _write_tables(file, records, captions, vocabulary, attributes)
            if network is not None:
                _write_network(file, network)
            _write_images(file, partial, network)
    except (OSError, RuntimeError) as error:  # HDF5's words for a full disk, of writing and of closing
        raise OSError(f"{path}: {one_line(error)}") from error
    to_disk(path)


def _write_tables(
    file: h5py.File,
    records: Sequence[Record],
    captions: Captions,
    vocabulary: Vocabulary,
    attributes: dict[str, dict[str, Any]],
) -> None:
    text = h5py.string_dtype("utf-8")
    file.attrs["schema"] = SCHEMA
    for name, values in attributes.items():
        file.attrs[name] = json.dumps(values)
    file.create_dataset(VOCABULARY, data=list(vocabulary.words), dtype=text)
    file.create_dataset(NAMES, data=[record.name for record in records], dtype=text)
    splits = [SPLITS.index(record.split) for record in records]
    file.create_dataset(IMAGE_SPLIT, data=np.array(splits, np.uint8))
    file.create_dataset(FIRST_CAPTION, data=np.array(captions.first_caption, np.int64))
    file.create_dataset(RAW, data=captions.raw, dtype=text)
    file.create_dataset(FIRST_WORD, data=np.array(captions.first_word, np.int64))
    file.create_dataset(WORDS, data=np.array(captions.words, np.int32))


def _write_network(file: h5py.File, network: Network) -> None:
    group = file.create_group(ENCODER)
    group.attrs["config"] = json.dumps(to_dict(network.config))
    for name, values in network.state.items():
        group.create_dataset(name, data=values.numpy())


def _write_images(file: h5py.File, partial: Partial, network: Network | None) -> None:
    if network is None:
        _write_dataset(file, PIXELS, partial, ())
        return
    ends = list(accumulate(h * w for h, w in network.grids))
    for view in all_views(len(network.grids), mirrored=network.mirror):
        (h, w), end = network.grids[view.scale], ends[view.scale]
        places = slice(end - h * w, end)
        part = (int(view.mirrored), places) if network.mirror else (places,)
        images = _write_dataset(file, annotations_name(network.config, view), partial, part)
        images.attrs["grid"] = np.array((h, w), np.int64)


def _write_dataset(file: h5py.File, name: str, partial: Partial, part: tuple[Any, ...]) -> h5py.Dataset:
    """A part of every image's values, as a dataset with one chunk per image."""
    shape = np.empty(partial.shape, np.bool_)[part].shape
    images = file.create_dataset(name, (partial.kept, *shape), partial.dtype, chunks=(1, *shape))
    start = 0
    for block in partial.blocks():
        images[start : start + len(block)] = block[:, *part]
        start += len(block)
    return images
