"""Shared fixtures; shapes of tensors are checked in every test."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from jaxtyping import install_import_hook
from PIL import Image
from torch import nn

os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # where there is a GPU, too

install_import_hook(["captioning", "preprocess"], "beartype.beartype")

from tiny_runs import tiny_settings  # noqa: E402

from captioning import training  # noqa: E402  hooked imports come after
from captioning.checkpoint import Checkpoint, save_checkpoint  # noqa: E402
from captioning.config import DecoderConfig, EncoderConfig, SearchConfig  # noqa: E402
from captioning.data import CaptionData  # noqa: E402
from captioning.metrics import java_found  # noqa: E402
from captioning.models.captioner import build_model  # noqa: E402
from captioning.vocabulary import END, START  # noqa: E402
from preprocess.build import BuildSettings, build  # noqa: E402
from preprocess.sources import shapes  # noqa: E402

TINY_ENCODER = EncoderConfig(name="resnet18", layer="layer2", weights=None, image_size=32)
TINY_DECODER = DecoderConfig(embedding_dim=12, hidden_dim=16, attention_dim=8, dropout=0.1)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Callable[..., Path]:
    """Path of a file or folder of the development data; skips when it is not there."""

    def find(*parts: str) -> Path:
        path = SHARED.joinpath(*parts)
        if not path.exists():
            pytest.skip(f"development data {'/'.join(parts)} is not beside the checkout")
        return path

    return find


@pytest.fixture(autouse=True)
def _java(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Java for tests marked `java`, which are skipped where there is none; the others are as on a machine without."""
    if request.node.get_closest_marker("java") is None:
        monkeypatch.setattr("captioning.metrics.java_found", lambda: False)
    elif not java_found():
        pytest.skip("needs Java (METEOR, SPICE and the PTB tokenizer)")


@pytest.fixture(scope="session")
def command() -> ModuleType:
    """The command that captions photos."""
    from captioning import caption

    return caption


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data file with the pixels of 40 scenes of the shapes world at 32 px: 32 train, 4 val, 4 test."""
    return build_shapes(tmp_path_factory.mktemp("data") / "pixels.h5", None)


@pytest.fixture
def photo(tiny_data: Path) -> Image.Image:
    """A picture of `tiny_data`."""
    return Image.fromarray(CaptionData(tiny_data).image(3).permute(1, 2, 0).numpy())


@pytest.fixture(scope="session")
def tiny_annotations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same scenes as `tiny_data`, stored as annotation vectors (16, 128) of TINY_ENCODER."""
    return build_shapes(tmp_path_factory.mktemp("data") / "annotations.h5", TINY_ENCODER)


@pytest.fixture(scope="session")
def tiny_scales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same scenes as vectors of two scales, (16, 128) at 32 pixels and (36, 128) at 48, and of mirror images."""
    output = tmp_path_factory.mktemp("data") / "scales.h5"
    return build_shapes(output, TINY_ENCODER, scales=(48,), mirror=True)


@pytest.fixture(scope="session")
def two_scales(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """The folder of an untrained model that looks at 32 and at 48 pixels, and searches with both."""
    vocabulary = CaptionData(tiny_data).vocabulary
    torch.manual_seed(7)
    model, encoder = build_model(dataclasses.replace(TINY_ENCODER, scales=(48,)), TINY_DECODER, len(vocabulary))
    for decoder in model.decoders:
        make_talkative(decoder)
    folder = tmp_path_factory.mktemp("checkpoint") / "two"
    search = SearchConfig(multi_scale=True)
    save_checkpoint(folder, Checkpoint(model, encoder, TINY_DECODER, vocabulary, search=search))
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_annotations: Path) -> Path:
    """The folder of an untrained model on a 4x4 grid, with the vocabulary and the encoder of `tiny_annotations`."""
    data = CaptionData(tiny_annotations)
    assert data.encoder is not None
    torch.manual_seed(2)
    model, encoder = build_model(data.encoder, TINY_DECODER, len(data.vocabulary), encoder_state=data.encoder_state())
    make_talkative(model.decoder)
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_checkpoint(folder, Checkpoint(model, encoder, TINY_DECODER, data.vocabulary, about={"about": "untrained"}))
    return folder


def make_talkative(decoder: nn.Module) -> None:
    """Weights far from zero, so that captions differ from image to image, and never an empty one, whatever the words.

    The first entry of the deep output's hidden vector knows only whether a caption has begun: tanh(-20) = -1 after
    <start> and tanh(0.02) = 0.02 after a word. It enters the logit of <end> alone, as -20 and +0.4.
    """
    weights = dict(decoder.named_parameters())
    with torch.no_grad():
        for weight in weights.values():
            if weight.dim() > 1:
                weight.mul_(5)
        for name in ("L_h.weight", "L_h.bias", "L_z.weight"):
            weights[name][0] = 0
        weights["lstm_word.weight"][:, 0] = 0
        weights["E.weight"][:, 0] = 0.02
        weights["E.weight"][START, 0] = -20
        weights["L_o.weight"][:, 0] = 0
        weights["L_o.weight"][END, 0] = 20


def build_shapes(output: Path, encoder: EncoderConfig | None, **options: Any) -> Path:
    """A data file of 40 scenes: pixels, or annotation vectors of an encoder."""
    settings = BuildSettings(image_size=TINY_ENCODER.image_size, min_count=1, **options)
    source = {"name": "shapes", "count": 40, "seed": 0}
    build(shapes(40, seed=0), source, settings, output=output, encoder=encoder, device="cpu", workers=0)
    return output


@pytest.fixture(scope="session")
def whole_run(tiny_data, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    training.train(tiny_settings(tiny_data, output))
    return output


@pytest.fixture(scope="session")
def photos(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a.png, b.png, c.jpg (wide), a text file, and the folder other/ with another a.png."""
    data = CaptionData(tiny_data)
    folder = tmp_path_factory.mktemp("photos")
    (folder / "other").mkdir()
    names = {"a.png": (32, 32), "b.png": (32, 32), "c.jpg": (60, 40), "other/a.png": (32, 32)}
    for i, (name, size) in enumerate(names.items()):
        Image.fromarray(data.image(2 + i).permute(1, 2, 0).numpy()).resize(size).save(folder / name)
    (folder / "notes.txt").write_text("no photo")
    return folder


@pytest.fixture
def call_caption(command, tiny_checkpoint, capsys):
    """Calls caption.py; returns the exit code, the lines of standard output and those of standard error."""

    def run(*words: object, checkpoint: Path = tiny_checkpoint) -> tuple[int, list[str], list[str]]:
        code = command.main([*map(str, words), "--checkpoint", str(checkpoint), "--device", "cpu"])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return run
