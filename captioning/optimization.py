"""The optimiser, its schedule and the moving average of the weights: settings in, state that can be saved out."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer, RMSprop
from torch.optim.swa_utils import AveragedModel

from captioning.config import OptimizerConfig
from captioning.models.captioner import CaptioningModel

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": partial(Adam, fused=True),  # one pass over the weights; the default makes a dozen on the CPU
    "adamw": partial(AdamW, fused=True),
    "rmsprop": RMSprop,
}


def build_optimizer(model: CaptioningModel, config: OptimizerConfig, *others: nn.Module | None) -> Optimizer:
    """An optimiser over what is trained: the encoder's stages with their own rate; no decay on biases and norms.

    `others` are trained at the decoder's rate.
    """
    groups = []
    beside = [part for part in others if part is not None]
    language = nn.ModuleList([model.regions, *model.decoders, *beside])
    for part, peak in ((model.encoder, config.encoder_learning_rate), (language, config.learning_rate)):
        trained = [p for p in part.parameters() if p.requires_grad]
        for decayed in (True, False):
            parameters = [p for p in trained if (p.dim() > 1) == decayed]
            if parameters:
                decay = config.weight_decay if decayed else 0.0
                groups.append({"params": parameters, "lr": peak, "peak": peak, "weight_decay": decay})
    return OPTIMIZERS[config.name](groups)


def learning_rate_factor(step: int, total: int, config: OptimizerConfig) -> float:
    """The learning rate of a step as a fraction of its peak: linear warm-up, then constant, cosine or linear to zero.

    Args:
        step: from 0.
        total: steps of the whole run.
        config: warmup_steps and schedule.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(total - config.warmup_steps, 1)
    return {"constant": 1.0, "cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done}[config.schedule]


def set_learning_rate(optimizer: Optimizer, factor: float) -> None:
    """Set every group's rate to its peak times the factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the weights; a young one forgets faster: min(decay, (1 + n) / (10 + n))."""

    def average(averaged: Iterable[Tensor], current: Iterable[Tensor], count: Tensor | int) -> None:
        n = int(count)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        for old, new in zip(averaged, current, strict=True):
            old.lerp_(new.to(old.dtype), weight)

    return AveragedModel(model, multi_avg_fn=average)


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors: `3/exp_avg` belongs to its fourth parameter."""
    return {
        f"{number}/{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for number, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def _state_of_one(optimizer: Optimizer) -> dict[str, bool]:
    """What an optimiser keeps of a parameter, and whether it has that parameter's form, from a step with another."""
    probe = nn.Parameter(torch.zeros(1))
    probe.grad = torch.zeros(1)
    other = cast(Callable[..., Optimizer], type(optimizer))([probe])
    other.step()
    return {name: torch.as_tensor(value).dim() == 1 for name, value in other.state[probe].items()}


def load_optimizer_tensors(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave.

    Raises:
        ValueError: that was another optimiser, or one of other parameters; names the tensor.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = _state_of_one(optimizer)
    shapes = {
        f"{number}/{name}": parameter.shape if alike else torch.Size()
        for number, parameter in enumerate(parameters)
        for name, alike in kept.items()
    }
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        if key not in shapes or shapes[key] != value.shape:
            raise ValueError(f"{key} of shape {tuple(value.shape)} is none of this optimiser's")
        number, name = key.split("/", 1)
        state.setdefault(int(number), {})[name] = value
    lacking = next((key for key in shapes if int(key.split("/")[0]) in state and key not in tensors), None)
    if lacking is not None:
        raise ValueError(f"{lacking} is missing")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
