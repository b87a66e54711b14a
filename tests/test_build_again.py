"""Preprocessing that was killed, interrupted, begun twice or done before: it goes on, or says why not."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from photo_folders import ENCODER, command, photos
from torchvision.models import get_model

from captioning.data import CaptionData
from preprocess.__main__ import main
from preprocess.store import Partial


def test_the_same_data_in_another_folder_give_the_same_bytes(tmp_path):
    files = []
    for name in ("one", "two"):
        photos(tmp_path / name, 5)
        assert main(command(tmp_path / name, tmp_path / f"{name}.h5", *ENCODER, size=64)) == 0
        files.append((tmp_path / f"{name}.h5").read_bytes())
    assert files[0] == files[1]


def test_workers_change_no_byte(tmp_path):
    root = photos(tmp_path / "in", 40)
    (root / "5.png").write_bytes(b"broken")
    before = list(warnings.filters)
    assert main(command(root, tmp_path / "0.h5", "--max-missing", "0.1")) == 0
    assert warnings.filters == before
    assert main(command(root, tmp_path / "2.h5", "--workers", "2", "--max-missing", "0.1")) == 0
    assert (tmp_path / "0.h5").read_bytes() == (tmp_path / "2.h5").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 119 images, made in one go; its photos, one of them broken, lie in the folder beside it."""
    root = tmp_path_factory.mktemp("uninterrupted")
    (photos(root / "in", 120) / "3.png").write_bytes(b"broken")
    assert main(command(root / "in", root / "d.h5", *ENCODER, size=64)) == 0
    return root / "d.h5"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 130)])
def test_a_killed_run_goes_on_and_gives_the_bytes_of_an_uninterrupted_one(tmp_path, uninterrupted, number, code):
    words = command(uninterrupted.parent / "in", tmp_path / "d.h5", *ENCODER, size=64)
    journal = tmp_path / "d.h5.partial" / "journal.jsonl"
    with subprocess.Popen([sys.executable, "-m", "preprocess", *words], cwd=Path(__file__).parents[1]) as process:
        while not (journal.exists() and journal.read_bytes().count(b"\n") >= 3):
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(number)
        assert process.wait() == code
    assert 3 <= journal.read_bytes().count(b"\n") < 30  # of 120 / 4 batches
    assert not (tmp_path / "d.h5").exists()
    assert main(words) == 0
    assert (tmp_path / "d.h5").read_bytes() == uninterrupted.read_bytes()
    assert not journal.parent.exists()


def partial(folder: Path, key: str = "k", *, restart: bool = False) -> Partial:
    return Partial(folder, key, shape=(2,), dtype=np.float16, restart=restart)


@pytest.mark.parametrize(
    ("tail_of_images", "tail_of_journal"),
    [(b"", b""), (b"\x01", b""), (b"\x01" * 8, b'{"kept": 2, "bro'), (b"\x01" * 4, b'{"kept": 2, "broken": []}\n')],
    ids=["clean", "torn image", "torn journal", "images lost"],
)
def test_a_run_killed_in_the_middle_of_a_write_goes_on_from_the_last_whole_batch(
    tmp_path, tail_of_images, tail_of_journal
):
    first = partial(tmp_path / "p")
    first.append(np.ones((2, 2), np.float16), [(1, "torn")])
    for name, tail in (("images.bin", tail_of_images), ("journal.jsonl", tail_of_journal)):
        with open(tmp_path / "p" / name, "ab") as file:
            file.write(tail)
    again = partial(tmp_path / "p")
    assert (again.batches, again.kept, again.broken) == (1, 2, [(1, "torn")])
    again.append(np.full((1, 2), 2, np.float16), [])
    assert np.concatenate(list(again.blocks())).tolist() == [[1, 1], [1, 1], [2, 2]]
    assert partial(tmp_path / "p").batches == 2


def test_what_another_command_left_is_refused_unless_told_to_overwrite(tmp_path):
    partial(tmp_path / "p").append(np.ones((2, 2), np.float16), [])
    with pytest.raises(ValueError, match="--overwrite"):
        partial(tmp_path / "p", "another")
    assert partial(tmp_path / "p").batches == 1
    assert partial(tmp_path / "p", "another", restart=True).batches == 0


def interrupted(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that read all images and was stopped before it wrote the file."""
    with monkeypatch.context() as patch:
        patch.setattr("preprocess.build.write_file", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(words) == 130


@pytest.mark.parametrize("change", ["size", "captions", "photo"])
def test_leftovers_are_not_mixed_with_other_settings_captions_or_photos(tmp_path, capsys, monkeypatch, change):
    root, output = photos(tmp_path / "in", 3), tmp_path / "d.h5"
    interrupted(command(root, output), monkeypatch)
    if change == "captions":
        (root / "captions.csv").write_text((root / "captions.csv").read_text().replace("Photo", "Picture"))
    elif change == "photo":
        os.utime(root / "1.png", (1, 1))
    words = command(root, output, size=48 if change == "size" else 32)
    capsys.readouterr()
    assert main(words) == 2
    assert "left by a run with other settings, captions or photos" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    assert len(CaptionData(output)) == 3


def test_leftovers_are_not_mixed_with_vectors_of_other_weights(tmp_path, capsys, monkeypatch):
    root, output, weights = photos(tmp_path / "in", 3), tmp_path / "d.h5", tmp_path / "w.pth"
    words = command(root, output, "--encoder", "resnet18", "--weights", str(weights), "--device", "cpu", size=64)
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(get_model("resnet18", weights=None).state_dict(), weights)
        if seed == 0:
            interrupted(words, monkeypatch)
    assert main(words) == 2
    assert "left by a run with other settings, captions or photos" in capsys.readouterr().err


def test_an_interrupted_run_reads_no_image_twice(tmp_path, capsys, monkeypatch):
    root, output = photos(tmp_path / "in", 3), tmp_path / "d.h5"
    interrupted(command(root, output), monkeypatch)
    assert main(command(root, output)) == 0
    assert " 0 read in " in capsys.readouterr().out


def test_an_output_that_is_there_is_kept_unless_told_to_overwrite(tmp_path, capsys):
    root, output = photos(tmp_path / "in", 2), tmp_path / "d.h5"
    main(command(root, output))
    before = output.read_bytes()
    assert main(command(root, output, size=16)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert output.read_bytes() == before
    assert main(command(root, output, "--overwrite", size=16)) == 0
    assert CaptionData(output).image_shape == (16, 16, 3)


def test_two_processes_do_not_write_the_same_file(tmp_path):
    held = partial(tmp_path / "p")
    held.append(np.ones((2, 2), np.float16), [])
    code = "import numpy as np, sys; from pathlib import Path; from preprocess.store import Partial\n"
    code += "Partial(Path(sys.argv[1]), 'k', shape=(2,), dtype=np.float16, restart=True)"
    words = [sys.executable, "-c", code, str(tmp_path / "p")]
    other = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert other.returncode == 1
    assert other.stderr.splitlines()[-1] == f"ValueError: {tmp_path / 'p'}: another process is writing there now"
    assert partial(tmp_path / "p").batches == 1
    del held


def test_a_file_system_without_locks_is_no_other_process(tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("captioning.files.fcntl.lockf", unknown)
    assert partial(tmp_path / "p").batches == 0


def test_the_folder_is_let_go_before_it_is_removed(tmp_path, monkeypatch):
    real = shutil.rmtree
    done = partial(tmp_path / "p")
    monkeypatch.setattr(shutil, "rmtree", lambda path: done._lock.closed and real(path))  # as network file systems do
    done.remove()
    assert not (tmp_path / "p").exists()
