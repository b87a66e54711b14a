"""From photos and captions to a data file: contents, faults, and interruptions that leave no trace."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import get_model

from captioning.checkpoint import load_checkpoint
from captioning.data import ANNOTATIONS, PIXELS, CaptionData
from captioning.evaluate import check_same_task
from captioning.images import open_image, to_array, to_square
from captioning.tokenization import tokenize
from captioning.vocabulary import SPECIAL
from preprocess.__main__ import main
from preprocess.store import Partial

ENCODER = ("--encoder", "resnet18", "--weights", "null", "--batch-size", "4", "--device", "cpu")


def photos(root: Path, count: int, *, size: tuple[int, int] = (40, 30)) -> Path:
    """A folder of noise and its captions.csv: 0.png is val, the others train; the words of i.png are "photo n<i>"."""
    root.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    rows = ["image,caption,split"]
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(root / f"{i}.png")
        rows += [f"{i}.png,Photo n{i} .,{'train' if i else 'val'}", f"{i}.png,A photo !,{'train' if i else 'val'}"]
    (root / "captions.csv").write_text("\n".join(rows))
    return root


def command(root: Path, output: Path, *options: str, size: int = 32) -> list[str]:
    words = ["folder", "--captions", root / "captions.csv", "--images", root, "--output", output]
    return [str(word) for word in (*words, "--image-size", size, "--min-count", 1, "--workers", 0, *options)]


def test_a_pixel_file_holds_what_the_source_gave(tmp_path):
    root = photos(tmp_path / "in", 3)
    assert main(command(root, tmp_path / "d.h5")) == 0
    data = CaptionData(tmp_path / "d.h5")
    assert data.names == ["0.png", "1.png", "2.png"]
    assert data.indices("val").tolist() == [0]
    assert data.indices("train").tolist() == [1, 2]
    assert data.references(1) == ["Photo n1 .", "A photo !"]
    assert data.vocabulary.words == (*SPECIAL, "photo", "a", "n1", "n2")  # 4, 2, 1 and 1 times in train
    assert [data.vocabulary.decode(data.words(caption).tolist()) for caption in data.captions_of(0)] == [
        ["photo", "<unk>"],  # n0 is in val only
        ["a", "photo"],
    ]
    expected = to_array(to_square(open_image(root / "2.png"), 32, "crop"))
    np.testing.assert_array_equal(data.image(2).permute(1, 2, 0).numpy(), expected)
    assert data.settings["image_size"] == 32
    assert data.settings["fit"] == "crop"
    assert data.source["captions"] == ["captions.csv"]


def test_one_image_is_one_chunk(tmp_path):
    main(command(photos(tmp_path / "in", 3), tmp_path / "p.h5"))
    main(command(tmp_path / "in", tmp_path / "a.h5", *ENCODER, size=64))
    with h5py.File(tmp_path / "p.h5") as file:
        assert file[PIXELS].chunks == (1, 32, 32, 3)
        assert file[PIXELS].compression is None
    with h5py.File(tmp_path / "a.h5") as file:
        assert file[ANNOTATIONS].chunks == (1, 4, 512)
        assert file[ANNOTATIONS].dtype == np.float16


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


def test_negative_workers_are_refused(tmp_path, capsys):
    assert main(command(photos(tmp_path / "in", 5), tmp_path / "d.h5", "--workers", "-1")) == 2
    assert "--workers -1" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


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


def interrupted(root: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that read all images and was stopped before it wrote the file."""
    with monkeypatch.context() as patch:
        patch.setattr("preprocess.build.write_file", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(command(root, output)) == 130


@pytest.mark.parametrize("change", ["size", "captions", "photo"])
def test_leftovers_are_not_mixed_with_other_settings_captions_or_photos(tmp_path, capsys, monkeypatch, change):
    root, output = photos(tmp_path / "in", 3), tmp_path / "d.h5"
    interrupted(root, output, monkeypatch)
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


def test_an_interrupted_run_reads_no_image_twice(tmp_path, capsys, monkeypatch):
    root, output = photos(tmp_path / "in", 3), tmp_path / "d.h5"
    interrupted(root, output, monkeypatch)
    assert main(command(root, output)) == 0
    assert " 0 read in " in capsys.readouterr().out


def test_missing_and_broken_photos_are_named_and_left_out(tmp_path, capsys):
    root = photos(tmp_path / "in", 10)
    (root / "4.png").unlink()
    (root / "5.png").write_bytes((root / "5.png").read_bytes()[:300])
    (root / "6.png").write_bytes(b"")
    assert main(command(root, tmp_path / "d.h5", "--max-missing", "0.3")) == 0
    assert "3 missing or broken" in capsys.readouterr().out
    data = CaptionData(tmp_path / "d.h5")
    assert data.names == [f"{i}.png" for i in (0, 1, 2, 3, 7, 8, 9)]
    assert data.references(4) == ["Photo n7 .", "A photo !"]
    np.testing.assert_array_equal(
        data.image(4).permute(1, 2, 0).numpy(), to_array(to_square(open_image(root / "7.png"), 32, "crop"))
    )
    assert not {"n4", "n5", "n6"} & set(data.vocabulary.words)
    lines = (tmp_path / "d.missing.txt").read_text().splitlines()
    assert lines[0] == "# 3 of 10 images listed for d.h5 are missing or broken"
    assert lines[1] == "name\tfile\treason"
    assert lines[2] == f"4.png\t{root / '4.png'}\tno such file"
    assert [line.split("\t")[0] for line in lines[2:]] == ["4.png", "5.png", "6.png"]
    assert "cannot be read as an image" in lines[3]


@pytest.mark.parametrize("fault", ["missing", "broken"])
def test_more_faults_than_the_limit_are_one_error_that_names_the_option(tmp_path, capsys, fault):
    root, output = photos(tmp_path / "in", 10), tmp_path / "d.h5"
    for i in (2, 3):
        (root / f"{i}.png").unlink() if fault == "missing" else (root / f"{i}.png").write_bytes(b"x")
    assert main(command(root, output, "--max-missing", "0.1")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "2 of 10 images (20.0%)" in error
    assert "--max-missing 0.1" in error
    assert not output.exists()
    assert output.with_name("d.h5.partial").exists() == (fault == "broken")
    assert main(command(root, output, "--max-missing", "0.2")) == 0  # a higher limit goes on with the leftover
    assert len(CaptionData(output)) == 8


def test_without_any_photo_there_is_an_error_whatever_the_limit(tmp_path, capsys):
    root = photos(tmp_path / "in", 2)
    (root / "0.png").unlink()
    (root / "1.png").write_bytes(b"x")
    assert main(command(root, tmp_path / "d.h5", "--max-missing", "1")) == 2
    assert "nothing is left" in capsys.readouterr().err


def test_a_rotated_photo_is_stored_upright(tmp_path):
    root = photos(tmp_path / "in", 2)
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, :16] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: white at the top
    Image.fromarray(pixels).save(root / "1.png", exif=exif)
    main(command(root, tmp_path / "d.h5"))
    image = CaptionData(tmp_path / "d.h5").image(1)
    assert image[:, :16].min() == 255
    assert image[:, 16:].max() == 0


def test_squash_keeps_the_whole_photo(tmp_path):
    root = photos(tmp_path / "in", 2)
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, :32] = 255  # the left third: outside the square in the centre
    Image.fromarray(pixels).save(root / "1.png")
    main(command(root, tmp_path / "crop.h5"))
    main(command(root, tmp_path / "squash.h5", "--fit", "squash"))
    assert CaptionData(tmp_path / "crop.h5").image(1)[:, :, 2:].max() == 0  # but for the resampling at the edge
    assert CaptionData(tmp_path / "squash.h5").image(1)[:, :, :8].min() == 255


