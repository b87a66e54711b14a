"""The listening test: what a decoder loses when it is made to look elsewhere.

It forces the attention and nothing else: the words stay those of the caption, the annotation vectors those of the
image.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from captioning.models.attention import Attention, Context
from captioning.models.decoder import Decoder


class ForcedAttention(Attention):
    """Attention that looks where it is told, whatever the query; for one teacher-forced pass after each `prepare`.

    Args:
        own: the decoder's attention, whose memory is kept.
        alphas: weights of every word in the order of the decoder's steps; one-hot for a hard location.
    """

    def __init__(self, own: Attention, alphas: Float[Tensor, "N K T L"]):
        super().__init__()
        self.own = own
        self.alphas = alphas
        self.step = 0

    def prepare(self, a: Float[Tensor, "N L D"]) -> Any:
        self.step = 0
        return self.own.prepare(a)

    def forward(self, query: Float[Tensor, "R n"], memory: Any) -> Context:
        images = len(memory.a)  # the corner of the batch that still goes on, see Decoder.forward
        captions = len(query) // images
        at_once = captions > self.alphas.shape[1]  # all words in one call, as Luong's decoder asks
        alpha = self.alphas.flatten(1, 2) if at_once else self.alphas[:images, :captions, self.step]
        self.step += 1
        return Context(z=self.own.mix(alpha, memory).flatten(0, 1), alpha=alpha.flatten(0, 1))


@contextmanager
def forced(decoder: Decoder, alphas: Float[Tensor, "N K T L"]) -> Iterator[None]:
    """Make a decoder attend with these weights."""
    own = attention_of(decoder)
    if own is None:
        raise ValueError(f"{type(decoder).__name__} has no attention that could be forced")
    decoder.attention = ForcedAttention(own, alphas)
    try:
        yield
    finally:
        decoder.attention = own


def attention_of(decoder: Decoder) -> Attention | None:
    """The decoder's attention, if it can be forced: asked word by word, its alphas alone make the contexts."""
    own = getattr(decoder, "attention", None)
    return own if isinstance(own, Attention) and own.single else None


def exchange(
    alphas: Float[Tensor, "N K T L"], mask: Bool[Tensor, "N K T"], generator: torch.Generator
) -> Float[Tensor, "N K T L"]:
    """Every caption gets, word by word, the weights of a random caption of another image.

    That one is at least as long if there is such; of a shorter one the last word's weights are repeated.

    Raises:
        ValueError: there is no other image.
    """
    n, k, t = mask.shape
    lengths = mask.sum(dim=-1).flatten().cpu()
    image = torch.arange(n).repeat_interleave(k)
    others = (image.unsqueeze(1) != image) & (lengths > 0)
    if not others.any(dim=1).all():
        raise ValueError("exchanging attention needs captions of two images or more")
    covered = torch.minimum(lengths.unsqueeze(1), lengths).masked_fill(~others, -1)
    best = covered == covered.amax(dim=1, keepdim=True)
    donors = torch.multinomial(best.double(), 1, generator=generator)  # (N K, 1)
    steps = torch.minimum(torch.arange(t), lengths[donors] - 1)
    return alphas.flatten(0, 1)[donors.to(alphas.device), steps.to(alphas.device)].unflatten(0, (n, k))


def replacements(
    alphas: Float[Tensor, "N K T L"],
    mask: Bool[Tensor, "N K T"],
    grid: tuple[int, int],
    generator: torch.Generator,
) -> dict[str, Float[Tensor, "N K T L"]]:
    """What the listening test puts in place of the weights.

    Returns:
        exchanged: between images; random: the own weights, their locations shuffled at every word; uniform; centre: the
        cell in the middle of the grid alone.
    """
    order = torch.rand(alphas.shape, generator=generator).argsort(dim=-1).to(alphas.device)
    height, width = grid if math.prod(grid) == alphas.shape[-1] else (1, alphas.shape[-1])
    centre = torch.tensor((height // 2) * width + width // 2, device=alphas.device)
    return {
        "exchanged": exchange(alphas, mask, generator),
        "random": alphas.gather(-1, order),
        "uniform": torch.full_like(alphas, 1 / alphas.shape[-1]),
        "centre": F.one_hot(centre, alphas.shape[-1]).to(alphas.dtype).expand_as(alphas),
    }
