"""What an epoch is made of: steps in training mode, and their means."""

import dataclasses
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from conftest import ROOT
from tiny_runs import STEPS, TINY, tiny_settings

from captioning import training
from captioning.checkpoint import load_checkpoint
from captioning.run import start, start_accelerator


def test_every_step_is_made_in_training_mode_though_the_same_model_was_validated(tiny_data, tmp_path, monkeypatch):
    modes = []

    def step(run, batch):
        modes.append([run.model.training, run.model.decoder.dropout.training])
        return {"nll": 1.0}, 1

    monkeypatch.setattr(training, "train_step", step)
    changes = {
        "optimizer": dataclasses.replace(TINY["optimizer"], average_decay=0.0),
        "validation": dataclasses.replace(TINY["validation"], diagnose_images=0),
    }
    training.train(tiny_settings(tiny_data, tmp_path / "run", **changes))
    assert modes == [[True, True]] * STEPS


@pytest.mark.parametrize(("by_words", "mean"), [(True, (30 * 2 + 10 * 4) / 40), (False, (2 + 4) / 2)])
def test_the_mean_of_an_epoch_is_over_its_words_or_over_its_steps(by_words, mean):
    means = training.Means(by_words=by_words)
    means.add({"nll": 2.0}, 30)
    means.add({"nll": 4.0}, 10)
    assert str(means).startswith(f"nll {mean:.4f}, ")
    assert means.words == 40


APART = """
import sys
from types import SimpleNamespace
import torch
from accelerate import Accelerator
from captioning.training import share_statistics
accelerator = Accelerator(cpu=True)
norm = torch.nn.BatchNorm1d(2)
norm.running_mean.fill_(accelerator.process_index + 1)
norm.num_batches_tracked.fill_(accelerator.process_index + 5)
share_statistics(SimpleNamespace(accelerator=accelerator), norm)
assert norm.running_mean.tolist() == [1.0, 1.0] and norm.num_batches_tracked.item() == 5, accelerator.process_index
accelerator.end_training()
"""


@pytest.mark.slow
def test_all_processes_validate_with_the_statistics_of_the_first(tmp_path):
    (tmp_path / "apart.py").write_text(APART)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(tmp_path / "apart.py")], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_validation_searches_in_evaluation_mode(decay, tiny_data, tmp_path, monkeypatch):
    real, modes = training.caption_split, []

    def noted(model, *arguments, **options):
        modes.append(any(part.training for part in model.modules()))
        return real(model, *arguments, **options)

    monkeypatch.setattr(training, "caption_split", noted)
    optimizer = dataclasses.replace(TINY["optimizer"], average_decay=decay)
    training.train(tiny_settings(tiny_data, tmp_path / "run", optimizer=optimizer))
    assert modes == [False, False]


def test_a_gradient_that_is_not_finite_reaches_neither_the_weights_nor_what_was_saved(tiny_data, tmp_path, monkeypatch):
    def spoil(run):
        if run.progress.step == 1:
            next(run.model.decoder.parameters()).grad.fill_(float("nan"))  # of a loss that is finite

    monkeypatch.setattr(training, "average_gradients", spoil)
    with pytest.raises(ValueError, match=r"the gradient is not finite at step 1: lower optimizer\.learning_rate"):
        training.train(tiny_settings(tiny_data, tmp_path / "run", save_every=1))
    assert load_checkpoint(tmp_path / "run" / "last").about["progress"]["step"] == 1  # it is finite, or would not load


def test_a_process_ends_with_one_whose_loss_is_no_number(tiny_data, tmp_path):
    run = start(tiny_settings(tiny_data, tmp_path / "run"))
    asked = []

    def reduce(finite: torch.Tensor, reduction: str) -> torch.Tensor:
        asked.append((finite.item(), reduction))
        return finite / 2  # the mean of one and of the other's zero

    run.accelerator = cast(Any, SimpleNamespace(num_processes=2, reduce=reduce))
    with pytest.raises(ValueError, match="not finite at step 0"):  # or it would wait for the other for ever
        training.refuse_what_is_not_finite(run, torch.tensor(1.0), torch.tensor(2.0))
    assert asked == [(1.0, "mean")]


def test_more_processes_than_gpus_are_refused_in_a_line(tiny_data, tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"2 processes need as many GPUs \(found 1\)"):
        start_accelerator(tiny_settings(tiny_data, tmp_path / "run"))