def test_long_captions_are_cut_for_training_and_kept_for_scoring(tmp_path):
    root = photos(tmp_path / "in", 1)
    (root / "captions.csv").write_text("image,caption,split\n0.png,one two three four,train\n")
    main(command(root, tmp_path / "d.h5", "--max-length", "2"))
    data = CaptionData(tmp_path / "d.h5")
    assert data.vocabulary.decode(data.words(0).tolist()) == ["one", "two"]
    assert data.references(0) == ["one two three four"]


def test_captions_without_a_word_are_left_out(tmp_path):
    root = photos(tmp_path / "in", 2)
    (root / "captions.csv").write_text("image,caption,split\n0.png,...,train\n0.png,A cat,train\n1.png,!,train\n")
    assert main(command(root, tmp_path / "d.h5", "--max-missing", "0.5")) == 0
    data = CaptionData(tmp_path / "d.h5")
    assert (data.names, data.references(0)) == (["0.png"], ["A cat"])
    assert "none of its captions has a word" in (tmp_path / "d.missing.txt").read_text()


def test_a_file_without_a_train_split_has_only_the_special_words(tmp_path):
    main(command(photos(tmp_path / "in", 1), tmp_path / "d.h5"))
    data = CaptionData(tmp_path / "d.h5")
    assert data.vocabulary.words == SPECIAL
    assert data.references(0) == ["Photo n0 .", "A photo !"]


