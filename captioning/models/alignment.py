"""f_att, Xu et al. (2015), eq. 4: how well location i fits what the decoder is about to say.

Every alignment splits its work: `keys` depends on the image alone and is computed once per image, `forward` runs once
per word. Rows of the query come grouped by image, K per image, and share that image's keys.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

BLOCK = 2**19
"""Elements that an operation of many steps handles at a time: two megabytes, which caches hold."""


class Alignment(nn.Module):
    """The contract: keys once per image, scores once per word."""

    def keys(self, a: Float[Tensor, "N L D"]) -> Float[Tensor, "N L k"]:
        """What of the score depends on the image alone."""
        raise TypeError(f"{type(self).__name__} must define keys")

    def forward(self, query: Float[Tensor, "N K n"], keys: Float[Tensor, "N L k"]) -> Float[Tensor, "N K L"]:
        """Scores e of K queries per image over its L locations."""
        raise TypeError(f"{type(self).__name__} must define forward")


class AdditiveAlignment(Alignment):
    """Bahdanau et al. (2015), used by the paper: e_i = v' tanh(W_a a_i + W_h h + b).

    Its keys are exp(2 (W_a a_i + b)): see `_AdditiveScores`, which needs them so.

    Args:
        query_dim: n, size of h.
        annotation_dim: D.
        dim: k, size of the space in which they meet.
    """

    def __init__(self, *, query_dim: int, annotation_dim: int, dim: int):
        super().__init__()
        self.key = nn.Linear(annotation_dim, dim)
        self.query = nn.Linear(query_dim, dim, bias=False)
        self.v = nn.Linear(dim, 1, bias=False)  # a bias would shift all scores alike, which the softmax ignores

    def keys(self, a: Float[Tensor, "N L D"]) -> Float[Tensor, "N L k"]:
        return _exp2x(self.key(a))

    def forward(self, query: Float[Tensor, "N K n"], keys: Float[Tensor, "N L k"]) -> Float[Tensor, "N K L"]:
        return _AdditiveScores.apply(_exp2x(self.query(query)), keys, self.v.weight.flatten())


def _exp2x(x: Tensor) -> Tensor:
    """exp(2x), never in bf16. x is cut at 30, so that gradients stay finite.

    What tanh(x + y) becomes by that is wrong only if |x| and |y| are both above 30 and nearly cancel.
    """
    return torch.exp(2 * x.to(torch.promote_types(x.dtype, torch.float32)).clamp(-30, 30))


class _AdditiveScores(torch.autograd.Function):
    """sum_j v_j tanh(x_j + y_j) for all pairs of a query y and a key x of an image, given exp(2y) and exp(2x).

    With u = 1 / (1 + exp(2x) exp(2y)), tanh(x + y) is 1 - 2u and its derivative 4u(1 - u): a product and a reciprocal
    where tanh costs ten times as much. u, of size N K L k, is made for a few images at a time, which stay in the
    processor's cache, and made again in the backward pass instead of being kept.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(query, keys, v)
        scores = keys.new_empty(*query.shape[:2], keys.shape[1])
        for block in _blocks(query, keys):
            scores[block] = torch.mv(_sigmoids(query[block], keys[block]).flatten(0, -2), v).view(scores[block].shape)
        return scores.mul_(-2).add_(v.sum())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (query, keys, v), grad = ctx.saved_tensors, grads[0]
        grad_query, grad_keys, u_sum = torch.empty_like(query), torch.zeros_like(keys), torch.zeros_like(v)
        for block in _blocks(query, keys):
            g, u = grad[block].unsqueeze(2), _sigmoids(query[block], keys[block])  # (b, K, 1, L), (b, K, L, k)
            u_sum += torch.matmul(g, u).sum(dim=(0, 1, 2))
            slope = torch.addcmul(u, u, u, value=-1, out=u)
            grad_query[block] = torch.matmul(g, slope).squeeze(2)
            for k in range(query.shape[1]):
                grad_keys[block].addcmul_(slope[:, k], g[:, k].transpose(1, 2))
            grad_keys[block] *= 2 * v / keys[block]  # 4 v for x, and d x / d exp(2x) = 1 / (2 exp(2x))
        return grad_query * 2 * v / query, grad_keys, grad.sum() - 2 * u_sum


def _sigmoids(query: Float[Tensor, "N K k"], keys: Float[Tensor, "N L k"]) -> Float[Tensor, "N K L k"]:
    """1 / (1 + query key), of every query with every key of its image."""
    product = torch.addcmul(keys.new_ones(()), query.unsqueeze(2), keys.unsqueeze(1))
    return product.reciprocal_()


