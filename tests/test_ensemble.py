"""Several voices as one: their mean at every word, on one grid, from one folder."""

import dataclasses
import json
import re
import shutil

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from captioning import load_captioner
from captioning.api import search_config
from captioning.checkpoint import Checkpoint, build_model, load_checkpoint, save_checkpoint
from captioning.config import DecoderConfig, RegionEncoderConfig, SearchConfig
from captioning.data import MIRRORED, CaptionData
from captioning.decoding import search
from captioning.ensemble import main
from captioning.evaluate import caption_split, evaluate
from captioning.evaluate import main as evaluate_main
from captioning.files import short_name
from captioning.images import to_square
from captioning.models.attention import Look, looking
from captioning.models.ensemble import EnsembleDecoder, refine, refine_location
from captioning.models.registry import build_decoder
from captioning.vocabulary import START, Vocabulary
from captioning.voices import Ensemble, caption_images, load_ensemble
from tests.conftest import TINY_DECODER, TINY_ENCODER, _make_talkative

L, D, V = 4, 6, 11


def voice(seed: int, attention: str = "soft", name: str = "attention_lstm"):
    torch.manual_seed(seed)
    config = DecoderConfig(name=name, attention=attention, embedding_dim=8, hidden_dim=12, attention_dim=6, dropout=0.0)
    decoder = build_decoder(config, vocabulary_size=V, annotation_dim=D).eval()
    with torch.no_grad():
        for weight in decoder.parameters():
            weight.mul_(2)
    return decoder


def vectors(seed: int, places: int = L) -> torch.Tensor:
    return torch.randn(3, places, D, generator=torch.Generator().manual_seed(seed))


# The mean


@pytest.mark.parametrize("options", [{"beam_size": 3, "num_captions": 3}, {"sample": True, "num_captions": 3}])
def test_each_word_has_the_mean_of_the_voices_probabilities(options):
    decoders, views = [voice(0), voice(1), voice(2, name="luong")], [vectors(0), vectors(1), vectors(2)]
    config = SearchConfig(max_length=6, **options)
    for i, found in enumerate(search(decoders, views, config, generator=torch.Generator().manual_seed(0))):
        for hypothesis in found:
            words = torch.tensor([[[START, *hypothesis.ids]]])
            outputs = [decoder(a[i : i + 1], words) for decoder, a in zip(decoders, views, strict=True)]
            p = torch.stack([output.logits.softmax(-1) for output in outputs]).mean(0)
            said = p.gather(-1, outputs[0].targets.unsqueeze(-1)).flatten().log()
            assert said.tolist() == pytest.approx(list(hypothesis.log_probs), abs=1e-5)
            for ours, theirs in (("alphas", "alphas"), ("betas", "betas")):
                mean = torch.stack([getattr(output, theirs)[0, 0] for output in outputs]).mean(0)
                torch.testing.assert_close(getattr(hypothesis, ours), mean)
            assert hypothesis.locations is None


def test_voices_that_agree_are_one():
    decoder, a, config = voice(0), vectors(0), SearchConfig(beam_size=4, num_captions=4, max_length=6)
    alone, twice = search(decoder, a, config), search([decoder, decoder], [a, a], config)
    for one, other in zip(alone, twice, strict=True):
        assert [h.ids for h in one] == [h.ids for h in other]
        assert [h.score for h in one] == pytest.approx([h.score for h in other], abs=1e-5)
    assert [h.ids for h in search([decoder], [a], config)[0]] == [h.ids for h in alone[0]]


def test_a_voice_without_attention_speaks_and_shows_nothing():
    decoders = [voice(0), voice(1, name="lstm")]
    found = search(decoders, [vectors(0)] * 2, SearchConfig(beam_size=2, max_length=5))[0][0]
    words = torch.tensor([[[START, *found.ids]]])
    torch.testing.assert_close(found.alphas, decoders[0](vectors(0)[:1], words).alphas[0, 0])
    assert EnsembleDecoder(decoders).attends
    assert not EnsembleDecoder(decoders[1:]).attends
    assert search(decoders[1:] * 2, [vectors(0)] * 2, SearchConfig(max_length=5))[0][0].alphas is None


# Paths of hard attention


def test_many_paths_give_the_sum_over_locations():
    decoder, a = voice(3, "hard"), vectors(0)
    ensemble, word = EnsembleDecoder([decoder], paths=3000), torch.full((3,), START)
    with torch.no_grad(), looking(ensemble, Look("sample", generator=torch.Generator().manual_seed(0))):
        memory = ensemble.prepare([a])
        step = ensemble.step(word, ensemble.initial_state(memory), memory)
    words = torch.tensor([START, 5]).expand(3, 1, 2)
    each = [decoder(a, words, locations=torch.full((3, 1, 1), s)) for s in range(L)]
    p = torch.stack([output.logits.softmax(-1) for output in each], dim=1)  # (image, location, word)
    exact = (each[0].alphas[:, 0, 0].unsqueeze(-1) * p).sum(dim=1)
    spread = (each[0].alphas[:, 0, 0].unsqueeze(-1) * p**2).sum(dim=1) - exact**2
    deviation = (step.logits.exp() - exact).abs() / (spread / 3000).sqrt()
    assert deviation.max() < 4
    assert (p - exact.unsqueeze(1)).abs().max() > 0.05  # a single path is another distribution
    assert step.location.shape == (3, 3000)
    torch.testing.assert_close(step.logits.exp().sum(-1), torch.ones(3))


