"""A gradient that is made once, after the last step, is the one that every step would have added to."""

import torch
from torch.nn.functional import linear

from captioning.models.late import LateLinear


def recurrence(weight: torch.Tensor, offsets: list[torch.Tensor], *, late: bool) -> torch.Tensor:
    """x_1 = 1, y_t = b_t + W x_t, x_{t+1} = tanh(y_t), and after the first two steps one row less."""
    maps = LateLinear(weight, offsets) if late else None
    x, total = torch.ones(len(offsets[0]), weight.shape[1], dtype=weight.dtype), weight.new_zeros(())
    for offset in offsets:
        x = x[: len(offset)]
        x = torch.tanh(maps(x) if maps is not None else offset + linear(x, weight))
        total = total + x.square().sum()
    return total


def example() -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weight, *offsets = (torch.randn(rows, 3, generator=generator).double().requires_grad_() for rows in (3, 4, 4, 3))
    return weight, offsets


def test_a_late_gradient_is_the_sum_over_steps():
    weight, offsets = example()
    results = [recurrence(weight, offsets, late=late) for late in (True, False)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(x, [weight, *offsets]) for x in results))


def test_a_late_gradient_is_the_derivative():
    weight, offsets = example()
    assert torch.autograd.gradcheck(lambda w, *b: recurrence(w, b, late=True), (weight, *offsets))


def test_a_second_backward_pass_gives_the_same_late_gradient():
    weight, offsets = example()
    total = recurrence(weight, offsets, late=True)
    torch.autograd.grad(total, offsets[-1], retain_graph=True)  # a part of the graph only
    first = torch.autograd.grad(total, weight, retain_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(total, weight))


def test_under_bf16_the_products_are_bf16_and_the_late_gradient_is_not():
    weight, offsets = example()
    weight = weight.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = LateLinear(weight, [offsets[0].bfloat16()])(torch.ones(4, 3))
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert weight.grad.tolist() == [[4.0] * 3] * 3  # the sum of four rows of ones
