"""Files and folders that somebody else made: nothing outside them is read or changed, and what is wrong is named."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import tiny_settings, train_interrupted

from captioning import load_captioner
from captioning.checkpoint import load_checkpoint
from captioning.config import EncoderConfig, SearchConfig
from captioning.console import one_line
from captioning.data import (
    ANNOTATIONS,
    ENCODER,
    FIRST_CAPTION,
    FIRST_WORD,
    IMAGE_SPLIT,
    NAMES,
    PIXELS,
    RAW,
    VOCABULARY,
    WORDS,
    CaptionData,
    CaptionDataset,
    Sample,
    load_batches,
)
from captioning.files import hold
from captioning.run import start
from captioning.vocabulary import END, PAD, START


def changed(whole: Path, tmp_path: Path, change: Callable[[h5py.File], None]) -> Path:
    shutil.copyfile(whole, tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5", "r+") as file:
        change(file)
    return tmp_path / "x.h5"


def replaced(name: str, **options: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        attributes = dict(file[name].attrs)
        del file[name]
        file.create_dataset(name, **options).attrs.update(attributes)

    return change


@pytest.mark.parametrize("link", [h5py.ExternalLink("other.h5", VOCABULARY), h5py.SoftLink(f"/{NAMES}")])
@pytest.mark.parametrize("name", [VOCABULARY, PIXELS, "image"])
def test_a_link_is_not_followed(name, link, tiny_data, tmp_path):
    shutil.copyfile(tiny_data, tmp_path / "other.h5")

    def change(file):
        del file[name]
        file[name] = link

    with pytest.raises(ValueError, match=rf"x\.h5: {name}.*: is a link; everything must lie in the file itself"):
        CaptionData(changed(tiny_data, tmp_path, change))


def test_bytes_of_another_file_are_not_read(tiny_annotations, tmp_path):
    (tmp_path / "secret").write_bytes(bytes(64))

    def weight_outside(file):
        file[ENCODER].create_dataset("stolen", (64,), "uint8", external=[(str(tmp_path / "secret"), 0, 64)])

    with pytest.raises(ValueError, match=r"x\.h5: encoder/stolen: is stored elsewhere"):
        CaptionData(changed(tiny_annotations, tmp_path, weight_outside)).encoder_state()

    def words_of_another(file):
        words = file[WORDS]
        layout = h5py.VirtualLayout(words.shape, words.dtype)
        layout[:] = h5py.VirtualSource(str(tiny_annotations), WORDS, words.shape)
        del file[WORDS]
        file.create_virtual_dataset(WORDS, layout)

    with pytest.raises(ValueError, match=r"x\.h5: caption/words: is stored elsewhere"):
        CaptionData(changed(tiny_annotations, tmp_path, words_of_another))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        (IMAGE_SPLIT, {"shape": (2 * 10**10,), "dtype": "u1", "chunks": (1,)}, "must take at most 4,294,967,296 bytes"),
        (IMAGE_SPLIT, {"data": h5py.Empty("u1")}, "holds nothing"),
        (PIXELS, {"data": h5py.Empty("u1")}, "holds nothing"),
        (RAW, {"shape": (2 * 10**10,), "dtype": h5py.string_dtype(), "chunks": (1,)}, "must take at most"),
        (NAMES, {"shape": (1000,), "dtype": "S20000000", "chunks": (1,)}, "must take at most"),
        (NAMES, {"shape": (10**8,), "dtype": "S1", "chunks": (10**6,)}, "must take at most"),
        (FIRST_WORD, {"shape": (10**9,), "dtype": "u1", "chunks": (10**6,)}, "must take at most"),
        (IMAGE_SPLIT, {"data": np.zeros(40)}, r"must be a list of whole numbers \(got float64 of shape \(40,\)\)"),
        (IMAGE_SPLIT, {"data": np.full(40, -1)}, "must be 40 numbers below 3"),
        (FIRST_CAPTION, {"data": np.zeros((41, 1), int)}, "must be a list of whole numbers"),
        (FIRST_CAPTION, {"data": np.array([0, 2**63, *range(10, 205, 5)], "u8")}, "must be 41 numbers that rise"),
        (
            FIRST_CAPTION,
            {"data": np.array([0, 2**63 - 1, -(2**63), *range(15, 205, 5)])},
            "must be 41 numbers that rise",
        ),
        (FIRST_CAPTION, {"data": np.array([0, 0, *range(10, 205, 5)])}, "image 0 has no caption"),
        (VOCABULARY, {"data": np.arange(9)}, "must be a list of texts"),
        (VOCABULARY, {"data": [b"dog", b"cat"]}, "a vocabulary must begin with <pad>"),
        (NAMES, {"data": [b"a.png"] * 40}, r"must be unique \('a\.png' comes twice\)"),
        (NAMES, {"data": [b"\xff"] * 40}, "must be UTF-8"),
        (RAW, {"data": [b"\xff"] * 200}, "must be UTF-8"),
        (
            PIXELS,
            {"data": np.zeros((40, 8, 8, 3), "f4")},
            "must be 40 square RGB images of at most 4096 pixels a side, in uint8",
        ),
        (PIXELS, {"data": np.zeros((40, 8, 9, 3), "u1")}, "must be 40 square RGB images"),
        (PIXELS, {"data": np.zeros((40, 3, 8, 8), "u1")}, "must be 40 square RGB images"),
        (PIXELS, {"shape": (40, 10**6, 10**6, 3), "dtype": "u1", "chunks": (1, 8, 8, 3)}, "must be 40 square RGB"),
        (PIXELS, {"data": np.zeros((40, 32, 32, 3), ">u2")}, r".*in the other order of bytes"),
        (PIXELS, {"data": np.uint8(0)}, "must be 40 square RGB images"),
    ],
)
def test_a_table_of_another_kind_is_named(name, options, said, tiny_data, tmp_path):
    with pytest.raises(ValueError, match=rf"x\.h5: {name}: {said}"):
        CaptionData(changed(tiny_data, tmp_path, replaced(name, **options)))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (3, "settings: must be an attribute with a JSON object"),
        (["{}", "{}"], "settings: must be an attribute with a JSON object"),
        ("[]", "settings: must be a JSON object, not list"),
        ("{", "settings: is not JSON"),
        ("[" * 10**5, "settings: is not JSON"),
        ('{"fit": "letterbox"}', r"settings: fit must be crop or squash \(got 'letterbox'\)"),
    ],
)
def test_settings_that_are_none_are_named(value, said, tiny_data, tmp_path):
    def change(file):
        file.attrs.create("settings", value[:60000] if isinstance(value, str) else value)

    with pytest.raises(ValueError, match=rf"x\.h5: {said}"):
        CaptionData(changed(tiny_data, tmp_path, change))


@pytest.mark.parametrize("grid", [4, [4], [4, 4, 1], [0, 16], [4.0, 4.0], "4x4"])
def test_a_grid_that_is_none_is_named(grid, tiny_annotations, tmp_path):
    def change(file):
        file[ANNOTATIONS].attrs["grid"] = grid

    with pytest.raises(ValueError, match=r"x\.h5: image/annotations: its attribute grid must be two positive numbers"):
        CaptionData(changed(tiny_annotations, tmp_path, change))


def test_vectors_that_are_not_finite_are_named_with_their_image(tiny_annotations, tmp_path):
    def change(file):
        file[ANNOTATIONS][3, 2, 1] = np.nan

    data = CaptionData(changed(tiny_annotations, tmp_path, change))
    data.image(2)
    said = r"^\S*x\.h5: image/annotations: image 3 \('\w+\.png'\) has values that are not finite$"
    with pytest.raises(ValueError, match=said):
        data.image(3)
    for workers in (0, 1):
        batches = load_batches(CaptionDataset(data), [[Sample(3, (), 0)]], captions_per_image=1, workers=workers)
        with pytest.raises(ValueError, match=said):
            next(batches)


def test_a_stored_encoder_that_is_not_finite_is_refused_before_it_is_trained_with(tiny_annotations, tmp_path):
    def change(file):
        file[ENCODER]["bn1.running_var"][0] = np.inf

    data = changed(tiny_annotations, tmp_path, change)
    with pytest.raises(ValueError, match=r"x\.h5: encoder/bn1\.running_var: must be finite numbers"):
        CaptionData(data).encoder_state()


def test_a_stored_encoder_has_no_groups_within_it(tiny_annotations, tmp_path):
    data = changed(tiny_annotations, tmp_path, lambda file: file[ENCODER].create_group("a/b/c"))
    with pytest.raises(ValueError, match=r"x\.h5: encoder/a: must hold numbers or text, and is a group"):
        CaptionData(data).encoder_state()


@pytest.mark.parametrize("special", [PAD, START, END])
def test_a_caption_holds_no_special_word(special, tiny_data, tmp_path):
    def change(file):
        file[WORDS][7] = special

    with pytest.raises(ValueError, match=r"x\.h5: caption/words: numbers of words must lie in \[3, "):
        CaptionData(changed(tiny_data, tmp_path, change))


def test_a_caption_without_end_is_refused(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr("captioning.data.MOST_WORDS", 3)
    with pytest.raises(ValueError, match=r"d?\.h5: caption/first_word: a caption may have at most 3 words"):
        CaptionData(tiny_data)


def test_vectors_must_have_the_form_that_their_encoder_gives_them(tiny_annotations, tmp_path):
    settings = {"encoder": EncoderConfig(name="resnet18", image_size=32), "augment": "none"}
    wide = changed(tiny_annotations, tmp_path, replaced(ANNOTATIONS, data=np.zeros((40, 16, 64), "f2")))
    with pytest.raises(ValueError, match=r"x\.h5: holds vectors of 64 numbers on grids of \(\(4, 4\),\), and the enc"):
        start(tiny_settings(wide, tmp_path / "run", **settings))

    def flat(file):
        replaced(ANNOTATIONS, data=np.zeros((40, 16, 128), "f2"))(file)
        file[ANNOTATIONS].attrs["grid"] = (2, 8)

    with pytest.raises(ValueError, match=r"grids of \(\(2, 8\),\), and the encoder stored beside them makes 128 on"):
        start(tiny_settings(changed(tiny_annotations, tmp_path, flat), tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_a_lock_that_is_a_link_leaves_what_it_leads_to_alone(tiny_data, tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"\.lock: is a link; delete it"):
        start(tiny_settings(tiny_data, tmp_path / "run"))
    assert (tmp_path / "mine").read_text() == "precious"
    (tmp_path / "plain").write_text("precious")
    hold(tmp_path / "plain").close()
    assert (tmp_path / "plain").read_text() == "precious"


@pytest.fixture(scope="module")
def stopped(tiny_data, tmp_path_factory) -> Path:
    """A run that was stopped after its second step."""
    folder = tmp_path_factory.mktemp("stopped")
    train_interrupted(tiny_settings(tiny_data, folder / "run"), 2)
    return folder / "run"


def progress_with(**values: object) -> Callable[[Path], None]:
    def change(last: Path) -> None:
        state = json.loads((last / "training.json").read_text())
        state["progress"] |= values
        (last / "training.json").write_text(json.dumps(state))

    return change


def without(*names: str) -> Callable[[Path], None]:
    def change(last: Path) -> None:
        state = json.loads((last / "training.json").read_text())
        (last / "training.json").write_text(json.dumps({k: v for k, v in state.items() if k not in names}))

    return change


def tensors_with(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def write(last: Path) -> None:
        tensors = {name: x.clone() for name, x in load_file(last / "training.safetensors").items()}
        save_file(change(tensors), last / "training.safetensors")

    return write


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("progress"), r"training\.json: progress is missing"),
        (without("settings"), r"training\.json: settings is missing"),
        (progress_with(colour="red"), r"training\.json: progress: no setting is called 'colour'"),
        (progress_with(batch=-5), r"training\.json: progress: .*batch must not be negative"),
        (progress_with(step="two"), r"training\.json: progress: .*step"),
        (
            tensors_with(lambda x: {k: v for k, v in x.items() if not k.startswith("optimizer/")}),
            r"training\.safetensors: the optimiser's state is missing",
        ),
        (
            tensors_with(lambda x: {k: v for k, v in x.items() if k != "optimizer/0/exp_avg_sq"}),
            r"training\.safetensors: 0/exp_avg_sq is missing",
        ),
        (
            tensors_with(lambda x: {**x, "optimizer/0/exp_avg": torch.zeros(3, 5)}),
            r"training\.safetensors: 0/exp_avg of shape \(3, 5\) is none of this optimiser's",
        ),
        (
            tensors_with(lambda x: {**x, "optimizer/999/step": torch.zeros(())}),
            r"training\.safetensors: 999/step of shape \(\) is none of this optimiser's",
        ),
        (
            tensors_with(lambda x: {**x, "optimizer/0/exp_avg": x["optimizer/0/exp_avg"] * torch.nan}),
            r"training\.safetensors: optimizer/0/exp_avg holds values that are not finite",
        ),
        (
            tensors_with(lambda x: {k: v for k, v in x.items() if not k.startswith("average/")}),
            r"training\.safetensors: Error\(s\) in loading state_dict",
        ),
    ],
)
def test_a_training_state_that_is_not_the_runs_is_named(change, said, stopped, tiny_data, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    change(tmp_path / "run" / "last")
    settings = dataclasses.replace(tiny_settings(tiny_data, tmp_path / "run"), resume=True)
    with pytest.raises(ValueError, match=said) as caught:
        start(settings)
    assert "\n" not in str(caught.value)


def test_a_search_that_would_not_end_is_refused(tiny_checkpoint, tmp_path):
    for name, value, limit in (("max_length", 10**9, 1000), ("length_penalty", 300.0, 100)):
        with pytest.raises(ValueError, match=f"{name} must be at most {limit}"):
            SearchConfig(**{name: value})


def test_weights_that_make_no_probabilities_are_no_riddle(tiny_checkpoint, photo, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "x")
    path = tmp_path / "x" / "model.safetensors"
    state = {name: x.clone() for name, x in load_file(path).items()}
    save_file({**state, "encoder.network.bn1.running_var": -torch.ones(64)}, path)
    with pytest.raises(ValueError, match="no word has a probability; weights or annotation vectors are broken"):
        load_captioner(tmp_path / "x").caption(photo)
    save_file(
        {**state, "decoder.L_o.bias": torch.full_like(state["decoder.L_o.bias"], 1e300, dtype=torch.double)}, path
    )
    with pytest.raises(ValueError, match=r"decoder\.L_o\.bias holds values that are not finite"):
        load_checkpoint(tmp_path / "x")


def test_an_image_that_cannot_be_read_is_named(tiny_data, tmp_path):
    data = CaptionData(shutil.copyfile(tiny_data, tmp_path / "x.h5"))
    data.image(0)
    data = CaptionData(tmp_path / "x.h5")
    (tmp_path / "x.h5").write_bytes(b"no longer")
    said = r"^\S*x\.h5: image/pixels: image 5 \('000005\.png'\) cannot be read: "
    for workers in (0, 1):
        batches = load_batches(CaptionDataset(data), [[Sample(5, (), 0)]], captions_per_image=1, workers=workers)
        with pytest.raises(ValueError, match=said) as caught:
            next(batches)
        assert "\n" not in str(caught.value)


def test_what_a_file_says_does_not_steer_the_terminal():
    assert one_line(ValueError("x.h5: \x1b]0;title\x07\x1b[2J\nsecond")) == "x.h5: ]0;title [2J second"
    assert one_line(Path("caf\udce9.jpg")) == "caf\udce9.jpg"  # a name that is no text stays what it is
