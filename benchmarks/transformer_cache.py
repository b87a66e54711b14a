"""What caching keys and values is worth: `python -m benchmarks.transformer_cache [--images N] [--beams K] [--steps T]`.

The Transformer's search reads one word per step, since its state holds the keys and values of the words before. The
peer reads every caption from its start again at each step. Both run on the same random weights; the ratio is that of
their best times in this one run, and the same log-probabilities come out of both.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import best_of
from captioning.devices import default_device
from captioning.models.transformer import TransformerDecoder
from captioning.vocabulary import START

SIZES: dict[str, Any] = {"vocabulary_size": 9_000, "annotation_dim": 1280, "dim": 512, "layers": 3, "heads": 8}


def cached(decoder: TransformerDecoder, a: Tensor, words: Tensor) -> Tensor:
    """Logits of every word, step by step."""
    memory = decoder.prepare(a)
    state = decoder.initial_state(memory, len(words) // len(a))
    logits = []
    for word in words.unbind(1):
        step = decoder.step(word, state, memory)
        state = step.state
        logits.append(step.logits)
    return torch.stack(logits, dim=1)


def recomputed(decoder: TransformerDecoder, a: Tensor, words: Tensor) -> Tensor:
    """The same, reading all words so far at each step; the image's keys and values are computed once here, too."""
    memory = decoder.prepare(a)
    nothing = decoder.initial_state(memory, len(words) // len(a))
    logits = []
    for t in range(words.shape[1]):
        x, _, _ = decoder.read_on(words[:, : t + 1], nothing, memory)
        logits.append(decoder.L_o(x[:, -1]))
    return torch.stack(logits, dim=1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the ratio."""
    parse = argparse.ArgumentParser(prog="benchmarks.transformer_cache", description=__doc__)
    parse.add_argument("--images", type=int, default=8)
    parse.add_argument("--beams", type=int, default=5)
    parse.add_argument("--steps", type=int, nargs="+", default=[10, 20, 30])
    parse.add_argument("--locations", type=int, default=49)
    parse.add_argument("--repeats", type=int, default=3)
    parse.add_argument("--device", default=default_device())
    options = parse.parse_args(arguments)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    decoder = TransformerDecoder(**SIZES).eval().to(options.device)
    a = torch.randn(options.images, options.locations, SIZES["annotation_dim"], generator=generator).to(options.device)
    rows = options.images * options.beams
    print(f"{options.images} images x {options.beams} beams, {options.locations} locations, {decoder_size(decoder)}")
    for steps in options.steps:
        words = torch.randint(4, SIZES["vocabulary_size"], (rows, steps), generator=generator)
        words[:, 0] = START
        words = words.to(options.device)
        with torch.no_grad():
            ways = [partial(way, decoder, a, words) for way in (cached, recomputed)]
            torch.testing.assert_close(ways[0](), ways[1](), rtol=1e-3, atol=1e-3)
            fast, slow = best_of(ways, options.repeats)
        print(
            f"{steps} steps: cached {rows * steps / fast:,.0f} words/s, "
            f"recomputed {rows * steps / slow:,.0f} words/s, ratio {slow / fast:.1f}"
        )


def decoder_size(decoder: TransformerDecoder) -> str:
    """Its parameters and threads, for the first line."""
    parameters = sum(p.numel() for p in decoder.parameters())
    return f"{parameters / 1e6:.1f} million parameters, {torch.get_num_threads()} thread(s)"


if __name__ == "__main__":
    main()
