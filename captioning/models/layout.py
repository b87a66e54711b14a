"""Weights laid out once for many products of few rows: of a recurrence in training, and of a search.

In fp32 on a CPU, F.linear lays W out at every call as its kernels read it, which takes longer than the product of a few
rows. The operators that take it laid out are torch's own, but private (torch.compile uses them): where they are not,
and for small weights and other types, it is F.linear.
"""

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

LARGE = 2**19
"""Numbers in a W that it pays to lay out for a search."""
_ROWS = 32
"""What W is laid out for; other numbers of rows can be multiplied as well."""

M = TypeVar("M", bound=nn.Module)


def fixed_product(weight: Float[Tensor, "q p"], large: int) -> Callable[[Float[Tensor, "R p"]], Float[Tensor, "R q"]]:
    """A function x -> x W' for many x, without gradients; W is laid out if it has `large` numbers or more."""
    if not _suits(weight, large):
        return partial(F.linear, weight=weight)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, None, "none", [], "")


class FixedLinear(nn.Module):
    """A linear map as it is now, without gradients."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.product = fixed_product(linear.weight.detach(), LARGE)

    def forward(self, x: Float[Tensor, "*R p"]) -> Float[Tensor, "*R q"]:
        """W x + b."""
        y = self.product(x)
        return y if self.bias is None else y + self.bias


def laid_out(module: M) -> M:
    """A module that computes the same, with its large linear maps laid out as they are now; without gradients.

    The module itself stays as it is, and shares its parameters; where nothing is to be laid out it is returned.
    """
    if torch.is_autocast_enabled("cpu"):
        return module
    if type(module) is nn.Linear:
        linear = cast(nn.Linear, module)
        return cast(M, FixedLinear(linear)) if _suits(linear.weight, LARGE) else module
    parts = {name: part if part is None else laid_out(part) for name, part in module._modules.items()}
    if all(part is module._modules[name] for name, part in parts.items()):
        return module
    twin = copy.copy(module)
    twin._modules = parts
    return twin


def _suits(weight: Tensor, large: int) -> bool:
    right = weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.numel() >= large
    return right and _onednn_packs()


@cache
def _onednn_packs() -> bool:
    operators = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in operators)
