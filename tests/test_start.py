"""What a run refuses before its first step: data, checkpoints, settings and folders that do not fit."""

import dataclasses
import importlib.metadata
import json
import shutil
import subprocess
import sys

import h5py
import pytest
from conftest import ROOT
from tiny_runs import STEPS, TINY, tiny_settings, train_interrupted

from captioning import training
from captioning.config import EncoderConfig, SearchConfig, ValidationConfig
from captioning.run import as_checkpoint, start


def test_nothing_to_validate_on_is_said_before_an_epoch_is_spent(tiny_data, tmp_path):
    data = tmp_path / "train.h5"
    shutil.copy(tiny_data, data)
    with h5py.File(data, "r+") as file:
        file["image/split"][:] = 0
    with pytest.raises(ValueError, match="no images of split 'val'; there are train"):
        start(tiny_settings(data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_validation_that_the_model_cannot_make_is_refused_at_once(tiny_data, tmp_path):
    validation = ValidationConfig(search=SearchConfig(location="sample"))
    with pytest.raises(ValueError, match=r"validation\.search\.location='sample' needs decoder\.attention='hard'"):
        start(tiny_settings(tiny_data, tmp_path / "run", validation=validation))


def test_a_validation_with_mirrored_images_needs_their_vectors(tiny_annotations, tmp_path):
    validation = ValidationConfig(search=SearchConfig(mirror=True))
    changes = {"encoder": EncoderConfig(name="resnet18", image_size=32), "augment": "none", "validation": validation}
    with pytest.raises(ValueError, match="holds no annotation vectors of mirrored images"):
        start(tiny_settings(tiny_annotations, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_its_own_words_only(tiny_data, tmp_path):
    settings = tiny_settings(tiny_data, tmp_path / "run")
    train_interrupted(settings, 2)
    data = tmp_path / "other.h5"
    shutil.copy(tiny_data, data)
    with h5py.File(data, "r+") as file:
        file["vocabulary"][-1] = "azure"
    with pytest.raises(ValueError, match=r"--resume: its vocabulary is not that of .*other\.h5"):
        start(dataclasses.replace(settings, data=str(data), resume=True))


def test_a_package_that_lies_beside_its_command_has_no_version_and_costs_no_run(tiny_data, tmp_path, monkeypatch):
    real = importlib.metadata.version

    def not_installed(name):
        if name == "show-attend-tell":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    run = start(tiny_settings(tiny_data, tmp_path / "run"))
    versions = as_checkpoint(run, run.model).about["versions"]
    assert versions["show-attend-tell"] is None
    assert versions["torch"] == real("torch")


def test_a_run_that_is_over_lets_go_of_its_folder(tiny_data, tmp_path):
    run = start(tiny_settings(tiny_data, tmp_path / "run"))
    run.close()
    assert run.lock.closed


def test_two_processes_do_not_train_in_one_folder(tiny_data, tmp_path):
    run = start(tiny_settings(tiny_data, tmp_path / "run"))
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(dataclasses.asdict(run.settings)))
    command = [sys.executable, "train.py", "--config", str(recipe)]
    other = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert other.returncode == 2
    assert other.stderr.strip().endswith(f"output={tmp_path / 'run'}: another process is training there now")


def test_a_fit_that_the_data_file_has_not_is_refused(tiny_data, tiny_annotations, tmp_path):
    squashed = dataclasses.replace(TINY["encoder"], fit="squash")
    with pytest.raises(ValueError, match=r"encoder\.fit='squash', but .*pixels\.h5 was made with 'crop'"):
        start(tiny_settings(tiny_data, tmp_path / "run", encoder=squashed))
    bilinear = dataclasses.replace(TINY["encoder"], train_from=None, resample="bilinear")
    with pytest.raises(
        ValueError, match=r"encoder\.resample='bilinear', but .*annotations\.h5 was made with 'bicubic'"
    ):
        start(tiny_settings(tiny_annotations, tmp_path / "run", encoder=bilinear, augment="none"))
    assert not (tmp_path / "run").exists()


def test_vectors_of_another_encoder_are_nothing_to_go_on_with(tiny_data, tiny_annotations, tmp_path):
    frozen = dataclasses.replace(TINY["encoder"], train_from=None, batch_norm="frozen")
    training.train(tiny_settings(tiny_data, tmp_path / "first", encoder=frozen, epochs=1, seed=5))
    settings = tiny_settings(tiny_annotations, tmp_path / "run", encoder=frozen, augment="none")
    with pytest.raises(ValueError, match=r"init_from=.*first: .* annotation vectors of another encoder"):
        start(dataclasses.replace(settings, init_from=str(tmp_path / "first")))


def test_a_run_on_squashed_photos_makes_a_checkpoint_that_squashes(tiny_data, tmp_path):
    shutil.copy(tiny_data, tmp_path / "squashed.h5")
    with h5py.File(tmp_path / "squashed.h5", "r+") as file:
        file.attrs["settings"] = json.dumps({**json.loads(file.attrs["settings"]), "fit": "squash"})
    run = start(tiny_settings(tmp_path / "squashed.h5", tmp_path / "run"))
    run.close()
    assert run.encoder.fit == as_checkpoint(run, run.model).encoder.fit == "squash"


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"weights": "mine.pth"}, "weights='mine.pth'"), ({"batch_norm": "train"}, "batch_norm='train'")],
)
def test_what_stored_vectors_leave_no_room_for_is_refused(changes, named, tiny_annotations, tmp_path):
    encoder = EncoderConfig(name="resnet18", image_size=32, **changes)
    with pytest.raises(ValueError, match=f"encoder.{named}"):
        start(tiny_settings(tiny_annotations, tmp_path / "run", encoder=encoder, augment="none"))


def test_one_image_is_too_few_to_choose_an_epoch_by(tiny_data, tmp_path):
    # CIDEr weighs words by how few images they belong to; of one image all weigh nothing
    validation = dataclasses.replace(TINY["validation"], images=1, diagnose_images=0)
    with pytest.raises(ValueError, match=r"takes two images at least \(4 in split 'val'.*validation.images=1"):
        start(tiny_settings(tiny_data, tmp_path / "run", validation=validation))


@pytest.mark.parametrize("left", ["last/", "best/", "config.json"])
def test_what_is_in_the_folder_already_is_not_trained_over(left, tiny_data, tmp_path):
    output = tmp_path / "run"
    (output / left).mkdir(parents=True) if left.endswith("/") else output.mkdir()
    (output / "config.json").touch()
    if left != "config.json":
        (output / "config.json").unlink()
    with pytest.raises(FileExistsError, match="holds a run or a checkpoint already"):
        start(tiny_settings(tiny_data, output))


def test_a_warm_up_that_never_ends_is_told(tiny_data, tmp_path, capsys):
    for warmup in (STEPS, STEPS - 1):
        optimizer = dataclasses.replace(TINY["optimizer"], warmup_steps=warmup)
        start(tiny_settings(tiny_data, tmp_path / str(warmup), optimizer=optimizer)).close()
    assert capsys.readouterr().out.count("its rate never reaches its peak") == 1
