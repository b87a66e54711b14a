"""Captions per second of beam search, one image at a time and many: `python -m benchmarks.beam_search`.

The sizes are those of `benchmarks.train_step`. END is made impossible, so that every caption has all its words.
"""

import sys
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.report import Line, best_of, formats, options, present
from benchmarks.roofline import Phase, measure
from benchmarks.train_step import Sizes, build_pair
from captioning.config import SearchConfig
from captioning.decoding import Hypothesis, search
from captioning.models.decoder import AttentionLSTM
from captioning.vocabulary import END


def endless_decoder(sizes: Sizes) -> AttentionLSTM:
    """A decoder with random weights that never says END."""
    decoder = build_pair(sizes)[0].eval()
    with torch.no_grad():
        decoder.L_o.bias[END] = -1e4
    return decoder


def run(decoder: AttentionLSTM, a: torch.Tensor, config: SearchConfig, *, dtype: torch.dtype) -> list[list[Hypothesis]]:
    """Search, with matrix products of that type."""
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        return search(decoder, a, config)


def necessary(sizes: Sizes, config: SearchConfig, dtype: torch.dtype) -> list[Phase]:
    """What the search of `sizes.images` images cannot do without.

    Operations are those of the matrix products. Weights are read once per step, annotation vectors and keys too. A step
    more than there are words asks for END.
    """
    n, beam, steps = sizes.images, config.beam_size, config.max_length + 1
    locations, annotation_dim, dim, k, vocabulary = sizes[2:7]
    rows, size = n * (beam * (steps - 1) + 1), dtype.itemsize  # before the first word all rows of an image are one
    weights = (2 * dim + annotation_dim) * 4 * dim + dim * (k + 1) + dim * (dim + annotation_dim) + dim * vocabulary
    image = locations * (annotation_dim + k)
    return [
        Phase("keys", 2 * n * locations * annotation_dim * k, n * locations * annotation_dim * size),
        Phase("initial state", 4 * n * annotation_dim * dim, 2 * annotation_dim * dim * size),
        Phase("gates, deep output, logits", 2 * rows * weights, steps * weights * size),
        Phase("attention", 2 * rows * image, steps * n * image * size),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    description = str(__doc__).splitlines()[0]
    parser = options(description, images=32, locations=196, annotation_dim=2048, dim=512, vocabulary=9000, beam=5)
    parser.add_argument("--words", type=int, default=15, help="of every caption")
    parser.add_argument("--repeats", type=int, default=3, help="timed searches, of which the shortest counts")
    parser.add_argument("--product", type=int, default=2048, help="side of the matrices that the roofline multiplies")
    chosen = parser.parse_args(arguments)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    config = SearchConfig(beam_size=chosen.beam, max_length=chosen.words)
    shared = (chosen.locations, chosen.annotation_dim, chosen.dim, chosen.dim, chosen.vocabulary)
    many, one = (Sizes(images, 1, *shared) for images in (chosen.images, 1))
    decoder = endless_decoder(many)
    a = torch.randn(many.images, many.locations, many.annotation_dim).relu()
    machine = measure(repeats=max(chosen.repeats, 2), size=chosen.product, megabytes=max(chosen.product // 8, 1))
    lines = []
    for precision, dtype in formats().items():
        batches = ((many, a), (one, a[:1]))
        seconds = best_of([partial(run, decoder, x, config, dtype=dtype) for _, x in batches], chosen.repeats)
        rates = [sizes.images / s for (sizes, _), s in zip(batches, seconds, strict=True)]
        limits = [s.images / machine.seconds(necessary(s, config, dtype), dtype) for s, _ in batches]
        for i, (sizes, _) in enumerate(batches):
            what, figure = f"{precision}, batch of {sizes.images}", f"{rates[i]:.1f} captions/s"
            limit = f"{limits[i]:.1f} captions/s"
            if i == 0:
                lines.append(Line(what, figure, rates[0] / rates[1], "x batch of 1", limit, (">=", 8.0)))
            lines.append(Line(what, figure, limits[i] / rates[i], "x the limit's time", limit))
    present(lines, markdown=chosen.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
