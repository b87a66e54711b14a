"""Several decoders that speak with one voice: the mean of their probabilities at every word.

Sutskever et al. (2014), section 3.6, decode with an ensemble; Krizhevsky et al. (2012), section 4.1, average over views
of a picture, mirror images among them. For hard attention the mean over sampled paths of locations is more than that:
p(y_t | y_1..t-1, a) is a sum over locations, for which several stand better than one.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from captioning.models.decoder import Decoder, Step


class Voice(NamedTuple):
    """A decoder with its own memory of the images."""

    decoder: Decoder
    memory: Any


class EnsembleDecoder(Decoder):
    """Voices that hear the same words: each decoder `paths` times, all with states of their own.

    What it reports is on the finest grid among them: alpha is the mean of theirs, beta likewise, and `location` (R, G)
    holds where the voices with hard attention looked, each once for every glimpse.

    Args:
        decoders: at least one; one that has several views of an image comes once for each.
        paths: copies of each decoder; they differ in the locations that hard attention samples.
    """

    def __init__(self, decoders: Sequence[Decoder], *, paths: int = 1):
        super().__init__()
        self.decoders = nn.ModuleList(decoders)
        self.paths = paths
        self.attends = any(decoder.attends for decoder in decoders)

    def prepare(self, a: Sequence[Float[Tensor, "N _ _"]]) -> list[Voice]:
        """Each voice with its memory; `a` holds the annotation vectors of each decoder."""
        decoders = cast(Sequence[Decoder], self.decoders)
        voices = [Voice(decoder, decoder.prepare(vectors)) for decoder, vectors in zip(decoders, a, strict=True)]
        return [voice for voice in voices for _ in range(self.paths)]

    def initial_state(self, memory: list[Voice], rows_per_image: int = 1) -> list[Any]:
        """The voices' states."""
        return [voice.decoder.initial_state(voice.memory, rows_per_image) for voice in memory]

    def step(self, word: Integer[Tensor, " R"], state: list[Any], memory: list[Voice]) -> Step:
        steps = [voice.decoder.step(word, own, voice.memory) for voice, own in zip(memory, state, strict=True)]
        log_p = torch.stack([step.logits.log_softmax(dim=-1) for step in steps])
        betas = [step.beta for step in steps if step.beta is not None]
        alphas = [step.alpha for step in steps if step.alpha is not None]
        finest = max((alpha.shape[-1] for alpha in alphas), default=0)
        looked = [
            refine_location(step.location, step.alpha.shape[-1], finest).view(len(word), -1)
            for step in steps
            if step.location is not None and step.alpha is not None
        ]
        return Step(
            logits=log_p.logsumexp(dim=0) - math.log(len(steps)),
            state=[step.state for step in steps],
            alpha=torch.stack([refine(alpha, finest) for alpha in alphas]).mean(dim=0) if alphas else None,
            beta=torch.stack(betas).mean(dim=0) if betas else None,
            location=torch.cat(looked, dim=-1) if looked else None,
        )


def refine(alpha: Float[Tensor, "R L"], locations: int) -> Float[Tensor, "R M"]:
    """Attention on a square grid as that on another: the weight of a cell is spread evenly over what it covers."""
    old, new = math.isqrt(alpha.shape[-1]), math.isqrt(locations)
    if old == new:
        return alpha
    share = _overlap(old, new).to(alpha)
    return (share.T @ alpha.unflatten(-1, (old, old)) @ share).flatten(-2)


def refine_location(location: Integer[Tensor, "R ..."], old: int, locations: int) -> Integer[Tensor, "R ..."]:
    """The cell of a square grid of `locations` in which the middle of a cell of a grid of `old` lies."""
    before, after = math.isqrt(old), math.isqrt(locations)
    row, column = location // before, location % before
    row, column = ((2 * x + 1) * after // (2 * before) for x in (row, column))
    return row * after + column


def _overlap(old: int, new: int) -> Float[Tensor, "old new"]:
    """The share of each of `old` equal parts of a line that lies in each of `new` ones; rows sum to one."""
    begin, start = torch.arange(old).unsqueeze(1) / old, torch.arange(new) / new
    return (torch.minimum(begin + 1 / old, start + 1 / new) - torch.maximum(begin, start)).clamp(min=0) * old
