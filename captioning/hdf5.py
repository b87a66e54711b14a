"""Reading an HDF5 file that may be somebody else's: what it holds itself, of the kind and the size that are expected.

HDF5 can point into other files (links, external storage, virtual datasets), whose bytes would end up in a checkpoint
that travels, and it can promise terabytes in a few bytes. What is refused is refused by a ValueError, in a line that
names file and field.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h5py
import numpy as np

from captioning.files import parse_object

MOST_BYTES = 2**32
"""Largest table that is read whole."""


@contextmanager
def reading(where: object) -> Iterator[None]:
    """What h5py and numpy say of damaged files and of types that they do not know, with the name of what was read."""
    try:
        yield
    except (OSError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{where} cannot be read: {error}") from error


def item_within(file: h5py.File, name: str) -> h5py.Dataset | h5py.Group:
    """What lies under a name in the file itself."""
    where, parts = f"{file.filename}: {name}", name.split("/")
    for i in range(len(parts)):
        link = file.get("/".join(parts[: i + 1]), getlink=True)
        if link is None:
            raise ValueError(f"{where}: is not there")
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"{where}: is a link; everything must lie in the file itself")
    item = file[name]
    if isinstance(item, h5py.Dataset) and item.shape is None:
        raise ValueError(f"{where}: holds nothing")
    if isinstance(item, h5py.Dataset) and (item.is_virtual or item.external):
        raise ValueError(f"{where}: is stored elsewhere; everything must lie in the file itself")
    return item


def own_dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """A dataset that lies in the file itself."""
    item = item_within(file, name)
    if not isinstance(item, h5py.Dataset):
        raise ValueError(f"{file.filename}: {name}: must hold numbers or text, and is a group")
    return item


def own_tensors(file: h5py.File, name: str) -> dict[str, np.ndarray]:
    """The datasets in a group, by their names there: finite numbers, all of them."""
    group = item_within(file, name)
    names = list(group) if isinstance(group, h5py.Group) else []
    items = {inner: own_dataset(file, f"{name}/{inner}") for inner in names}
    if sum(item.nbytes for item in items.values()) > MOST_BYTES:
        raise ValueError(f"{file.filename}: {name}: must be at most {MOST_BYTES:,} bytes")
    values: dict[str, np.ndarray] = {}
    for inner, item in items.items():
        if item.dtype.kind in "iufb":
            values[inner] = np.asarray(item[()])
        if inner not in values or not np.isfinite(values[inner]).all():
            raise ValueError(f"{file.filename}: {name}/{inner}: must be finite numbers")
    return values


def whole_numbers(file: h5py.File, name: str) -> np.ndarray:
    """A list of whole numbers, int64 whatever they are stored in."""
    item = own_dataset(file, name)
    if item.dtype.kind not in "iu" or item.ndim != 1:
        raise ValueError(f"{_name(item)}: must be a list of whole numbers (got {_kind(item)})")
    _check_size(item, 8 * item.size)
    return np.asarray(item[()]).astype(np.int64)


def texts(file: h5py.File, name: str) -> list[str]:
    """A list of texts in UTF-8."""
    item = own_dataset(file, name)
    if h5py.check_string_dtype(item.dtype) is None or item.ndim != 1:
        raise ValueError(f"{_name(item)}: must be a list of texts (got {_kind(item)})")
    found: list[str] = []
    size = item.nbytes + 64 * item.size  # in memory; of texts without a fixed length this counts none of their letters
    longest = item.dtype.itemsize if item.dtype.kind == "S" else file.id.get_filesize()  # many can be one and the same
    rows = min(max(2**30 // max(longest, 1), 100), 1000)
    _check_size(item, size)
    for start in range(0, len(item), rows):
        part = item[start : start + rows]
        size += sum(map(len, part))
        _check_size(item, size)
        try:
            found += [text.decode() for text in part]
        except UnicodeDecodeError as error:
            raise ValueError(f"{_name(item)}: must be UTF-8: {error}") from error
    return found


def _check_size(item: h5py.Dataset, size: int) -> None:
    """Refuse what takes more than `MOST_BYTES` in memory."""
    if size > MOST_BYTES:
        raise ValueError(f"{_name(item)}: must take at most {MOST_BYTES:,} bytes")


def check_images(item: h5py.Dataset, types: tuple[str, ...], shape: tuple[int, ...], what: str) -> None:
    """Refuse images of other types or another shape than these, which are `what` they must be in words."""
    if item.dtype.name not in types or not item.dtype.isnative or item.shape != shape:
        raise ValueError(f"{_name(item)}: must be {what}, in {' or '.join(types)} (got {_kind(item)})")


def json_attribute(owner: h5py.Dataset | h5py.Group, name: str) -> dict[str, Any]:
    """An attribute that holds a JSON object."""
    where = f"{_name(owner)}: {name}"
    value = _attribute(owner, name, ())
    if not isinstance(value, str):
        raise ValueError(f"{where}: must be an attribute with a JSON object")
    return parse_object(value, where)


def _attribute(owner: h5py.Dataset | h5py.Group, name: str, shape: tuple[int, ...]) -> Any:
    """An attribute of that shape, which is known before it is read; None if there is none."""
    fits = name in owner.attrs and owner.attrs.get_id(name).shape == shape
    return owner.attrs[name] if fits else None


def grid_attribute(item: h5py.Dataset) -> tuple[int, int]:
    """The attribute `grid` of annotation vectors: rows and columns."""
    value = np.asarray(_attribute(item, "grid", (2,)))
    if value.dtype.kind not in "iu" or (value < 1).any():
        raise ValueError(f"{_name(item)}: its attribute grid must be two positive numbers")
    return int(value[0]), int(value[1])


def _name(item: h5py.Dataset | h5py.Group) -> str:
    return f"{item.file.filename}: {item.name[1:]}".removesuffix(": ")


def _kind(item: h5py.Dataset) -> str:
    order = "" if item.dtype.isnative else "in the other order of bytes, "
    return f"{item.dtype.name} {order}of shape {item.shape}"