def test_a_search_with_paths_tells_where_each_looked():
    decoder, a = voice(3, "hard"), vectors(0)
    config = SearchConfig(beam_size=3, max_length=6, location="sample", paths=5)
    for i, (found, *_) in enumerate(search(decoder, a, config, generator=torch.Generator().manual_seed(0))):
        assert found.locations.shape == (len(found.ids), 5)
        words = torch.tensor([[[START, *found.ids]]])
        outputs = [decoder(a[i : i + 1], words, locations=path.view(1, 1, -1)) for path in found.locations.T]
        p = torch.stack([output.logits.softmax(-1) for output in outputs]).mean(0)
        said = p.gather(-1, outputs[0].targets.unsqueeze(-1)).flatten().log()
        assert said.tolist() == pytest.approx(list(found.log_probs), abs=1e-5)


@pytest.mark.parametrize("location", ["argmax", "expected"])
def test_paths_that_cannot_differ_are_refused(location):
    with pytest.raises(ValueError, match="paths=2 needs location='sample'"):
        SearchConfig(location=location, paths=2)
    with pytest.raises(ValueError, match="paths must be positive"):
        SearchConfig(paths=0)


@pytest.mark.parametrize("name", ["paths", "beam_size", "num_captions"])
def test_what_would_fill_all_memory_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name} must be at most 10000 \(got {10**12}\)"):
        SearchConfig(**{"location": "sample", "beam_size": 10_000, name: 10**12})


def test_a_checkpoint_that_draws_paths_may_be_asked_for_another_location():
    own = SearchConfig(location="sample", paths=5)
    assert search_config(own, location="argmax") == SearchConfig()
    assert search_config(own, beam_size=3).paths == 5
    with pytest.raises(ValueError, match="paths=5 needs location='sample'"):
        search_config(SearchConfig(), paths=5)


# Grids


def test_attention_on_a_finer_grid_keeps_its_mass_where_it_is():
    alpha = torch.rand(5, 49).softmax(dim=-1)
    fine = refine(alpha, 100)
    torch.testing.assert_close(fine.sum(-1), torch.ones(5))
    torch.testing.assert_close(fine.view(5, 10, 10)[:, :, :5].sum((1, 2)), _half(alpha.view(5, 7, 7)))
    torch.testing.assert_close(refine(torch.full((1, 49), 1 / 49), 100), torch.full((1, 100), 0.01))
    assert torch.equal(refine(alpha, 49), alpha)
    four = refine(torch.tensor([[0.4, 0.2, 0.3, 0.1]]), 16).view(4, 4)
    torch.testing.assert_close(four[:2, :2], torch.full((2, 2), 0.1))
    torch.testing.assert_close(four[2:, 2:], torch.full((2, 2), 0.025))


def _half(alpha):
    """The mass of the left half of 7 columns."""
    return alpha[:, :, :3].sum((1, 2)) + alpha[:, :, 3].sum(1) / 2


def test_a_location_on_a_finer_grid_is_the_cell_of_its_middle():
    assert refine_location(torch.arange(4), 4, 16).tolist() == [5, 7, 13, 15]
    assert refine_location(torch.arange(9), 9, 9).tolist() == list(range(9))
    assert refine_location(torch.tensor([0, 24, 48]), 49, 100).tolist() == [0, 55, 99]


def test_voices_on_unequal_grids_show_the_finest():
    decoders = [voice(0, "hard"), voice(1, "hard")]
    found = search(decoders, [vectors(0), vectors(1, places=9)], SearchConfig(beam_size=2, max_length=5))[0][0]
    words = torch.tensor([[[START, *found.ids]]])
    coarse, fine = decoders[0](vectors(0)[:1], words), decoders[1](vectors(1, places=9)[:1], words)
    torch.testing.assert_close(found.alphas, (refine(coarse.alphas[0, 0], 9) + fine.alphas[0, 0]) / 2)
    assert torch.equal(found.locations[:, 0], refine_location(coarse.locations[0, 0], 4, 9))
    assert torch.equal(found.locations[:, 1], fine.locations[0, 0])


# Mirrored images


@pytest.fixture
def photo(tiny_data) -> Image.Image:
    return Image.fromarray(CaptionData(tiny_data).image(3).permute(1, 2, 0).numpy())


def test_with_mirror_a_photo_and_its_mirror_image_are_the_same(tiny_checkpoint, photo):
    captioner, mirrored = load_captioner(tiny_checkpoint), photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    one, other = captioner.caption([photo, mirrored], mirror=True)
    assert one.words == other.words
    assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)
    np.testing.assert_allclose(one.alphas, other.alphas[:, :, ::-1], atol=1e-5)
    assert not np.allclose(one.alphas, one.alphas[:, :, ::-1], atol=1e-3)
    plain = captioner.caption([photo, mirrored])
    assert plain[0].log_probs != pytest.approx(plain[1].log_probs, abs=1e-4)


