"""Which estimator of hard attention's gradient: bias, variance and cost, on the oracle and on a real batch.

    python -m benchmarks.hard_gradient
    python -m benchmarks.hard_gradient --data features.h5 --checkpoint runs/soft/best --images 8 --draws 24

On the oracle (3 locations, 3 words, 27 paths) the gradient of L_s is exact; on a batch of a data file the mean of many
draws of the quietest estimator stands in for it. Columns, for the gradient of all the decoder's parameters:

- bias: length of (mean estimate - truth) over that of the truth, with what sampling alone would give behind it (the
  sampling of the truth, too);
- variance: trace of the covariance of one estimate over the truth's squared length; SNR: one over its root;
- cost: CPU or GPU time of one forward and backward pass over soft attention's on the same batch (for
  the single caption of the oracle that is mostly overhead).

An estimate on the oracle is of one caption; the moving average and the learned baseline have seen some batches before.
"""

import argparse
import copy
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.hard_oracle import Oracle, estimate, exact_gradient, new_baseline, small_oracle
from benchmarks.report import best_of
from captioning.checkpoint import checkpoint_folder, load_checkpoint
from captioning.compatibility import check_same_task
from captioning.config import HardConfig
from captioning.console import exit_code
from captioning.data import CaptionData, CaptionDataset, load_batches, plan_epoch
from captioning.devices import default_device
from captioning.losses import word_nll
from captioning.models.attention import HardAttention, SoftAttention
from captioning.reward_baselines import Baseline
from captioning.vocabulary import PAD

WARM_UP = 30
"""Batches that a baseline has seen before its estimates count."""
BASE = HardConfig(lambda_e=0.0, expectation_probability=0.0)
PAPER, CHOSEN = "sentence, moving average (eq. 12)", "to-go, leave-one-out, K = 5"
ESTIMATORS = {
    "sentence, no baseline": dataclasses.replace(BASE, reward="sentence", baseline="none"),
    PAPER: dataclasses.replace(BASE, reward="sentence"),
    "sentence, learned": dataclasses.replace(BASE, reward="sentence", baseline="learned"),
    "to-go, no baseline": dataclasses.replace(BASE, baseline="none"),
    "to-go, moving average": BASE,
    "to-go, learned": dataclasses.replace(BASE, baseline="learned"),
    "to-go, moving average, K = 5": dataclasses.replace(BASE, samples=5),
    "sentence, leave-one-out, K = 5": dataclasses.replace(BASE, reward="sentence", baseline="leave_one_out", samples=5),
    CHOSEN: dataclasses.replace(BASE, baseline="leave_one_out", samples=5),
    "Gumbel straight-through": dataclasses.replace(BASE, baseline="none", relaxation="gumbel_straight_through"),
    "the paper's: eq. 12, mean context in half": dataclasses.replace(
        BASE, reward="sentence", expectation_probability=0.5
    ),
}


@dataclass(frozen=True)
class Row:
    """One estimator's numbers; variance is relative to the truth's squared length, and of one estimate."""

    bias: float
    noise: float
    variance: float
    cost: float

    @property
    def line(self) -> str:
        """As columns of the table."""
        bias = f"{self.bias:8.4f} ({self.noise:.4f})"
        return f"{bias}  {self.variance:9.4f}  {self.variance**-0.5:7.3f}  {self.cost:6.2f}"


def measure(
    oracle: Oracle,
    truth: Float[Tensor, " P"],
    hard: HardConfig,
    *,
    draws: int,
    copies: int,
    soft: float,
    doubt: float = 0.0,
) -> Row:
    """The bias, variance and cost of an estimator.

    Args:
        oracle: captions and decoder.
        truth: the gradient that is estimated.
        hard: the estimator.
        draws: how many means of `copies` estimates.
        copies: estimates made side by side.
        soft: seconds of soft attention's gradient.
        doubt: the truth's own variance, if it is a mean of draws.
    """
    torch.manual_seed(0)
    baseline = new_baseline(oracle, hard)
    warm_up(oracle, hard, baseline, copies)
    mean, squares = moments(estimate(oracle, hard, baseline, copies=copies, seed=seed) for seed in range(draws))
    length = truth.square().sum()
    variance = squares / (draws - 1)
    seconds = fastest(lambda: estimate(oracle, hard, baseline, seed=0))
    bias, noise = (mean - truth).norm() / length.sqrt(), ((variance / draws + doubt) / length).sqrt()
    return Row(bias.item(), noise.item(), (variance * copies / length).item(), seconds / soft)


def warm_up(oracle: Oracle, hard: HardConfig, baseline: Baseline, copies: int) -> None:
    """Let a baseline learn, the decoder standing still."""
    if hard.baseline not in ("moving_average", "learned"):
        return
    optimizer = torch.optim.Adam(baseline.parameters(), lr=0.01) if list(baseline.parameters()) else None
    for seed in range(WARM_UP):
        baseline.zero_grad()
        estimate(oracle, hard, baseline, copies=copies, seed=10_000 + seed, learn=optimizer is not None)
        if optimizer is not None:
            optimizer.step()


