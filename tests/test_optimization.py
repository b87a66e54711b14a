"""What each weight's step is made of: its group, its rate, its decay, the clipped gradient, the moving average."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from known_weights import fill
from tiny_runs import TINY, tiny_settings
from torch import nn

from captioning import training
from captioning.checkpoint import load_checkpoint
from captioning.config import OptimizerConfig, RegionEncoderConfig
from captioning.data import Batch, CaptionDataset, load_batches
from captioning.optimization import OPTIMIZERS, build_optimizer, moving_average
from captioning.plan import plan
from captioning.run import Run, start


def first_batch(run: Run) -> Batch:
    dataset = CaptionDataset(run.data, sides=(32,))
    return next(load_batches(dataset, plan(run.settings, run.data, epoch=0), captions_per_image=5))


def start_run(data, folder, **optimizer) -> Run:
    run = start(tiny_settings(data, folder, optimizer=dataclasses.replace(TINY["optimizer"], **optimizer)))
    run.wrapped.train()
    return run


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_encoder_has_its_own_rate_and_biases_do_not_decay(name, tiny_data, tmp_path):
    model = start_run(tiny_data, tmp_path / "run").model
    beside = nn.Linear(2, 1)
    optimizer = build_optimizer(model, OptimizerConfig(name, 0.01, 0.001, weight_decay=0.1), beside, None)
    encoder = {id(p) for p in model.encoder.parameters() if p.requires_grad}
    trained = {id(p) for p in [*model.parameters(), *beside.parameters()] if p.requires_grad}
    seen = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            seen.append(id(parameter))
            assert group["peak"] == group["lr"] == (0.001 if id(parameter) in encoder else 0.01)
            assert group["weight_decay"] == (0.1 if parameter.dim() > 1 else 0.0)
    assert len(seen) == len(set(seen))
    assert set(seen) == trained
    assert encoder


def test_a_step_is_taken_at_the_rate_of_the_schedule(tiny_data, tmp_path):
    run = start_run(tiny_data, tmp_path / "run", learning_rate=0.01, encoder_learning_rate=0.001, warmup_steps=4)
    batch = first_batch(run)
    for step in range(5):
        training.train_step(run, batch)
        run.progress.count(1, seconds=0.0)
        rates = {group["peak"]: group["lr"] for group in run.optimizer.param_groups}
        factor = (step + 1) / 4 if step < 4 else 1.0
        assert rates == pytest.approx({0.01: 0.01 * factor, 0.001: 0.001 * factor})


def test_gradients_are_clipped_to_their_norm_and_by_0_not_at_all(tiny_data, tmp_path, monkeypatch):
    def norm_of_a_step(clip_norm: float) -> float:
        run, norms = start_run(tiny_data, tmp_path / str(clip_norm), clip_norm=clip_norm), []

        def look(*_):
            norms.append(torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None]).norm())

        monkeypatch.setattr(run.optimizer, "step", look)
        training.train_step(run, first_batch(run))
        return norms[0].item()

    whole = norm_of_a_step(0.0)
    assert norm_of_a_step(whole / 10) == pytest.approx(whole / 10, rel=1e-3)
    assert norm_of_a_step(whole * 10) == pytest.approx(whole, rel=1e-3)


def test_the_moving_average_by_hand():
    model = nn.Linear(1, 1, bias=False)
    average = moving_average(model, 0.5)
    for value in (0.0, 1.0, 3.0):  # first a copy; then min(0.5, 2/11) of the old is kept, then min(0.5, 3/12)
        fill(model, weight=[value])
        average.update_parameters(model)
    assert average.module.weight.item() == pytest.approx(3 / 12 * (9 / 11) + 9 / 12 * 3)
    for _ in range(30):
        average.update_parameters(model)
    fill(model, weight=[5.0])
    average.update_parameters(model)
    assert average.module.weight.item() == pytest.approx(4.0, abs=1e-6)  # an old one keeps half


def test_the_average_follows_the_weights_and_is_what_is_validated_and_kept(tiny_data, tmp_path, monkeypatch):
    run = start_run(tiny_data, tmp_path / "run", average_decay=0.9)
    batch = first_batch(run)
    name = "decoder.L_o.weight"
    weights = []
    for _ in range(2):
        training.train_step(run, batch)
        run.progress.count(1, seconds=0.0)
        weights.append(run.model.get_parameter(name).detach().clone())
    assert run.evaluated is run.average.module
    assert not torch.equal(*weights)
    torch.testing.assert_close(run.evaluated.get_parameter(name).detach(), weights[0].lerp(weights[1], 9 / 11))
    search, validated = training.caption_split, []

    def search_and_note(model, *rest, **options):
        validated.append(model)
        return search(model, *rest, **options)

    monkeypatch.setattr(training, "caption_split", search_and_note)
    training.validate(run)
    assert validated == [run.average.module]
    kept = load_checkpoint(tmp_path / "run" / "best").model.get_parameter(name)
    assert torch.equal(kept, run.average.module.get_parameter(name))
    assert not torch.equal(kept, run.model.get_parameter(name))
    assert start_run(tiny_data, tmp_path / "plain", average_decay=0.0).average is None


def test_what_lies_between_encoder_and_decoder_is_trained(tiny_data, tmp_path):
    regions = RegionEncoderConfig("transformer", "learned", dim=8, heads=2)
    run = start(tiny_settings(tiny_data, tmp_path / "run", region_encoder=regions))
    run.wrapped.train()
    before = {name: p.detach().clone() for name, p in run.model.regions.named_parameters()}
    training.train_step(run, next(iter(training_batches(run))))
    changed = [name for name, p in run.model.regions.named_parameters() if not torch.equal(p, before[name])]
    assert before
    assert changed == list(before)


def training_batches(run: Run) -> Iterator[Batch]:
    dataset = CaptionDataset(run.data, sides=run.encoder.sides)
    return load_batches(dataset, plan(run.settings, run.data, epoch=0), captions_per_image=5)


@pytest.mark.parametrize(("name", "left"), [("adamw", 3 * (1 - 0.1 * 0.5)), ("adam", 3 - 0.1)])
def test_decay_is_decoupled_in_adamw_and_part_of_the_gradient_in_adam(name, left):
    weight = nn.Parameter(torch.full((1, 1), 3.0))
    weight.grad = torch.zeros(1, 1)
    OPTIMIZERS[name]([{"params": [weight], "lr": 0.1, "weight_decay": 0.5}]).step()
    assert weight.item() == pytest.approx(left, rel=1e-5)
