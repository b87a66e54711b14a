"""Several voices as one: their mean at every word, shown on one grid; sampled paths and mirrored images among them."""

import dataclasses
import shutil

import h5py
import numpy as np
import pytest
import torch
from conftest import TINY_DECODER, TINY_ENCODER
from PIL import Image

from captioning import load_captioner
from captioning.api import search_config
from captioning.checkpoint import load_checkpoint, save_checkpoint
from captioning.config import DecoderConfig, RegionEncoderConfig, SearchConfig
from captioning.data import MIRRORED, CaptionData
from captioning.decoding import search
from captioning.ensemble import build_ensemble
from captioning.evaluate import caption_split
from captioning.evaluate import main as evaluate_main
from captioning.models.attention import Look, looking
from captioning.models.captioner import build_model
from captioning.models.ensemble import EnsembleDecoder, refine, refine_location
from captioning.models.registry import build_decoder
from captioning.vocabulary import START
from captioning.voices import caption_images

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
    ensemble, word = EnsembleDecoder([decoder], paths=500), torch.full((3,), START)
    with torch.no_grad(), looking(ensemble, Look("sample", generator=torch.Generator().manual_seed(0))):
        memory = ensemble.prepare([a])
        step = ensemble.step(word, ensemble.initial_state(memory), memory)
    words = torch.tensor([START, 5]).expand(3, 1, 2)
    each = [decoder(a, words, locations=torch.full((3, 1, 1), s)) for s in range(L)]
    p = torch.stack([output.logits.softmax(-1) for output in each], dim=1)  # (image, location, word)
    exact = (each[0].alphas[:, 0, 0].unsqueeze(-1) * p).sum(dim=1)
    spread = (each[0].alphas[:, 0, 0].unsqueeze(-1) * p**2).sum(dim=1) - exact**2
    deviation = (step.logits.exp() - exact).abs() / (spread / 500).sqrt()
    assert deviation.max() < 4
    assert (p - exact.unsqueeze(1)).abs().max() > 0.05  # a single path is another distribution
    assert step.location.shape == (3, 500)
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
        caption_images([model], lambda _, view: pixels.flip(-1) if view.mirrored else pixels, search),
        caption_images([model], lambda _, view: pixels if view.mirrored else pixels.flip(-1), search),
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
        file[MIRRORED].attrs["grid"] = checkpoint.model.encoder.grid
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


def test_an_ensemble_searches_as_its_first_member_does(tiny_checkpoint, tmp_path):
    own = SearchConfig(beam_size=3, length_penalty=0.8, no_repeat_ngram=2, mirror=True)
    save_checkpoint(tmp_path / "a", dataclasses.replace(load_checkpoint(tiny_checkpoint), search=own))
    assert build_ensemble([str(tmp_path / "a"), str(tiny_checkpoint)]).search == own
    assert build_ensemble([str(tiny_checkpoint), str(tmp_path / "a")]).search == SearchConfig()
    assert build_ensemble([str(tiny_checkpoint), str(tmp_path / "a")], mirror=True).search == SearchConfig(mirror=True)


def test_mirrored_vectors_must_be_there(tiny_checkpoint, tiny_annotations, capsys):
    words = ["--checkpoint", str(tiny_checkpoint), "--data", str(tiny_annotations)]
    assert evaluate_main([*words, "--mirror"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"evaluate: {tiny_annotations}: holds no annotation vectors of mirrored images; make it with"
    )
    assert evaluate_main([*words, "--no-mirror", "--tokenizer", "python"]) == 0
