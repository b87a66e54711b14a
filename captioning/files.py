"""Files and folders that are whole or not there, that one process writes at a time, and their names elsewhere."""

import errno
import json
import os
import re
import secrets
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

if sys.platform != "win32":
    import fcntl


MOST_TEXT = 2**30
"""Bytes of the largest text that is read."""


@contextmanager
def fresh_file(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block ends well and vanishes when it does not.

    What was written is on the disk before the name changes, so that a crash leaves the old file or the new one.
    """
    partial = _unused(path, "partial")
    try:
        yield partial
        to_disk(partial)
        os.replace(partial, path)
    except OSError as error:
        if error.errno and error.filename in (None, str(partial)):  # a full disk does not say where
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def _unused(path: Path, kind: str) -> Path:
    """A hidden name beside a path, which nobody else has chosen: not another process, not on another machine."""
    return path.with_name(f".{path.name[:40]}.{secrets.token_hex(6)}.{kind}")  # a system limits the length of names


def write_text(path: Path, text: str) -> None:
    """A text file in UTF-8, as it is on every system: whole or not at all."""
    with fresh_file(path) as partial:
        partial.write_bytes(text.encode(errors="backslashreplace"))  # half a surrogate pair, as JSON would escape it


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no UTF-8, or larger than any such file; names the file and the place.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file")
    if Path(path).stat().st_size > MOST_TEXT:
        raise ValueError(f"{path}: must be at most {MOST_TEXT:,} bytes")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text (byte {error.start})") from error


def parse_json(text: str, where: str | Path) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is none; begins with `where`.
    """
    try:
        return json.loads(text, object_pairs_hook=_each_once)
    except _RepeatedFieldError as error:
        raise ValueError(f"{where}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: is not JSON: {error}") from error


class _RepeatedFieldError(ValueError):
    """A field of a JSON object that comes again."""


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise _RepeatedFieldError(f"the field {twice[:80]!r} comes twice")
    return values


def parse_object(text: str, where: str | Path) -> dict[str, Any]:
    """The JSON object that a text holds.

    Raises:
        ValueError: it holds none; begins with `where`.
    """
    values = parse_json(text, where)
    if not isinstance(values, dict):
        raise ValueError(f"{where}: must be a JSON object, not {type(values).__name__}")
    return values


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        FileNotFoundError, ValueError: naming the file.
    """
    return parse_object(read_text(path), path)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """A JSON object, readable: whole or not at all."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def to_disk(path: Path) -> None:
    """Return when what was written to a file is on the disk, and a power cut cannot take it back."""
    with path.open("rb+") as file:  # Windows wants to be able to write
        os.fsync(file.fileno())


@contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `folder` when the block ends well and else vanishes.

    Where `folder` is a link it stays one, and what it leads to is replaced.
    """
    folder = Path(os.path.realpath(folder))
    new = _unused(folder, "new")
    new.mkdir(parents=True)
    try:
        yield new
        for file in new.rglob("*"):
            if file.is_file():
                to_disk(file)
        replace_folder(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def replace_folder(new: Path, folder: Path) -> None:
    """Put a finished folder in the place of an older one; at no time is there only half of one.

    A stop between the two renames leaves the older one under another name, by which `recover_folder` finds it.
    """
    old = _replaced(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Undo a replacement that was cut off between its two renames."""
    folder = Path(os.path.realpath(folder))
    old = _replaced(folder)
    if not folder.exists() and old.exists():
        with suppress(FileNotFoundError):  # another process of this run was faster
            os.rename(old, folder)


def clear_folder(folder: Path) -> None:
    """Remove what killed processes left half-written of a folder that this one alone writes."""
    folder = Path(os.path.realpath(folder))
    name = re.compile(rf"\.{re.escape(folder.name[:40])}\.[0-9a-f]{{12}}\.new")
    for path in folder.parent.iterdir() if folder.parent.is_dir() else ():
        if name.fullmatch(path.name) or (path == _replaced(folder) and folder.exists()):
            shutil.rmtree(path, ignore_errors=True)


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def hold(path: Path) -> TextIO:
    """Open a file that no other process holds; it is held until it is closed, or its process ends.

    On Windows, and where a file system knows no locks, nothing is held.

    Raises:
        BlockingIOError: another process holds it.
        ValueError: it is a link; the folder may be somebody else's, and what it leads to would be held.
    """
    if path.is_symlink():
        raise ValueError(f"{path}: is a link; delete it")
    file = path.open("a")
    if sys.platform != "win32":
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.close()
                raise BlockingIOError(f"{path}: another process holds it") from error
    return file


def make_place(path: Path, option: str) -> None:
    """The folder of a file that will be written, before the work for it is done.

    Raises:
        OSError: the file is a folder or a device, lies in a file, or cannot be written; names the option.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{option} {path}: is a folder; give the file to write")
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{option} {path}: is no ordinary file; give another name")
    make_folder(path.parent, f"{option} {path}")


def make_folder(path: Path, option: str) -> None:
    """A folder that will be written to.

    Raises:
        OSError: a file has its name, or that of a folder above it; or it cannot be written to. Names the option.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f"{option}: {path} is no folder and cannot become one: a file is in its place"
        ) from error
    except PermissionError as error:
        raise PermissionError(f"{option}: folder {path} cannot be made") from error
    if not os.access(path, os.W_OK):
        raise PermissionError(f"{option}: folder {path} cannot be written to")


def short_name(path: str | Path) -> str:
    """A file's or folder's name, for what travels and must not say where it lay.

    It is the last two names for a run's best, and for a member of an ensemble, be that a folder or a pretrained one.
    """
    path = Path(path)
    member = (path.parent / "config.json").is_file() or not (path.is_absolute() or path.exists())
    return "/".join(path.parts[-2:]) if member or path.name in ("best", "last") else path.name
