"""A captioner inside somebody's program: what it takes, what it leaves alone, and threads that share it."""

import dataclasses
import io
import itertools
import json
import runpy
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from captioning import Captioner, api, images, load_captioner
from captioning.checkpoint import load_checkpoint, save_checkpoint
from captioning.models.captioner import build_model


@pytest.fixture(scope="module")
def captioner(tiny_checkpoint: Path) -> Captioner:
    return load_captioner(tiny_checkpoint)


@pytest.fixture
def hard(tiny_checkpoint: Path, tmp_path: Path) -> Captioner:
    """The tiny checkpoint's weights, with hard attention."""
    soft = load_checkpoint(tiny_checkpoint)
    config = dataclasses.replace(soft.decoder, attention="hard")
    model, _ = build_model(soft.encoder, config, len(soft.vocabulary))
    model.load_state_dict(soft.model.state_dict())
    save_checkpoint(tmp_path / "hard", dataclasses.replace(soft, model=model, decoder=config))
    return load_captioner(tmp_path / "hard")


def png(photo: Image.Image) -> bytes:
    """A photo's file."""
    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    return buffer.getvalue()


def test_a_photo_may_come_in_any_form_alone_or_with_others(captioner, photo, tmp_path):
    (tmp_path / "x.png").write_bytes(png(photo))
    path = tmp_path / "x.png"
    forms = [path, str(path), png(photo), io.BytesIO(png(photo)), bytearray(png(photo)), photo, np.asarray(photo)]
    (expected,) = captioner.caption([photo])
    for i, form in enumerate(forms):
        (alone,) = captioner.stream(form)
        assert alone.text == expected.text, i
        np.testing.assert_array_equal(alone.alphas, expected.alphas)
    forms[3].seek(0)
    assert [c.text for c in captioner.caption(form for form in forms)] == [expected.text] * len(forms)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (b"no image", "image 1: image data: cannot be read as an image: it is none of JPEG, PNG"),
        (np.zeros((4, 4)), r"image 1: an image array must be uint8 \(H, W, 3\), got float64 \(4, 4\)"),
        (Image.new("RGB", (0, 3)), "image 1: a photo has pixels, got 0x3"),
    ],
)
def test_of_several_images_the_wrong_one_is_named(captioner, photo, image, said):
    with pytest.raises(ValueError, match=said):
        captioner.caption([photo, image])


def test_a_pillow_image_of_a_broken_file_is_named(captioner, photo):
    broken = Image.open(io.BytesIO(png(photo)[:-60]))
    with pytest.raises(ValueError, match="image 1: cannot be read as an image"):
        captioner.caption([photo, broken])


def test_arguments_of_wrong_types_are_said_in_a_line(tiny_checkpoint):
    calls = {  # in a process of its own, where nothing else looks at types
        "c.caption(3)": "images must be one or several (got int)",
        "c.caption([3])": "image 0: must be a file, bytes, a Pillow image or an array, got int",
        "c.stream([], batch_size='2')": "batch_size must be int (got '2')",
        "c.stream([], seed=1.5)": "seed must be int (got 1.5)",
    }
    lines = ["import captioning", f"c = captioning.load_captioner({str(tiny_checkpoint)!r})"]
    for call in calls:
        lines += ["try:", f"    {call}", "except ValueError as error:", "    print(error)"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines() == list(calls.values())


def test_a_stream_reads_no_more_photos_than_its_next_captions_need(captioner, photo, monkeypatch):
    taken = []
    endless = (taken.append(i) or photo for i in itertools.count())
    stream = captioner.stream(endless, batch_size=2)
    assert taken == []
    next(stream)
    assert taken == [0, 1]
    monkeypatch.setattr(images, "MAX_PIXELS", photo.width * photo.height)
    assert next(captioner.stream(endless, batch_size=16)).text
    assert taken == [0, 1, 2, 3]  # two photos are more than that already


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sample": "no"}, "sample must be bool"),
        ({"beam_size": True}, r"beam_size must be int \(got True\)"),
        ({"beam_size": 2.5}, "beam_size must be int"),
        ({"length_penalty": "1"}, "length_penalty must be float"),
        ({"location": 1}, "location must be str"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": 2**65}, "seed must be from 0 to"),
        ({"seed": -1}, "seed must be from 0 to"),
    ],
)
def test_an_option_of_a_wrong_type_is_named_before_anything_is_read(captioner, photo, options, said):
    with pytest.raises(ValueError, match=said):
        captioner.stream(photo, **options)


