"""Files and folders are whole or not there, whatever their names, and other people's stay where they are."""

import errno
import os
import signal

import pytest

from captioning import files
from captioning.console import exit_code
from captioning.files import clear_folder, fresh_file, fresh_folder, parse_json, read_json, read_text, write_json


def write(folder, text):
    with fresh_folder(folder) as new:
        (new / "x").write_text(text)


@pytest.mark.parametrize("mine", ["best.old", "best.partial", "best.new"])
def test_a_backup_that_somebody_made_beside_a_folder_stays(mine, tmp_path):
    (tmp_path / mine).mkdir()
    (tmp_path / mine / "x").write_text("precious")
    for text in ("one", "two"):
        write(tmp_path / "best", text)
    assert (tmp_path / mine / "x").read_text() == "precious"
    assert (tmp_path / "best" / "x").read_text() == "two"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["best", mine])


def test_a_folder_that_is_a_link_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "best").symlink_to(tmp_path / "disk" / "far")
    for text in ("one", "two", "three"):
        write(tmp_path / "best", text)
        assert (tmp_path / "disk" / "far" / "x").read_text() == text
    assert (tmp_path / "best").is_symlink()
    assert os.listdir(tmp_path / "disk") == ["far"]


def test_two_who_write_one_folder_at_a_time_do_not_mix(tmp_path):
    with fresh_folder(tmp_path / "soup") as first:
        (first / "x").write_text("first")
        write(tmp_path / "soup", "second")
        (first / "y").write_text("first")
    assert {path.name: path.read_text() for path in (tmp_path / "soup").iterdir()} == {"x": "first", "y": "first"}


def test_what_a_killed_process_left_is_cleared_and_nothing_else(tmp_path):
    for name in (".last.0123456789ab.new", ".last.replaced", ".last.backup.new", ".other.0123456789ab.new", "last.new"):
        (tmp_path / name).mkdir()
    stay = [".last.backup.new", ".last.replaced", ".other.0123456789ab.new", "last.new"]
    clear_folder(tmp_path / "last")
    assert sorted(os.listdir(tmp_path)) == stay  # the older folder is what is left of `last`
    write(tmp_path / "last", "good")
    clear_folder(tmp_path / "last")
    assert sorted(os.listdir(tmp_path)) == [".last.backup.new", ".other.0123456789ab.new", "last", "last.new"]


def test_half_a_surrogate_pair_is_written_as_json_escapes_it(tmp_path):
    write_json(tmp_path / "x.json", {"name": "\ud800 and Café"})
    assert read_json(tmp_path / "x.json") == {"name": "\ud800 and Café"}


def test_a_field_that_comes_twice_is_named():
    with pytest.raises(ValueError, match=r"^refs: the field 'a\.jpg' comes twice"):
        parse_json('[{"a.jpg": ["x"], "a.jpg": ["y"]}]', "refs")


def test_a_text_without_end_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_TEXT", 1000)
    (tmp_path / "x.json").write_text("[" + 999 * " ")
    assert len(read_text(tmp_path / "x.json")) == 1000
    (tmp_path / "x.json").write_text("[" + 1000 * " ")
    with pytest.raises(ValueError, match=r"x\.json: must be at most 1,000 bytes"):
        read_text(tmp_path / "x.json")


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*x\.json'"), fresh_file(tmp_path / "x.json") as new:
        new.write_text("{}")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no such signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_leaves_nothing_half_written(name, tmp_path, capsys):
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # nohup, under which these tests may run, ignores one of them

    def command():
        with fresh_file(tmp_path / "x") as new:
            new.write_text("half")
            os.kill(os.getpid(), number)
        return 0

    try:
        assert exit_code("tool", command) == 130
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert capsys.readouterr().err == "tool: interrupted\n"
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no such signals")
def test_a_signal_that_is_ignored_stays_so(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert exit_code("tool", lambda: os.kill(os.getpid(), signal.SIGHUP) or 0) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
