"""What a recurrence need not do at every step: casts and layouts, before its first, and gradients, after its last."""

from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def cast_for_autocast(x: Tensor) -> Tensor:
    """Cast once, not once per word, to the type that matrix products have here."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def fixed_product(weight: Float[Tensor, "q p"]) -> Callable[[Float[Tensor, "R p"]], Float[Tensor, "R q"]]:
    """A function x -> x W' for many x of few rows each, without gradients.

    In fp32 on a CPU a large W is laid out once as oneDNN's kernels read it. F.linear would do that at every step, which
    takes longer than the product of a few rows. These operators are torch's own, but private (torch.compile uses them):
    where they are not, and in other types, it is F.linear.
    """
    suits = weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.numel() >= _LARGE
    if not suits or not _onednn_packs():
        return partial(F.linear, weight=weight)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _FEW_ROWS)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, None, "none", [], "")


_LARGE = 2**19
"""Numbers in a W that it pays to lay out."""
_FEW_ROWS = 32
"""What W is laid out for; other numbers of rows can be multiplied as well."""


@cache
def _onednn_packs() -> bool:
    operators = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in operators)


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
        self.product = fixed_product(self._weight)

    def __call__(self, x: Float[Tensor, "R p"]) -> Float[Tensor, "R q"]:
        """The next step."""
        x = x.to(self._weight.dtype)
        self._inputs.append(x.detach())
        return self._offsets[len(self._inputs) - 1] + cast(Tensor, _FixedProduct.apply(x, self))

    @cached_property
    def product_back(self) -> Callable[[Float[Tensor, "R q"]], Float[Tensor, "R p"]]:
        """G -> g W."""
        return fixed_product(self._weight.t())


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
