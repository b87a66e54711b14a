"""A Transformer's parts, Vaswani et al. (2017): residuals with layer norm, MLP, sines; an encoder block."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from captioning.models.multihead import MultiHead


class PreNorm(nn.Module):
    """x + dropout(f(norm(x))): the norm inside, so that the sum of all residuals runs free; Xiong et al. (2020).

    A stack of such blocks ends with a norm of its own, `last`.

    Args:
        dim: d.
        dropout: rate on what is added.
    """

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def enter(self, x: Float[Tensor, "*B d"]) -> Float[Tensor, "*B d"]:
        """What the sublayer f is given."""
        return self.norm(x)

    def leave(self, x: Float[Tensor, "*B d"], y: Float[Tensor, "*B d"]) -> Float[Tensor, "*B d"]:
        """What comes after it, given its result y."""
        return x + self.dropout(y)

    @staticmethod
    def last(dim: int) -> nn.Module:
        """What ends a stack."""
        return nn.LayerNorm(dim)


class PostNorm(PreNorm):
    """norm(x + dropout(f(x))): Vaswani et al. (2017), section 3.1; deep stacks of it need a warm-up."""

    def enter(self, x: Float[Tensor, "*B d"]) -> Float[Tensor, "*B d"]:
        return x

    def leave(self, x: Float[Tensor, "*B d"], y: Float[Tensor, "*B d"]) -> Float[Tensor, "*B d"]:
        return self.norm(x + self.dropout(y))

    @staticmethod
    def last(dim: int) -> nn.Module:
        return nn.Identity()


class MLP(nn.Sequential):
    """max(0, x W_1 + b_1) W_2 + b_2 at each place by itself, four times as wide inside; Vaswani et al. (2017), eq. 2.

    Args:
        dim: d.
        dropout: rate on the inner layer.
    """

    def __init__(self, dim: int, dropout: float):
        super().__init__(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim))


class EncoderBlock(nn.Module):
    """Every place looks at every place, then thinks for itself: self-attention and MLP; Vaswani et al. (2017), 3.1.

    Args:
        dim: d.
        heads: H; divides d.
        norm: pre or post.
        dropout: rate on the weights, on the MLP's inner layer and on what both add.
    """

    def __init__(self, dim: int, *, heads: int, norm: str = "pre", dropout: float = 0.0):
        super().__init__()
        self.read = MultiHead(dim, dim, heads=heads, dropout=dropout)
        self.mlp = MLP(dim, dropout)
        self.around_read = NORMS[norm](dim, dropout)
        self.around_mlp = NORMS[norm](dim, dropout)

    def forward(self, x: Float[Tensor, "N L d"]) -> Float[Tensor, "N L d"]:
        inner = self.around_read.enter(x)
        x = self.around_read.leave(x, self.read(inner, inner)[0])
        return self.around_mlp.leave(x, self.mlp(self.around_mlp.enter(x)))


def sinusoids(length: int, dim: int, *, start: int = 0, device: torch.device | None = None) -> Float[Tensor, "T d"]:
    """PE(p, 2i) = sin(p / 10000^(2i/dim)), PE(p, 2i + 1) = cos of the same; Vaswani et al. (2017), section 3.5.

    Args:
        length: how many positions p.
        dim: d.
        start: the first of them.
        device: where.
    """
    frequency = torch.exp(torch.arange(0, dim, 2, device=device) * (-math.log(10_000.0) / dim))
    angle = torch.arange(start, start + length, device=device).unsqueeze(1) * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :dim]


NORMS: dict[str, type[PreNorm]] = {"pre": PreNorm, "post": PostNorm}
