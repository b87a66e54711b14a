"""Runs that end early, and go on: to the same bits, with the same settings, and nothing lost."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import h5py
import pytest
import torch
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import STEPS, TINY, same_bits, saved_bits, tiny_settings, train_interrupted

from captioning import training
from captioning.checkpoint import TrainingState, load_checkpoint
from captioning.config import LossConfig, RegionEncoderConfig, to_dict
from captioning.data import CaptionData
from captioning.plan import plan
from captioning.run import start
from captioning.start import check_same_run, load_last


@pytest.mark.parametrize("stop_after", range(1, STEPS))
def test_a_run_interrupted_after_any_step_and_resumed_ends_with_the_same_bits(
    stop_after, whole_run, tiny_data, tmp_path
):
    settings = tiny_settings(tiny_data, tmp_path / "run")
    train_interrupted(settings, stop_after)
    training.train(dataclasses.replace(settings, resume=True))
    assert same_bits(saved_bits(tmp_path / "run"), saved_bits(whole_run))


def test_a_killed_process_resumes_from_its_last_saved_step_to_the_same_bits(whole_run, tiny_data, tmp_path):
    recipe = tmp_path / "recipe.json"
    settings = dataclasses.asdict(tiny_settings(tiny_data, tmp_path / "run", save_every=1))
    recipe.write_text(json.dumps(settings))
    command = [sys.executable, "train.py", "--config", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    progress = tmp_path / "run" / "last" / "training.json"
    deadline = time.monotonic() + 120
    while not progress.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert progress.exists() or (tmp_path / "run" / ".last.replaced").exists()
    result = subprocess.run(
        [*command, "--resume", "true"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    assert same_bits(saved_bits(tmp_path / "run"), saved_bits(whole_run))


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="workers that are not forked take seconds")
def test_a_signal_to_the_whole_group_of_processes_saves_the_run(tiny_data, tmp_path):
    # As `timeout`, a terminal's Ctrl-C and a job queue send it: to the processes that read data, too.
    recipe, validation = tmp_path / "recipe.json", dataclasses.replace(TINY["validation"], every=999)
    changes = {"workers": 1, "batch_size": 1, "captions_per_image": 1, "epochs": 999, "save_every": 5}
    changes["validation"] = validation
    recipe.write_text(json.dumps(dataclasses.asdict(tiny_settings(tiny_data, tmp_path / "run", **changes))))
    process = subprocess.Popen(
        [sys.executable, "train.py", "--config", str(recipe)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    progress, deadline = tmp_path / "run" / "last" / "training.json", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):  # while it is replaced
            if json.loads(progress.read_text())["progress"]["step"] == 20:  # in the middle of an epoch of 160
                break
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "--resume true" in error.splitlines()[-1]
    assert load_checkpoint(tmp_path / "run" / "last").about["progress"]["step"] > 20


def test_a_run_that_fails_ends_though_its_workers_heed_no_signal(tiny_data, tmp_path):
    # Python waits for workers when it ends, and would ask them by SIGTERM; the traceback keeps the loader alive.
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(dataclasses.asdict(tiny_settings(tiny_data, tmp_path / "run", workers=1))))
    failing = (
        "import sys, train; from captioning import training\n"
        "def fail(run, batch): raise RuntimeError('out of memory')\n"
        "training.train_step = fail; sys.exit(train.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", failing, "--config", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "RuntimeError: out of memory"


def test_a_signal_that_comes_twice_at_once_is_one_and_a_later_one_stops_at_once(monkeypatch):
    # A job queue signals torchrun and each of its processes, and torchrun passes its own on to them.
    now = [100.0]
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with training._stop_signals() as stop:
        for seconds in (0.0, 0.1):
            now[0] += seconds
            signal.raise_signal(signal.SIGTERM)
            assert stop["now"]
        now[0] += 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_the_curves_of_a_resumed_run_keep_what_the_last_epoch_ended_with(tiny_data, tmp_path, monkeypatch):
    settings, real_step = tiny_settings(tiny_data, tmp_path / "run"), training.train_step

    def step_or_die(run, batch):
        if run.progress.step > STEPS // 2:
            raise MemoryError("killed in the second epoch, which had saved nothing")
        return real_step(run, batch)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", step_or_die)
        with pytest.raises(MemoryError):
            training.train(settings)
    training.train(dataclasses.replace(settings, resume=True))
    curves = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for name in ("val/CIDEr", "attention/entropy", "train/words_per_second"):
        assert [point.step for point in curves.Scalars(name)] == [STEPS // 2, STEPS], name


@pytest.mark.parametrize(("max_steps", "batches"), [(3, [3, 0]), (4, [4, 0]), (6, [4, 2]), (8, [4, 4]), (99, [4, 4])])
def test_max_steps_ends_the_run_and_its_schedule(max_steps, batches, tiny_data, tmp_path):
    optimizer = dataclasses.replace(TINY["optimizer"], warmup_steps=0, schedule="linear")
    settings = tiny_settings(tiny_data, tmp_path / "run", max_steps=max_steps, optimizer=optimizer)
    run = start(settings)
    assert [len(plan(settings, run.data, epoch=epoch)) for epoch in range(2)] == batches
    assert run.length.steps == sum(batches)
    run.progress.step = 3
    assert run.rate_factor() == pytest.approx(1 - 3 / sum(batches))


@pytest.mark.parametrize("stop_after", [2, 5, 6])
def test_a_run_with_max_steps_is_validated_at_its_end_and_resumes_to_the_same_bits(stop_after, tiny_data, tmp_path):
    validation = dataclasses.replace(TINY["validation"], every=9)
    settings = tiny_settings(tiny_data, tmp_path / "whole", max_steps=6, epochs=5, validation=validation)
    training.train(settings)
    progress = load_checkpoint(tmp_path / "whole" / "last").about["progress"]
    assert (progress["step"], progress["batch"], len(progress["history"])) == (6, 0, 1)
    assert progress["words"] > 0
    assert progress["seconds"] > 0

    again = dataclasses.replace(settings, output=str(tmp_path / "again"))
    train_interrupted(again, stop_after)
    for _ in range(2):  # the second time there is nothing left to do
        training.train(dataclasses.replace(again, resume=True))
    assert same_bits(saved_bits(tmp_path / "again"), saved_bits(tmp_path / "whole"))
    assert len(load_checkpoint(tmp_path / "again" / "last").about["progress"]["history"]) == 1


def test_a_finished_run_is_not_overwritten(whole_run, tiny_data):
    with pytest.raises(FileExistsError, match="holds a run or a checkpoint already"):
        training.train(tiny_settings(tiny_data, whole_run))


def test_a_run_of_an_older_version_is_resumed(whole_run, tiny_data, tmp_path):
    # which did not know of a setting that has its default
    shutil.copytree(whole_run, tmp_path / "run")
    path = tmp_path / "run" / "last" / "training.json"
    state = json.loads(path.read_text())
    del state["settings"]["distillation"], state["settings"]["decoder"]["gate"]
    path.write_text(json.dumps(state))
    start(tiny_settings(tiny_data, tmp_path / "run", resume=True))
    state["settings"]["decoder"]["gait"] = "scalar"
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"last: its settings\.decoder: no setting is called .gait."):
        start(tiny_settings(tiny_data, tmp_path / "run", resume=True))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder", dataclasses.replace(TINY["encoder"], batch_norm="frozen")),
        ("region_encoder", RegionEncoderConfig(positions="sinusoidal")),
        ("decoder", dataclasses.replace(TINY["decoder"], dropout=0.2)),
        ("loss", LossConfig(lambda_ds=0.5)),
        ("optimizer", dataclasses.replace(TINY["optimizer"], clip_norm=1.0)),
        ("epochs", 3),
        ("max_steps", 7),
        ("batch_size", 4),
        ("captions_per_image", 3),
        ("augment", "none"),
        ("seed", 1),
    ],
)
def test_a_resumed_run_may_not_change_what_the_weights_depend_on(name, value, whole_run, tiny_data):
    before, now = tiny_settings(tiny_data, whole_run), tiny_settings(tiny_data, whole_run, resume=True, **{name: value})
    was, is_now = (to_dict(settings)[name] for settings in (before, now))
    with pytest.raises(ValueError, match=re.escape(f"--resume: {name} was {was!r} and is now {is_now!r}")):
        start(now)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data", "elsewhere.h5"),
        ("init_from", "what has gone"),
        ("validation", dataclasses.replace(TINY["validation"], every=2)),
        ("workers", 2),
        ("save_every", 3),
        ("threads", 5),
    ],
)
def test_a_resumed_run_may_change_where_it_reads_and_how_it_is_saved_and_validated(name, value, whole_run, tiny_data):
    state = TrainingState.load(whole_run / "last")
    check_same_run(dataclasses.replace(tiny_settings(tiny_data, whole_run, resume=True), **{name: value}), state)


def test_a_run_that_goes_on_elsewhere_says_that_its_bits_will_differ(whole_run, tiny_data, tmp_path, capsys):
    shutil.copytree(whole_run, tmp_path / "run")
    state = tmp_path / "run" / "last" / "training.json"
    saved = json.loads(state.read_text())
    start(tiny_settings(tiny_data, tmp_path / "run", resume=True))
    assert "resumed elsewhere" not in capsys.readouterr().out
    saved["machine"]["threads"] = 77
    state.write_text(json.dumps(saved))
    start(tiny_settings(tiny_data, tmp_path / "run", resume=True))
    assert "resumed elsewhere (threads 77, processes 1, device cpu; now threads" in capsys.readouterr().out


def test_an_epoch_is_not_lost_when_its_validation_fails(tiny_data, tmp_path, whole_run, monkeypatch):
    def fail(*_, **__):
        raise MemoryError("the captions took too much")

    settings = tiny_settings(tiny_data, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(training, "caption_split", fail)
        with pytest.raises(MemoryError):
            training.train(settings)
    assert load_checkpoint(tmp_path / "run" / "last").about["progress"]["step"] == STEPS // 2
    training.train(dataclasses.replace(settings, resume=True))
    assert same_bits(saved_bits(tmp_path / "run"), saved_bits(whole_run))


def test_a_run_goes_on_without_what_it_started_from(tiny_data, tmp_path, whole_run):
    settings = tiny_settings(tiny_data, tmp_path / "run", init_from=str(shutil.copytree(whole_run, tmp_path / "first")))
    train_interrupted(settings, 2)
    shutil.rmtree(tmp_path / "first")
    training.train(dataclasses.replace(settings, resume=True))
    assert load_checkpoint(tmp_path / "run" / "last").about["progress"]["step"] == STEPS


@pytest.mark.parametrize("name", ["image/split", "image/name", "caption/raw"])
def test_a_run_goes_on_with_the_images_and_captions_that_it_began_with(name, whole_run, tiny_data, tmp_path):
    data = tmp_path / "other.h5"
    shutil.copy(tiny_data, data)
    with h5py.File(data, "r+") as file:
        first, second = file[name][0], file[name][8]
        file[name][0], file[name][8] = second, first
    state = TrainingState.load(whole_run / "last")
    settings = tiny_settings(data, whole_run, resume=True)
    with pytest.raises(ValueError, match=r"other\.h5 holds other images, splits or captions than the run began with"):
        load_last(settings, state, CaptionData(data))
    assert load_last(settings, state, CaptionData(tiny_data)) is not None
    del state.progress["data"]  # as older runs were saved
    assert load_last(settings, state, CaptionData(data)) is not None


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows closes no terminals so")
@pytest.mark.parametrize("nohup", [False, True])
def test_a_closed_terminal_stops_a_run_unless_it_was_told_to_go_on(nohup, tiny_data, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    try:
        real_step, steps = training.train_step, []

        def step_then_hang_up(run, batch):
            steps.append(real_step(run, batch))
            if len(steps) == 2:
                signal.raise_signal(signal.SIGHUP)
            return steps[-1]

        monkeypatch.setattr(training, "train_step", step_then_hang_up)
        settings = tiny_settings(tiny_data, tmp_path / "run", epochs=1)
        if nohup:
            training.train(settings)
        else:
            with pytest.raises(training.Interrupted, match="stopped at step 2"):
                training.train(settings)
        assert len(steps) == (4 if nohup else 2)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_that_was_copied_without_its_hidden_files_goes_on(tiny_data, tmp_path):
    train_interrupted(tiny_settings(tiny_data, tmp_path / "run"), 2)
    (tmp_path / "run" / ".lock").unlink()
    training.train(tiny_settings(tiny_data, tmp_path / "run", resume=True))


def test_settings_that_no_run_has_written_are_not_replaced(tiny_data, tmp_path):
    (tmp_path / "settings.json").write_text("my editor's")
    with pytest.raises(FileExistsError, match=r"holds a settings\.json that no run has made"):
        start(tiny_settings(tiny_data, tmp_path))
    assert (tmp_path / "settings.json").read_text() == "my editor's"
