"""Photos per second of an encoder's training step on the CPU, with and without what makes it fast.

`python -m benchmarks.finetune_step`: forward and backward pass of every layer, in batches of 8 as recipe
`flickr8k_soft_finetuned` has them. Three networks with the same weights take turns: torchvision's own; with the strided
depthwise convolutions of `models.depthwise`; and that one while the process keeps its memory (`memory`).
"""

import sys
import time
from collections.abc import Sequence

import torch
from torch import nn

from benchmarks.report import Line, options, present
from captioning.config import EncoderConfig
from captioning.memory import keep_memory
from captioning.models.depthwise import StridedDepthwise
from captioning.models.encoder import Encoder, build_encoder


def slow_copy(encoder: Encoder, config: EncoderConfig) -> Encoder:
    """The same encoder with the library's convolutions."""
    copy, _ = build_encoder(config)
    copy.load_state_dict(encoder.state_dict())
    for module in copy.modules():
        if isinstance(module, StridedDepthwise):
            module.__class__ = nn.Conv2d  # type: ignore[assignment]  # what it was made from
    return copy


def step(encoder: Encoder, images: torch.Tensor, *, bf16: bool) -> None:
    """Forward and backward."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        a = encoder(images)
    a.float().square().mean().backward()
    encoder.zero_grad(set_to_none=True)


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
    quick, config = build_encoder(config)
    slow = slow_copy(quick, config)
    shape = (chosen.batch_size, 3, chosen.image_size, chosen.image_size)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ways = (("the library's", slow, False), ("depthwise", quick, False), ("depthwise, memory kept", quick, True))
    lines = []
    for precision in ("fp32", "bf16"):
        best = dict.fromkeys((name for name, _, _ in ways), float("inf"))
        for _ in range(chosen.repeats):
            for name, encoder, keep in ways:
                keep_memory(keep=keep)
                step(encoder, images, bf16=precision == "bf16")
                began = time.perf_counter()
                step(encoder, images, bf16=precision == "bf16")
                best[name] = min(best[name], time.perf_counter() - began)
        keep_memory(keep=False)
        for name, seconds in best.items():
            ratio = best["the library's"] / seconds
            figure = f"{chosen.batch_size / seconds:.1f} photos/s"
            lines.append(Line(f"{precision}, {name}", figure, ratio, "x the library's"))
    present(lines, markdown=chosen.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