@pytest.mark.parametrize(
    ("decoder", "regions"),
    [
        ({"attention": "hard"}, {}),
        (
            {"name": "luong", "input_feeding": True},
            {"name": "self_attention", "positions": "learned", "dim": 12, "heads": 2},
        ),
        ({"attention": "multi_head", "heads": 2}, {"name": "lstm", "dim": 12}),
        ({"name": "transformer", "heads": 2, "layers": 1, "hidden_dim": 12}, {}),
        ({"name": "lstm", "inject": "each_step", "context": "mean"}, {"name": "lstm", "dim": 12}),
        ({"name": "lstm", "inject": "init", "context": "last"}, {"name": "lstm", "dim": 12}),
        ({"name": "lstm", "inject": "each_step", "context": "last"}, {"name": "lstm", "dim": 12}),
    ],
)
def test_every_decoder_says_the_same_of_both(decoder, regions, tiny_data):
    torch.manual_seed(0)
    data = CaptionData(tiny_data)
    config = dataclasses.replace(TINY_DECODER, **decoder)
    between = RegionEncoderConfig(**regions)
    model, _ = build_model(TINY_ENCODER, config, len(data.vocabulary), region_encoder=between)
    model.eval()
    with torch.no_grad():
        for weight in model.decoder.parameters():
            weight.mul_(3)
    pixels = torch.stack([data.image(i) for i in range(4)])
    search = SearchConfig(beam_size=2, max_length=4, mirror=True)
    for one, other in zip(
        caption_images([model], lambda _, mirrored: pixels.flip(-1) if mirrored else pixels, search),
        caption_images([model], lambda _, mirrored: pixels if mirrored else pixels.flip(-1), search),
        strict=True,
    ):
        assert one[0].ids == other[0].ids
        assert one[0].log_probs == pytest.approx(other[0].log_probs, abs=1e-3)
        if one[0].alphas is not None:
            mirrored = other[0].alphas.unflatten(1, (4, 4)).flip(2).flatten(1)
            torch.testing.assert_close(one[0].alphas, mirrored, atol=1e-4, rtol=1e-3)


def test_a_stored_split_is_mirrored_as_its_pixels_are(tiny_checkpoint, tiny_data, tiny_annotations, tmp_path):
    checkpoint, data = load_checkpoint(tiny_checkpoint), CaptionData(tiny_data)
    shutil.copy(tiny_annotations, tmp_path / "both.h5")
    with h5py.File(tmp_path / "both.h5", "r+") as file, torch.no_grad():
        pixels = torch.stack([data.image(i) for i in range(len(data.names))]).flip(-1)
        file[MIRRORED] = checkpoint.model.encoder(pixels).half().numpy()
    config, indices = SearchConfig(mirror=True), [0, 1, 2, 3]
    ours, theirs = (
        caption_split(checkpoint.model, each, indices, checkpoint.vocabulary, config)
        for each in (CaptionData(tmp_path / "both.h5"), data)
    )
    for name, caption in ours.items():
        assert caption.hypothesis.log_probs == pytest.approx(theirs[name].hypothesis.log_probs, abs=0.05)
    alone = caption_split(checkpoint.model, data, indices, checkpoint.vocabulary, SearchConfig())
    assert any(
        alone[name].hypothesis.log_probs != pytest.approx(caption.hypothesis.log_probs, abs=0.05)
        for name, caption in ours.items()
    )


def test_a_split_is_mirrored_as_photos_are(tiny_checkpoint, tiny_data, photo):
    checkpoint, data = load_checkpoint(tiny_checkpoint), CaptionData(tiny_data)
    config = SearchConfig(mirror=True)
    found = caption_split(checkpoint.model, data, [3], checkpoint.vocabulary, config)[data.names[3]]
    assert found.text == load_captioner(tiny_checkpoint).caption([photo], mirror=True)[0].text


def test_mirrored_vectors_must_be_there(tiny_checkpoint, tiny_annotations, capsys):
    words = ["--checkpoint", str(tiny_checkpoint), "--data", str(tiny_annotations)]
    assert evaluate_main([*words, "--mirror"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"evaluate: {tiny_annotations}: holds no annotation vectors of mirrored images; make it with"
    )
    assert evaluate_main([*words, "--no-mirror", "--tokenizer", "python"]) == 0


# The folder


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
    assert capsys.readouterr().err.startswith(f"ensemble: {tmp_path / 'deep' / 'config.json'}: not JSON")


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
    _make_talkative(model.decoder)
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
        (["x=A", "x=A"], "each member needs a name of its own (got x, x)"),
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
        (["fine", "fine"], "members: each name may come once (got fine, fine)"),
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
    _make_talkative(model.decoder)
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
    assert (tmp_path / "photo.png").stat().st_size > 0
    assert command.main([*words, "--paths", "3"]) == 2
    assert "paths=3 needs location='sample'" in capsys.readouterr().err
