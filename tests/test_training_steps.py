"""What an epoch is made of: steps in training mode, and their means."""

import dataclasses

import pytest
from tiny_runs import STEPS, TINY, tiny_settings

from captioning import training


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
