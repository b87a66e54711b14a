"""From photos and captions to a data file: contents and faults."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from photo_folders import ENCODER, command, photos
from PIL import Image
from torchvision.models import get_model

from captioning.checkpoint import load_checkpoint
from captioning.compatibility import check_same_task
from captioning.data import ANNOTATIONS, PIXELS, CaptionData
from captioning.images import open_image, to_array, to_square
from captioning.tokenization import tokenize
from captioning.vocabulary import SPECIAL
from preprocess.__main__ import main
from preprocess.build import BuildSettings
from preprocess.store import Partial, _write_dataset


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


def test_what_nobody_asked_for_is_as_documented():
    settings = BuildSettings()
    assert (settings.image_size, settings.fit, settings.max_missing) == (224, "crop", 0.01)
    assert (settings.min_count, settings.max_words, settings.max_length) == (5, 10_000, 50)


@pytest.mark.parametrize(
    ("options", "words"), [(("--min-count", "2"), ("photo", "a")), (("--max-words", "1"), ("photo",))]
)
def test_rare_words_are_left_out_of_the_files_vocabulary(options, words, tmp_path):
    assert main(command(photos(tmp_path / "in", 3), tmp_path / "d.h5", *options)) == 0  # photo 4 times, a twice
    data = CaptionData(tmp_path / "d.h5")
    assert data.vocabulary.words == (*SPECIAL, *words)
    assert data.vocabulary.decode(data.words(data.captions_of(1)[0]).tolist()) == ["photo", "<unk>"]


def test_one_image_is_one_chunk(tmp_path):
    main(command(photos(tmp_path / "in", 3), tmp_path / "p.h5"))
    main(command(tmp_path / "in", tmp_path / "a.h5", *ENCODER, size=64))
    with h5py.File(tmp_path / "p.h5") as file:
        assert file[PIXELS].chunks == (1, 32, 32, 3)
        assert file[PIXELS].compression is None
    with h5py.File(tmp_path / "a.h5") as file:
        assert file[ANNOTATIONS].chunks == (1, 4, 512)
        assert file[ANNOTATIONS].dtype == np.float16


def test_a_disk_without_room_is_noticed_before_a_photo_is_read(tmp_path, capsys, monkeypatch):
    root, output = photos(tmp_path / "in", 3), tmp_path / "d.h5"
    size = 32 * 32 * 3
    monkeypatch.setattr("preprocess.build.shutil.disk_usage", lambda _: SimpleNamespace(free=6 * size - 1))
    assert main(command(root, output)) == 2
    assert f"--output {output}: 0.0 GB are free there; to make a file of 3 images" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    monkeypatch.setattr("preprocess.build.shutil.disk_usage", lambda _: SimpleNamespace(free=6 * size))
    assert main(command(root, output)) == 0


def test_a_limit_that_leaves_no_image_of_a_split_says_so(tmp_path, capsys):
    root = photos(tmp_path / "in", 5)  # the first is val
    assert main(command(root, tmp_path / "d.h5", "--limit", "1")) == 0
    assert capsys.readouterr().err == "preprocess: --limit 1 leaves no images of train\n"


def test_negative_workers_are_refused(tmp_path, capsys):
    assert main(command(photos(tmp_path / "in", 5), tmp_path / "d.h5", "--workers", "-1")) == 2
    assert "--workers -1" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


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
        (["--encoder", "resnet18", "--weights", "null", "--device", "abacus"], "--device abacus: allowed is cpu"),
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


def test_neither_what_is_read_nor_what_lies_beside_the_output_is_replaced(tmp_path, capsys):
    root = photos(tmp_path / "in", 3)
    words = command(root, tmp_path / "d.h5")
    captions = words[words.index("--captions") + 1]
    same = command(root, Path(captions), "--overwrite")
    assert main(same) == 2
    assert "is what --captions, --json or --splits reads" in capsys.readouterr().err
    (tmp_path / "d.missing.txt").write_text("my notes")
    assert main(words) == 2
    assert "d.missing.txt is there already; give --overwrite" in capsys.readouterr().err
    assert (tmp_path / "d.missing.txt").read_text() == "my notes"
    (tmp_path / "s.v1.instances.json").write_text("{}")
    shapes = ["shapes", "--count", "10", "--image-size", "32", "--output"]
    assert main([*shapes, str(tmp_path / "s.v1")]) == 2
    assert "s.v1.instances.json is there already" in capsys.readouterr().err
    assert main([*shapes, str(tmp_path / "s.v2")]) == 0
    assert (tmp_path / "s.v2.instances.json").exists()


def test_a_run_that_was_stopped_after_its_companions_goes_on(tmp_path, monkeypatch):
    words = ["shapes", "--count", "10", "--image-size", "32", "--output", str(tmp_path / "s.h5")]
    replace = os.replace

    def stopped(source, target):
        if Path(target).name == "s.h5":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stopped)
    assert main(words) == 130
    assert (tmp_path / "s.instances.json").exists()
    monkeypatch.undo()
    assert main(words) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.h5", "s.instances.json"]


def test_every_image_lies_at_its_place_beyond_the_first_block(tmp_path):
    whole = Partial(tmp_path / "p", "k", shape=(1,), dtype=np.float16, restart=False)
    whole.append(np.arange(150, dtype=np.float16)[:, None], [])
    with h5py.File(tmp_path / "x.h5", "w") as file:
        _write_dataset(file, "x", whole, ())
        assert file["x"][:, 0].tolist() == list(range(150))


def test_a_broken_photo_of_a_later_batch_moves_no_captions(tmp_path):
    root = photos(tmp_path / "in", 10)
    (root / "6.png").write_bytes(b"x")
    assert main(command(root, tmp_path / "d.h5", "--batch-size", "4", "--max-missing", "0.1")) == 0
    data = CaptionData(tmp_path / "d.h5")
    assert data.names == [f"{i}.png" for i in range(10) if i != 6]
    expected = to_array(to_square(open_image(root / "8.png"), 32, "crop"))
    np.testing.assert_array_equal(data.image(7).permute(1, 2, 0).numpy(), expected)
