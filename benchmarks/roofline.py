"""The roofline: no phase of a computation is faster than its products, nor than its reading and writing of memory.

Both rates are measured on the machine, in the same run. A phase costs the larger of the two, and a step the sum of its
phases. It is a limit because it assumes that only what is necessary is computed, read and written, at full speed.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from benchmarks.report import best_of, formats


class Phase(NamedTuple):
    """A part of a computation: its floating point operations, and the bytes that it must read and write."""

    name: str
    operations: float
    bytes: float


class Machine(NamedTuple):
    """Measured rates: operations of matrix products per second by type, and bytes of memory per second."""

    products: dict[torch.dtype, float]
    bandwidth: float

    def seconds(self, phases: Iterable[Phase], dtype: torch.dtype) -> float:
        """The least time that the phases can take."""
        rate = self.products[dtype]
        return sum(max(phase.operations / rate, phase.bytes / self.bandwidth) for phase in phases)


def measure(*, repeats: int = 5, size: int = 2048, megabytes: int = 256) -> Machine:
    """The machine's rates: a square matrix product, and the better of copying and summing a long array."""
    products = {}
    for dtype in formats().values():
        x, y = (torch.randn(size, size, dtype=dtype) for _ in range(2))
        products[dtype] = 2 * size**3 / best_of([lambda x=x, y=y: x @ y], repeats)[0]  # type: ignore[misc]
    source = torch.randn(megabytes * 2**18)
    target = torch.empty_like(source)
    copying, summing = best_of([lambda: target.copy_(source), lambda: source.sum()], repeats)
    return Machine(products, source.nbytes * max(2 / copying, 1 / summing))
