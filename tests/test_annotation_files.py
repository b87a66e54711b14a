"""Data files of annotation vectors: whose network made them, and mirrored images."""

import dataclasses
import json
import shutil

import pytest
import torch
from photo_folders import ENCODER, command, photos

from captioning.checkpoint import load_checkpoint
from captioning.data import CaptionData, CaptionDataset, Sample
from captioning.images import open_image, to_array, to_square
from captioning.model_config import View
from captioning.models.encoder import build_encoder
from preprocess.__main__ import main


def test_an_annotation_file_brings_the_network_that_made_it(tmp_path):
    root = photos(tmp_path / "in", 6)
    assert main(command(root, tmp_path / "d.h5", *ENCODER, size=64)) == 0
    data = CaptionData(tmp_path / "d.h5")
    state = data.encoder_state()
    assert data.encoder is not None
    encoder, config = build_encoder(data.encoder, state=state)
    assert config == data.encoder
    assert (data.grids, data.image_shape) == (((2, 2),), (4, 512))
    assert state["bn1.num_batches_tracked"].shape == ()
    assert state["bn1.num_batches_tracked"].dtype == torch.int64
    pixels = to_array(to_square(open_image(root / "5.png"), 64, "crop")).copy()
    a = encoder(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
    torch.testing.assert_close(data.image(5).float(), a, rtol=2e-3, atol=2e-3)


def test_the_encoder_may_be_that_of_a_checkpoint(tmp_path, tiny_checkpoint):
    root = photos(tmp_path / "in", 3)
    assert main(command(root, tmp_path / "d.h5", "--encoder", str(tiny_checkpoint), "--device", "cpu")) == 0
    data, checkpoint = CaptionData(tmp_path / "d.h5"), load_checkpoint(tiny_checkpoint)
    assert data.encoder == dataclasses.replace(checkpoint.encoder, weights="tiny")
    pixels = to_array(to_square(open_image(root / "2.png"), 32, "crop")).copy()
    with torch.no_grad():
        a = checkpoint.model.encoder(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
    torch.testing.assert_close(data.image(2).float(), a, rtol=2e-3, atol=2e-3)


def test_a_checkpoints_encoder_may_see_larger_pictures(tmp_path, tiny_checkpoint):
    # its grid is finer then, whatever the checkpoint says of its own
    root, folder = photos(tmp_path / "in", 3), tmp_path / "named"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["encoder"]["grid"] = load_checkpoint(tiny_checkpoint).model.encoder.grid[0]
    (folder / "config.json").write_text(json.dumps(config))
    words = command(root, tmp_path / "d.h5", "--encoder", str(folder), "--device", "cpu", size=64)
    assert main(words) == 0
    data = CaptionData(tmp_path / "d.h5")
    assert data.encoder.image_size == 64
    assert data.grids == ((8, 8),)


def test_a_checkpoints_encoder_sees_what_it_was_trained_on_unless_told(tmp_path, tiny_checkpoint):
    root, folder = photos(tmp_path / "in", 3), tmp_path / "named"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["encoder"] |= {"image_size": 48, "fit": "squash", "resample": "bilinear", "grid": None}
    (folder / "config.json").write_text(json.dumps(config))
    words = command(root, tmp_path / "d.h5", "--encoder", str(folder), "--device", "cpu")
    at = words.index("--image-size")
    assert main([*words[:at], *words[at + 2 :]]) == 0
    data = CaptionData(tmp_path / "d.h5")
    assert (data.settings["image_size"], data.settings["fit"]) == (48, "squash")
    assert (data.encoder.image_size, data.encoder.fit, data.encoder.resample) == (48, "squash", "bilinear")
    pixels = to_array(to_square(open_image(root / "2.png"), 48, "squash", "bilinear")).copy()
    with torch.no_grad():
        a = load_checkpoint(folder).model.encoder(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
    torch.testing.assert_close(data.image(2).float(), a, rtol=2e-3, atol=2e-3)
    assert main([*words, "--fit", "crop", "--overwrite"]) == 0
    data = CaptionData(tmp_path / "d.h5")
    assert (data.settings["image_size"], data.settings["fit"]) == (32, "crop")


def test_a_checkpoints_encoder_takes_no_other_weights(tmp_path, tiny_checkpoint, capsys):
    root = photos(tmp_path / "in", 3)
    words = command(root, tmp_path / "d.h5", "--encoder", str(tiny_checkpoint), "--weights", "null")
    assert main(words) == 2
    assert "--weights does not go with --encoder" in capsys.readouterr().err


def test_mirrored_images_are_annotated_too_and_training_draws_one_of_both(tmp_path):
    root = photos(tmp_path / "in", 3)
    assert main(command(root, tmp_path / "plain.h5", *ENCODER, size=64)) == 0
    assert main(command(root, tmp_path / "both.h5", *ENCODER, "--mirror", size=64)) == 0
    plain, both = CaptionData(tmp_path / "plain.h5"), CaptionData(tmp_path / "both.h5")
    assert (plain.mirrored, both.mirrored) == (False, True)
    assert both.image_shape == plain.image_shape == (4, 512)
    torch.testing.assert_close(both.image(2), plain.image(2))
    encoder, _ = build_encoder(both.encoder, state=both.encoder_state())
    pixels = to_array(to_square(open_image(root / "2.png"), 64, "crop"))[:, ::-1].copy()
    a = encoder(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
    torch.testing.assert_close(both.image(2, View(mirrored=True)).float(), a, rtol=2e-3, atol=2e-3)
    dataset = CaptionDataset(both, augment="flip")
    drawn = [dataset[Sample(2, (), seed)][0] for seed in range(4)]
    assert [torch.equal(image, both.image(2)) for image in drawn] == [True, False, True, False]
    assert torch.equal(drawn[1], both.image(2, View(mirrored=True)))
    with pytest.raises(ValueError, match=r"augment='crop': .*both.h5 stores annotation vectors; allowed: none, flip"):
        CaptionDataset(both, augment="crop")
