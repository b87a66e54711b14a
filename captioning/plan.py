"""The batches of every epoch of a run, and how many there are."""

import dataclasses
from typing import NamedTuple

from captioning.config import Settings
from captioning.data import CaptionData, Sample, plan_epoch


class Length(NamedTuple):
    """How long a run is.

    Args:
        epoch_steps: of its first epoch.
        likelihood_steps: that minimise the NLL.
        steps: all of them.
        epochs: that they take.
    """

    epoch_steps: int
    likelihood_steps: int
    steps: int
    epochs: int


def plan(settings: Settings, data: CaptionData, *, epoch: int) -> list[list[Sample]]:
    """The batches of an epoch, over all processes; fewer or none after `max_steps`."""
    batches = plan_epoch(
        data,
        "train",
        captions_per_image=settings.captions_per_image,
        batch_size=settings.batch_size,
        seed=settings.seed,
        epoch=epoch,
        every_caption=epoch < settings.likelihood_epochs,
        scales=len(settings.encoder.sides),
    )
    return batches[: max(settings.max_steps - epoch * len(batches), 0)] if settings.max_steps else batches


def plan_length(settings: Settings, data: CaptionData) -> Length:
    """How long a run is, from the plans of its epochs."""
    unlimited = dataclasses.replace(settings, max_steps=0)
    first, last = (len(plan(unlimited, data, epoch=epoch)) for epoch in (0, settings.epochs - 1))
    likelihood = first * settings.likelihood_epochs
    total = likelihood + last * settings.self_critical.epochs
    total = min(total, settings.max_steps or total)
    epochs = min(settings.epochs, -(-total // first)) if settings.max_steps else settings.epochs
    return Length(first, min(likelihood, total), total, epochs)
