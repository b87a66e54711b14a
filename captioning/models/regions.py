"""Between the CNN and the decoder: what the annotation vectors learn of their places and of each other.

A region encoder maps annotation vectors (N, L, D) to annotation vectors (N, L, D'), one per location still, so that
attention and its overlays mean the same. The paper has none.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from captioning.config import RegionEncoderConfig
from captioning.models.blocks import NORMS, EncoderBlock, sinusoids
from captioning.models.multihead import MultiHead


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


class FullPrecisionLSTM(nn.LSTM):
    """torch's LSTM, in fp32 where a GPU's autocast would take fp16, in which small gradients vanish.

    What it reads is made contiguous: on Apple's GPUs the gradient of anything else is wrong (pytorch issue 175189).
    """

    def forward(self, x: Tensor, state: Any = None) -> Any:  # type: ignore[override]
        x = x.contiguous()
        if x.is_cuda and torch.is_autocast_enabled("cuda"):
            with torch.autocast("cuda", enabled=False):
                return super().forward(x.float(), state)
        return super().forward(x, state)


class RegionLSTM(RegionEncoder):
    """An LSTM reads the regions in raster order, row by row: h_i = LSTM(a_i, h_{i-1}); its states are the new vectors.

    The last one has read everything: the single context vector of Sutskever et al. (2014). Reading in both directions
    gives [h_i from the left; h_i from the right], the annotations of Bahdanau et al. (2015), section 3.2.

    Args:
        annotation_dim: D.
        dim: size of the state of one direction.
        bidirectional: read backwards too.
    """

    def __init__(self, annotation_dim: int, *, dim: int, bidirectional: bool = False):
        super().__init__(dim * (2 if bidirectional else 1))
        self.lstm = FullPrecisionLSTM(annotation_dim, dim, batch_first=True, bidirectional=bidirectional)
        with torch.no_grad():
            for name, bias in self.lstm.named_parameters():
                if name.startswith("bias_ih"):
                    bias[dim : 2 * dim] = 1.0  # an open forget gate, as in the decoders

    def forward(self, a: Float[Tensor, "N L D"]) -> Float[Tensor, "N L E"]:
        return self.lstm(a)[0]


class RegionSelfAttention(RegionEncoder):
    """A CNN's map looks at itself, Zhang et al. (2019, SAGAN), section 3; Wang et al. (2018, non-local networks).

    q, k, v = 1x1 convolutions of a (on vectors, linear maps); o_i = sum_j softmax_j(q_i k_j' / sqrt(d)) v_j in every
    head; a_i + gamma W_o o_i comes out. gamma begins at 0: each block begins as nothing, and disturbs no trained CNN.
    (Those papers have one head, and do not divide by sqrt(d).)

    Args:
        annotation_dim: D, which stays.
        dim: size of q, k and v, over all heads.
        blocks: how many, one after the other.
        heads: divides dim.
    """

    def __init__(self, annotation_dim: int, *, dim: int, blocks: int = 1, heads: int = 1):
        super().__init__(annotation_dim)
        self.blocks = nn.ModuleList(
            MultiHead(annotation_dim, annotation_dim, heads=heads, dim=dim) for _ in range(blocks)
        )
        self.gammas = nn.ParameterList(nn.Parameter(torch.zeros(1)) for _ in range(blocks))

    def forward(self, a: Float[Tensor, "N L D"]) -> Float[Tensor, "N L D"]:
        for block, gamma in zip(self.blocks, self.gammas, strict=True):
            a = a + gamma * block(a, a)[0]
        return a


class RegionTransformer(RegionEncoder):
    """A linear map to the blocks' size, then Transformer encoder blocks over the regions: Vaswani et al. (2017), 3.1.

    Args:
        annotation_dim: D.
        dim: D'.
        blocks: how many.
        heads: divides D'.
        norm: pre or post.
        dropout: in the blocks.
    """

    def __init__(
        self, annotation_dim: int, *, dim: int, blocks: int, heads: int, norm: str = "pre", dropout: float = 0.0
    ):
        super().__init__(dim)
        self.project = nn.Linear(annotation_dim, dim)
        self.blocks = nn.Sequential(
            *(EncoderBlock(dim, heads=heads, norm=norm, dropout=dropout) for _ in range(blocks)), NORMS[norm].last(dim)
        )

    def forward(self, a: Float[Tensor, "N L D"]) -> Float[Tensor, "N L E"]:
        return self.blocks(self.project(a))


def build_region_encoder(config: RegionEncoderConfig, *, annotation_dim: int, grid: tuple[int, int]) -> RegionEncoder:
    """The region encoder of a config, for vectors of size D on a grid (h, w).

    Raises:
        ValueError: heads that do not divide a size; sinusoidal positions of one that 4 does not divide.
    """
    encoder = REGION_ENCODERS[config.name](config, annotation_dim)
    if config.positions == "none":
        return encoder
    return WithPositions(POSITIONS[config.positions](grid, annotation_dim), encoder)


POSITIONS: dict[str, type[LearnedPositions] | type[SinusoidalPositions]] = {
    "learned": LearnedPositions,
    "sinusoidal": SinusoidalPositions,
}
REGION_ENCODERS: dict[str, Callable[[RegionEncoderConfig, int], RegionEncoder]] = {
    "none": lambda config, annotation_dim: RegionEncoder(annotation_dim),
    "lstm": lambda config, annotation_dim: RegionLSTM(annotation_dim, dim=config.dim),
    "bilstm": lambda config, annotation_dim: RegionLSTM(annotation_dim, dim=config.dim, bidirectional=True),
    "self_attention": lambda config, annotation_dim: RegionSelfAttention(
        annotation_dim, dim=config.dim, blocks=config.blocks, heads=config.heads
    ),
    "transformer": lambda config, annotation_dim: RegionTransformer(
        annotation_dim,
        dim=config.dim,
        blocks=config.blocks,
        heads=config.heads,
        norm=config.norm,
        dropout=config.dropout,
    ),
}
"""Name -> builder from (config, annotation_dim)."""