def fastest(once: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs, the process's own time on a CPU."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    return best_of([once], 5, clock=clock)[0]


def soft_seconds(oracle: Oracle) -> float:
    """Seconds of the gradient of the NLL with the same decoder made soft."""
    soft: Any = copy.deepcopy(oracle.decoder)
    soft.attention = SoftAttention(soft.attention.alignment)

    def once() -> None:
        output = soft(oracle.a, oracle.words)
        torch.autograd.grad(word_nll(output.logits, output.targets).sum(), [*soft.parameters()], allow_unused=True)

    return fastest(once)


def real_batch(data_path: str, checkpoint: str, images: int) -> Oracle:
    """A batch of training captions with the checkpoint's decoder made hard and without dropout."""
    data, loaded = CaptionData(data_path), load_checkpoint(checkpoint_folder(checkpoint))
    check_same_task(loaded, data, "--checkpoint")
    decoder = loaded.decoder
    if decoder.name != "attention_lstm" or decoder.attention == "multi_head" or decoder.values != "annotations":
        raise ValueError(f"--checkpoint {checkpoint}: must be an attention_lstm, soft or hard, with values=annotations")
    batches = plan_epoch(data, "train", captions_per_image=5, batch_size=images, seed=0, epoch=0)
    dataset = CaptionDataset(data, sides=loaded.encoder.sides, resample=loaded.encoder.resample)
    batch = next(load_batches(dataset, batches[:1], captions_per_image=5))
    model: Any = loaded.model.to(default_device()).eval()
    with torch.no_grad():
        a = model.annotate(batch[0].to(model.device))
    alignment = model.decoder.attention.alignment
    model.decoder.attention = HardAttention(alignment, glimpses=decoder.glimpses, window=decoder.window)
    return Oracle(model.decoder.eval(), a, batch[1].to(model.device))


def table(title: str, rows: dict[str, Row]) -> None:
    """Print one problem's rows, and whether the goal was met."""
    print(f"\n{title}")
    print(f"{'estimator':36} {'bias (noise)':>17}  {'variance':>9}  {'SNR':>7}  {'cost':>6}")
    for name, row in rows.items():
        print(f"{name:36} {row.line}")
    paper, chosen = rows[PAPER], rows[CHOSEN]
    ratio, product = paper.variance / chosen.variance, paper.variance * paper.cost / (chosen.variance * chosen.cost)
    met = "met" if ratio >= 5 and product > 1 else "not met"
    print(f"{CHOSEN} against the paper's: variance {ratio:.1f} times less, variance x cost {product:.1f} times less")
    print(f"goal (5 times less variance, and less variance x cost): {met}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 after a mistake, which it says in one line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hard_gradient", description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="HDF5 file: also measure on a batch of it; needs --checkpoint")
    parser.add_argument("--checkpoint", help="of the same encoder; a soft one will do")
    parser.add_argument("--images", type=int, default=8, help="in the batch, with five captions each")
    parser.add_argument("--draws", type=int, default=24, help="of each estimator on the batch")
    parser.add_argument("--oracle-draws", type=int, default=60, help="of each estimator on the oracle, 400 at a time")
    return exit_code("hard_gradient", lambda: _report(parser.parse_args(arguments)))


def _report(options: argparse.Namespace) -> int:
    """Measure and print the tables.

    Raises:
        ValueError: options that do not go together.
    """
    if bool(options.data) != bool(options.checkpoint):
        raise ValueError("--data and --checkpoint go together")
    if options.images < 1 or options.draws < 2 or options.oracle_draws < 2:
        asked = f"{options.images}, {options.draws} and {options.oracle_draws}"
        raise ValueError(f"--images must be at least 1, --draws and --oracle-draws 2 (got {asked})")
    real = real_batch(options.data, options.checkpoint, options.images) if options.data else None
    oracle = small_oracle()
    soft = soft_seconds(oracle)
    truth = exact_gradient(oracle)
    rows = {
        name: measure(oracle, truth, hard, draws=options.oracle_draws, copies=400, soft=soft)
        for name, hard in ESTIMATORS.items()
    }
    table("the oracle; the truth is exact", rows)
    if real is not None:
        soft, many = soft_seconds(real), 4 * options.draws
        truth, doubt = mean_of(real, ESTIMATORS[CHOSEN], many)
        one_glimpse = cast(HardAttention, real.decoder.attention).glimpses == 1  # the relaxation knows no more
        rows = {
            name: measure(real, truth, hard, draws=options.draws, copies=1, soft=soft, doubt=doubt)
            for name, hard in ESTIMATORS.items()
            if one_glimpse or hard.relaxation == "none"
        }
        words = int((real.words[..., 1:] != PAD).sum())
        table(f"{options.images} images, {words} words; the truth is the mean of {many} draws", rows)
    return 0


def mean_of(oracle: Oracle, hard: HardConfig, draws: int) -> tuple[Float[Tensor, " P"], float]:
    """The mean of many estimates, of other seeds than those measured, and the trace of its covariance."""
    baseline = new_baseline(oracle, hard)
    mean, squares = moments(estimate(oracle, hard, baseline, seed=20_000 + draw) for draw in range(draws))
    return mean, squares / (draws - 1) / draws


def moments(found: Iterable[Float[Tensor, " P"]]) -> tuple[Float[Tensor, " P"], float]:
    """The mean of vectors, and the sum of their squared distances from it (Welford's: none of them is kept)."""
    mean, squares = torch.zeros(()), 0.0
    for count, vector in enumerate(found, 1):
        change = vector - mean
        mean = mean + change / count
        squares += float((change * (vector - mean)).sum())
    return mean, squares


if __name__ == "__main__":
    sys.exit(main())
