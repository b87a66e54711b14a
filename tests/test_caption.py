"""The command that captions photos, and the three lines of library use."""

import dataclasses
import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from captioning import images, load_captioner
from captioning.checkpoint import PRETRAINED, load_checkpoint, save_checkpoint
from captioning.config import SearchConfig
from captioning.images import visible_box
from captioning.vocabulary import END
from preprocess.shapes import make_scene


def captioned(lines: list[str]) -> list[str]:
    """The paths of the lines `path<TAB>caption`."""
    assert all(line.count("\t") == 1 and line.split("\t")[1] for line in lines)
    return [line.split("\t")[0] for line in lines]


def test_a_file_gives_one_line_with_its_caption(call_caption, photos, tiny_checkpoint):
    code, out, err = call_caption(photos / "a.png")
    caption = load_captioner(tiny_checkpoint).caption([photos / "a.png"], beam_size=5)[0]
    assert (code, err) == (0, [])
    assert out == [f"{photos / 'a.png'}\t{caption.text}{'' if caption.finished else ' ...'}"]


@pytest.mark.parametrize("name", ["caption", "train"])
def test_the_scripts_beside_the_package_are_its_commands(name):
    script = runpy.run_path(str(ROOT / f"{name}.py"))
    assert script["main"] is importlib.import_module(f"captioning.{name}").main


def test_hidden_files_of_a_folder_are_no_photos(call_caption, photos, tmp_path):
    shutil.copy(photos / "a.png", tmp_path)
    (tmp_path / "._a.png").write_bytes(b"\x00\x05")
    code, out, err = call_caption(tmp_path)
    assert (code, captioned(out), err) == (0, [str(tmp_path / "a.png")], [])


