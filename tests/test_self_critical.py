"""The self-critical phase: its gradient is that of the expected reward, and its runs resume with the same bits."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from tiny_runs import train_interrupted
from torch import Tensor, nn

from captioning import training
from captioning.checkpoint import load_checkpoint, read_tensors
from captioning.config import (
    DecoderConfig,
    EncoderConfig,
    LossConfig,
    OptimizerConfig,
    RegionEncoderConfig,
    SearchConfig,
    SelfCriticalConfig,
    Settings,
    ValidationConfig,
    to_dict,
)
from captioning.data import Batch, CaptionData, CaptionDataset, load_batches
from captioning.decoding import sayable
from captioning.losses import doubly_stochastic_penalty, leave_one_out, self_critical
from captioning.models.captioner import CaptioningModel
from captioning.models.regions import RegionEncoder
from captioning.models.registry import build_decoder
from captioning.plan import plan
from captioning.run import Run, start
from captioning.self_critical import Rollout, reward_of, self_critical_sampled
from captioning.vocabulary import END, PAD, START

TINY = {
    "encoder": EncoderConfig(name="resnet18", image_size=32),
    "decoder": DecoderConfig(embedding_dim=8, hidden_dim=12, attention_dim=6, dropout=0.3),
    "optimizer": OptimizerConfig(learning_rate=0.01, average_decay=0.9, warmup_steps=3),
    "self_critical": SelfCriticalConfig(epochs=1, samples=3, max_length=8, learning_rate=0.002, schedule="linear"),
    "validation": ValidationConfig(diagnose_images=4, search=SearchConfig(beam_size=1, max_length=8)),
    "epochs": 2,
    "batch_size": 8,
    "workers": 0,
}
STEPS = 4  # of the phase: 32 images, 8 a step; the epoch of likelihood before it has as many


def tiny_settings(data: Path, output: Path, **changes: Any) -> Settings:
    return Settings(**{**TINY, "data": str(data), "output": str(output), **changes})


def saved_bits(folder: Path) -> dict[str, Tensor]:
    return read_tensors(folder / "last" / "model.safetensors") | read_tensors(folder / "last" / "training.safetensors")


def in_phase(run: Run) -> Run:
    """A run that stands at the first step of its phase."""
    run.progress.epoch, run.progress.step = run.settings.likelihood_epochs, run.length.likelihood_steps
    run.wrapped.train()
    return run


def first_batch(run: Run) -> Batch:
    dataset = CaptionDataset(run.data, sides=(32,))
    batches = plan(run.settings, run.data, epoch=run.progress.epoch)
    return next(load_batches(dataset, batches, captions_per_image=run.settings.captions_per_image))


def test_the_baseline_is_the_mean_of_the_others_by_hand():
    # 1 - (2 + 6) / 2 = -3; 2 - (1 + 6) / 2 = -1.5; 6 - (1 + 2) / 2 = 4.5
    advantage = leave_one_out(torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]]))
    torch.testing.assert_close(advantage, torch.tensor([[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]))


def test_each_word_weighs_the_advantage_of_its_caption_by_hand():
    mask = torch.tensor([[[True, True], [True, False]]])
    log_p = torch.tensor([-1.0, -2.0, -3.0])  # two words of the first caption, one of the second
    loss = self_critical(log_p, mask, torch.tensor([[0.5, -2.0]]))
    torch.testing.assert_close(loss, torch.tensor([0.5, 1.0, -6.0]))


REWARD = {(END,): 0.1, (4, END): 2.0, (5, END): 0.3, (4, 5, END): 1.0, (5, 4, END): 1.5}


def reward_of_words(images, captions):
    return torch.tensor([REWARD.get(tuple(caption), 0.0) for caption in captions], dtype=torch.float64).numpy()


@pytest.fixture
def enumerable_run(tiny_annotations, tmp_path) -> Run:
    """A run whose model knows two words and speaks at most two: 15 captions, those that break off among them."""
    run = in_phase(start(tiny_settings(tiny_annotations, tmp_path / "run", loss=LossConfig(lambda_ds=0.0))))
    config = dataclasses.replace(TINY["self_critical"], max_length=2)
    run.settings = dataclasses.replace(run.settings, self_critical=config)
    torch.manual_seed(0)
    decoder = build_decoder(
        DecoderConfig(embedding_dim=3, hidden_dim=3, attention_dim=3, dropout=0.5), vocabulary_size=6, annotation_dim=5
    )
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter)
    run.model = run.wrapped = CaptioningModel(run.model.encoder, RegionEncoder(5), decoder.double()).train()
    run.reward = reward_of_words
    return run


def gradient(model: CaptioningModel, loss: Tensor) -> Tensor:
    parameters = list(model.decoder.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
    )


def exact_gradient(model: CaptioningModel, a: Tensor) -> Tensor:
    """-d E[reward], by going through all captions that can be drawn."""
    captions = [(END,)] + [(word, END) for word in (4, 5)]
    captions += [(*words, last) for words in itertools.product((4, 5), repeat=2) for last in (END, 4, 5)]
    total, mean = 0.0, torch.zeros((), dtype=torch.float64)
    for caption in captions:
        output = model.decoder.eval()(a, torch.tensor([[[START, *caption]]]))
        log_p = sayable(output.logits).log_softmax(-1).gather(-1, output.targets.unsqueeze(-1)).sum()
        total, mean = total + float(log_p.detach().exp()), mean + log_p.exp() * REWARD.get(caption, 0.0)
    assert total == pytest.approx(1)
    model.decoder.train()
    return gradient(model, -mean)


def test_the_gradient_is_that_of_the_expected_reward(enumerable_run):
    run, n, k = enumerable_run, 200, 3
    a = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    own = torch.full((n, 1, 3), 4)
    exact = exact_gradient(run.model, a)
    found = []
    for _ in range(60):
        objective = self_critical_sampled(
            run, Batch(a.expand(n, -1, -1), own, torch.arange(n), torch.zeros(n, dtype=torch.bool))
        )
        per_caption = objective.loss * objective.words / (n * k)  # from a mean over words to one over captions
        found.append(gradient(run.model, per_caption))
    estimates = torch.stack(found)
    variance = estimates.var(dim=0) / len(estimates)

    def deviation(estimate: Tensor) -> float:
        """Squared distance from the exact gradient in units of its expectation for an estimate without bias: 1."""
        return float((estimate - exact).square().sum() / variance.sum())

    assert deviation(estimates.mean(dim=0)) < 2
    assert deviation(estimates.mean(dim=0) * (k - 1) / k) > 4  # a baseline with the sample itself in it


def test_nll_weight_adds_the_nll_of_the_images_own_captions(enumerable_run):
    run = enumerable_run
    a = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    own = torch.tensor([[[START, 4, 5, 4, 4, END]], [[START, 5, END, PAD, PAD, PAD]], [[PAD] * 6]])
    batch = Batch(a, own, torch.arange(3), torch.zeros(3, dtype=torch.bool))
    torch.manual_seed(1)
    alone = self_critical_sampled(run, batch)
    config = dataclasses.replace(run.settings.self_critical, nll_weight=0.25)
    run.settings = dataclasses.replace(run.settings, self_critical=config)
    torch.manual_seed(1)
    both = self_critical_sampled(run, batch)
    truth = run.model.eval().decoder(a, own)
    nll = torch.nn.functional.cross_entropy(truth.logits.float(), truth.targets)
    torch.testing.assert_close(both.means["nll"].float(), nll)
    torch.testing.assert_close(both.loss, alone.loss + 0.25 * both.means["nll"])
    assert both.means["reward"] == alone.means["reward"]
    assert both.words == alone.words + 5 + 2


def test_fillers_get_no_captions_and_others_come_longest_first(enumerable_run):
    run = enumerable_run
    own = torch.full((40, 1, 3), 4)
    own[[0, 7]] = PAD
    rollout = Rollout(
        run.model,
        Batch(torch.zeros(40, 4, 5), own, torch.arange(40), torch.zeros(40, dtype=torch.bool)),
        run.settings.self_critical,
        torch.Generator().manual_seed(0),
    )
    a = torch.arange(40.0).double().view(40, 1, 1).expand(40, 4, 5) / 40
    ordered, words = rollout(a)
    lengths = (words != PAD).sum(dim=-1)
    assert sorted(rollout.indices[-2:].tolist()) == [0, 7]
    assert lengths[-2:].sum() == 0
    assert bool((lengths[:-2] > 0).all())
    assert torch.equal(ordered, a[rollout.indices])
    assert torch.equal(lengths, lengths.sort(dim=1, descending=True).values)
    assert torch.equal(lengths[:, 0], lengths[:, 0].sort(descending=True).values)
    assert len(lengths.unique()) == 4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_weight_that_a_caption_depends_on_gets_a_gradient(precision, tiny_annotations, tmp_path):
    # Under autocast, weights that were cast while drawing, without gradient, must not be used again.
    run = in_phase(start(tiny_settings(tiny_annotations, tmp_path / "run", precision=precision)))
    self_critical_sampled(run, first_batch(run)).loss.backward()
    missing = [name for name, p in run.model.decoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_captions_are_drawn_without_dropout_and_training_goes_on_with_it(tiny_annotations, tmp_path):
    regions = RegionEncoderConfig("transformer", dim=8, heads=2, dropout=0.5)
    run = in_phase(start(tiny_settings(tiny_annotations, tmp_path / "run", region_encoder=regions)))
    modes, modes_of_regions = [], []
    run.model.decoder.dropout.register_forward_hook(lambda module, *_: modes.append(module.training))
    for part in run.model.regions.modules():
        if isinstance(part, nn.Dropout):
            part.register_forward_hook(lambda module, *_: modes_of_regions.append(module.training))
    self_critical_sampled(run, first_batch(run))
    assert set(modes) == {False}
    assert modes_of_regions == [False] * 4  # on the weights, on the MLP's inner layer and on what both add
    assert all(part.training for half in (run.model.regions, run.model.decoder) for part in half.modules())
    config = dataclasses.replace(run.settings.self_critical, dropout=True)
    run.settings = dataclasses.replace(run.settings, self_critical=config)
    modes.clear()
    modes_of_regions.clear()
    self_critical_sampled(run, first_batch(run))
    assert set(modes) == {False, True}
    assert modes_of_regions == [True] * 4


@pytest.fixture(scope="module")
def whole_run(tiny_annotations, tmp_path_factory) -> Path:
    """A run with both phases that nothing interrupted."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    training.train(tiny_settings(tiny_annotations, output))
    return output


