"""What a recurrence need not do at every step: casts, before its first, and gradients, after its last."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from captioning.models.layout import fixed_product

LARGE = 2**21
"""Numbers in a W that it pays to lay out for a step of training: twice, and for more rows than a search has."""


def cast_for_autocast(x: Tensor) -> Tensor:
    """Cast once, not once per word, to the type that matrix products have here."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class _FixedProduct(torch.autograd.Function):
    """x W', whose gradient is that of x alone: g W, with W laid out for that once, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "LateLinear") -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.product_back(grads[0]), None


class LateLinear:
    """y_t = b_t + W x_t for the steps t of a recurrence, whose b_t are all there before the first.

    The gradient of W is sum_t g_t x_t', where g_t is that of y_t, which is also that of b_t. So it is made where b
    comes from, as one product of all steps: at every step it would cost a pass over the memory of W.

    Args:
        weight: W.
        offsets: b_t of every step, R_t rows each; all of these steps must be made.
    """

    def __init__(self, weight: Float[Tensor, "q p"], offsets: Sequence[Float[Tensor, "_ q"]]):
        self._inputs: list[Tensor] = []
        self._offsets = _LateGradient.apply(self._inputs, weight, *offsets)
        self._weight = cast_for_autocast(weight.detach())
        self.product = fixed_product(self._weight, LARGE)

    def __call__(self, x: Float[Tensor, "R p"]) -> Float[Tensor, "R q"]:
        """The next step."""
        x = x.to(self._weight.dtype)
        self._inputs.append(x.detach())
        return self._offsets[len(self._inputs) - 1] + cast(Tensor, _FixedProduct.apply(x, self))

    @cached_property
    def product_back(self) -> Callable[[Float[Tensor, "R q"]], Float[Tensor, "R p"]]:
        """G -> g W."""
        return fixed_product(self._weight.t(), LARGE)


class _LateGradient(torch.autograd.Function):
    """The offsets as they are. On the way back, their gradients and the inputs give the weight's."""

    @staticmethod
    def forward(ctx: Any, inputs: list[Tensor], weight: Tensor, *offsets: Tensor) -> tuple[Tensor, ...]:
        ctx.inputs, ctx.dtype = inputs, weight.dtype
        return tuple(x.view_as(x) for x in offsets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x = torch.cat(ctx.inputs)
        weight = torch.cat(grads).to(x.dtype).t() @ x
        return None, weight.to(ctx.dtype), *grads
