"""Between the CNN and the decoder: what the annotation vectors learn of their places and of each other.

A region encoder maps annotation vectors (N, L, D) to annotation vectors (N, L, D'), one per location still, so that
attention and its overlays mean the same. The paper has none.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from captioning.config import RegionEncoderConfig


class RegionEncoder(nn.Module):
    """The contract, and the paper's choice: nothing.

    Args:
        dim: D', size of the vectors that come out.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, a: Float[Tensor, "N L D"]) -> Float[Tensor, "N L E"]:
        return a


class LearnedPositions(nn.Module):
    """A learned vector for each row and each column of the grid is added: a_ij + r_i + c_j; Dosovitskiy et al. (2021).

    Args:
        grid: (h, w).
        dim: D.
    """

    def __init__(self, grid: tuple[int, int], dim: int):
        super().__init__()
        self.rows = nn.Parameter(0.1 * torch.randn(grid[0], 1, dim))
        self.columns = nn.Parameter(0.1 * torch.randn(1, grid[1], dim))

    def forward(self, a: Float[Tensor, "N L D"]) -> Float[Tensor, "N L D"]:
        return a + (self.rows + self.columns).flatten(0, 1).to(a.dtype)


class SinusoidalPositions(nn.Module):
    """The sines of Vaswani et al. (2017), section 3.5: half of the features for the row, half for the column.

    Args:
        grid: (h, w).
        dim: D, a multiple of 4.

    Raises:
        ValueError: it is none.
    """

    code: Tensor

    def __init__(self, grid: tuple[int, int], dim: int):
        super().__init__()
        if dim % 4:
            raise ValueError(f"region_encoder.positions='sinusoidal' needs a dim that 4 divides (got {dim})")
        rows, columns = (sinusoids(length, dim // 2) for length in grid)
        both = torch.cat([rows.unsqueeze(1).expand(-1, grid[1], -1), columns.expand(grid[0], -1, -1)], dim=-1)
        self.register_buffer("code", both.flatten(0, 1), persistent=False)

    def forward(self, a: Float[Tensor, "N L D"]) -> Float[Tensor, "N L D"]:
        return a + self.code.to(a.dtype)


def sinusoids(length: int, dim: int) -> Float[Tensor, "{length} {dim}"]:
    """PE(p, 2i) = sin(p / 10000^(2i/dim)), PE(p, 2i + 1) = cos of the same; Vaswani et al. (2017), section 3.5."""
    frequency = torch.exp(torch.arange(0, dim, 2) * (-math.log(10_000.0) / dim))
    angle = torch.arange(length).unsqueeze(1) * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


class WithPositions(RegionEncoder):
    """Positions first, then a region encoder.

    Args:
        positions: adds the code of each place.
        inner: what follows.
    """

    def __init__(self, positions: nn.Module, inner: RegionEncoder):
        super().__init__(inner.dim)
        self.positions = positions
        self.inner = inner

    def forward(self, a: Float[Tensor, "N L D"]) -> Float[Tensor, "N L E"]:
        return self.inner(self.positions(a))


def build_region_encoder(config: RegionEncoderConfig, *, annotation_dim: int, grid: tuple[int, int]) -> RegionEncoder:
    """The region encoder of a config, for vectors of size D on a grid (h, w)."""
    encoder = REGION_ENCODERS[config.name](config, annotation_dim)
    if config.positions == "none":
        return encoder
    return WithPositions(POSITIONS[config.positions](grid, annotation_dim), encoder)


POSITIONS: dict[str, type[LearnedPositions] | type[SinusoidalPositions]] = {
    "learned": LearnedPositions,
    "sinusoidal": SinusoidalPositions,
}
REGION_ENCODERS = {"none": lambda config, dim: RegionEncoder(dim)}
