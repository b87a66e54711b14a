"""Files that are there whole or not at all, and what they go by elsewhere."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def fresh_file(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block ends well and vanishes when it does not.

    What was written is on the disk before the name changes, so that a crash leaves the old file or the new one.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        descriptor = os.open(partial, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def short_name(path: str | Path) -> str:
    """A file's or folder's name, for what travels and must not say where it lay; with its run's, for a run's best."""
    path = Path(path)
    return "/".join(path.parts[-2:]) if path.name in ("best", "last") else path.name
