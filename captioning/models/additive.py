"""v' tanh(x + y) for every query y and every key x of an image, from exp(2y) and exp(2x), without keeping the tanh.

With u = 1 / (1 + exp(2x) exp(2y)), tanh(x + y) is 1 - 2u and its derivative 4u(1 - u): a product and a reciprocal where
tanh costs ten times as much. u, of size N K L k, is made in blocks that stay in the processor's cache, and made again
on the way back instead of being kept.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

BLOCK = 2**19
"""Elements of u that are made at a time on a CPU: two megabytes."""


def exp2x(x: Tensor) -> Tensor:
    """exp(2x), never in bf16. x is cut at 30, so that gradients stay finite.

    What tanh(x + y) becomes by that is wrong only where one is beyond 30 and the other near -30 or below; or reversed.
    """
    return torch.exp(2 * x.to(torch.promote_types(x.dtype, torch.float32)).clamp(-30, 30))


class LateKeys(NamedTuple):
    """The keys of one step of a recurrence: their gradient, and v's, are made once, after the last step's.

    Args:
        keys: of the images that still go on, without a gradient.
        offset: zeros that bring the scores' gradient to where the keys' is made.
        queries: of all steps up to now; each adds its own.
    """

    keys: Float[Tensor, "n L k"]
    offset: Float[Tensor, "n K L"]
    queries: list[Tensor]


def additive_scores(
    query: Float[Tensor, "N K k"], keys: Tensor | LateKeys, v: Float[Tensor, " k"]
) -> Float[Tensor, "N K L"]:
    """sum_j v_j tanh(x_j + y_j) from `exp2x` of queries y and keys x."""
    if isinstance(keys, LateKeys):
        keys.queries.append(query.detach())
        return _Scores.apply(query, keys.keys, v.detach()) + keys.offset
    return _Scores.apply(query, keys, v)


def late_keys(
    keys: Float[Tensor, "N L k"], v: Float[Tensor, " k"], corners: Sequence[tuple[int, int]]
) -> list[LateKeys]:
    """The keys for each step of a recurrence that has queries for the first (images, captions) of `corners`."""
    queries: list[Tensor] = []
    offsets = _LateGradient.apply(queries, corners, keys, v)
    return [LateKeys(keys.detach()[:n], x, queries) for (n, _), x in zip(corners, offsets, strict=True)]


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(query, keys, v)
        scores = keys.new_empty(*query.shape[:2], keys.shape[1])
        with torch.autocast(keys.device.type, enabled=False):  # on GPUs it would make the sums in bf16
            for images, rows in _blocks(query, keys):
                u = _u(query[images, rows], keys[images])
                scores[images, rows] = torch.mv(u.flatten(0, -2), v).view(u.shape[:-1])
        return scores.mul_(-2).add_(v.sum())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        (query, keys, v), g = ctx.saved_tensors, grads[0]
        grad_query, grad_keys, grad_v = torch.empty_like(query), None, None
        for images, rows in _blocks(query, keys):
            slope = _slope(_u(query[images, rows], keys[images]))
            grad_query[images, rows] = torch.matmul(g[images, rows].unsqueeze(2), slope).squeeze(2)
        if any(ctx.needs_input_grad[1:]):
            grad_keys, grad_v = _of_keys_and_v(query, keys, v, g)
        return grad_query * 2 * v / query, grad_keys, grad_v  # 4 v for y, and d y / d exp(2y) = 1 / (2 exp(2y))


class _LateGradient(torch.autograd.Function):
    """Zeros in the form of every step's scores, whose gradients give those of the keys and v."""

    @staticmethod
    def forward(
        ctx: Any, queries: list[Tensor], corners: Sequence[tuple[int, int]], keys: Tensor, v: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(keys, v)
        ctx.queries = queries
        return tuple(keys.new_zeros(()).expand(n, k, keys.shape[1]) for n, k in corners)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor, Tensor]:
        keys, v = ctx.saved_tensors
        query, g = (  # zero where an image has ended, so that it adds nothing
            torch.cat([F.pad(x, (0, 0, 0, 0, 0, len(keys) - len(x))) for x in steps], dim=1)
            for steps in (ctx.queries, grads)
        )
        return None, None, *_of_keys_and_v(query, keys, v, g)


def _of_keys_and_v(
    query: Float[Tensor, "N K k"], keys: Float[Tensor, "N L k"], v: Float[Tensor, " k"], g: Float[Tensor, "N K L"]
) -> tuple[Float[Tensor, "N L k"], Float[Tensor, " k"]]:
    """The gradients of keys and v, given that of the scores, g."""
    grad_keys, u_sum = torch.zeros_like(keys), torch.zeros_like(v)
    for images, rows in _blocks(query, keys):
        part = g[images, rows]
        u = _u(query[images, rows], keys[images])
        u_sum.addmv_(u.flatten(0, -2).t(), part.flatten())
        grad_keys[images] += _slope(u).mul_(part.unsqueeze(-1)).sum(dim=1)
    return grad_keys.mul_(2 * v).div_(keys), g.sum() - 2 * u_sum


def _u(query: Float[Tensor, "N K k"], keys: Float[Tensor, "N L k"]) -> Float[Tensor, "N K L k"]:
    product = torch.addcmul(keys.new_ones(()), query.unsqueeze(2), keys.unsqueeze(1))
    return product.reciprocal_()


def _slope(u: Tensor) -> Tensor:
    """In place: u (1 - u)."""
    return torch.addcmul(u, u, u, value=-1, out=u)


def _blocks(query: Float[Tensor, "N K k"], keys: Float[Tensor, "N L k"]) -> Iterator[tuple[slice, slice]]:
    """Images and rows in blocks for which u has about `BLOCK` elements."""
    size = BLOCK if keys.device.type == "cpu" else 256 * BLOCK
    (n, k), one = query.shape[:2], max(1, keys[0].numel())
    rows = max(1, min(k, size // one))
    images = max(1, size // (rows * one))
    for i in range(0, n, images):
        for j in range(0, k, rows):
            yield slice(i, i + images), slice(j, j + rows)
