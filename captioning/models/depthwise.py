"""Depthwise convolutions with a stride, as MobileNet and EfficientNet have them, trained in bf16 on a CPU.

There the library's way back takes two to twenty times as long as that of the same convolution without a stride. That
one will do: with stride s, y_s = y_1[::s, ::s], so the gradient of y_s, spread over zeros, is that of y_1.
docs/performance.md has what it is worth.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class _Convolve(torch.autograd.Function):
    """Forward as it is, backward without the stride. Options: stride, padding and dilation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, options: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = options
        stride, padding, dilation = options
        return F.conv2d(x, weight, None, stride, padding, dilation, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        stride, padding, dilation = ctx.options
        sizes = zip(x.shape[2:], weight.shape[2:], padding, dilation, strict=True)
        height, width = (side + 2 * p - d * (k - 1) for side, k, p, d in sizes)
        shape = (len(x), len(weight), height, width)
        spread = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last).zero_()
        spread[:, :, :: stride[0], :: stride[1]] = gradients[0]
        one, none = (1, 1), (0, 0)
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(
            spread, x, weight, None, one, padding, dilation, False, none, len(weight), (True, True, False)
        )
        return of_x, of_weight, None


class StridedDepthwise(nn.Conv2d):
    """`nn.Conv2d` of one filter per channel, without a bias, whose gradients in bf16 on a CPU are made as above."""

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C h w"]:
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or not torch.is_grad_enabled():
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cpu")
        options = (self.stride, self.padding, self.dilation)
        result: Tensor = _Convolve.apply(x.to(dtype), self.weight.to(dtype), options)
        return result


def quicken(network: nn.Module) -> None:
    """Replace a network's strided depthwise convolutions by `StridedDepthwise`, with the same weights by name."""
    for name, module in list(network.named_modules()):
        if type(module) is not nn.Conv2d or module.bias is not None:
            continue
        depthwise = module.groups == module.in_channels == module.out_channels
        if depthwise and max(module.stride) > 1 and module.padding_mode == "zeros" and module.padding != "same":
            network.set_submodule(name, _replaced(module))


def _replaced(conv: Any) -> StridedDepthwise:
    options = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")}
    with torch.device("meta"):
        quick = StridedDepthwise(conv.in_channels, conv.out_channels, conv.kernel_size, bias=False, **options)
    quick.weight = conv.weight
    return quick
