"""Multi-head attention, Vaswani et al. (2017), section 3.2: many small looks at once, each with queries, keys, values.

The work is split as in `alignment.py`: `project` depends on what is looked at alone, `attend` on the query too.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


class KeysValues(NamedTuple):
    """What is looked at, as every head sees it: N memories of L locations, H heads of size d."""

    k: Float[Tensor, "N H L d"]
    v: Float[Tensor, "N H L d"]


def scaled_dot_product(
    q: Float[Tensor, "*B T d"], k: Float[Tensor, "*B L d"], mask: Bool[Tensor, "..."] | None = None
) -> Float[Tensor, "*B T L"]:
    """The weights of Vaswani et al. (2017), eq. 1: softmax(q k' / sqrt(d)).

    If the entries of q and k are independent with variance 1, those of q k' have variance d: unscaled, the softmax
    would saturate as d grows, and its gradient vanish.

    Args:
        q: T queries.
        k: L keys.
        mask: true where a query may look, broadcast over (*B, T, L); the others get exactly 0. Every query needs at
            least one place.
    """
    scores = q @ k.transpose(-1, -2) * k.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1)


def causal_mask(length: int, *, past: int = 0, device: torch.device | None = None) -> Bool[Tensor, "T PT"]:
    """T positions after P earlier ones may look at those, at the ones before them and at themselves; section 3.2.3."""
    return torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)


class MultiHead(nn.Module):
    """Vaswani et al. (2017), section 3.2.2: MultiHead(Q, K, V) = [head_1; ...; head_H] W_o.

    head_j = softmax(q_j k_j' / sqrt(d)) v_j with q_j = Q W_q,j, k_j = K W_k,j, v_j = V W_v,j and d = dim / H; here K
    and V are the same memory. Keys have no bias: it would shift all scores of a query alike.

    Args:
        query_dim: size of what asks.
        memory_dim: size of what is looked at.
        heads: H; divides dim.
        dim: size of all heads together; query_dim by default.
        output_dim: size of the result; query_dim by default.
        dropout: rate on the weights; the weights that are returned have none.

    Raises:
        ValueError: heads does not divide dim.
    """

    def __init__(
        self,
        query_dim: int,
        memory_dim: int,
        *,
        heads: int,
        dim: int | None = None,
        output_dim: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        dim = dim or query_dim
        if dim % heads:
            raise ValueError(f"heads must divide the attention's size (got heads={heads} and {dim})")
        self.heads = heads
        self.head: int | None = None
        self.query = nn.Linear(query_dim, dim)
        self.key = nn.Linear(memory_dim, dim, bias=False)
        self.value = nn.Linear(memory_dim, dim)
        self.output = nn.Linear(dim, output_dim or query_dim)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.query, self.key, self.value, self.output):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def project(self, memory: Float[Tensor, "N L D"]) -> KeysValues:
        """Keys and values of N memories; what of the work does not depend on the query."""
        return KeysValues(self._split(self.key(memory)), self._split(self.value(memory)))

    def attend(
        self, query: Float[Tensor, "N T n"], memory: KeysValues, mask: Bool[Tensor, "..."] | None = None
    ) -> tuple[Float[Tensor, "N T o"], Float[Tensor, "N H T L"]]:
        """T looks at each of N memories.

        Args:
            query: what asks; K rows of an image come as one memory with K times as many queries, nothing is copied.
            memory: from `project`.
            mask: true where a query may look, broadcast over (N, H, T, L).

        Returns:
            The contexts, and the weights of every head.
        """
        weights = scaled_dot_product(self._split(self.query(query)), memory.k, mask)
        contexts = self.dropout(weights).to(memory.v.dtype) @ memory.v
        return self.output(contexts.transpose(1, 2).flatten(2)), weights

    def shown(self, weights: Float[Tensor, "N H T L"]) -> Float[Tensor, "N T L"]:
        """One distribution per query: the mean of the heads, or that of the chosen `head`."""
        return weights.mean(dim=1) if self.head is None else weights[:, self.head]

    def forward(
        self,
        query: Float[Tensor, "N T n"],
        memory: Float[Tensor, "N L D"],
        mask: Bool[Tensor, "..."] | None = None,
    ) -> tuple[Float[Tensor, "N T o"], Float[Tensor, "N H T L"]]:
        """`project` and `attend` in one; self-attention when query and memory are the same."""
        return self.attend(query, self.project(memory), mask)

    def _split(self, x: Float[Tensor, "N L HD"]) -> Float[Tensor, "N H L d"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def show_head(module: nn.Module, head: int | None) -> None:
    """Choose whose weights a model reports as its alphas: one head's, or the mean of all (None).

    Raises:
        ValueError: it has no heads, or not so many.
    """
    attentions = [inner for inner in module.modules() if isinstance(inner, MultiHead)]
    if head is not None and not attentions:
        raise ValueError(f"head={head}: this model's attention has no heads")
    for attention in attentions:
        if head is not None and not 0 <= head < attention.heads:
            raise ValueError(f"head={head}: this model has heads 0 to {attention.heads - 1}")
        attention.head = head
