"""What commands print: in one line where a line is meant, and in every letter there is."""

import io
import sys

_STEERING = dict.fromkeys((*range(0x20), *range(0x7F, 0xA0)), " ")


def one_line(message: object) -> str:
    """A message on a single line without control characters, whatever file its words came from."""
    return " ".join(str(message).translate(_STEERING).split())


def print_every_letter() -> None:
    """Let standard output take names of files that are no text, as they came in; on Windows any letter at all.

    Redirected to a file it would have the letters of the system's language alone there, and others would be errors.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(encoding="utf-8" if sys.platform == "win32" else None, errors="surrogateescape")