def _blocks(query: Float[Tensor, "N K k"], keys: Float[Tensor, "N L k"]) -> Iterator[slice]:
    """Images in blocks for which u has about `BLOCK` elements; all at once where it is not a CPU."""
    n = len(keys)
    size = n if keys.device.type != "cpu" else max(1, BLOCK // (query.shape[1] * keys[0].numel()))
    return (slice(i, i + size) for i in range(0, n, size))


class ConcatAlignment(Alignment):
    """Luong et al. (2015), eq. 8, concat: e_i = v' tanh(W [h; a_i]), with one matrix for both.

    Since W [h; a_i] = W_h h + W_a a_i, where W_h and W_a are columns of W, it is Bahdanau's score by another name: the
    same functions as `AdditiveAlignment` without its bias b, from other initial values.

    Args:
        query_dim: n, size of h.
        annotation_dim: D.
        dim: k, size of the space in which they meet.
    """

    def __init__(self, *, query_dim: int, annotation_dim: int, dim: int):
        super().__init__()
        self.query_dim = query_dim
        self.W = nn.Linear(query_dim + annotation_dim, dim, bias=False)
        self.v = nn.Linear(dim, 1, bias=False)

    def keys(self, a: Float[Tensor, "N L D"]) -> Float[Tensor, "N L k"]:
        return F.linear(a, self.W.weight[:, self.query_dim :])

    def forward(self, query: Float[Tensor, "N K n"], keys: Float[Tensor, "N L k"]) -> Float[Tensor, "N K L"]:
        query = F.linear(query, self.W.weight[:, : self.query_dim])
        return self.v(torch.tanh(keys.unsqueeze(1) + query.unsqueeze(2))).squeeze(-1)


class DotAlignment(Alignment):
    """Luong et al. (2015), dot: e_i = h' a_i. Needs n == D.

    Args:
        query_dim: n, size of h.
        annotation_dim: D.
        dim: not used; every alignment takes the same arguments.

    Raises:
        ValueError: n != D.
    """

    def __init__(self, *, query_dim: int, annotation_dim: int, dim: int):
        super().__init__()
        if query_dim != annotation_dim:
            raise ValueError(
                f"alignment='dot' needs hidden_dim == encoder dim (got {query_dim} and {annotation_dim}); use 'general'"
            )

    def keys(self, a: Float[Tensor, "N L D"]) -> Float[Tensor, "N L D"]:
        return a

    def forward(self, query: Float[Tensor, "N K n"], keys: Float[Tensor, "N L n"]) -> Float[Tensor, "N K L"]:
        return query @ keys.transpose(1, 2)


class GeneralAlignment(Alignment):
    """Luong et al. (2015), general: e_i = h' W a_i.

    Args:
        query_dim: n, size of h.
        annotation_dim: D.
        dim: not used; every alignment takes the same arguments.
    """

    def __init__(self, *, query_dim: int, annotation_dim: int, dim: int):
        super().__init__()
        self.key = nn.Linear(annotation_dim, query_dim, bias=False)

    def keys(self, a: Float[Tensor, "N L D"]) -> Float[Tensor, "N L n"]:
        return self.key(a)

    def forward(self, query: Float[Tensor, "N K n"], keys: Float[Tensor, "N L n"]) -> Float[Tensor, "N K L"]:
        return query @ keys.transpose(1, 2)


class ScaledDotAlignment(Alignment):
    """Vaswani et al. (2017), eq. 1: e_i = (W_q h)' (W_k a_i) / sqrt(k).

    Args:
        query_dim: n, size of h.
        annotation_dim: D.
        dim: k, size of queries and keys.
    """

    def __init__(self, *, query_dim: int, annotation_dim: int, dim: int):
        super().__init__()
        self.key = nn.Linear(annotation_dim, dim, bias=False)
        self.query = nn.Linear(query_dim, dim)
        self.scale = 1 / math.sqrt(dim)

    def keys(self, a: Float[Tensor, "N L D"]) -> Float[Tensor, "N L k"]:
        return self.key(a)

    def forward(self, query: Float[Tensor, "N K n"], keys: Float[Tensor, "N L k"]) -> Float[Tensor, "N K L"]:
        return self.query(query) @ keys.transpose(1, 2) * self.scale


ALIGNMENTS: dict[str, type[Alignment]] = {
    "additive": AdditiveAlignment,
    "concat": ConcatAlignment,
    "dot": DotAlignment,
    "general": GeneralAlignment,
    "scaled_dot": ScaledDotAlignment,
}