@pytest.mark.parametrize("stop_after", [STEPS - 1, STEPS, STEPS + 1, STEPS + 2])
def test_a_run_interrupted_in_or_before_the_phase_and_resumed_ends_with_the_same_bits(
    stop_after, whole_run, tiny_annotations, tmp_path
):
    settings = tiny_settings(tiny_annotations, tmp_path / "run")
    train_interrupted(settings, stop_after)
    training.train(dataclasses.replace(settings, resume=True))
    one, other = saved_bits(tmp_path / "run"), saved_bits(whole_run)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_every_sample_is_judged_against_the_captions_of_its_own_image():
    samples = torch.tensor([[[START, 4, 5, END], [START, 4, END, PAD], [START, 5, END, PAD]]] * 2)
    asked = []

    def numbers(images, captions):
        asked.extend(captions)
        return np.asarray(images, dtype=np.float64)

    assert reward_of(numbers, samples, torch.tensor([7, 9])).tolist() == [[7, 7, 7], [9, 9, 9]]
    assert asked == [[4, 5, END], [4, END], [5, END]] * 2


def test_the_rate_has_a_schedule_in_each_phase(tiny_annotations, tmp_path):
    run = start(tiny_settings(tiny_annotations, tmp_path / "run", optimizer=OptimizerConfig(learning_rate=0.01)))
    rates = []
    for epoch, step in ((0, 0), (0, 2), (1, 4), (1, 6)):
        run.progress.epoch, run.progress.step = epoch, step
        rates.append(0.01 * run.rate_factor())
    # Cosine over the first 4 steps from 0.01: half of it at step 2. Linear over the last 4 from 0.002: likewise.
    assert rates == pytest.approx([0.01, 0.005, 0.002, 0.001])


