"""What every benchmark shares: timing, the table that it prints, and what it ran on."""

import argparse
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from captioning.config import NumberFormat
from captioning.precision import has_bf16

PACKAGES = ("torch", "torchvision", "numpy", "h5py", "pillow")


class Line(NamedTuple):
    """One figure of a benchmark.

    Args:
        what: is measured.
        figure: with its unit.
        ratio: that the goal speaks of, None when there is none.
        of: what is divided by what.
        limit: what the machine allows, in the figure's unit.
        goal: (">=" or "<=", ratio), None for a figure without a goal.
    """

    what: str
    figure: str
    ratio: float | None = None
    of: str = ""
    limit: str = "-"
    goal: tuple[str, float] | None = None

    def cells(self) -> list[str]:
        """The line as a row: figure, ratio, limit, goal, met or not met."""
        ratio = "-" if self.ratio is None else f"{self.ratio:.3g} {self.of}"
        goal, met = "-", "-"
        if self.goal is not None and self.ratio is not None:
            sign, wanted = self.goal
            goal = f"{sign} {wanted:g}"
            met = "met" if (self.ratio >= wanted if sign == ">=" else self.ratio <= wanted) else "not met"
        return [self.what, self.figure, ratio, self.limit, goal, met]


HEADER = ["what", "figure", "ratio", "limit", "goal", "met?"]


def table(lines: Sequence[Line], *, markdown: bool = False) -> str:
    """The lines under each other, as plain text or as a Markdown table."""
    rows = [HEADER, *(line.cells() for line in lines)]
    if markdown:
        rows.insert(1, ["---"] * len(HEADER))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def machine() -> str:
    """Processor, threads and versions, in one line."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in _lines(cpuinfo) if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    bf16 = "" if has_bf16("cpu") else ", no instructions for bf16"
    return (
        f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch{bf16}; "
        f"Python {platform.python_version()}, {versions}"
    )


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def formats() -> dict[NumberFormat, torch.dtype]:
    """What products are measured in: fp32, and bf16 where the processor has instructions; else it takes hours."""
    found: dict[NumberFormat, torch.dtype] = {"fp32": torch.float32}
    if has_bf16("cpu"):
        found["bf16"] = torch.bfloat16
    return found


def best_of(
    actions: Sequence[Callable[[], object]], repeats: int, *, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """The shortest time of each action in seconds; they take turns, after one round that does not count."""
    best = [float("inf")] * len(actions)
    for round_ in range(repeats + 1):
        for i, action in enumerate(actions):
            began = clock()
            action()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_:
                best[i] = min(best[i], clock() - began)
    return best


def options(description: str, **defaults: int) -> argparse.ArgumentParser:
    """A command line with one whole number per name in `defaults`, torch's threads, and the form of the table."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=" ")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves its default")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    return parser


def present(lines: Sequence[Line], *, markdown: bool) -> None:
    """Print the table, and below it what it was measured on."""
    sys.stdout.write(f"{table(lines, markdown=markdown)}\n\n{machine()}\n")
