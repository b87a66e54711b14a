"""Photos per second of an encoder's training step on the CPU, with and without what makes it fast.

`python -m benchmarks.finetune_step`: forward and backward pass of every layer, in batches of 8 as recipe
`flickr8k_soft_finetuned` has them. Three processes take turns: one with torchvision's own network; one with the strided
depthwise convolutions of `models.depthwise`; and one with those that keeps its memory (`memory`), as `train.py` does.
"""

import functools
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack

import torch
from torch import nn

from benchmarks.report import Line, best_of, formats, options, present
from captioning.config import EncoderConfig
from captioning.memory import keep_memory
from captioning.models.depthwise import StridedDepthwise
from captioning.models.encoder import Encoder, build_encoder

WAYS = {"the library's": (False, False), "depthwise": (True, False), "depthwise, memory kept": (True, True)}
"""Name -> whether the convolutions are ours, and whether memory is kept."""


@functools.cache
def network(config: EncoderConfig, *, ours: bool) -> Encoder:
    """The encoder, with our convolutions or the library's."""
    encoder, _ = build_encoder(config)
    for module in encoder.modules():
        if isinstance(module, StridedDepthwise) and not ours:
            module.__class__ = nn.Conv2d  # type: ignore[assignment]  # what it was made from
    return encoder


def step(encoder: Encoder, images: torch.Tensor, *, bf16: bool) -> None:
    """Forward and backward."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        a = encoder(images)
    a.float().square().mean().backward()
    encoder.zero_grad(set_to_none=True)


def prepare(threads: int, keep: bool) -> None:
    """What a process does first."""
    torch.set_num_threads(threads)
    if keep:
        keep_memory()


def seconds(config: EncoderConfig, batch_size: int, ours: bool, bf16: bool) -> float:
    """Of one step, after one that does not count."""
    size = config.image_size
    images = torch.randint(256, (batch_size, 3, size, size), dtype=torch.uint8)
    return best_of([functools.partial(step, network(config, ours=ours), images, bf16=bf16)], 1)[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = options(str(__doc__).splitlines()[0], batch_size=8, image_size=320, repeats=5)
    parser.add_argument("--encoder", default="mobilenet_v2", help="a torchvision network")
    parser.add_argument("--layer", default="features.17", help="where it is cut")
    chosen = parser.parse_args(arguments)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    config = EncoderConfig(
        name=chosen.encoder, layer=chosen.layer, image_size=chosen.image_size, weights=None, train_from="all"
    )
    lines = []
    with ExitStack() as stack:
        fresh = functools.partial(ProcessPoolExecutor, 1, multiprocessing.get_context("spawn"), prepare)
        processes = {
            name: stack.enter_context(fresh((torch.get_num_threads(), keep))) for name, (_, keep) in WAYS.items()
        }
        for precision in formats():
            best = dict.fromkeys(WAYS, float("inf"))
            for _ in range(chosen.repeats):
                for name, (ours, _) in WAYS.items():
                    task = processes[name].submit(seconds, config, chosen.batch_size, ours, precision == "bf16")
                    best[name] = min(best[name], task.result())
            for name, shortest in best.items():
                figure = f"{chosen.batch_size / shortest:.1f} photos/s"
                ratio = best["the library's"] / shortest
                lines.append(Line(f"{precision}, {name}", figure, ratio, "x the library's"))
    present(lines, markdown=chosen.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
