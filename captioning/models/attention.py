"""From scores to a context vector: phi of Xu et al. (2015), eq. 6, and the gate beta of section 4.2.1."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from captioning.models.alignment import Alignment


class Memory(NamedTuple):
    """What depends on the image alone; N images."""

    a: Float[Tensor, "N L D"]
    keys: Float[Tensor, "N L k"]


class Context(NamedTuple):
    """What one attention step yields for R rows; the last three are there for hard attention only."""

    z: Float[Tensor, "R D"]
    alpha: Float[Tensor, "R L"]
    location: Integer[Tensor, " R"] | None = None
    log_prob: Float[Tensor, " R"] | None = None
    entropy: Float[Tensor, " R"] | None = None


class Attention(nn.Module):
    """The contract: a query per row and the memory of the images give a Context.

    There are R = N * K queries, grouped by image: rows i * K to (i + 1) * K belong to image i. In a batch of single
    captions K is 1; captions of one image, or beams, share its annotation vectors and keys.

    Args:
        alignment: f_att.
    """

    def __init__(self, alignment: Alignment):
        super().__init__()
        self.alignment = alignment

    def prepare(self, a: Float[Tensor, "N L D"]) -> Memory:
        """The memory of N images."""
        keys = self.alignment.keys(a)
        return Memory(a=a.to(keys.dtype), keys=keys)  # under autocast: cast once, not once per word

    def forward(self, query: Float[Tensor, "R n"], memory: Memory) -> Context:
        """Attend."""
        raise TypeError(f"{type(self).__name__} must define forward")


class SoftAttention(Attention):
    """Deterministic soft attention, Xu et al. (2015), eq. 13: z_t = sum_i alpha_ti a_i."""

    def forward(self, query: Float[Tensor, "R n"], memory: Memory) -> Context:
        e = self.alignment(query.unflatten(0, (len(memory.a), -1)), memory.keys)  # eq. 4
        alpha = e.softmax(dim=-1)  # eq. 5
        z = torch.bmm(alpha, memory.a)  # eq. 13
        return Context(z=z.flatten(0, 1), alpha=alpha.flatten(0, 1))


class Gate(nn.Module):
    """beta_t = sigmoid(f_beta(h_{t-1})), which weighs the image against the language, Xu et al. (2015), section 4.2.1.

    Args:
        hidden_dim: n.
        gate_dim: 1 for the paper's scalar, D for one gate per feature.
    """

    def __init__(self, hidden_dim: int, gate_dim: int):
        super().__init__()
        self.f_beta = nn.Linear(hidden_dim, gate_dim)

    def forward(self, h: Float[Tensor, "R n"]) -> Float[Tensor, "R g"]:
        return torch.sigmoid(self.f_beta(h))


class OpenGate(nn.Module):
    """No gate: beta is 1 everywhere."""

    def forward(self, h: Float[Tensor, "R n"]) -> Float[Tensor, "R 1"]:
        return h.new_ones(len(h), 1)


def build_gate(name: str, *, hidden_dim: int, annotation_dim: int) -> nn.Module:
    """The gate by its name: scalar, vector or none."""
    if name == "none":
        return OpenGate()
    return Gate(hidden_dim, {"scalar": 1, "vector": annotation_dim}[name])


ATTENTIONS: dict[str, type[Attention]] = {"soft": SoftAttention}