def test_a_whole_number_is_a_number(captioner, photo):
    assert captioner.caption(photo, length_penalty=1)[0].text == captioner.caption(photo, length_penalty=1.0)[0].text


def test_threads_share_a_hard_captioner(hard, photo):
    wanted = [{"location": "argmax"}, {"location": "expected"}, {"location": "sample", "seed": 3}] * 2
    alone = [hard.caption(photo, **options)[0] for options in wanted]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(len(wanted)) as pool:
            found = list(pool.map(lambda options: hard.caption(photo, **options)[0], wanted))
    finally:
        sys.setswitchinterval(interval)
    assert [c.text for c in found] == [c.text for c in alone]
    for one, other in zip(found, alone, strict=True):
        np.testing.assert_equal(one.locations, other.locations)


def test_searches_take_turns(hard, photo, monkeypatch):
    real, locked = api.caption_images, []
    monkeypatch.setattr(api, "caption_images", lambda *x, **y: locked.append(hard._turn.locked()) or real(*x, **y))
    hard.caption(photo)
    assert locked == [True]


def test_reading_files_leaves_the_process_its_warnings(captioner, photo, tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(png(photo))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("not safe in threads")

    monkeypatch.setattr(warnings, "catch_warnings", refuse)
    captioner.caption([tmp_path / "x.png", str(tmp_path / "x.png")])


def test_loading_takes_nobodys_random_numbers(tiny_checkpoint):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_captioner(tiny_checkpoint)
    torch.testing.assert_close(torch.rand(3), expected)


def test_captions_are_compared_by_identity(captioner, photo):
    one, other = captioner.caption([photo, photo])
    assert one == one
    assert one != other
    assert one in [other, one]
    assert len({one, other}) == 2


def test_a_caption_as_json_has_all_of_it(captioner, photo):
    (caption,) = captioner.caption(photo, num_captions=2)
    read = json.loads(json.dumps(caption.as_dict()))
    assert set(read) == {field.name for field in dataclasses.fields(caption)}
    assert (read["text"], read["size"]) == (caption.text, [32, 32])
    np.testing.assert_allclose(read["alphas"], caption.alphas, atol=1e-5)
    assert [other["words"] for other in read["alternatives"]] == [list(c.words) for c in caption.alternatives]


@pytest.mark.parametrize("scale", [0.5, 2])
def test_an_overlay_on_another_size_of_the_photo_is_refused(captioner, photo, scale, tmp_path):
    (caption,) = captioner.caption(photo)
    other = photo.resize((int(32 * scale), int(32 * scale)))
    with pytest.raises(ValueError, match=f"the photo has {other.width}x{other.height} pixels, the captioned one had"):
        caption.overlay(other, tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_an_overlay_that_cannot_be_written_names_its_own_file(captioner, photo, tmp_path):
    (caption,) = captioner.caption(photo)
    with pytest.raises(FileNotFoundError, match=r"absent/x\.html'") as caught:
        caption.overlay(photo, tmp_path / "absent" / "x.html")
    assert ".partial" not in str(caught.value)


def test_types_are_there_for_those_who_check_them():
    assert (ROOT / "captioning" / "py.typed").is_file()
    assert '"py.typed"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("file", "command", "module"),
    [
        ("train.py", "train.py", "tensorboard"),
        ("captioning/train.py", "captioning.train", "accelerate"),
        ("captioning/evaluate.py", "captioning.evaluate", "h5py"),
        ("captioning/compare.py", "captioning.compare", "pycocoevalcap"),
        ("preprocess/__main__.py", "preprocess", "h5py"),
        ("preprocess/shapes_check.py", "preprocess.shapes_check", "pycocotools"),
    ],
)
def test_a_command_without_its_extra_says_which(file, command, module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not there
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / file), run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err == f"{command}: needs {module} (this package's extra `train`)\n"
