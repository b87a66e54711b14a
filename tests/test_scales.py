"""Pictures at several sizes: each scale has its vectors, its decoder and its batches, and all speak with one voice."""

import dataclasses
import itertools
import json
import re
import shutil
from collections import Counter

import h5py
import numpy as np
import pytest
import torch
from conftest import TINY_DECODER, TINY_ENCODER
from photo_folders import ENCODER, command, photos
from PIL import Image
from tiny_runs import TINY, same_bits, tiny_settings
from torchvision.transforms.v2 import functional as resizing

from captioning import load_captioner, training
from captioning.checkpoint import load_checkpoint
from captioning.config import (
    RegionEncoderConfig,
    SearchConfig,
)
from captioning.data import CaptionData, CaptionDataset, Sample, plan_epoch, shard
from captioning.decoding import search
from captioning.ensemble import main as ensemble_main
from captioning.evaluate import evaluate
from captioning.evaluate import main as evaluate_main
from captioning.model_config import View
from captioning.models.captioner import build_model
from captioning.models.encoder import build_encoder
from captioning.voices import Ensemble, load_ensemble
from preprocess.__main__ import main as preprocess_main

BOTH = dataclasses.replace(TINY_ENCODER, scales=(48,))
"""4x4 places at 32 pixels, 6x6 at 48."""


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Photos, and a data file with the vectors of both scales and of their mirror images."""
    folder = tmp_path_factory.mktemp("stored")
    root = photos(folder / "in", 12)
    words = command(root, folder / "both.h5", *ENCODER, "--layer", "layer2", "--mirror", "--scales", "48")
    assert preprocess_main(words) == 0
    return root, folder / "both.h5"


@pytest.mark.parametrize("scales", [(32,), (48, 48), (0,), (5000,), tuple(range(40, 48))])
def test_scales_that_are_none_are_refused(scales):
    with pytest.raises(ValueError, match=re.escape(f"none of them image_size=32 (got {list(scales)})")):
        dataclasses.replace(TINY_ENCODER, scales=scales)


def test_each_scale_has_a_grid_and_a_decoder_of_its_own():
    model, encoder = build_model(dataclasses.replace(TINY_ENCODER, scales=(48, 64)), TINY_DECODER, 9)
    assert encoder.scales == (48, 64)
    assert model.encoder.grids == ((4, 4), (6, 6), (8, 8))
    decoders = [model.decoder_of(model.annotate(torch.zeros(1, 3, side, side).byte())) for side in (32, 48, 64)]
    assert decoders == [model.decoder, *model.further] == list(model.decoders)
    assert len({id(decoder) for decoder in decoders}) == 3
    with pytest.raises(ValueError, match="49 annotation vectors are of no grid of the encoder"):
        model.decoder_of(torch.zeros(1, 49, 128))
    with pytest.raises(ValueError, match=r"encoder.scales=\[30\]: each scale must have a grid of its own \(got .*4"):
        build_encoder(dataclasses.replace(TINY_ENCODER, scales=(30,)))
    with pytest.raises(ValueError, match=r"encoder.scales: 8 pixels: encoder.layer='layer2.1.relu_1' is no"):
        build_encoder(dataclasses.replace(TINY_ENCODER, scales=(8,)))
    with pytest.raises(ValueError, match=r"region_encoder\.positions='learned' needs a grid of one size"):
        build_model(BOTH, TINY_DECODER, 9, region_encoder=RegionEncoderConfig(positions="learned"))


def test_a_model_of_one_scale_begins_with_the_weights_that_it_had_before():
    torch.manual_seed(1)
    one = build_model(TINY_ENCODER, TINY_DECODER, 9)[0].state_dict()
    torch.manual_seed(1)
    both = build_model(BOTH, TINY_DECODER, 9)[0].state_dict()
    assert same_bits(one, {name: x for name, x in both.items() if not name.startswith("further")})


def test_the_batches_are_dealt_to_the_scales(tiny_data):
    data = CaptionData(tiny_data)
    options = {"captions_per_image": 1, "batch_size": 3, "seed": 1, "epoch": 2}
    plain, dealt = (plan_epoch(data, "train", **options, scales=scales) for scales in (1, 3))
    assert [[s._replace(scale=0) for s in batch] for batch in dealt] == plain  # the order is what it was
    assert all(len({sample.scale for sample in batch}) == 1 for batch in dealt)
    counts = Counter(batch[0].scale for batch in dealt)
    assert set(counts) == {0, 1, 2}
    assert max(counts.values()) - min(counts.values()) <= 1
    assert [batch[0].scale for batch in dealt] != sorted(batch[0].scale for batch in dealt)
    assert dealt != plan_epoch(data, "train", **{**options, "epoch": 3}, scales=3)
    parts = shard([*dealt[:-1], dealt[-1][:1]], 1, 2)  # of the last batch this process has nothing
    assert [{sample.scale for sample in part} for part in parts] == [{batch[0].scale} for batch in dealt]


@pytest.mark.parametrize(("batches", "scales"), [(1, 2), (1, 3), (2, 3)])
def test_every_scale_has_its_turn_also_in_short_epochs(batches, scales, tiny_data):
    options = {"captions_per_image": 5, "batch_size": -(-32 // batches), "seed": 0, "scales": scales}
    epochs = [plan_epoch(CaptionData(tiny_data), "train", epoch=epoch, **options) for epoch in range(12)]
    assert {len(epoch) for epoch in epochs} == {batches}
    assert {batch[0].scale for epoch in epochs for batch in epoch} == set(range(scales))


def test_pixels_become_the_size_of_their_scale(tiny_data):
    data = CaptionData(tiny_data)
    dataset = CaptionDataset(data, sides=(32, 48))
    assert torch.equal(dataset[Sample(3, (), 0)][0], data.image(3))
    larger = resizing.resize(data.image(3), [48, 48], interpolation=resizing.InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(dataset[Sample(3, (), 0, scale=1)][0], larger)


def test_the_vectors_of_every_scale_and_view_are_stored(stored):
    root, path = stored
    data = CaptionData(path)
    assert data.encoder.sides == (32, 48)
    assert data.settings["scales"] == [48]
    encoder, _ = build_encoder(data.encoder, state=data.encoder_state())
    whole = Image.open(root / "5.png")
    box = (5, 0, 35, 30)  # of 40x30 pixels the square in the middle
    for scale, mirrored in itertools.product((0, 1), (False, True)):
        pixels = np.array(whole.resize((data.encoder.sides[scale],) * 2, Image.Resampling.BICUBIC, box=box))
        pixels = torch.from_numpy(pixels[:, ::-1].copy() if mirrored else pixels).permute(2, 0, 1).unsqueeze(0)
        with torch.no_grad():
            a = encoder(pixels)[0]
        torch.testing.assert_close(data.image(5, View(scale, mirrored)).float(), a, rtol=2e-3, atol=2e-3)
    with h5py.File(path) as file:
        assert file["image/mirrored_48"].attrs["grid"].tolist() == [6, 6]
        assert file["image/mirrored_48"].chunks == (1, 36, 128)
    drawn = CaptionDataset(data, augment="flip")[Sample(5, (), 1, scale=1)][0]
    assert torch.equal(drawn, data.image(5, View(1, mirrored=True)))


def test_a_file_that_lacks_a_scale_is_named(stored, tmp_path):
    for name, change, message in (
        ("image/mirrored_48", None, "mirrored_48"),
        (
            "image/annotations_48",
            (12, 36, 5),
            r"annotations_48: must be 12 images with .* \(6, 6\), .*\(got float16 of shape \(12, 36, 5\)\)",
        ),
        (
            "image/annotations_48",
            (12, 35, 128),
            r"annotations_48: must be 12 images with vectors of 128 numbers on a grid",
        ),
        (
            "image/mirrored",
            (12, 9, 128),
            r"image/mirrored: must be 12 images with vectors .* \(4, 4\), in .* \(got float16 of shape \(12, 9",
        ),
        ("image/annotations", (12, 16), r"image/annotations: must be 12 images with"),
        ("image/annotations", "group", "image/annotations: must hold numbers or text, and is a group"),
        ("image/annotations_48", "group", "image/annotations_48: must hold numbers or text, and is a group"),
    ):
        broken = tmp_path / "broken.h5"
        shutil.copy(stored[1], broken)
        with h5py.File(broken, "a") as file:
            attributes = dict(file[name].attrs)
            del file[name]
            if change is not None:
                new = file.create_group(name) if change == "group" else file.create_dataset(name, change, np.float16)
                new.attrs.update(attributes)
        with pytest.raises(ValueError, match=f"{broken}: .*{message}"):
            CaptionData(broken)


def test_two_scales_of_one_grid_are_refused(stored, tmp_path):
    shutil.copy(stored[1], tmp_path / "same.h5")
    with h5py.File(tmp_path / "same.h5", "a") as file:
        for name in ("image/annotations", "image/mirrored"):
            del file[f"{name}_48"]
            file.copy(name, f"{name}_48")
    with pytest.raises(ValueError, match=r"same\.h5: encoder: each scale must have a grid of its own"):
        CaptionData(tmp_path / "same.h5")


def test_preprocess_says_what_scales_need(stored, tmp_path, capsys):
    root, _ = stored
    for options, message in (
        (["--scales", "48"], "scales needs an encoder"),
        ([*ENCODER, "--scales", "32"], "none of them image_size=32 (got [32])"),
        ([*ENCODER, "--layer", "layer2", "--scales", "30"], "--scales=[30]: each scale must have a grid of its own"),
    ):
        assert preprocess_main(command(root, tmp_path / "d.h5", *options)) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


def test_a_checkpoints_scales_are_its_features_too(stored, two_scales, tmp_path):
    root, _ = stored
    words = command(root, tmp_path / "d.h5", "--encoder", str(two_scales), "--device", "cpu")
    assert preprocess_main(words) == 0  # with --image-size, which is one of its scales: that alone
    assert CaptionData(tmp_path / "d.h5").encoder.sides == (32,)
    larger = ["48" if before == "--image-size" else word for before, word in zip(["", *words], words, strict=False)]
    assert preprocess_main([*larger, "--overwrite"]) == 0
    assert CaptionData(tmp_path / "d.h5").encoder.sides == (48,)
    at = words.index("--image-size")
    words = [*words[:at], *words[at + 2 :], "--overwrite", "--vocabulary", str(two_scales)]
    assert preprocess_main(words) == 0
    data = CaptionData(tmp_path / "d.h5")
    assert data.encoder.sides == (32, 48)
    config = SearchConfig(multi_scale=True, mirror=False)
    found, _ = evaluate(load_checkpoint(two_scales), data, "train", config, tokenizer="python")
    captions = load_captioner(two_scales).caption([root / name for name in found])
    for caption, evaluated in zip(captions, found.values(), strict=True):
        assert caption.log_probs == pytest.approx(evaluated.hypothesis.log_probs[: len(caption.words)], abs=0.05)
    assert preprocess_main([*words, "--scales"]) == 0
    assert CaptionData(tmp_path / "d.h5").encoder.sides == (32,)
    with pytest.raises(ValueError, match=r"of pictures of \(32,\) pixels, and the model learned from \(32, 48\); m"):
        evaluate(load_checkpoint(two_scales), CaptionData(tmp_path / "d.h5"), "train", config)
    evaluate(load_checkpoint(two_scales), CaptionData(tmp_path / "d.h5"), "train", SearchConfig(), tokenizer="python")


def test_all_scales_speak_with_one_voice(two_scales, photo):
    model = load_checkpoint(two_scales).model
    photo = photo.resize((80, 80))
    caption = load_captioner(two_scales).caption([photo])[0]
    annotations = []
    for side in (32, 48):
        pixels = torch.from_numpy(np.array(photo.resize((side, side), Image.Resampling.BICUBIC, reducing_gap=3.0)))
        with torch.no_grad():
            annotations.append(model.annotate(pixels.permute(2, 0, 1).unsqueeze(0)))
    decoders = [model.decoder, model.further[0]]
    found = search(decoders, annotations, SearchConfig())[0][0]
    assert caption.words == tuple(load_checkpoint(two_scales).vocabulary.decode(found.ids))
    assert caption.log_probs == pytest.approx(found.log_probs[: len(caption.words)], abs=1e-4)
    assert caption.alphas.shape[1:] == (6, 6)
    alone = load_captioner(two_scales).caption([photo], multi_scale=False)[0]
    first = search(decoders[:1], annotations[:1], SearchConfig())[0][0]
    assert alone.log_probs == pytest.approx(first.log_probs[: len(alone.words)], abs=1e-4)
    assert alone.alphas.shape[1:] == (4, 4)
    assert alone.log_probs != caption.log_probs


def test_a_mirrored_view_of_each_scale_is_told_in_places_of_the_image(two_scales, photo):
    plain = load_captioner(two_scales).caption([photo], mirror=True, max_length=1)[0]
    turned = load_captioner(two_scales).caption([photo.transpose(0)], mirror=True, max_length=1)[0]
    assert plain.log_probs == pytest.approx(turned.log_probs, abs=1e-4)
    np.testing.assert_allclose(plain.alphas, turned.alphas[:, :, ::-1], atol=1e-4)


def test_several_scales_where_there_is_one_are_refused(tiny_checkpoint, tiny_data, photo, capsys, tmp_path):
    with pytest.raises(ValueError, match=r"^multi_scale: no model learned from pictures of several sizes"):
        load_captioner(tiny_checkpoint).caption([photo], multi_scale=True)
    words = ["--checkpoint", str(tiny_checkpoint), "--data", str(tiny_data), "--multi-scale"]
    assert evaluate_main(words) == 2
    assert "no model learned from pictures of several sizes" in capsys.readouterr().err
    validation = dataclasses.replace(TINY["validation"], search=SearchConfig(multi_scale=True))
    with pytest.raises(ValueError, match="no model learned from pictures of several sizes"):
        training.train(tiny_settings(tiny_data, tmp_path / "run", validation=validation))
    assert not (tmp_path / "run").exists()


def test_an_ensemble_may_have_members_of_one_scale(two_scales, tiny_checkpoint, photo):
    one, two = load_checkpoint(tiny_checkpoint), load_checkpoint(two_scales)
    both = Ensemble((one, two), SearchConfig(multi_scale=True, mirror=True), ("one", "two"))
    caption = load_captioner(two_scales).__class__(both).caption([photo])[0]
    assert caption.alphas.shape[1:] == (6, 6)
    np.testing.assert_allclose(caption.alphas.sum((1, 2)), 1, atol=1e-5)


def test_a_checkpoint_that_cannot_search_as_it_says_is_named(tiny_checkpoint, tmp_path):
    folder = tmp_path / "x"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["search"]["multi_scale"] = True
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=f"{folder}/config.json: multi_scale: no model learned from pictures of several"
    ):
        load_captioner(folder)
    for scales, message in (
        (None, r"config.json: encoder: scales must not be null"),
        ([1] * 10**5, "fewer than 8"),
    ):
        config["encoder"]["scales"] = scales
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message) as error:
            load_captioner(folder)
        assert len(str(error.value)) < 500


def test_an_ensemble_searches_at_several_sizes_if_a_member_does(two_scales, tiny_checkpoint, tmp_path):
    for name, order in (("a", (two_scales, tiny_checkpoint)), ("b", (tiny_checkpoint, two_scales))):
        assert ensemble_main([*map(str, order), "--output", str(tmp_path / name)]) == 0
        assert load_ensemble(tmp_path / name).search.multi_scale
