"""f_att, Xu et al. (2015), eq. 4: how well location i fits what the decoder is about to say.

Every alignment splits its work: `keys` depends on the image alone and is computed once per image, `forward` runs once
per word. Rows of the query come grouped by image, K per image, and share that image's keys.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from captioning.models.additive import LateKeys, additive_scores, exp2x, late_keys


class Alignment(nn.Module):
    """The contract: keys once per image, scores once per word."""

    def keys(self, a: Float[Tensor, "N L D"]) -> Float[Tensor, "N L k"]:
        """What of the score depends on the image alone."""
        raise TypeError(f"{type(self).__name__} must define keys")

    def by_step(self, keys: Float[Tensor, "N L k"], corners: Sequence[tuple[int, int]]) -> list[Any]:
        """The keys for each step of a recurrence that has queries for the first (images, captions) of `corners`."""
        return [keys[:n] for n, _ in corners]

    def forward(self, query: Float[Tensor, "N K n"], keys: Any) -> Float[Tensor, "N K L"]:
        """Scores e of K queries per image over its L locations."""
        raise TypeError(f"{type(self).__name__} must define forward")


class AdditiveAlignment(Alignment):
    """Bahdanau et al. (2015), used by the paper: e_i = v' tanh(W_a a_i + W_h h + b).

    Its keys are exp(2 (W_a a_i + b)): `additive` makes the scores from exponentials.

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
        return exp2x(self.key(a))

    def by_step(self, keys: Float[Tensor, "N L k"], corners: Sequence[tuple[int, int]]) -> list[Any]:
        return late_keys(keys, self.v.weight.flatten(), corners)

    def forward(self, query: Float[Tensor, "N K n"], keys: Tensor | LateKeys) -> Float[Tensor, "N K L"]:
        return additive_scores(exp2x(self.query(query)), keys, self.v.weight.flatten())


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
        return exp2x(F.linear(a, self.W.weight[:, self.query_dim :]))

    def by_step(self, keys: Float[Tensor, "N L k"], corners: Sequence[tuple[int, int]]) -> list[Any]:
        return late_keys(keys, self.v.weight.flatten(), corners)

    def forward(self, query: Float[Tensor, "N K n"], keys: Tensor | LateKeys) -> Float[Tensor, "N K L"]:
        query = F.linear(query, self.W.weight[:, : self.query_dim])
        return additive_scores(exp2x(query), keys, self.v.weight.flatten())


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
