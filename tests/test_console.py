"""What commands print and how they end: one line, any letter, readers that leave, streams that are closed."""

import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from conftest import ROOT
from tiny_runs import tiny_settings

from captioning import run
from captioning.console import exit_code, one_line, print_every_letter


def raises(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (lambda: 0, 0, ""),
        (lambda: 7, 7, ""),
        (raises(ValueError("x:\n  is 3")), 2, "me: x: is 3\n"),
        (raises(FileNotFoundError("no such file")), 2, "me: no such file\n"),
        (raises(BrokenPipeError("a worker died")), 2, "me: a worker died\n"),
        (raises(KeyboardInterrupt()), 130, "me: interrupted\n"),
        (raises(KeyboardInterrupt("stopped at step 3")), 130, "me: stopped at step 3\n"),
    ],
)
def test_a_command_ends_with_a_code_and_a_line(command, code, said, capsys):
    assert exit_code("me", command) == code
    assert capsys.readouterr().err == said


def test_what_is_no_mistake_of_the_users_is_traced_back():
    with pytest.raises(RuntimeError, match="ours"):
        exit_code("me", raises(RuntimeError("ours")))
    assert exit_code("me", raises(RuntimeError("theirs")), mistakes=(RuntimeError,)) == 2


def test_control_characters_stay_out_of_a_line():
    assert one_line("a\x1b[31m\r\nb\x9fc") == "a [31m b c"


def python(code: str, *, shell: str = '"$@"', **environment: str) -> subprocess.CompletedProcess[bytes]:
    words = ["sh", "-c", shell, "sh", sys.executable, "-c", code]
    return subprocess.run(words, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, check=False)


ENDS = "import sys\nfrom captioning.console import exit_code\nsys.exit(exit_code('me', lambda: print({!r}) or 0))"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_no_error(closed):
    assert python(ENDS.format("here"), shell=f'"$@" {closed}').returncode == 0
    fails = "import sys\nfrom captioning.console import exit_code\nsys.exit(exit_code('me', lambda: int('x')))"
    assert python(fails, shell=f'"$@" {closed}').returncode == 2


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_letters_that_the_output_cannot_write_are_escaped():
    done = python(ENDS.format("ł ö"), PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stdout) == (0, "\\u0142 ö\n".encode("latin-1"))


def test_any_letter_of_a_file_name_is_printed(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="utf-8", errors="strict"))
    print_every_letter()
    print("\udcff", end="", flush=True)
    assert raw.getvalue() == b"\xff"


@pytest.mark.parametrize("error", [BrokenPipeError, OSError(errno.ENOSPC, "No space left on device")])
def test_a_run_goes_on_when_nobody_listens_any_more(error, tiny_data, tmp_path, monkeypatch):
    begun = run.start(tiny_settings(tiny_data, tmp_path / "run"))
    begun.close()

    def gone(*_: object) -> None:
        raise error

    heard: list[str] = []
    monkeypatch.setattr(run.tqdm, "write", gone)
    monkeypatch.setattr(run, "go_on_unheard", lambda stream: heard.append("nobody"))
    run.say(begun, "epoch 1")
    assert heard == ["nobody"]
