"""What commands print: in one line where a line is meant, and in every letter there is."""

import io
import sys

from captioning.tokenization import one_line as _one_line


def one_line(error: Exception) -> str:
    """An exception's message on a single line without control characters, whatever file its words came from."""
    return _one_line(str(error))


def print_every_letter() -> None:
    """Let standard output take names of files that are no text, as they came in; on Windows any letter at all.

    Redirected to a file it would have the letters of the system's language alone there, and others would be errors.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(encoding="utf-8" if sys.platform == "win32" else None, errors="surrogateescape")
