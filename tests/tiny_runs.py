"""Runs of the training loop that take a second, what they leave behind, and how one is interrupted."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from captioning import training
from captioning.checkpoint import read_tensors
from captioning.config import (
    DecoderConfig,
    EncoderConfig,
    OptimizerConfig,
    SearchConfig,
    Settings,
    ValidationConfig,
)

TINY = {
    "encoder": EncoderConfig(
        name="resnet18", layer="layer2", weights=None, image_size=32, train_from="layer1", batch_norm="train"
    ),
    "decoder": DecoderConfig(embedding_dim=8, hidden_dim=12, attention_dim=6, dropout=0.3),
    "optimizer": OptimizerConfig(learning_rate=0.01, encoder_learning_rate=0.01, average_decay=0.9, warmup_steps=3),
    "validation": ValidationConfig(diagnose_images=4, search=SearchConfig(beam_size=2, max_length=8)),
    "epochs": 2,
    "batch_size": 8,
    "workers": 0,
    "augment": "crop",
}


STEPS = 8  # 32 images x 5 captions in groups of 5, 8 groups a step, 2 epochs


def tiny_settings(data: Path, output: Path, **changes: Any) -> Settings:
    return Settings(**{**TINY, "data": str(data), "output": str(output), **changes})


def saved_bits(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder / "last" / "model.safetensors") | read_tensors(folder / "last" / "training.safetensors")


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def train_interrupted(settings: Settings, after: int) -> None:
    """Train until a signal comes, after so many steps."""
    real_step, steps = training.train_step, 0

    def step_then_signal(run, batch):
        nonlocal steps
        steps += 1
        result = real_step(run, batch)
        if steps == after:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train_step", step_then_signal)
        with pytest.raises(training.Interrupted, match="--resume true"):
            training.train(settings)