def test_the_phase_raises_the_reward(tiny_annotations, tmp_path, capsys):
    phase = SelfCriticalConfig(epochs=12, samples=16, max_length=12, learning_rate=0.005)
    decoder = DecoderConfig(embedding_dim=24, hidden_dim=32, attention_dim=16, dropout=0.0)
    optimizer = OptimizerConfig(learning_rate=0.01)
    validation = ValidationConfig(every=99, search=SearchConfig(beam_size=1))
    changes = {"decoder": decoder, "optimizer": optimizer, "validation": validation, "loss": LossConfig(lambda_ds=0.0)}
    training.train(tiny_settings(tiny_annotations, tmp_path / "run", epochs=16, self_critical=phase, **changes))
    lines = [line for line in capsys.readouterr().out.splitlines() if "reward" in line]
    rewards = [float(line.split("reward ")[1].split(",")[0]) for line in lines]
    assert len(rewards) == 12
    assert rewards[-1] > 1.3 * rewards[0]
    assert all("length" in line for line in lines)


def test_the_encoder_can_be_trained_in_the_phase(tiny_data, tmp_path):
    encoder = EncoderConfig(name="resnet18", layer="layer2", weights=None, image_size=32, train_from="layer1")
    run = in_phase(start(tiny_settings(tiny_data, tmp_path / "run", encoder=encoder)))
    before = {name: x.clone() for name, x in run.model.encoder.state_dict().items()}
    calls = []
    run.model.encoder.register_forward_hook(lambda *_: calls.append(1))
    training.train_step(run, first_batch(run))
    after = run.model.encoder.state_dict()
    assert not torch.equal(before["network.layer1.0.conv1.weight"], after["network.layer1.0.conv1.weight"])
    assert len(calls) == 1  # drawing and gradient share its work


