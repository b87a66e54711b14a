"""Strided depthwise convolutions: whatever way back is taken, the gradients are those of the equation."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from captioning.config import EncoderConfig
from captioning.models.depthwise import StridedDepthwise, _Convolve, quicken
from captioning.models.encoder import build_encoder

OPTIONS = [((2, 2), (1, 1), (1, 1)), ((2, 1), (0, 2), (1, 1)), ((3, 3), (2, 2), (2, 2))]


@pytest.mark.parametrize("sides", [(8, 8), (9, 7)])
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_are_those_of_the_convolution(options, sides):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *sides, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(3, 1, 3, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    plain = F.conv2d(x, weight, None, *options, groups=3)
    ours = _Convolve.apply(x, weight, options)
    upstream = torch.randn(plain.shape, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(ours, plain)
    wanted, found = (torch.autograd.grad(y, (x, weight), upstream) for y in (plain, ours))
    torch.testing.assert_close(found, wanted)
    assert torch.autograd.gradcheck(lambda *inputs: _Convolve.apply(*inputs, options), (x, weight))


def test_in_bf16_it_agrees_with_fp32():
    torch.manual_seed(0)
    conv = StridedDepthwise(16, 16, 3, stride=2, padding=1, groups=16, bias=False)
    x = torch.randn(2, 16, 12, 12, requires_grad=True)

    def gradients(*, bf16: bool) -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y = conv(x)
        assert y.dtype == (torch.bfloat16 if bf16 else torch.float32)
        return torch.autograd.grad(y.float().square().sum(), (x, conv.weight))

    for quick, exact in zip(gradients(bf16=True), gradients(bf16=False), strict=True):
        assert quick.dtype == exact.dtype
        torch.testing.assert_close(quick, exact, atol=0.02 * float(exact.abs().max()), rtol=0)


def test_only_what_is_strided_and_depthwise_is_replaced():
    convs = {
        "plain": nn.Conv2d(4, 4, 3, stride=2),
        "unstrided": nn.Conv2d(4, 4, 3, groups=4, bias=False),
        "biased": nn.Conv2d(4, 4, 3, stride=2, groups=4),
        "widening": nn.Conv2d(4, 8, 3, stride=2, groups=4, bias=False),
        "reflecting": nn.Conv2d(4, 4, 3, stride=2, groups=4, bias=False, padding=1, padding_mode="reflect"),
        "strided": nn.Conv2d(4, 4, 3, stride=2, groups=4, bias=False),
    }
    network = nn.ModuleDict(convs)
    before = network.state_dict()
    quicken(network)
    assert [name for name, conv in network.items() if type(conv) is StridedDepthwise] == ["strided"]
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(after[name].data_ptr() == before[name].data_ptr() for name in after)
    assert network["strided"].weight.requires_grad


@pytest.mark.parametrize(("train_from", "expected"), [(None, 0), ("all", 4)])
def test_an_encoder_that_is_trained_has_them(train_from, expected):
    config = EncoderConfig(name="mobilenet_v2", layer="features.17", weights=None, train_from=train_from)
    encoder, _ = build_encoder(config)
    assert sum(isinstance(module, StridedDepthwise) for module in encoder.modules()) == expected
