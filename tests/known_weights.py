"""Modules whose weights are known, for tests by hand, and modules none of whose weights is zero."""

import torch
from torch import nn


def fill(module: nn.Module, **values: list) -> None:
    """Set parameters by their names, with __ for a dot."""
    with torch.no_grad():
        for name, value in values.items():
            parameter = module.get_parameter(name.replace("__", "."))
            parameter.copy_(torch.tensor(value, dtype=parameter.dtype).view_as(parameter))


def noisy(module: nn.Module) -> nn.Module:
    """Biases begin at zero; here they must not be."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module.eval()