@pytest.fixture
def short(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint, which by its own search says two words at most, the likeliest."""
    checkpoint = load_checkpoint(tiny_checkpoint)
    own = SearchConfig(beam_size=1, max_length=2, no_repeat_ngram=1)
    save_checkpoint(tmp_path / "short", dataclasses.replace(checkpoint, search=own))
    return tmp_path / "short"


def test_a_checkpoint_captions_by_its_own_search_unless_told_otherwise(call_caption, photos, tiny_checkpoint, short):
    path = photos / "a.png"
    plain, own = load_captioner(tiny_checkpoint), load_captioner(short)
    assert own.caption([path])[0].text == plain.caption([path], beam_size=1, max_length=2, no_repeat_ngram=1)[0].text
    assert len(own.caption([path])[0].words) == 2
    assert len(own.caption([path], max_length=4)[0].words) > 2
    told = ("--beam-size", 5, "--max-length", 30, "--no-repeat-ngram", 0)
    assert call_caption(path, checkpoint=short)[1][0].removesuffix(" ...") == f"{path}\t{own.caption([path])[0].text}"
    assert call_caption(path, *told, checkpoint=short) == call_caption(path)


def test_drawn_captions_take_nothing_of_a_checkpoints_search(photos, tiny_checkpoint, short):
    path = photos / "a.png"
    drawn = [load_captioner(folder).caption([path], sample=True, seed=3)[0] for folder in (tiny_checkpoint, short)]
    assert drawn[0].text == drawn[1].text


def test_a_folder_gives_its_image_files_in_order(call_caption, photos):
    code, out, _ = call_caption(photos)
    assert code == 0
    assert captioned(out) == [str(photos / name) for name in ("a.png", "b.png", "c.jpg")]


def test_a_glob_gives_what_it_matches(call_caption, photos):
    _, out, _ = call_caption(photos / "**" / "*.png")
    assert captioned(out) == [str(photos / name) for name in ("a.png", "b.png", "other/a.png")]


def test_a_file_that_is_named_twice_is_captioned_once(call_caption, photos):
    _, out, _ = call_caption(photos / "b.png", photos / "*.png", photos)
    assert captioned(out) == [str(photos / name) for name in ("b.png", "a.png", "c.jpg")]


def test_a_file_whose_name_looks_like_a_glob_is_taken_as_it_is(call_caption, photos, tmp_path):
    shutil.copy(photos / "a.png", tmp_path / "a[1].png")
    _, out, _ = call_caption(tmp_path / "a[1].png")
    assert captioned(out) == [str(tmp_path / "a[1].png")]


def test_a_broken_file_stops_no_other(call_caption, photos, tmp_path):
    (tmp_path / "broken.png").write_bytes((photos / "a.png").read_bytes()[:60])
    alone = [line for name in ("a.png", "b.png") for line in call_caption(photos / name)[1]]
    code, out, err = call_caption(photos / "a.png", tmp_path / "broken.png", photos / "b.png")
    assert code == 2
    assert out == alone
    assert len(err) == 1
    assert err[0].startswith(f"caption: {tmp_path / 'broken.png'}: cannot be read as an image")


def test_only_broken_files_give_no_line(call_caption, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"")
    code, out, err = call_caption(tmp_path, "--json", tmp_path / "x.json")
    assert (code, out, len(err)) == (2, [], 1)
    assert json.loads((tmp_path / "x.json").read_text()) == []


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_batch_changes_no_caption(call_caption, photos, batch_size):
    assert call_caption(photos, "--batch-size", batch_size)[1] == call_caption(photos)[1]


def test_several_captions_come_best_first(call_caption, photos, tiny_checkpoint):
    words = ("--num-captions", 3, "--sample", "--max-length", 6)
    _, out, _ = call_caption(photos / "a.png", *words)
    assert captioned(out) == [str(photos / "a.png")] * 3
    options = {"num_captions": 3, "sample": True, "max_length": 6}
    best = load_captioner(tiny_checkpoint).caption([photos / "a.png"], **options)[0]
    assert [line.split("\t")[1].removesuffix(" ...") for line in out] == [c.text for c in (best, *best.alternatives)]
    assert best.score >= best.alternatives[0].score >= best.alternatives[1].score


def test_every_batch_draws_anew(call_caption, photos, tmp_path):
    copy = shutil.copy(photos / "a.png", tmp_path / "copy.png")
    _, lines, _ = call_caption(photos / "a.png", copy, "--sample", "--batch-size", 1, "--max-length", 20)
    one, other = (line.split("\t")[1] for line in lines)
    assert one != other


def test_samples_follow_the_seed(call_caption, photos):
    first, again, *others = (call_caption(photos / "a.png", "--sample", "--seed", seed)[1] for seed in (1, 1, 2, 3, 4))
    assert first == again
    assert any(first != other for other in others)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["absent.png"], r"absent\.png: no such file, folder or match"),
        (["absent/*.png"], r"absent/\*\.png: no such file, folder or match"),
        (["PHOTO", "--beam-size", "0"], "beam_size must be positive"),
        (["PHOTO", "--num-captions", "9"], "num_captions=9 needs beam_size"),
        (["PHOTO", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["PHOTO", "--batch-size", "-3"], "--batch-size must be at least 1"),
        (["PHOTO", "--top-p", "2"], "top_p"),
        (["PHOTO", "--device", "abacus"], "abacus"),
        (["PHOTO", "--json", "PHOTO/x.json"], r"a\.png"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(command, photos, tiny_checkpoint, capsys, words, named):
    words = [word.replace("PHOTO", str(photos / "a.png")) for word in words]
    code = command.main(["--checkpoint", str(tiny_checkpoint), "--device", "cpu", *words])
    err = capsys.readouterr().err.splitlines()
    assert code == 2
    assert len(err) == 1
    assert re.search(named, err[0])


def test_an_empty_folder_says_what_it_looked_for(call_caption, tmp_path):
    code, out, err = call_caption(tmp_path)
    assert (code, out) == (2, [])
    assert err[0].startswith(f"caption: {tmp_path}: no image files in this folder (.bmp")


def test_a_missing_checkpoint_names_the_pretrained_ones(call_caption, photos, tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    monkeypatch.setattr("captioning.checkpoint.PRETRAINED", tmp_path)
    code, out, err = call_caption(photos / "a.png", checkpoint=Path("absent"))
    assert (code, out) == (2, [])
    assert err == ["caption: absent: no checkpoint folder, nor one of the pretrained: one"]


@pytest.mark.parametrize("folder", sorted(PRETRAINED.iterdir()), ids=lambda folder: folder.name)
def test_what_comes_with_the_package_captions_a_picture_and_has_a_card(folder, tmp_path):
    make_scene(0, 0).render(200).save(tmp_path / "scene.png")
    captioner = load_captioner(folder.name)
    caption = captioner.caption(tmp_path / "scene.png")[0]
    assert len(caption.words) > 2
    finest = max(model.encoder.grid for model in captioner.ensemble.models)
    assert caption.alphas.shape == (len(caption.words), *finest)
    assert (caption.locations is not None) == folder.name.endswith("-hard")
    assert (folder / "README.md").read_text(encoding="utf-8").startswith(f"# {folder.name}\n")
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) <= 25e6


def test_the_real_command_prints_no_traceback(photos, tiny_checkpoint, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    words = [photos / "a.png", tmp_path / "broken.jpg", "--checkpoint", tiny_checkpoint, "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, ROOT / "caption.py", *words], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert captioned(done.stdout.splitlines()) == [str(photos / "a.png")]
    assert len(done.stderr.splitlines()) == 1


def test_a_reader_that_has_enough_is_no_error(photos, tiny_checkpoint):
    words = [sys.executable, ROOT / "caption.py", photos / "a.png", "--checkpoint", tiny_checkpoint, "--device", "cpu"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_files_images_and_arrays_give_the_same_caption(photos, tiny_checkpoint):
    captioner = load_captioner(tiny_checkpoint)
    path = photos / "c.jpg"
    with Image.open(path) as image:
        kinds = [path, str(path), image.convert("RGB"), np.asarray(image.convert("RGB"))]
    first, *others = captioner.caption(kinds, beam_size=2)
    assert captioner.caption(path, beam_size=2)[0].words == first.words
    for other in others:
        assert (other.words, other.log_probs) == (first.words, first.log_probs)
    assert first.box == visible_box(60, 40, "crop")
    assert first.alphas is not None
    assert (first.alphas.shape, first.alphas.dtype) == ((len(first.words), 4, 4), np.float32)
    np.testing.assert_allclose(first.alphas.sum((1, 2)), 1, rtol=1e-5)


def test_an_unfinished_caption_is_marked_and_has_the_score_of_its_words(
    call_caption, photos, tiny_checkpoint, tmp_path
):
    endless = load_checkpoint(tiny_checkpoint)
    with torch.no_grad():
        endless.model.decoder.get_parameter("L_o.bias")[END] = -1e4
    save_checkpoint(tmp_path / "endless", endless)
    _, out, _ = call_caption(photos / "a.png", "--max-length", 3, checkpoint=tmp_path / "endless")
    caption = load_captioner(tmp_path / "endless").caption(photos / "a.png", max_length=3)[0]
    assert out == [f"{photos / 'a.png'}\t{caption.text} ..."]
    assert not caption.finished
    assert len(caption.words) == 3
    assert sum(caption.log_probs) == pytest.approx(caption.score, rel=1e-5)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (np.zeros((4, 4), np.uint8), r"an image array must be uint8 \(H, W, 3\), got uint8 \(4, 4\)"),
        (np.zeros((4, 4, 3), np.float32), r"an image array must be uint8 \(H, W, 3\), got float32"),
    ],
)
def test_a_wrong_array_is_refused(tiny_checkpoint, value, named):
    with pytest.raises(ValueError, match=named):
        load_captioner(tiny_checkpoint).caption([value])


def test_a_misspelt_option_names_those_there_are(tiny_checkpoint, photos):
    with pytest.raises(ValueError, match="unknown option 'beams'; allowed: beam_size, "):
        load_captioner(tiny_checkpoint).caption(photos / "a.png", beams=3)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_nothing_is_refused(tiny_checkpoint, photos, batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1 \\(got {batch_size}\\)"):
        load_captioner(tiny_checkpoint).caption(photos / "a.png", batch_size=batch_size)


def test_a_photo_that_says_it_is_turned_is_captioned_as_it_is_shown(call_caption, photos, tiny_checkpoint, tmp_path):
    upright = Image.open(photos / "c.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored after a quarter turn anti-clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    target = tmp_path / "all.json"
    code, _, _ = call_caption(
        tmp_path / "turned.png", tmp_path / "upright.png", "--json", target, "--overlay", tmp_path / "o"
    )
    turned, straight = json.loads(target.read_text())
    assert code == 0
    assert [turned[name] for name in ("words", "box", "alternatives")] == [
        straight[name] for name in ("words", "box", "alternatives")
    ]
    assert turned["log_probs"] == pytest.approx(straight["log_probs"], rel=1e-4)
    assert turned["text"] == load_captioner(tiny_checkpoint).caption([tmp_path / "turned.png"])[0].text


def test_a_file_name_that_is_no_text_comes_out_as_it_went_in(photos, tiny_checkpoint, tmp_path):
    name = os.fsencode(tmp_path) + b"/\xe9.png"
    shutil.copy(photos / "a.png", name)
    words = [sys.executable, "caption.py", name, "--checkpoint", str(tiny_checkpoint), "--device", "cpu"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stdout.split(b"\t")[0]) == (0, name), done.stderr


def test_a_name_with_a_line_break_stays_on_its_line(call_caption, photos, tmp_path):
    shutil.copy(photos / "a.png", tmp_path / "new\nline.png")
    code, out, _ = call_caption(tmp_path / "new\nline.png")
    assert (code, captioned(out)) == (0, [f"{tmp_path}/new\\nline.png"])


def test_an_interruption_is_one_line(command, photos, tiny_checkpoint, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupted)
    assert command.main([str(photos / "a.png"), "--checkpoint", str(tiny_checkpoint)]) == 130
    assert capsys.readouterr().err == "caption: interrupted\n"


@pytest.mark.parametrize("device", ["gpu", "meta:x"])
def test_a_device_that_is_not_there_is_named(photos, tiny_checkpoint, command, capsys, device):
    words = [str(photos / "a.png"), "--checkpoint", str(tiny_checkpoint), "--device", device]
    assert command.main(words) == 2
    assert capsys.readouterr().err.startswith(f"caption: device {device}: allowed is cpu")


def test_a_photo_without_pixels_is_refused(tiny_checkpoint):
    with pytest.raises(ValueError, match="a photo has pixels, got 0x4"):
        load_captioner(tiny_checkpoint).caption([Image.new("RGB", (0, 4))])


@pytest.mark.parametrize("wanted", [True, False])
def test_when_nobody_reads_any_more_only_what_is_written_elsewhere_is_still_made(
    wanted, command, photos, tiny_checkpoint, tmp_path, monkeypatch
):
    def gone(*_: object, **__: object) -> None:
        raise BrokenPipeError

    captioned: list[object] = []
    real = command.captions_of

    def counted(*words: object):
        for each in real(*words):
            captioned.append(each)
            yield each

    monkeypatch.setattr(command, "print", gone, raising=False)
    monkeypatch.setattr(command, "go_on_unheard", lambda stream: None)
    monkeypatch.setattr(command, "captions_of", counted)
    words = [str(photos / name) for name in ("a.png", "b.png", "c.jpg")]
    more = ["--json", str(tmp_path / "all.json")] if wanted else []
    assert command.main([*words, "--checkpoint", str(tiny_checkpoint), "--device", "cpu", *more]) == 0
    assert len(captioned) == (3 if wanted else 1)
    assert (tmp_path / "all.json").is_file() == wanted


def test_large_photos_make_small_batches(command, photos, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 60 * 40)  # c.jpg fills it, a.png and b.png have 32 x 32
    files = [photos / name for name in ("a.png", "b.png", "c.jpg", "notes.txt", "a.png")]
    assert [len(batch) for batch in command.opened(files, 16)] == [3, 2]
    assert [len(batch) for batch in command.opened(files[:2] * 2, 2)] == [2, 2]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.parametrize("heads", ["| head -c 10 >/dev/null", '2>&1 >"$0" | head -c 1 >/dev/null'])
def test_json_for_a_reader_that_leaves_is_no_error(heads, photos, tiny_checkpoint, tmp_path):
    many = [str(photos / "a.png"), str(photos / "b.png"), "--num-captions", "5", "--json", "-", "--words"]
    words = [
        sys.executable,
        "-u",
        str(ROOT / "caption.py"),
        *many,
        "--checkpoint",
        str(tiny_checkpoint),
        "--device",
        "cpu",
    ]
    script = f'(("$@"; echo $? >&3) {heads}) 3>"$0.code"'
    subprocess.run(["bash", "-c", script, str(tmp_path / "all.json"), *words], check=True, capture_output=True)
    assert (tmp_path / "all.json.code").read_text() == "0\n"
    if ">" in heads.split("|")[0]:
        assert len(json.loads((tmp_path / "all.json").read_text())) == 2
