"""A checkpoint is a folder that comes back as it was, or says which file is wrong."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from captioning import load_captioner
from captioning.checkpoint import (
    Checkpoint,
    TrainingState,
    checkpoint_folder,
    load_checkpoint,
    save_checkpoint,
)
from captioning.config import DecoderConfig, RegionEncoderConfig, SearchConfig
from captioning.files import fresh_file, recover_folder
from captioning.models.baselines import CONTEXTS, INJECTIONS
from captioning.models.captioner import build_model


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "best"))


def edit(path: Path, **values: object) -> None:
    """Change fields of a JSON file; `decoder__name` means decoder.name."""
    content = json.loads(path.read_text())
    for name, value in values.items():
        *outer, last = name.split("__")
        inner = content
        for key in outer:
            inner = inner[key]
        inner[last] = value
    path.write_text(json.dumps(content))


def with_decoder(checkpoint: Checkpoint, regions: RegionEncoderConfig | None = None, **settings: Any) -> Checkpoint:
    decoder, regions = dataclasses.replace(checkpoint.decoder, **settings), regions or checkpoint.region_encoder
    model, _ = build_model(checkpoint.encoder, decoder, len(checkpoint.vocabulary), region_encoder=regions)
    return dataclasses.replace(checkpoint, model=model.eval(), decoder=decoder, region_encoder=regions)


def logits(checkpoint: Checkpoint) -> Tensor:
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return checkpoint.model(images, torch.tensor([[[1, 4, 5, 2]], [[1, 6, 2, 0]]])).logits


def test_a_checkpoint_comes_back_bit_for_bit(tiny_checkpoint, tmp_path):
    first = load_checkpoint(tiny_checkpoint)
    save_checkpoint(tmp_path / "again", first)
    second = load_checkpoint(tmp_path / "again")
    state, other = first.model.state_dict(), second.model.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)
    assert torch.equal(logits(first), logits(second))
    for name in ("encoder", "decoder", "vocabulary", "about", "search"):
        assert getattr(first, name) == getattr(second, name)
    for name in ("model.safetensors", "config.json", "vocabulary.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tiny_checkpoint / name).read_bytes()


def test_a_checkpoint_brings_its_search_and_an_older_one_has_the_plain_one(tiny_checkpoint, tmp_path):
    search = SearchConfig(beam_size=4, length_penalty=0.8, no_repeat_ngram=2)
    save_checkpoint(tmp_path / "new", dataclasses.replace(load_checkpoint(tiny_checkpoint), search=search))
    assert load_checkpoint(tmp_path / "new").search == search
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    del config["search"]
    (tmp_path / "new" / "config.json").write_text(json.dumps(config))
    assert load_checkpoint(tmp_path / "new").search == SearchConfig()


def test_half_precision_takes_half_the_room_and_stays_close(tiny_checkpoint, tmp_path):
    first = load_checkpoint(tiny_checkpoint)
    save_checkpoint(tmp_path / "half", first, half=True)
    second = load_checkpoint(tmp_path / "half")
    sizes = [(path / "model.safetensors").stat().st_size for path in (tmp_path / "half", tiny_checkpoint)]
    assert sizes[0] < 0.55 * sizes[1]
    for name, x in second.model.state_dict().items():
        assert x.dtype == first.model.state_dict()[name].dtype
        torch.testing.assert_close(x, first.model.state_dict()[name], rtol=1e-3, atol=1e-3)


def test_weights_too_large_for_half_precision_are_not_stored_so(tiny_checkpoint, tmp_path):
    first = load_checkpoint(tiny_checkpoint)
    first.model.decoder.E.weight.data[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"as float16: decoder\.E\.weight holds values that are not finite"):
        save_checkpoint(tmp_path / "half", first, half=True)
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize("half", [False, True])
def test_tied_embeddings_are_stored_once_and_come_back_tied(tiny_checkpoint, tmp_path, half):
    first = with_decoder(load_checkpoint(tiny_checkpoint), tie_embeddings=True)
    save_checkpoint(tmp_path / "tied", first, half=half)
    stored = safetensors.torch.load_file(tmp_path / "tied" / "model.safetensors")
    assert sum(x.shape == (len(first.vocabulary), first.decoder.embedding_dim) for x in stored.values()) == 1
    second = load_checkpoint(tmp_path / "tied")
    decoder = second.model.decoder
    assert decoder.get_parameter("E.weight") is decoder.get_parameter("L_o.weight")
    torch.testing.assert_close(logits(second), logits(first), rtol=0, atol=5e-2 if half else 0)


@pytest.mark.parametrize("gate", ["scalar", "vector", "none"])
@pytest.mark.parametrize("alignment", ["additive", "concat", "general", "scaled_dot"])
def test_every_variant_comes_back(tiny_checkpoint, tmp_path, gate, alignment):
    first = with_decoder(load_checkpoint(tiny_checkpoint), gate=gate, alignment=alignment)
    save_checkpoint(tmp_path / "x", first)
    assert torch.equal(logits(load_checkpoint(tmp_path / "x")), logits(first))


REGIONS = [
    RegionEncoderConfig("lstm", dim=6),
    RegionEncoderConfig("bilstm", "learned", dim=6),
    RegionEncoderConfig("self_attention", "sinusoidal", dim=6, heads=2, blocks=2),
    RegionEncoderConfig("transformer", "learned", dim=6, heads=2, blocks=2, norm="post"),
]


@pytest.mark.parametrize("regions", REGIONS, ids=lambda regions: regions.name)
@pytest.mark.parametrize("decoder", [{}, {"name": "lstm", "inject": "each_step"}], ids=["attends", "lstm"])
def test_every_region_encoder_comes_back(regions, decoder, tiny_checkpoint, tmp_path):
    first = with_decoder(load_checkpoint(tiny_checkpoint), regions, **decoder)
    save_checkpoint(tmp_path / "copy", first)
    second = load_checkpoint(tmp_path / "copy")
    assert (second.region_encoder, second.decoder) == (regions, first.decoder)
    assert torch.equal(logits(second), logits(first))


@pytest.mark.parametrize("inject", INJECTIONS)
@pytest.mark.parametrize("context", CONTEXTS)
def test_every_decoder_without_attention_comes_back(inject, context, tiny_checkpoint, tmp_path):
    first = with_decoder(load_checkpoint(tiny_checkpoint), name="lstm", inject=inject, context=context)
    save_checkpoint(tmp_path / "copy", first)
    assert torch.equal(logits(load_checkpoint(tmp_path / "copy")), logits(first))


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "luong", "alignment": "concat", "input_feeding": True},
        {"name": "luong", "gate": "none", "tie_embeddings": True},
        {"name": "transformer", "heads": 4, "layers": 2, "positions": "learned"},
        {"name": "transformer", "heads": 2, "norm": "post", "tie_embeddings": True},
    ],
    ids=lambda settings: f"{settings['name']}-{len(settings)}",
)
def test_every_decoder_comes_back(tiny_checkpoint, tmp_path, settings):
    first = with_decoder(load_checkpoint(tiny_checkpoint), embedding_dim=16, **settings)
    save_checkpoint(tmp_path / "x", first)
    second = load_checkpoint(tmp_path / "x")
    assert second.decoder == first.decoder
    assert torch.equal(logits(second), logits(first))


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_who_may_read_a_checkpoint_is_the_umasks_business(tiny_checkpoint, tmp_path, umask):
    before = os.umask(umask)
    try:
        save_checkpoint(tmp_path / "x", load_checkpoint(tiny_checkpoint))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "x").iterdir()} == {0o666 & ~umask}


def test_a_training_state_lies_beside_the_model(tiny_checkpoint, tmp_path):
    progress = {"progress": {"epoch": 1}, "settings": {}}
    state = TrainingState({"optimizer/0/step": torch.tensor(3.0), "average/x": torch.ones(2)}, progress)
    save_checkpoint(tmp_path / "last", load_checkpoint(tiny_checkpoint), training=state)
    loaded = TrainingState.load(tmp_path / "last")
    assert loaded.progress == progress
    assert {name: x.tolist() for name, x in loaded.group("optimizer").items()} == {"0/step": 3.0}
    assert list(loaded.group("average")) == ["x"]


def test_without_a_training_state_there_is_nothing_to_resume(tiny_checkpoint):
    with pytest.raises(FileNotFoundError, match=r"training\.json: no such file; there is no run to resume"):
        TrainingState.load(tiny_checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vocabulary.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}: no such file"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"format": 2}, r"config\.json: format is 2, this version reads 1"),
        ({"decoder__depth": 3}, r"config\.json: decoder: .*depth"),
        ({"encoder__colour": "red"}, r"config\.json: encoder: .*colour"),
        ({"decoder__hidden_dim": "wide"}, r"config\.json: decoder: .*hidden_dim"),
        ({"decoder__name": "gru"}, r"config\.json: decoder: .*name"),
        ({"search__beam_size": 0}, r"config\.json: search: .*beam_size"),
        ({"decoder": None}, r"config\.json: decoder: expected a mapping"),
        ({"decoder__hidden_dim": 17}, r"model\.safetensors: does not fit its config and vocabulary"),
        ({"encoder__layer": "layer3"}, r"model\.safetensors: does not fit its config and vocabulary"),
        ({"encoder__name": "resnet34"}, r"model\.safetensors: does not fit its config and vocabulary"),
    ],
)
def test_a_wrong_config_is_one_line_with_file_and_field(folder, values, named):
    edit(folder / "config.json", **values)
    with pytest.raises(ValueError, match=named) as error:
        load_checkpoint(folder)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(folder))


@pytest.mark.parametrize("name", ["config.json", "vocabulary.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_a_malformed_json_file_is_named(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        load_checkpoint(folder)


def test_another_vocabulary_does_not_fit(folder):
    words = json.loads((folder / "vocabulary.json").read_text())["words"]
    edit(folder / "vocabulary.json", words=[*words, "another"])
    with pytest.raises(ValueError, match=r"model\.safetensors: does not fit its config and vocabulary"):
        load_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_cut_off_weights_are_named(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a safetensors file") as error:
        load_checkpoint(folder)
    assert "\n" not in str(error.value)


def test_a_pickle_in_the_place_of_the_weights_is_refused(folder):
    torch.save(load_checkpoint(folder).model.state_dict(), folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: not a safetensors file"):
        load_checkpoint(folder)


def test_saving_replaces_an_older_checkpoint_and_leaves_nothing_behind(folder, tiny_checkpoint):
    (folder / "training.json").write_text("{}")
    save_checkpoint(folder, dataclasses.replace(load_checkpoint(tiny_checkpoint), about={"epoch": 2}))
    assert load_checkpoint(folder).about == {"epoch": 2}
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "vocabulary.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["best"]


def test_a_crash_while_writing_leaves_the_older_checkpoint(folder, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("disk full")

    newer = dataclasses.replace(load_checkpoint(folder), about={"epoch": 2})
    monkeypatch.setattr("captioning.checkpoint.safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(folder, newer)
    assert load_checkpoint(folder).about == {"about": "untrained"}


@pytest.mark.parametrize("crash_at", [1, 2])
def test_after_a_crash_at_a_renaming_the_older_checkpoint_is_recovered(folder, monkeypatch, crash_at):
    rename, calls = os.rename, []

    def crash(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == crash_at:
            raise KeyboardInterrupt
        rename(source, target)

    newer = dataclasses.replace(load_checkpoint(folder), about={"epoch": 2})
    monkeypatch.setattr("captioning.files.os.rename", crash)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(folder, newer)
    monkeypatch.undo()
    assert folder.exists() == (crash_at == 1)
    recover_folder(folder)
    assert load_checkpoint(folder).about == {"about": "untrained"}
    save_checkpoint(folder, newer)  # and the leftovers are in nobody's way
    assert load_checkpoint(folder).about == {"epoch": 2}
    assert [path.name for path in folder.parent.iterdir()] == ["best"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "x").write_text("old")

    def write(content: str) -> None:
        with fresh_file(tmp_path / "x") as partial:
            partial.write_text(content)
            if content != "new":
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write("ne")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "old")]
    write("new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "new")]


def test_a_run_folder_means_its_best_checkpoint(folder):
    assert checkpoint_folder(folder.parent) == folder
    assert checkpoint_folder(folder) == folder


def test_an_unknown_checkpoint_names_the_pretrained_ones(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / "pretrained" / name).mkdir(parents=True)
    monkeypatch.setattr("captioning.checkpoint.PRETRAINED", tmp_path / "pretrained")
    with pytest.raises(FileNotFoundError, match="nothing: no checkpoint folder, nor one of the pretrained: one, two"):
        load_captioner("nothing")


def test_a_pretrained_checkpoint_goes_by_its_name(folder, monkeypatch):
    monkeypatch.setattr("captioning.checkpoint.PRETRAINED", folder.parent)
    assert load_captioner("best").ensemble.members[0].decoder == load_checkpoint(folder).decoder


def test_dot_alignment_of_unequal_sizes_cannot_be_built(tiny_checkpoint):
    with pytest.raises(ValueError, match=r"alignment='dot' needs .*16.*128"):
        build_model(load_checkpoint(tiny_checkpoint).encoder, DecoderConfig(hidden_dim=16, alignment="dot"), 9)


def test_a_checkpoint_that_cannot_be_written_leaves_the_older_one_and_nothing_beside(folder, monkeypatch):
    checkpoint, before = load_checkpoint(folder), (folder / "model.safetensors").read_bytes()

    def full(*_):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match=r"model\.safetensors: I/O error: No space left on device"):
        save_checkpoint(folder, checkpoint)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["best"]


@pytest.mark.parametrize("field", ["hidden_dim", "embedding_dim", "attention_dim"])
def test_a_config_that_asks_for_terabytes_is_refused_before_they_are_taken(folder, field):
    edit(folder / "config.json", **{f"decoder__{field}": 10**7})
    with pytest.raises(ValueError, match=r"config describes [\d,]{9,} parameters, its file has [\d,]+$"):
        load_checkpoint(folder)


def test_pictures_of_a_million_pixels_a_side_are_refused(folder):
    edit(folder / "config.json", encoder__image_size=10**6)
    with pytest.raises(ValueError, match=r"config\.json: encoder: .*image_size must be at most 4096"):
        load_checkpoint(folder)


def test_weights_that_are_not_finite_are_refused(folder):
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state["decoder.L_h.bias"][3] = float("nan")
    safetensors.torch.save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: decoder\.L_h\.bias holds values that are not finite"):
        load_checkpoint(folder)