def test_a_run_may_be_all_phase_if_it_starts_from_a_checkpoint(whole_run, tiny_annotations, tmp_path):
    settings = tiny_settings(tiny_annotations, tmp_path / "run", epochs=1, init_from=str(whole_run / "best"))
    training.train(settings)
    assert load_checkpoint(tmp_path / "run" / "last").about["progress"]["step"] == STEPS


@pytest.mark.slow
def test_two_processes_go_through_the_phase_together(tiny_annotations, tmp_path):
    settings = tiny_settings(tiny_annotations, tmp_path / "run", batch_size=7)  # halves are unequal: there are fillers
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(to_dict(settings)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [*command, "--config", str(recipe)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "epoch 2: reward" in result.stdout


def test_an_epoch_of_the_phase_is_every_image_once(tiny_annotations, tmp_path):
    phase = tiny_settings(tiny_annotations, tmp_path, captions_per_image=2)
    data = CaptionData(tiny_annotations)
    assert [sum(map(len, plan(phase, data, epoch=epoch))) for epoch in (0, phase.epochs - 1)] == [3 * 32, 32]


def test_the_penalty_acts_on_the_captions_that_were_drawn(enumerable_run):
    run, seen = enumerable_run, []
    a = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    batch = Batch(a, torch.full((3, 1, 3), 4), torch.arange(3), torch.zeros(3, dtype=torch.bool))
    torch.manual_seed(1)
    alone = self_critical_sampled(run, batch).loss
    run.settings = dataclasses.replace(run.settings, loss=LossConfig(lambda_ds=0.7))
    run.model.register_forward_hook(lambda *x: seen.append(x[2]))
    torch.manual_seed(1)
    both = self_critical_sampled(run, batch).loss
    mean = doubly_stochastic_penalty(seen[0].alphas, seen[0].mask).sum() / 9  # 3 images, 3 captions each
    torch.testing.assert_close(both, alone + 0.7 * mean, check_dtype=False)
