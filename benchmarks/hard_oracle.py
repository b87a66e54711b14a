"""A decoder so small that all L^T paths of its hard attention can be enumerated: the exact bound and its gradient."""

import itertools
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from captioning.config import DecoderConfig, HardConfig
from captioning.hard_objective import hard_loss
from captioning.losses import by_word, word_nll
from captioning.models.attention import HardAttention
from captioning.models.decoder import Decoder
from captioning.models.registry import build_decoder
from captioning.reward_baselines import Baseline, build_baseline
from captioning.vocabulary import END, START


@dataclass(frozen=True)
class Oracle:
    """Captions of N images, and the decoder whose gradients are asked for.

    Args:
        decoder: with hard attention, without dropout.
        a: annotation vectors.
        words: framed captions.
    """

    decoder: Decoder
    a: Float[Tensor, "N L D"]
    words: Integer[Tensor, "N K S"]

    @property
    def parameters(self) -> list[Tensor]:
        """Those that a gradient is taken for."""
        return [p for p in self.decoder.parameters() if p.requires_grad]


def small_oracle(seed: int = 0, *, glimpses: int = 1) -> Oracle:
    """One image with L = 3 locations and one caption of T = 3 words, in double precision, with decided attention."""
    torch.manual_seed(seed)
    config = DecoderConfig(
        attention="hard", glimpses=glimpses, embedding_dim=3, hidden_dim=4, attention_dim=3, dropout=0.0
    )
    decoder = build_decoder(config, vocabulary_size=7, annotation_dim=3).double().eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(std=0.8)
    return Oracle(decoder, torch.randn(1, 3, 3, dtype=torch.float64), torch.tensor([[[START, 4, 5, END]]]))


def paths(oracle: Oracle) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"]]:
    """Log p(s|a) and log p(y|s,a) of every path s, through the decoder with its locations forced; with gradients."""
    places, steps = oracle.a.shape[1], oracle.words.shape[-1] - 1
    glimpses = cast(HardAttention, oracle.decoder.attention).glimpses
    looks = range(places) if glimpses == 1 else itertools.permutations(range(places), glimpses)
    every = torch.tensor(list(itertools.product(looks, repeat=steps))).unsqueeze(0)
    output = oracle.decoder(oracle.a, oracle.words.expand(1, every.shape[1], -1), locations=every)
    log_p = by_word(-word_nll(output.logits, output.targets), output.mask)
    return output.log_probs.sum(dim=-1).flatten(), log_p.sum(dim=-1).flatten()


def exact_bound(oracle: Oracle) -> Float[Tensor, ""]:
    """L_s, eq. 10: sum_s p(s|a) log p(y|s,a)."""
    log_q, log_p = paths(oracle)
    return (log_q.exp() * log_p).sum()


def exact_gradient(oracle: Oracle) -> Float[Tensor, " P"]:
    """The gradient of L_s."""
    return _flat(exact_bound(oracle), oracle)


def marginal(oracle: Oracle) -> Float[Tensor, ""]:
    """Log p(y|a) = log sum_s p(s|a) p(y|s,a)."""
    log_q, log_p = paths(oracle)
    return (log_q + log_p).logsumexp(dim=0)


def new_baseline(oracle: Oracle, hard: HardConfig) -> Baseline:
    """The baseline of an estimator, of the decoder's precision and on its device."""
    hidden_dim = oracle.decoder.initial_state(oracle.decoder.prepare(oracle.a)).h.shape[-1]
    return build_baseline(hard, hidden_dim=hidden_dim).to(oracle.a)


def estimate(
    oracle: Oracle,
    hard: HardConfig,
    baseline: Baseline,
    *,
    copies: int = 1,
    seed: int | None = None,
    learn: bool = False,
) -> Float[Tensor, " P"]:
    """One estimate of the gradient of L_s, summed over the captions: as training makes it, with its sign turned.

    Args:
        oracle: what for.
        hard: the estimator, with `hard.samples` paths for each caption.
        baseline: its b, which learns from this batch when it is done.
        copies: the mean of so many independent estimates.
        seed: of the locations.
        learn: give the baseline's own parameters their gradient too, in `.grad`.
    """
    generator = None if seed is None else torch.Generator(oracle.a.device).manual_seed(seed)
    a, words = (x.repeat_interleave(copies, dim=0) for x in (oracle.a, oracle.words))  # each copy tosses its own coins
    total, _, terms = hard_loss(oracle.decoder, a, words, hard, baseline, generator=generator)
    loss = total / (copies * hard.samples)
    if learn:
        loss.backward(inputs=list(baseline.parameters()), retain_graph=True)
    gradient = _flat(-loss, oracle)
    baseline.observe(*terms.captions)
    return gradient


def _flat(value: Float[Tensor, ""], oracle: Oracle) -> Float[Tensor, " P"]:
    gradients = torch.autograd.grad(value, oracle.parameters, allow_unused=True)
    zipped = zip(oracle.parameters, gradients, strict=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zipped])
