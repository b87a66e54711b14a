"""Additive alignment computes its tanh from two exponentials, in blocks, with a gradient of its own."""

import pytest
import torch

from captioning.models import additive
from captioning.models.alignment import AdditiveAlignment


def example(scale: float = 1.0) -> tuple[AdditiveAlignment, torch.Tensor, torch.Tensor]:
    """An alignment with three images of two queries and five locations."""
    torch.manual_seed(0)
    module = AdditiveAlignment(query_dim=3, annotation_dim=4, dim=6).double()
    return module, torch.randn(3, 2, 3).double(), scale * torch.randn(3, 5, 4).double()


def plain(module: AdditiveAlignment, query: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """The formula as it stands in the paper."""
    return module.v(torch.tanh(module.key(a).unsqueeze(1) + module.query(query).unsqueeze(2))).squeeze(-1)


@pytest.mark.parametrize("block", [1, 60, 2**19])  # one image, one image, and all three at a time
@pytest.mark.parametrize("scale", [1.0, 1e3])  # at 1e3 most are 1 or -1, and an uncut exp(2x) infinite
def test_additive_scores_and_gradients_are_those_of_the_tanh(monkeypatch, block, scale):
    monkeypatch.setattr(additive, "BLOCK", block)
    module, query, a = example(scale)
    leaves = [query.requires_grad_(), a.requires_grad_(), *module.parameters()]
    weights = torch.randn(3, 2, 5).double()
    scores = [module(query, module.keys(a)), plain(module, query, a)]
    torch.testing.assert_close(*scores)
    if scale == 1.0:
        gradients = [torch.autograd.grad((weights * x).sum(), leaves) for x in scores]
        torch.testing.assert_close(*gradients)


def test_saturated_additive_scores_have_finite_gradients():
    module, query, a = (x.float() for x in example(1e3))
    leaves = [query.requires_grad_(), a.requires_grad_(), *module.parameters()]
    gradients = torch.autograd.grad(module(query, module.keys(a)).sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_the_gradient_of_additive_scores_is_the_derivative():
    module, query, a = example()
    assert torch.autograd.gradcheck(
        lambda q, x, *_: module(q, module.keys(x)),
        (query.requires_grad_(), a.requires_grad_(), *module.parameters()),
    )


def test_keys_gather_the_gradients_of_all_steps_and_of_one_backward_pass_alone():
    module, query, a = example()
    query.requires_grad_()
    keys = module.keys(a).detach().requires_grad_()
    corners = [(3, 2), (3, 1), (1, 2)]  # images and captions leave
    weights = [torch.randn(n, k, 5).double() for n, k in corners]

    def total(parts: list) -> torch.Tensor:
        scores = [module(query[:n, :k], part) for (n, k), part in zip(corners, parts, strict=True)]
        return sum((w * x).sum() for w, x in zip(weights, scores, strict=True))

    leaves = [keys, module.v.weight]
    expected = torch.autograd.grad(total([keys[:n] for n, _ in corners]), leaves)
    late = total(module.by_step(keys, corners))
    torch.autograd.grad(late, query, retain_graph=True)  # a part of the graph only
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(late, leaves, retain_graph=True), expected)


def test_the_scores_are_summed_up_without_autocast(monkeypatch):
    # A GPU's autocast would take torch.mv in bf16, a CPU's does not: the result here could not tell.
    module, query, a = (x.float() for x in example())
    real, seen = torch.mv, []
    monkeypatch.setattr(torch, "mv", lambda *x: (seen.append(torch.is_autocast_enabled("cpu")), real(*x))[1])
    with torch.autocast("cpu", torch.bfloat16):
        module(query, module.keys(a))
    assert seen
    assert not any(seen)


def test_bf16_matrix_products_leave_the_scores_in_fp32():
    module, query, a = (x.float() for x in example())
    with torch.autocast("cpu", torch.bfloat16):
        scores = module(query, module.keys(a))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, plain(module, query, a), atol=0.03, rtol=0)
