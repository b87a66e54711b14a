"""Ensembles on the disk and at work: members, folders, the commands."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY_DECODER, TINY_ENCODER, make_talkative
from PIL import Image

from captioning import load_captioner
from captioning.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from captioning.config import SearchConfig
from captioning.data import CaptionData
from captioning.decoding import search
from captioning.ensemble import main
from captioning.evaluate import evaluate
from captioning.evaluate import main as evaluate_main
from captioning.files import short_name
from captioning.images import to_square
from captioning.models.captioner import build_model
from captioning.vocabulary import Vocabulary
from captioning.voices import Ensemble, load_ensemble


def test_members_need_names(tiny_checkpoint):
    one = load_checkpoint(tiny_checkpoint)
    with pytest.raises(ValueError, match=r"several members need as many names, one alone none \(got 2 and 0\)"):
        Ensemble((one, one), SearchConfig())
    with pytest.raises(ValueError, match="got 0 and 0"):
        Ensemble((), SearchConfig())


def test_a_folders_name_may_have_an_equals_sign(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "lr=0.1")
    assert main([str(tmp_path / "lr=0.1"), str(tiny_checkpoint), "--output", str(tmp_path / "new")]) == 0
    assert load_ensemble(tmp_path / "new").names == ("1", "2")


def test_a_config_without_bottom_is_named(tiny_checkpoint, tmp_path, capsys):
    shutil.copytree(tiny_checkpoint, tmp_path / "deep")
    (tmp_path / "deep" / "config.json").write_text("[" * 200_000)
    assert main([str(tmp_path / "deep"), str(tiny_checkpoint), "--output", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err.startswith(f"ensemble: {tmp_path / 'deep' / 'config.json'}: is not JSON")


def test_a_member_keeps_its_ensembles_name_where_checkpoints_are_named(pair):
    assert short_name("flickr8k-soft/fine") == "flickr8k-soft/fine"
    assert short_name(pair / "fine") == "pair/fine"
    assert short_name("/elsewhere/runs/x") == "x"


@pytest.fixture
def other(tiny_checkpoint, tmp_path):
    """A checkpoint with another decoder, on a finer grid."""
    first = load_checkpoint(tiny_checkpoint)
    torch.manual_seed(5)
    encoder = dataclasses.replace(TINY_ENCODER, image_size=48, fit=first.encoder.fit, resample="bilinear")
    decoder = dataclasses.replace(TINY_DECODER, hidden_dim=20)
    model, encoder = build_model(encoder, decoder, len(first.vocabulary))
    make_talkative(model.decoder)
    save_checkpoint(tmp_path / "other", Checkpoint(model, encoder, decoder, first.vocabulary))
    return tmp_path / "other"


@pytest.fixture
def pair(tiny_checkpoint, other, tmp_path):
    assert main([f"fine={other}", f"coarse={tiny_checkpoint}", "--output", str(tmp_path / "pair"), "--mirror"]) == 0
    return tmp_path / "pair"


def test_an_ensembles_folder_captions_as_its_members_together(pair, other, tiny_checkpoint, photo):
    loaded = load_ensemble(pair)
    assert loaded.names == ("fine", "coarse")
    assert loaded.search == SearchConfig(mirror=True)
    photo = photo.resize((40, 40))
    caption = load_captioner(pair).caption([photo], mirror=False)[0]
    models = [load_checkpoint(other).model, load_checkpoint(tiny_checkpoint).model]
    views = []
    for model, size, resample in zip(models, (48, 32), ("bilinear", "bicubic"), strict=True):
        pixels = np.array(to_square(photo, size, "crop", resample))
        with torch.no_grad():
            views.append(model.annotate(torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)))
    found = search([model.decoder for model in models], views, SearchConfig())[0][0]
    assert caption.words == tuple(loaded.vocabulary.decode(found.ids))
    assert caption.log_probs == pytest.approx(found.log_probs[: len(caption.words)], abs=1e-4)
    assert caption.alphas.shape == (len(caption.words), 6, 6)
    np.testing.assert_allclose(caption.alphas.sum((1, 2)), 1, atol=1e-5)


def test_an_ensemble_is_evaluated_as_it_captions(pair, tiny_data):
    data = CaptionData(tiny_data)
    found, _ = evaluate(load_ensemble(pair), data, "val", SearchConfig(), tokenizer="python")
    photos = [Image.fromarray(data.image(i).permute(1, 2, 0).numpy()) for i in data.indices("val").tolist()]
    captions = load_captioner(pair).caption(photos, mirror=False)
    for caption, evaluated in zip(captions, found.values(), strict=True):
        length, hypothesis = len(caption.words), evaluated.hypothesis
        assert caption.text == evaluated.text
        assert caption.log_probs == pytest.approx(hypothesis.log_probs[:length], abs=1e-4)
        np.testing.assert_allclose(caption.alphas.reshape(length, -1), hypothesis.alphas[:length], atol=1e-4)
        np.testing.assert_allclose(caption.betas, hypothesis.betas[:length], atol=1e-4)


def test_where_one_model_is_wanted_the_members_are_named(pair, tiny_data, capsys):
    with pytest.raises(
        ValueError, match=f"{pair}: an ensemble; here one model is wanted: {pair}/fine or {pair}/coarse"
    ):
        load_checkpoint(pair)
    words = ["--checkpoint", str(pair), "--data", str(tiny_data), "--diagnose"]
    assert evaluate_main(words) == 2
    assert "is an ensemble; diagnose its members one by one" in capsys.readouterr().err


def test_an_ensemble_may_be_stored_in_half_the_size(pair, other, tiny_checkpoint, tmp_path):
    words = [f"fine={other}", f"coarse={tiny_checkpoint}", "--half", "--output", str(tmp_path / "half")]
    assert main(words) == 0
    size = {
        folder: sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
        for folder in (pair, tmp_path / "half")
    }
    assert size[tmp_path / "half"] < 0.55 * size[pair]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["A"], "an ensemble has 2 to 16 members (got 1)"),
        (["x=A", "x=A"], "each member needs a name of its own, in whatever case (got x, x)"),
        (["x=A", "X=A"], "each member needs a name of its own, in whatever case (got x, X)"),
        (["../x=A", "y=A"], "a member's name has letters, digits, - and _, at most 64 (got '../x')"),
        (["A", "absent"], "absent: no checkpoint folder"),
        (["A", "words"], "2: its vocabulary is not that of 1"),
        (["A", "fit"], "2: made photos square with fit squash, 1 with crop"),
    ],
)
def test_what_cannot_be_an_ensemble_is_refused_and_leaves_nothing(members, message, tiny_checkpoint, tmp_path, capsys):
    first = load_checkpoint(tiny_checkpoint)
    shorter = Vocabulary([*first.vocabulary.words[:-1], "zebra"])
    save_checkpoint(tmp_path / "words", dataclasses.replace(first, vocabulary=shorter))
    save_checkpoint(
        tmp_path / "fit", dataclasses.replace(first, encoder=dataclasses.replace(first.encoder, fit="squash"))
    )
    places = {"A": tiny_checkpoint, "words": tmp_path / "words", "fit": tmp_path / "fit"}
    asked = [re.sub(r"\w+$", lambda m: str(places.get(m[0], m[0])), member) for member in members]
    assert main([*asked, "--output", str(tmp_path / "new")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ensemble: {message}")
    assert not (tmp_path / "new").exists()


def test_an_ensemble_is_never_written_over(pair, other, tiny_checkpoint, capsys):
    before = (pair / "config.json").read_bytes()
    assert main([str(other), str(tiny_checkpoint), "--output", str(pair)]) == 2
    assert capsys.readouterr().err == f"ensemble: --output {pair}: is there already\n"
    assert (pair / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["fine", "../pair/coarse"], "members: a member's name has letters, digits, - and _"),
        (["fine", "/etc"], "members: a member's name has"),
        (["fine", 3], "members: a member's name has"),
        (["fine", "fine"], "members: each member needs a name of its own, in whatever case (got fine, fine)"),
        (["fine", "Fine"], "members: each member needs a name of its own, in whatever case (got fine, Fine)"),
        ("fine", "members must be a list of 1 to 16 names"),
        ([], "members must be a list of 1 to 16 names"),
        (["fine"] * 17, "members must be a list of 1 to 16 names"),
        (["fine", "absent"], "absent/config.json: no such file"),
    ],
)
def test_a_config_that_names_strange_members_is_refused(pair, members, message):
    config = json.loads((pair / "config.json").read_text())
    (pair / "config.json").write_text(json.dumps({**config, "members": members}))
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        load_captioner(pair)


# The command line


def test_the_command_mirrors_and_tells_of_every_cell(command, tiny_checkpoint, photo, tmp_path, capsys):
    first = load_checkpoint(tiny_checkpoint)
    torch.manual_seed(1)
    decoder = dataclasses.replace(TINY_DECODER, attention="hard")
    model, encoder = build_model(first.encoder, decoder, len(first.vocabulary))
    make_talkative(model.decoder)
    save_checkpoint(tmp_path / "hard", Checkpoint(model, encoder, decoder, first.vocabulary))
    photo.save(tmp_path / "photo.png")
    words = [
        str(tmp_path / "photo.png"),
        "--checkpoint",
        str(tmp_path / "hard"),
        "--device",
        "cpu",
        "--max-length",
        "4",
    ]
    looks = ["--location", "sample", "--paths", "3", "--mirror", "--words"]
    assert command.main([*words, *looks, "--json", str(tmp_path / "x.json"), "--overlay", str(tmp_path)]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    (said,) = json.loads((tmp_path / "x.json").read_text())
    assert np.shape(said["locations"]) == (len(said["words"]), 6)
    for line, cells in zip(lines, said["locations"], strict=True):
        assert line.count(" at row ") == len(set(cells))
    assert (tmp_path / "photo-2.png").stat().st_size > 1000  # the overlay, beside the photo
    assert command.main([*words, "--paths", "3"]) == 2
    assert "paths=3 needs location='sample'" in capsys.readouterr().err
