"""The training loop: what it learns, says and keeps; several processes agree; mistakes are one line."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import TINY, same_bits, saved_bits, tiny_settings

from captioning import objective, train, training
from captioning.api import load_captioner
from captioning.checkpoint import load_checkpoint, read_tensors
from captioning.config import (
    DecoderConfig,
    EncoderConfig,
    HardConfig,
    LossConfig,
    OptimizerConfig,
    SearchConfig,
    ValidationConfig,
)
from captioning.data import CaptionData, CaptionDataset, load_batches, shard
from captioning.hard_objective import hard_terms
from captioning.losses import word_nll
from captioning.metrics import Scores
from captioning.models.attention import Look
from captioning.objective import teacher_forced
from captioning.optimization import learning_rate_factor
from captioning.plan import plan
from captioning.run import start


def test_another_seed_ends_elsewhere(whole_run, tiny_data, tmp_path):
    training.train(tiny_settings(tiny_data, tmp_path / "run", seed=1))
    assert not same_bits(saved_bits(tmp_path / "run"), saved_bits(whole_run))


def test_workers_change_no_bit(whole_run, tiny_data, tmp_path):
    training.train(tiny_settings(tiny_data, tmp_path / "run", workers=2))
    assert same_bits(saved_bits(tmp_path / "run"), saved_bits(whole_run))


def test_the_run_folder_holds_settings_curves_and_a_best_checkpoint_that_captions(whole_run, tiny_data):
    settings = json.loads((whole_run / "settings.json").read_text())
    assert settings["optimizer"]["learning_rate"] == 0.01
    assert list((whole_run / "tensorboard").glob("events*"))
    about = load_checkpoint(whole_run / "best").about
    scores = [entry["CIDEr"] for entry in load_checkpoint(whole_run / "last").about["progress"]["history"]]
    assert about["progress"]["history"][-1]["CIDEr"] == max(scores)
    assert load_checkpoint(whole_run / "best").search == SearchConfig(beam_size=5, max_length=8)  # validated with 2
    assert about["settings"]["data"] == tiny_data.name  # no folder of this machine
    photo = CaptionData(tiny_data).image(0).permute(1, 2, 0).numpy()
    assert load_captioner(whole_run).caption([photo])[0].alphas.shape[1:] == (4, 4)


def test_a_run_that_is_validated_by_drawing_gives_a_checkpoint_that_searches(tiny_data, tmp_path):
    validation = ValidationConfig(search=SearchConfig(sample=True, num_captions=7, length_penalty=0.5, max_length=8))
    training.train(tiny_settings(tiny_data, tmp_path / "run", validation=validation, max_steps=1))
    assert load_checkpoint(tmp_path / "run" / "best").search == SearchConfig(length_penalty=0.5, max_length=8)


def test_every_validation_says_what_the_attention_does(whole_run):
    history = load_checkpoint(whole_run / "last").about["progress"]["history"]
    assert len(history) == 2
    for entry in history:
        assert 0 < entry["entropy"] <= 1
        numbers = {"listening_gap", "mutual_information", "mutual_information_null", "movement_nouns", "gradient_snr"}
        assert numbers <= entry.keys()
    curves = EventAccumulator(str(whole_run / "tensorboard")).Reload()
    points = [point.value for point in curves.Scalars("attention/entropy")]
    assert points == pytest.approx([entry["entropy"] for entry in history])
    assert {"attention/entropy_of_word_1", "attention/nll_change_uniform", "attention/nll_change_centre"} <= set(
        curves.Tags()["scalars"]
    )


@pytest.mark.parametrize("attention", ["soft", "hard"])
def test_diagnosing_changes_no_bit(attention, tiny_data, tmp_path):
    decoder = dataclasses.replace(TINY["decoder"], attention=attention)
    hard = HardConfig(baseline="moving_average")  # which learns from every batch that it sees
    for count in (0, 4):
        validation = dataclasses.replace(TINY["validation"], diagnose_images=count)
        run = tmp_path / str(count)
        training.train(tiny_settings(tiny_data, run, decoder=decoder, hard=hard, validation=validation))
        for entry in load_checkpoint(run / "last").about["progress"]["history"]:
            assert ("entropy" in entry) == ("gradient_snr" in entry) == bool(count)
    assert same_bits(saved_bits(tmp_path / "0"), saved_bits(tmp_path / "4"))


def test_the_signal_is_that_of_the_runs_own_objective_without_its_teachers(tiny_data, tmp_path):
    penalty = LossConfig(lambda_ds=100.0)
    runs = [
        start(tiny_settings(tiny_data, tmp_path / str(i), loss=loss)) for i, loss in enumerate((LossConfig(), penalty))
    ]
    weak, strong = (training.attention_signal(run) for run in runs)
    assert strong > weak  # every batch pulls the attention the same way
    runs[1].teachers = cast(Any, "nobody who could be asked")
    assert training.attention_signal(runs[1]) == strong


@pytest.mark.parametrize(("epochs", "after"), [(5, 3), (2, 2)])
def test_training_says_plainly_when_attention_has_collapsed(epochs, after, tiny_data, tmp_path, capsys):
    run = start(tiny_settings(tiny_data, tmp_path / "run", epochs=epochs))
    with torch.no_grad():
        run.evaluated.decoder.attention.alignment.v.weight.zero_()  # it can see nothing: uniform for ever
    for epoch in range(after):
        assert "collapsed" not in capsys.readouterr().out
        run.progress.epoch = epoch
        training.validate(run)
    warning = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(warning) == 1
    assert f"H/ln L above 0.98 and a listening gap below 0.01 nats per word for {after} validations" in warning[0]
    assert "loss.lambda_ds" in warning[0]


@pytest.mark.slow
def test_two_processes_train_to_nearly_the_weights_of_one(tiny_data, tmp_path):
    # Without dropout, augmentation and batch statistics the gradients are the same up to the order of sums.
    changes = {
        "encoder": dataclasses.replace(TINY["encoder"], batch_norm="frozen", scales=(48,)),
        "decoder": dataclasses.replace(TINY["decoder"], dropout=0.0),
        "optimizer": OptimizerConfig(learning_rate=0.001, encoder_learning_rate=0.001),
        "augment": "none",
        "batch_size": 31,  # of 32 samples: the halves are unequal, and of the last batch one process has nothing
    }
    training.train(tiny_settings(tiny_data, tmp_path / "one", **changes))
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(dataclasses.asdict(tiny_settings(tiny_data, tmp_path / "two", **changes))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [*command, "--config", str(recipe)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "2 process(es)" in result.stdout
    one, two = (read_tensors(tmp_path / name / "last" / "model.safetensors") for name in ("one", "two"))
    for name, x in one.items():
        torch.testing.assert_close(two[name], x, rtol=0, atol=2e-3, msg=name)
    scores = [load_checkpoint(tmp_path / n / "last").about["progress"]["history"][0]["CIDEr"] for n in ("one", "two")]
    assert scores[0] == pytest.approx(scores[1], abs=0.05)


def test_every_caption_weighs_the_same_however_many_processes(tiny_data):
    data = CaptionData(tiny_data)
    batches = plan(tiny_settings(tiny_data, Path("unused"), batch_size=7), data, epoch=0)
    parts = [shard(batches, rank, 2) for rank in range(2)]
    for batch, *halves in zip(batches, *parts, strict=True):
        assert len(halves[0]) == len(halves[1])
        captions = sorted(c for half in halves for sample in half for c in sample.captions)
        assert captions == sorted(c for sample in batch for c in sample.captions)


def test_stored_annotations_train_a_checkpoint_that_has_its_encoder(tiny_annotations, tmp_path):
    settings = tiny_settings(tiny_annotations, tmp_path / "run", encoder=EncoderConfig(name="resnet18", image_size=32))
    settings = dataclasses.replace(settings, augment="none", epochs=1)
    training.train(settings)
    own = load_checkpoint(tmp_path / "run" / "best").model.encoder.network.state_dict()
    stored = CaptionData(tiny_annotations).encoder_state()
    assert all(torch.equal(own[name], x) for name, x in stored.items())


def test_training_starts_from_a_checkpoint_with_the_same_words(whole_run, tiny_data, tmp_path):
    run = start(tiny_settings(tiny_data, tmp_path / "run", init_from=str(whole_run / "best")))
    first = load_checkpoint(whole_run / "best").model.state_dict()
    assert all(torch.equal(x, first[name]) for name, x in run.model.state_dict().items())


def test_training_stops_early_when_cider_gains_no_more(tiny_data, tmp_path, capsys):
    optimizer = OptimizerConfig(learning_rate=1e-12, encoder_learning_rate=1e-12)
    validation = dataclasses.replace(TINY["validation"], patience=1)
    still = {"encoder": dataclasses.replace(TINY["encoder"], batch_norm="frozen"), "optimizer": optimizer}
    training.train(tiny_settings(tiny_data, tmp_path / "run", validation=validation, epochs=9, **still))
    assert load_checkpoint(tmp_path / "run" / "last").about["progress"]["epoch"] == 2
    assert "stopping early" in capsys.readouterr().out


def test_training_lowers_the_loss_of_its_captions(tiny_data, tmp_path):
    validation = ValidationConfig(every=99, search=SearchConfig(beam_size=1))
    decoder = DecoderConfig(embedding_dim=32, hidden_dim=64, attention_dim=16, dropout=0.0)
    settings = tiny_settings(tiny_data, tmp_path / "run", epochs=15, decoder=decoder, validation=validation)
    training.train(settings)
    data = CaptionData(tiny_data)
    dataset = CaptionDataset(data, sides=(32,))
    batch = next(load_batches(dataset, plan(settings, data, epoch=0), captions_per_image=5))
    output = load_checkpoint(tmp_path / "run" / "last").model(batch.images, batch.words)
    nll = word_nll(output.logits, output.targets).mean()
    assert nll < 0.6 * torch.tensor(len(data.vocabulary)).log()  # guessing costs ln V per word


def test_bf16_trains_too(tiny_data, tmp_path):
    training.train(tiny_settings(tiny_data, tmp_path / "run", precision="bf16", epochs=1))
    assert all(x.isfinite().all() for x in saved_bits(tmp_path / "run").values() if x.is_floating_point())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": EncoderConfig(name="resnet50", image_size=32)}, "encoder.name='resnet50', but .* 'resnet18'"),
        (
            {"encoder": EncoderConfig(name="resnet18", image_size=32, train_from="all")},
            "encoder.train_from='all' needs pixels",
        ),
        (
            {"augment": "flip"},
            "augment='flip': .* stores annotation vectors; allowed: none; with",
        ),
        ({"data": "nowhere.h5"}, "nowhere.h5: no such data file"),
        ({"resume": True}, "there is no run to resume"),
        ({"init_from": "nowhere"}, "nowhere: no checkpoint folder"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(changes, message, tiny_annotations, tmp_path):
    values = {"encoder": EncoderConfig(name="resnet18", image_size=32), "augment": "none", **changes}
    settings = dataclasses.replace(tiny_settings(tiny_annotations, tmp_path / "run"), **values)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        training.train(settings)
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_no_number_stops_the_run_with_advice(tiny_data, tmp_path):
    run = start(tiny_settings(tiny_data, tmp_path / "run"))
    with torch.no_grad():
        run.model.decoder.L_o.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"the loss is nan at step 0: lower optimizer.learning_rate"):
        training.train_epoch(run, {"now": False})


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),  # cos 45 degrees is the root of 1/2
    ],
)
def test_the_learning_rate_warms_up_and_decays(schedule, expected):
    config = OptimizerConfig(warmup_steps=2, schedule=schedule)
    factors = [learning_rate_factor(step, 10, config) for step in (0, 1, 2, 4, 6, 8)]  # from 2 to 10 in quarters
    assert factors == pytest.approx(expected)


@pytest.mark.parametrize("extra", [[], ["--loss.lambda", "1"], ["--epochs", "0"], ["--config", "nothing"]])
def test_the_commands_mistakes_are_one_line_and_exit_code_2(extra, tmp_path, capsys):
    assert train.main(["--data", "nowhere.h5", "--output", str(tmp_path / "x"), *extra]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("train: ")


def test_eq_14_is_the_mean_over_words_and_the_mean_over_captions(tiny_data, tmp_path):
    settings = tiny_settings(tiny_data, tmp_path / "run", loss=LossConfig(lambda_ds=0.7))
    run = start(settings)
    run.model.eval()
    data = CaptionData(tiny_data)
    batches = load_batches(CaptionDataset(data, sides=(32,)), plan(settings, data, epoch=0), captions_per_image=5)
    images, words, *_ = next(batches)
    words[1, 2:] = 0  # three captions less
    with torch.no_grad():
        found = teacher_forced(run, images, words)
        output = run.model(images, words)
        log_p = output.logits.log_softmax(dim=-1)
        nll = sum(-log_p[i, word] for i, word in enumerate(output.targets.tolist())) / len(output.targets)
        captions = [(n, k) for n in range(8) for k in range(5) if words[n, k, 0]]
        penalties = []
        for n, k in captions:
            length = int((words[n, k, 1:] != 0).sum())
            penalties.append((1 - output.alphas[n, k, :length].sum(dim=0)).square().mean())
    assert len(captions) == 37
    assert found.loss.item() == pytest.approx((nll + 0.7 * sum(penalties) / 37).item(), rel=1e-5)


@pytest.mark.parametrize("attention", ["soft", "hard"])
def test_the_losses_of_two_processes_have_the_whole_batchs_mean(attention, tiny_data, tmp_path, monkeypatch):
    hard = HardConfig(baseline="none", lambda_e=0.3) if attention == "hard" else HardConfig()
    decoder = dataclasses.replace(TINY["decoder"], attention=attention)
    loss = LossConfig(lambda_ds=0.7)
    settings = tiny_settings(tiny_data, tmp_path / "run", loss=loss, decoder=decoder, hard=hard)
    monkeypatch.setattr("captioning.objective.training_look", lambda hard: Look("argmax"))  # nothing is random
    monkeypatch.setattr("captioning.objective.update_baseline", lambda *_: None)
    run = start(settings)
    run.model.eval()
    dataset = CaptionDataset(run.data, sides=(32,))
    images, words, *_ = next(load_batches(dataset, plan(settings, run.data, epoch=0), captions_per_image=5))
    words[1, 2:] = 0  # the halves have 12 and 25 captions
    halves = [(images[:3], words[:3]), (images[3:], words[3:])]
    counts = [[(part[..., 1:] != 0).sum(), (part[..., 0] != 0).sum()] for _, part in halves]  # words, and captions
    for words_and_captions in counts:
        words_and_captions.append(torch.tensor(1.0))  # asked for by what is reported of hard attention alone
    alone = run.accelerator

    def loss_beside(others, half):
        left = iter(others)
        together = {"num_processes": 2, "autocast": alone.autocast, "reduce": lambda x: x + next(left)}
        run.accelerator = cast(Any, SimpleNamespace(**together))
        return teacher_forced(run, *half).loss.item()

    with torch.no_grad():
        whole = teacher_forced(run, images, words).loss.item()
        parts = [loss_beside(others, half) for others, half in zip(counts[::-1], halves, strict=True)]
    assert sum(parts) / 2 == pytest.approx(whole, rel=1e-5)


def test_every_seed_has_its_steps():
    seeds = {
        training.step_seed(seed, step, process) for seed in (0, 2**63 - 1) for step in range(3) for process in (0, 1)
    }
    assert len(seeds) == 12


def test_the_command_that_is_interrupted_before_its_first_step_says_so_in_one_line(tmp_path, capsys, monkeypatch):
    def interrupted(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted)
    assert train.main(["--data", "d.h5", "--output", str(tmp_path / "x")]) == 130
    assert capsys.readouterr().err == "train: interrupted\n"


def test_mistakes_do_not_wait_for_torch():
    code = "import sys; from captioning.train import main; print(main(['--config', 'x']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"


def test_what_is_said_of_a_step_is_of_all_processes(tiny_data, tmp_path):
    run = start(tiny_settings(tiny_data, tmp_path / "run"))
    assert training.over_processes(run, {"nll": 2.0}, 7) == ({"nll": 2.0}, 7)
    # 30 words with a mean NLL of 2 here and 10 words with one of 4 there: each sum over the mean count, 20
    here, there = {"nll": 30 * 2 / 20, "penalty": 0.5}, torch.tensor([10 * 4 / 20, 1.5, 10.0])
    together = {"num_processes": 2, "device": "cpu", "reduce": lambda x, how: (x + there) / 2}
    run.accelerator = cast(Any, SimpleNamespace(**together))
    values, words = training.over_processes(run, here, 30)
    assert values == pytest.approx({"nll": (30 * 2 + 10 * 4) / 40, "penalty": 1.0})
    assert words == 40


def test_a_process_that_is_asked_to_stop_while_it_asks_the_others_does_not_forget_it(tiny_data, tmp_path):
    run, stop = start(tiny_settings(tiny_data, tmp_path / "run")), {"now": False}

    def reduce(flag):
        stop["now"] = True  # the signal comes now
        return flag

    run.accelerator = cast(Any, SimpleNamespace(num_processes=2, device="cpu", reduce=reduce))
    assert not training.asked_to_stop(run, stop)  # all processes have the same answer
    assert stop["now"]  # and will have another after the next step


def test_the_best_checkpoint_is_that_of_the_highest_cider(tiny_data, tmp_path, monkeypatch):
    ciders = iter((0.1, 0.9, 0.5))

    def score(*_: Any, **__: Any) -> Scores:
        cider = next(ciders)
        bleu = {0.1: 0.1, 0.9: 0.2, 0.5: 0.3}[cider]
        return Scores({"BLEU-4": bleu, "ROUGE-L": bleu, "CIDEr": cider}, images=4, tokenisation="python")

    monkeypatch.setattr(training, "score", score)
    training.train(tiny_settings(tiny_data, tmp_path / "run", epochs=3))
    history = load_checkpoint(tmp_path / "run" / "best").about["progress"]["history"]
    assert [entry["CIDEr"] for entry in history] == [0.1, 0.9]
    last = load_checkpoint(tmp_path / "run" / "last").about["progress"]
    assert (last["best"], last["best_epoch"], last["without_gain"]) == (0.9, 2, 1)


@pytest.mark.parametrize("attention", ["soft", "hard"])
def test_labels_are_smoothed_in_the_loss_and_not_in_what_is_told_or_rewarded(
    attention, tiny_data, tmp_path, monkeypatch
):
    decoder = dataclasses.replace(TINY["decoder"], attention=attention)
    loss = LossConfig(lambda_ds=0.0, label_smoothing=0.2)
    settings = tiny_settings(tiny_data, tmp_path / "run", decoder=decoder, loss=loss)
    run = start(settings)
    dataset = CaptionDataset(run.data, sides=(32,))
    images, words, *_ = next(load_batches(dataset, plan(settings, run.data, epoch=0), captions_per_image=5))
    judged = []

    def terms(output, log_p, *others):
        judged.append((output, log_p))
        return hard_terms(output, log_p, *others)

    monkeypatch.setattr(objective, "hard_terms", terms)
    hook = run.model.register_forward_hook(lambda _, __, output: judged.append((output, None)))
    found = objective.teacher_forced(run, images, words)
    hook.remove()
    output = judged[0][0]
    smoothed = word_nll(output.logits, output.targets, label_smoothing=0.2)
    plain = word_nll(output.logits, output.targets)
    assert found.means["nll"].item() == pytest.approx(plain.mean().item(), rel=1e-5)
    if attention == "soft":
        assert found.loss.item() == pytest.approx(smoothed.mean().item(), rel=1e-5)
    else:
        torch.testing.assert_close(judged[1][1], -plain.detach())
