"""Every decoder goes the whole way: trained, saved, a start for another run, and heard and seen at the command line."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captioning import load_captioner, training
from captioning.checkpoint import load_checkpoint, save_checkpoint
from captioning.config import DecoderConfig, EncoderConfig, LossConfig, SearchConfig, Settings, ValidationConfig
from captioning.data import CaptionData
from captioning.models.registry import DECODERS
from captioning.run import start
from captioning.vocabulary import END

SIZES = {"embedding_dim": 16, "hidden_dim": 16, "attention_dim": 6}
FAMILY = {
    "lstm": DecoderConfig(name="lstm", inject="each_step", **SIZES),
    "attention_lstm": DecoderConfig(**SIZES),
    "luong": DecoderConfig(name="luong", alignment="general", gate="none", **SIZES),
    "luong-fed": DecoderConfig(name="luong", alignment="concat", gate="none", input_feeding=True, **SIZES),
    "luong-hard": DecoderConfig(name="luong", attention="hard", **SIZES),
    "values": DecoderConfig(alignment="scaled_dot", values="projected", **SIZES),
    "multi-head": DecoderConfig(attention="multi_head", heads=2, **SIZES),
    "transformer": DecoderConfig(name="transformer", heads=2, layers=2, **SIZES),
}


def test_no_decoder_is_left_out():
    assert {config.name for config in FAMILY.values()} == set(DECODERS)


def settings_of(name: str, data: Path, output: Path, **changes) -> Settings:
    return Settings(
        data=str(data),
        output=str(output),
        encoder=EncoderConfig(name="resnet18", image_size=32),
        decoder=FAMILY[name],
        loss=LossConfig(lambda_ds=0.0 if name == "lstm" else 1.0),
        validation=ValidationConfig(diagnose_images=4, search=SearchConfig(beam_size=2, max_length=8)),
        epochs=1,
        workers=0,
        precision="bf16",
        **changes,
    )


def talkative(best: Path, folder: Path) -> Path:
    """The checkpoint with a bias against <end>: after one epoch a caption may be empty, and have nothing to draw."""
    checkpoint = load_checkpoint(best)
    with torch.no_grad():
        checkpoint.model.decoder.get_parameter("L_o.bias")[END] = -9.0
    save_checkpoint(folder, checkpoint)
    return folder


@pytest.mark.parametrize("name", FAMILY)
def test_a_decoder_is_trained_saved_and_captions(name, tiny_annotations, tiny_data, tmp_path, command, capsys):
    best = training.train(settings_of(name, tiny_annotations, tmp_path / "run"))
    again = start(settings_of(name, tiny_annotations, tmp_path / "more", init_from=str(best)))
    weights = load_checkpoint(best).model.state_dict()
    assert all(torch.equal(x, weights[key]) for key, x in again.model.state_dict().items())
    photo = tmp_path / "a.png"
    Image.fromarray(CaptionData(tiny_data).image(3).permute(1, 2, 0).numpy()).save(photo)
    folder = talkative(best, tmp_path / "talkative")
    capsys.readouterr()
    words = [str(photo), "--checkpoint", str(folder), "--device", "cpu", "--words", "--max-length", "5"]
    words += ["--json", str(tmp_path / "a.json")]
    if name == "lstm":  # the only one that does not attend
        assert command.main(words) == 0
        assert json.loads((tmp_path / "a.json").read_text())[0]["alphas"] is None
        return
    assert command.main([*words, "--overlay", str(tmp_path / "drawn")]) == 0
    found = json.loads((tmp_path / "a.json").read_text())[0]
    alphas = np.array(found["alphas"])
    assert alphas.shape == (len(found["words"]), 4, 4)
    assert alphas.sum(axis=(1, 2)) == pytest.approx(1, abs=1e-3)
    assert (tmp_path / "drawn" / "a.png").exists()
    assert capsys.readouterr().out.count("  looked ") == len(found["words"])


def test_one_head_can_be_shown_of_a_transformer_and_of_no_lstm(
    tiny_annotations, tiny_checkpoint, tmp_path, command, capsys
):
    best = training.train(settings_of("transformer", tiny_annotations, tmp_path / "run"))
    photo = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    folder = talkative(best, tmp_path / "talkative")
    shown = [load_captioner(folder, head=head) for head in (None, 0, 1)]
    mean, one, other = (captioner.caption(photo, max_length=4)[0].alphas for captioner in shown)
    np.testing.assert_allclose(mean, (one + other) / 2, atol=1e-6)
    assert np.abs(one - other).max() > 1e-4
    Image.fromarray(photo).save(tmp_path / "a.png")
    capsys.readouterr()
    for checkpoint, head, said in (
        (best, "2", "head=2: this model has heads 0 to 1"),
        (tiny_checkpoint, "0", "head=0: this model's attention has no heads"),
    ):
        code = command.main([str(tmp_path / "a.png"), "--checkpoint", str(checkpoint), "--head", head])
        assert (code, capsys.readouterr().err) == (2, f"caption: {said}\n")


def test_too_few_learned_positions_are_noticed_before_the_first_step(tiny_annotations, tmp_path):
    longest = CaptionData(tiny_annotations).longest_caption()
    assert longest > 8  # the length that the validation searches
    decoder = dataclasses.replace(FAMILY["transformer"], positions="learned", max_positions=longest)
    settings = settings_of("transformer", tiny_annotations, tmp_path / "run")
    with pytest.raises(ValueError, match=f"max_positions={longest}: .* need {longest + 1}"):
        start(dataclasses.replace(settings, decoder=decoder))