def test_an_output_that_is_there_is_kept_unless_told_to_overwrite(tmp_path, capsys):
    root, output = photos(tmp_path / "in", 2), tmp_path / "d.h5"
    main(command(root, output))
    before = output.read_bytes()
    assert main(command(root, output, size=16)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert output.read_bytes() == before
    assert main(command(root, output, "--overwrite", size=16)) == 0
    assert CaptionData(output).image_shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image-size", "0"], "image_size must be at least 1 (got 0)"),
        (["--max-missing", "2"], "max_missing must lie in [0, 1] (got 2.0)"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--val-fraction", "1"], "val_fraction=1.0 and test_fraction=0.1"),
        (["--images", "nowhere"], "--images nowhere: no such folder"),
        (["--captions", "no.csv"], "no.csv: no such file"),
        (["--output", "."], "--output .: is a folder; give the file to write"),
        (["--mirror"], "mirror needs an encoder: pixels are mirrored when they are read"),
        (["--encoder", "resnet17"], "--encoder 'resnet17' is no checkpoint, nor a torchvision classification model"),
        (["--encoder", "resnet18", "--weights", "no.pth"], "--weights=no.pth: no such file"),
        (["--encoder", "resnet18", "--weights", "null", "--layer", "layer9"], "--layer='layer9' is no feature map"),
        (["--encoder", "resnet18", "--weights", "null", "--device", "abacus"], "--device abacus: allowed are"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_two(tmp_path, capsys, options, message):
    root = photos(tmp_path / "in", 2)
    assert main([*command(root, tmp_path / "d.h5", size=64), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("preprocess: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_path_that_leaves_the_folder_is_a_users_mistake(tmp_path, capsys):
    root = photos(tmp_path / "in", 2)
    (root / "captions.csv").write_text("image,caption\n../0.png,A cat\n")
    assert main(command(root, tmp_path / "d.h5")) == 2
    assert "captions.csv:2: image: '../0.png' is no path below" in capsys.readouterr().err


def test_annotations_too_large_for_float16_are_refused(tmp_path, capsys):
    root = photos(tmp_path / "in", 2)
    network = get_model("resnet18", weights=None)
    network.layer4[1].bn2.weight.data.fill_(1e8)  # normalised features of size 1 become 1e8 > 65504
    torch.save(network.state_dict(), tmp_path / "w.pth")
    words = command(root, tmp_path / "d.h5", "--encoder", "resnet18", "--weights", str(tmp_path / "w.pth"), size=64)
    assert main(words) == 2
    assert "do not fit into float16" in capsys.readouterr().err


def test_shapes_come_with_the_masks_of_their_things(tmp_path):
    output = tmp_path / "s.h5"
    assert main(["shapes", "--count", "20", "--seed", "1", "--output", str(output), "--workers", "0"]) == 0
    data = CaptionData(output)
    assert [len(data.indices(split)) for split in ("train", "val", "test")] == [16, 2, 2]
    masks = json.loads((tmp_path / "s.instances.json").read_text())
    assert [image["file_name"] for image in masks["images"]] == data.names
    assert {image["width"] for image in masks["images"]} == {data.image_shape[0]} == {64}
    assert {annotation["image_id"] for annotation in masks["annotations"]} == set(range(20))


@pytest.mark.data
def test_flickr8k_with_its_missing_photos_needs_a_limit_and_then_works(tmp_path, capsys, shared: Callable[..., Path]):
    root = shared("data", "flickr8k")
    words = ["flickr8k", "--captions", root / "Flickr8k.token.txt", "--images", root / "Images", "--splits", root]
    words = [str(word) for word in (*words, "--output", tmp_path / "f.h5", "--image-size", "32")]
    assert main(words) == 2
    assert "1001 of 8000 images (12.5%)" in capsys.readouterr().err
    assert main([*words, "--max-missing", "0.2", "--limit", "200"]) == 0
    data = CaptionData(tmp_path / "f.h5")
    missing = len((tmp_path / "f.missing.txt").read_text().splitlines()) - 2
    assert missing > 0
    assert len(data) + missing == 200
    assert len(data.references(0)) == 5


@pytest.mark.data
def test_cocos_validation_file_works_with_the_photos_that_are_there(tmp_path, shared: Callable[..., Path]):
    root = shared("data", "coco")
    words = ["coco", "--captions", root / "captions_val2017.json", "--images", root / "val2017"]
    options = ["--output", tmp_path / "c.h5", "--image-size", "32", "--max-missing", "0.95"]
    assert main([str(word) for word in (*words, *options)]) == 0
    data = CaptionData(tmp_path / "c.h5")
    assert len(data.indices("val")) == len(data) == 300
    assert all(name.isdecimal() for name in data.names)
    assert (root / "val2017" / f"{int(data.names[0]):012d}.jpg").is_file()


def test_the_folder_of_the_output_is_made(tmp_path):
    root = photos(tmp_path / "in", 3)
    assert main(command(root, tmp_path / "new" / "data" / "d.h5")) == 0
    assert len(CaptionData(tmp_path / "new" / "data" / "d.h5")) == 3


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


def test_the_words_may_be_a_checkpoints_so_that_training_goes_on_from_it(tmp_path, tiny_checkpoint):
    root = photos(tmp_path / "in", 3)
    words = ["--vocabulary", str(tiny_checkpoint), "--encoder", str(tiny_checkpoint), "--device", "cpu"]
    assert main(command(root, tmp_path / "d.h5", *words)) == 0
    data, checkpoint = CaptionData(tmp_path / "d.h5"), load_checkpoint(tiny_checkpoint)
    assert data.vocabulary == checkpoint.vocabulary
    assert data.source["vocabulary"] == tiny_checkpoint.name
    check_same_task(checkpoint, data, "init_from")
    for caption in range(3):
        expected = checkpoint.vocabulary.encode(tokenize(data.references(caption)[0]))
        assert data.words(data.captions_of(caption)[0]).tolist() == expected


def test_a_vocabulary_of_no_checkpoint_is_named(tmp_path, capsys):
    root = photos(tmp_path / "in", 3)
    assert main(command(root, tmp_path / "d.h5", "--vocabulary", "nowhere")) == 2
    assert "preprocess: error: nowhere: no checkpoint folder" in capsys.readouterr().err
