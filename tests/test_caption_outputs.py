"""What caption.py writes beside captions: overlays, JSON and lists of words."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_caption import captioned

from captioning import load_captioner, visualize, visualize_html
from captioning.api import OVERLAYS, Captioner
from captioning.checkpoint import load_checkpoint, save_checkpoint
from captioning.files import make_folder
from captioning.images import open_image, to_square, visible_box
from captioning.models.captioner import build_model
from captioning.vocabulary import END


def test_json_on_standard_output_holds_the_attention_of_every_word(call_caption, photos):
    code, out, err = call_caption(photos, "--json", "-", "--max-length", 8)
    values = json.loads("\n".join(out))
    assert code == 0
    assert captioned(err) == [value["image"] for value in values]  # the lines step aside
    for value in values:
        alphas, count = np.array(value["alphas"]), len(value["words"])
        assert alphas.shape == (count, 4, 4)
        np.testing.assert_allclose(alphas.sum((1, 2)), 1, atol=16 * 5e-6)  # rounded to five digits
        assert len(value["log_probs"]) == len(value["betas"]) == count
        assert value["text"] == " ".join(value["words"])
    assert values[2]["box"] == {"left": 10, "top": 0, "right": 50, "bottom": 40}  # the centre of 60x40


def test_json_in_a_file_holds_the_same(call_caption, photos, tmp_path):
    code, out, _ = call_caption(photos, "--json", tmp_path / "new" / "x.json")
    assert code == 0
    values = json.loads((tmp_path / "new" / "x.json").read_text())
    assert [f"{v['image']}\t{v['text']}{'' if v['finished'] else ' ...'}" for v in values] == out


def test_overlays_are_written_one_per_photo(call_caption, photos, tmp_path):
    code, _, err = call_caption(photos / "*.png", "--overlay", tmp_path / "new" / "folder", "--max-length", 4)
    assert code == 0
    folder = tmp_path / "new" / "folder"
    assert err == [f"{photos / name}.png: {folder / name}.png" for name in ("a", "b")]
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "b.png"]
    with Image.open(folder / "a.png") as figure:
        assert figure.format == "PNG"
        assert min(figure.size) > 50


@pytest.fixture
def without_attention(tiny_checkpoint, tmp_path) -> Path:
    """A checkpoint of a decoder that never looks."""
    first = load_checkpoint(tiny_checkpoint)
    decoder = dataclasses.replace(first.decoder, name="lstm")
    model, _ = build_model(first.encoder, decoder, len(first.vocabulary))
    save_checkpoint(tmp_path / "lstm", dataclasses.replace(first, model=model, decoder=decoder))
    return tmp_path / "lstm"


def test_a_model_without_attention_says_so_instead_of_drawing(call_caption, photos, tmp_path, without_attention):
    code, out, err = call_caption(photos, "--overlay", tmp_path / "drawn", checkpoint=without_attention)
    assert (code, out) == (2, [])
    assert err == [f"caption: --overlay: {without_attention} has no attention to draw (its decoder attends to nothing)"]
    assert not (tmp_path / "drawn").exists()


def test_a_model_without_attention_captions_all_the_same(call_caption, photos, tmp_path, without_attention):
    words = ("--json", tmp_path / "x.json", "--words")
    code, out, err = call_caption(photos / "a.png", *words, checkpoint=without_attention)
    assert (code, err) == (0, [])
    assert not any("looked" in line or "beta" in line for line in out)
    (values,) = json.loads((tmp_path / "x.json").read_text())
    assert values["alphas"] is None
    assert values["betas"] is None


@pytest.mark.parametrize(("ending", "begins"), [("gif", b"GIF89a"), ("html", b"<!doctype html>")])
def test_overlays_can_be_animations_and_pages(call_caption, photos, tmp_path, ending, begins):
    code, _, err = call_caption(photos / "a.png", "--overlay", tmp_path, "--overlay-format", ending, "--max-length", 3)
    assert (code, err) == (0, [f"{photos / 'a.png'}: {tmp_path / f'a.{ending}'}"])
    assert (tmp_path / f"a.{ending}").read_bytes().lower().startswith(begins.lower())
    assert [file.name for file in tmp_path.iterdir()] == [f"a.{ending}"]


def test_every_overlay_lies_on_what_the_network_saw_of_the_photo(tiny_checkpoint, photos, tmp_path, monkeypatch):
    caption = load_captioner(tiny_checkpoint).caption([photos / "c.jpg"], max_length=3)[0]
    boxes = []
    for module in (visualize, visualize_html):

        def noted(*arguments, real=module.prepare, **named):
            boxes.append(tuple(named["box"]))
            return real(*arguments, **named)

        monkeypatch.setattr(module, "prepare", noted)
    for ending in OVERLAYS:
        caption.overlay(photos / "c.jpg", tmp_path / f"c{ending}")
    assert boxes == [(10.0, 0.0, 50.0, 40.0)] * 3  # the centre of 60x40


def test_an_overlay_of_another_kind_is_refused(tiny_checkpoint, photos, tmp_path):
    caption = load_captioner(tiny_checkpoint).caption(photos / "a.png", max_length=2)[0]
    with pytest.raises(ValueError, match=r"a\.tiff: an overlay ends with \.png, \.gif, \.html"):
        caption.overlay(photos / "a.png", tmp_path / "a.tiff")


def test_two_photos_of_one_name_give_two_overlays(call_caption, photos, tmp_path):
    call_caption(photos / "a.png", photos / "other", "--overlay", tmp_path, "--max-length", 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-2.png", "a.png"]


def test_an_overlay_never_takes_the_place_of_a_photo(call_caption, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "own")
    (folder / "A-2.PNG").write_bytes(b"somebody's")  # another name for a-2.png where case does not count
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for _ in range(2):
        code, _, err = call_caption(folder / "a.png", folder / "c.jpg", "--overlay", folder, "--max-length", 3)
        assert code == 0
    assert {path: path.read_bytes() for path in before} == before
    assert [Path(line.split(": ")[1]).name for line in err] == ["a-4.png", "c-2.png"]
    assert {path.name for path in folder.glob("*-*.png")} - {"A-2.PNG"} == {"a-3.png", "a-4.png", "c-2.png"}
    code, _, err = call_caption(folder / "a.png", "--json", folder / "a.png")
    assert (code, (folder / "a.png").read_bytes()) == (2, before[folder / "a.png"])
    assert err == [f"caption: --json {folder / 'a.png'}: is a photo to be captioned; give another file to write"]


def test_overlays_in_a_folder_of_their_own_replace_older_ones(call_caption, photos, tmp_path):
    for _ in range(2):
        call_caption(photos / "a.png", "--overlay", tmp_path / "o", "--max-length", 3)
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["a.png"]


def test_a_caption_without_words_has_no_overlay_and_is_no_error(call_caption, photos, tmp_path, tiny_checkpoint):
    silent = load_checkpoint(tiny_checkpoint)
    with torch.no_grad():
        silent.model.decoder.get_parameter("L_o.bias")[END] = 1e4
    save_checkpoint(tmp_path / "silent", silent)
    words = ("--overlay", tmp_path / "drawn", "--json", tmp_path / "x.json", "--words")
    code, out, err = call_caption(photos / "a.png", *words, checkpoint=tmp_path / "silent")
    assert (code, out) == (0, [f"{photos / 'a.png'}\t"])
    assert err == [f"{photos / 'a.png'}: no words to overlay"]
    assert json.loads((tmp_path / "x.json").read_text())[0]["words"] == []


def test_words_are_listed_with_probability_gate_and_place(call_caption, photos, tiny_checkpoint):
    _, out, _ = call_caption(photos / "a.png", "--words", "--max-length", 3)
    caption = load_captioner(tiny_checkpoint).caption([photos / "a.png"], max_length=3)[0]
    assert len(out) == 1 + len(caption.words)
    assert caption.alphas is not None
    told = zip(out[1:], caption.words, caption.log_probs, caption.betas, strict=True)
    for line, word, log_p, beta in told:
        assert line.split()[:6] == [word, "log", "p", f"{log_p:.3f}", "beta", f"{beta:.2f}"]


def test_every_words_own_place_is_told(command, photos, tiny_checkpoint):
    caption = load_captioner(tiny_checkpoint).caption([photos / "a.png"], max_length=3)[0]
    alphas = np.full((3, 4, 4), 0.02)
    for t, place in enumerate(((0, 1), (2, 3), (3, 0))):
        alphas[t][place] = 0.7
    said = io.StringIO()
    command.print_words(dataclasses.replace(caption, alphas=alphas), said)
    for line, (row, column) in zip(said.getvalue().splitlines(), ((1, 2), (3, 4), (4, 1)), strict=True):
        assert line.endswith(f"looked most at row {row} of 4, column {column} of 4 (70%)")


def test_one_overlay_that_cannot_be_drawn_loses_nothing_else(call_caption, command, photos, tmp_path, monkeypatch):
    real = command.Caption.overlay

    def overlay(caption, photo, path):
        if photo.name == "a.png":
            raise OSError("File name too long")
        return real(caption, photo, path)

    monkeypatch.setattr(command.Caption, "overlay", overlay)
    target, files = tmp_path / "all.json", (photos / "a.png", photos / "b.png")
    code, out, err = call_caption(*files, "--json", target, "--overlay", tmp_path / "o")
    assert code == 2
    assert captioned(out) == [str(path) for path in files]
    assert err == [
        f"caption: {files[0]}: no overlay: File name too long",
        f"{files[1]}: {tmp_path / 'o' / 'b.png'}",
    ]
    assert len(json.loads(target.read_text())) == 2


def test_the_longest_name_that_a_file_can_have_has_an_overlay(call_caption, photos, tmp_path):
    photo = tmp_path / f"{'n' * 251}.png"
    shutil.copy(photos / "a.png", photo)
    code, _, _ = call_caption(photo, "--overlay", tmp_path / "o")
    assert code == 0
    assert (tmp_path / "o" / photo.name).is_file()


def test_json_into_a_folder_is_refused_before_the_work(call_caption, photos, tmp_path):
    code, out, err = call_caption(photos / "a.png", "--json", tmp_path)
    assert (code, out) == (2, [])
    assert err == [f"caption: --json {tmp_path}: is a folder; give the file to write"]


@pytest.mark.parametrize("option", [("--top-k", 1), ("--top-p", 0.5), ("--temperature", 5)])
def test_what_only_drawing_reads_is_refused_without_it(call_caption, photos, option):
    code, out, err = call_caption(photos / "a.png", *option)
    assert (code, out) == (2, [])
    assert "only captions that are drawn have it; set sample too (--sample)" in err[0]
    assert call_caption(photos / "a.png", "--sample", *option)[0] == 0


def test_weights_in_json_have_five_digits(call_caption, photos, tmp_path):
    assert call_caption(photos / "a.png", "--json", tmp_path / "x.json")[0] == 0
    (found,) = json.loads((tmp_path / "x.json").read_text())
    numbers = [*found["betas"], *np.ravel(found["alphas"]).tolist()]
    assert all(len(repr(number)) <= 7 or "e-" in repr(number) for number in numbers)


@pytest.mark.parametrize("option", ["--overlay", "--json"])
def test_a_file_in_the_place_of_a_folder_is_named_with_its_option(call_caption, photos, tmp_path, option):
    (tmp_path / "afile").write_text("")
    code, out, err = call_caption(photos / "a.png", option, tmp_path / "afile" / "x")
    assert (code, out, len(err)) == (2, [], 1)
    assert err[0].startswith(f"caption: {option} {tmp_path / 'afile' / 'x'}: ")
    assert err[0].endswith("is no folder and cannot become one: a file is in its place")


@pytest.mark.parametrize("fit", ["crop", "squash"])
def test_a_wide_photo_is_seen_and_its_box_drawn_as_its_model_learned_to_see(fit, tiny_checkpoint, photos):
    one = load_checkpoint(tiny_checkpoint)
    captioner = Captioner(dataclasses.replace(one, encoder=dataclasses.replace(one.encoder, fit=fit)))
    caption, photo = captioner.caption(photos / "c.jpg")[0], open_image(photos / "c.jpg")
    squares = {each: captioner.caption(to_square(photo, 32, each))[0].log_probs for each in ("crop", "squash")}
    assert squares["crop"] != squares["squash"]
    assert caption.log_probs == squares[fit]
    assert caption.box == visible_box(60, 40, fit)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_an_overlay_never_takes_the_place_of_a_photo_that_a_link_leads_to(call_caption, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "own")
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "a.png").symlink_to(folder / "a.png")
    before = (folder / "a.png").read_bytes()
    code, _, _ = call_caption(tmp_path / "best", "--overlay", folder, "--max-length", 3)
    assert (code, (folder / "a.png").read_bytes(), (folder / "a-2.png").is_file()) == (0, before, True)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such files")
def test_a_device_is_not_replaced_by_a_file(call_caption, photos, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    code, _, err = call_caption(photos / "a.png", "--json", tmp_path / "pipe")
    assert (code, err) == (2, [f"caption: --json {tmp_path}/pipe: is no ordinary file; give another name"])


def test_a_page_needs_no_matplotlib(photos, tiny_checkpoint, tmp_path):
    code = "import sys; sys.modules['matplotlib'] = None; from captioning.caption import main; sys.exit(main())"
    words = [str(photos / "a.png"), "--checkpoint", str(tiny_checkpoint), "--device", "cpu", "--max-length", "3"]
    words += ["--overlay", str(tmp_path / "o"), "--overlay-format", "html"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "o" / "a.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_an_overlay_without_matplotlib_is_refused_before_the_work(call_caption, command, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    code, out, err = call_caption(photos / "a.png", "--overlay", tmp_path / "o")
    assert (code, out, "needs matplotlib" in err[0]) == (2, [], True)
    assert not (tmp_path / "o").exists()


def test_what_was_captioned_before_an_interruption_is_not_lost(call_caption, photos, tmp_path, command, monkeypatch):
    real = command.as_json

    def second_stops(path, caption):
        if path.name != "a.png":
            raise KeyboardInterrupt
        return real(path, caption)

    monkeypatch.setattr(command, "as_json", second_stops)
    (tmp_path / "x.json").write_text("of a run before")
    code, _, err = call_caption(photos / "*.png", "--json", tmp_path / "x.json")
    kept = tmp_path / "x.json.partial"
    said = [f"caption: {kept} has the captions of the first 1 photos", "caption: interrupted"]
    assert (code, err) == (130, said)
    assert [value["image"] for value in json.loads(kept.read_text())] == [str(photos / "a.png")]
    assert (tmp_path / "x.json").read_text() == "of a run before"


def test_a_name_that_would_steer_a_terminal_is_written_as_escapes(call_caption, photos, tmp_path):
    shutil.copy(photos / "a.png", tmp_path / "\x1b]0;mine\x07.png")
    _, out, _ = call_caption(tmp_path / "\x1b]0;mine\x07.png")
    assert out[0].startswith(f"{tmp_path}/\\x1b]0;mine\\x07.png\t")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([""], "an image must have a name (got '')"),
        (["a.png", "--json", ""], "--json must name what to write (got '')"),
        (["a.png", "--overlay", ""], "--overlay must name what to write (got '')"),
        (["a.png", "--overlay-format", "html"], "--overlay-format: nothing is drawn; set --overlay too"),
        (["a.png", "--json", "x", "--overlay", "x"], "--json and --overlay: a file and a folder cannot both be x"),
    ],
)
def test_words_that_would_write_nothing_or_another_thing_are_refused(words, said, call_caption, photos, monkeypatch):
    monkeypatch.chdir(photos)
    before = sorted(photos.iterdir())
    code, out, err = call_caption(*words)
    assert (code, out, err) == (2, [], [f"caption: {said}"])
    assert sorted(photos.iterdir()) == before


def test_a_folder_that_cannot_be_made_is_named_with_its_option(monkeypatch, tmp_path):
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "x")

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(PermissionError, match=r"--overlay o: folder .*o cannot be made"):
        make_folder(tmp_path / "o", "--overlay o")
