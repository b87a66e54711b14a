"""What commands print: in one line where a line is meant, and in every letter there is; and the code they end with."""

import codecs
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

_STEERING = dict.fromkeys((*range(0x20), *range(0x7F, 0xA0)), " ")


def one_line(message: object) -> str:
    """A message on a single line without control characters, whatever file its words came from."""
    return " ".join(str(message).translate(_STEERING).split())


def print_every_letter() -> None:
    """Let standard output take any letter, names of files that are no text as they came in; if it is closed, nothing.

    Redirected to a file it would have the letters of the system's language alone on Windows, and others would be
    errors; where that language's encoding is not UTF-8, letters that it lacks are written as escapes.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  as long as the process lives
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        if sys.platform == "win32":
            sys.stdout.reconfigure(encoding="utf-8")
        utf8 = codecs.lookup(sys.stdout.encoding).name == "utf-8"
        sys.stdout.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")


def go_on_unheard(stream: TextIO) -> None:
    """Where a stream takes no more, since `| head` has read enough: what else is printed there goes nowhere."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def exit_code(
    name: str,
    command: Callable[[], int],
    *,
    mistakes: tuple[type[Exception], ...] = (ValueError, OSError),
    stopped: str = "interrupted",
) -> int:
    """What a command ends with: its own code, 2 after a mistake of the user's, 130 after Ctrl-C or SIGTERM.

    Both of these say so in a line.

    Args:
        name: begins that line.
        command: does all the work and prints its results.
        mistakes: the exceptions whose words say what the user can mend; others are ours, and traced back.
        stopped: the line after Ctrl-C, unless its KeyboardInterrupt has words of its own.
    """
    print_every_letter()
    try:
        with _interrupted_by_any_signal():
            code = command()
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            go_on_unheard(sys.stdout)
        return code
    except KeyboardInterrupt as stop:
        print(f"{name}: {one_line(stop) or stopped}", file=sys.stderr)
        return 130
    except mistakes as error:
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        return 2


@contextmanager
def _interrupted_by_any_signal() -> Iterator[None]:
    """SIGTERM and a closed terminal end the block as Ctrl-C does, so that nothing half-written stays behind."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    mine = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in numbers if mine}
    before = {number: handler for number, handler in before.items() if handler is signal.SIG_DFL}
    try:
        for number in before:
            signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
