"""v' tanh(x + y) for every query y and every key x of an image, from exp(2y) and exp(2x), without keeping the tanh.

With u = 1 / (1 + exp(2x) exp(2y)), tanh(x + y) is 1 - 2u and its derivative 4u(1 - u): a product and a reciprocal where
tanh costs ten times as much. u, of size N K L k, is made in blocks that stay in the processor's cache, and made again
on the way back instead of being kept. The gradients of the keys and of v are summed there in place, over all steps of a
recurrence.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 2**19
"""Elements of u that are made at a time on a CPU: two megabytes."""


def exp2x(x: Tensor) -> Tensor:
    """exp(2x), never in bf16. x is cut at 30, so that gradients stay finite.

    What tanh(x + y) becomes by that is wrong only where one is beyond 30 and the other near -30 or below; or reversed.
    """
    return torch.exp(2 * x.to(torch.promote_types(x.dtype, torch.float32)).clamp(-30, 30))


class _Sums:
    """What all steps of a recurrence add to the gradients of the keys and of v in one backward pass."""

    def __init__(self, keys: Float[Tensor, "N L k"], v: Float[Tensor, " k"]):
        self.keys, self.v = keys.detach(), v.detach()
        self._pass: int | None = None

    def open(self) -> "_Sums":
        """Begin with zeros in a new backward pass: one over a part of the graph leaves its sums behind."""
        current = torch._C._current_graph_task_id()
        if current != self._pass:
            self._pass = current
            self.g, self.gu = self.v.new_zeros(()), torch.zeros_like(self.v)
            self.slopes = torch.zeros_like(self.keys)
        return self

    def close(self) -> tuple[Float[Tensor, "N L k"], Float[Tensor, " k"]]:
        """The gradients: d u / d exp(2x) is -u (1 - u) / exp(2x)."""
        keys = self.open().slopes.mul_(2 * self.v).div_(self.keys)
        self._pass = None
        del self.slopes
        return keys, self.g - 2 * self.gu


class LateKeys(NamedTuple):
    """The keys of one step of a recurrence: their gradient, and v's, are ready after the last step's.

    Args:
        n: how many images still go on.
        sums: of all steps.
        last: zero; what must be done on the way back before the sums are complete depends on it.
    """

    n: int
    sums: _Sums
    last: Float[Tensor, ""]


def additive_scores(
    query: Float[Tensor, "N K k"], keys: Tensor | LateKeys, v: Float[Tensor, " k"]
) -> Float[Tensor, "N K L"]:
    """sum_j v_j tanh(x_j + y_j) from `exp2x` of queries y and keys x; late keys have brought their own v."""
    if isinstance(keys, Tensor):
        (keys,) = late_keys(keys, v, [query.shape[:2]])
    return _Scores.apply(query, keys.last, keys.n, keys.sums)


def late_keys(keys: Float[Tensor, "N L k"], v: Float[Tensor, " k"], corners: Sequence[Sequence[int]]) -> list[LateKeys]:
    """The keys for each step of a recurrence that has queries for the first (images, captions) of `corners`."""
    sums = _Sums(keys, v)
    last = _Last.apply(sums, keys, v)
    return [LateKeys(n, sums, last) for n, _ in corners]


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, last: Tensor, n: int, sums: _Sums) -> Tensor:
        ctx.save_for_backward(query)
        ctx.n, ctx.sums = n, sums
        keys, v = sums.keys[:n], sums.v
        scores = keys.new_empty(*query.shape[:2], keys.shape[1])
        with torch.autocast(keys.device.type, enabled=False):  # on GPUs it would make the sums in bf16
            for images, rows in _blocks(query, keys):
                u = _u(query[images, rows], keys[images])
                scores[images, rows] = torch.mv(u.flatten(0, -2), v).view(u.shape[:-1])
        return scores.mul_(-2).add_(v.sum())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (query,), g, late = ctx.saved_tensors, grads[0], ctx.needs_input_grad[1]
        sums = ctx.sums.open() if late else ctx.sums
        keys, grad_query = sums.keys[: ctx.n], torch.empty_like(query)
        for images, rows in _blocks(query, keys):
            u, part = _u(query[images, rows], keys[images]), g[images, rows]
            if late:
                sums.gu.addmv_(u.flatten(0, -2).t(), part.flatten())
            slope = torch.ops.aten.sigmoid_backward.grad_input(part.unsqueeze(-1), u, grad_input=u)  # g u (1 - u)
            grad_query[images, rows] = slope.sum(dim=2)
            if late:
                sums.slopes[: ctx.n][images] += slope.sum(dim=1) if slope.shape[1] > 1 else slope.squeeze(1)
        if late:
            sums.g += g.sum()
        return grad_query * 2 * sums.v / query, query.new_zeros(()) if late else None, None, None


class _Last(torch.autograd.Function):
    """Zero. On the way back it comes after all steps, and gives their sums."""

    @staticmethod
    def forward(ctx: Any, sums: _Sums, keys: Tensor, v: Tensor) -> Tensor:
        ctx.sums = sums
        return keys.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor]:
        return None, *ctx.sums.close()


def _u(query: Float[Tensor, "N K k"], keys: Float[Tensor, "N L k"]) -> Float[Tensor, "N K L k"]:
    product = torch.addcmul(keys.new_ones(()), query.unsqueeze(2), keys.unsqueeze(1))
    return product.reciprocal_()


def _blocks(query: Float[Tensor, "N K k"], keys: Float[Tensor, "N L k"]) -> Iterator[tuple[slice, slice]]:
    """Images and rows in blocks for which u has about `BLOCK` elements."""
    size = BLOCK if keys.device.type == "cpu" else 256 * BLOCK
    (n, k), one = query.shape[:2], max(1, keys[0].numel())
    rows = max(1, min(k, size // one))
    images = max(1, size // (rows * one))
    for i in range(0, n, images):
        for j in range(0, k, rows):
            yield slice(i, i + images), slice(j, j + rows)
