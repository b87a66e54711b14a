"""What hard attention minimises: Xu et al. (2015), eq. 12, whose first term is the likelihood of the words."""

from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from captioning.config import HardConfig
from captioning.losses import REWARDS, by_word, reinforce, word_nll
from captioning.models.attention import Look, looking
from captioning.models.decoder import Output
from captioning.reward_baselines import Baseline


class HardTerms(NamedTuple):
    """What eq. 12 adds to the NLL, summed over the words of a batch, and what it says of its sampled captions.

    Args:
        loss: the terms.
        entropy: H[alpha], summed over all words.
        squared_advantage: (R - b)^2, summed over the words whose locations were sampled.
        captions: log p, words and number of the captions whose locations were sampled.
    """

    loss: Float[Tensor, ""]
    entropy: Float[Tensor, ""]
    squared_advantage: Float[Tensor, ""]
    captions: Float[Tensor, "3"]


def training_look(hard: HardConfig, generator: torch.Generator | None = None) -> Look:
    """How hard attention looks in training: eq. 8 or its relaxation, some images with the mean context."""
    location = "sample" if hard.relaxation == "none" else hard.relaxation
    return Look(location, hard.expectation_probability, generator)


def hard_loss(
    model: nn.Module,
    a: Float[Tensor, "N L D"],
    words: Integer[Tensor, "N K S"],
    hard: HardConfig,
    baseline: Baseline,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, ""], int, HardTerms]:
    """The whole of eq. 12, the NLL and the terms, summed over the words of `hard.samples` paths per caption.

    It is what `objective.teacher_forced` minimises without teachers, smoothed labels and the penalty (a test).

    Args:
        model: hard attention's, from annotation vectors and words to an Output.
        a: annotation vectors.
        words: framed captions.
        hard: the estimator.
        baseline: b.
        generator: of the locations and coins.

    Returns:
        The loss, over how many words of all paths it is a sum, and the terms in it.
    """
    with looking(model, training_look(hard, generator)):
        output: Output = model(a, words.repeat_interleave(hard.samples, dim=1))
    nlls = word_nll(output.logits, output.targets)
    terms = hard_terms(output, -nlls.detach(), hard, baseline)
    return nlls.sum() + terms.loss, len(nlls), terms


def hard_terms(output: Output, log_p: Float[Tensor, " W"], hard: HardConfig, baseline: Baseline) -> HardTerms:
    """Eq. 12 (the gradient of the hard objective) without its first term, which is the NLL's.

    Args:
        output: of hard attention, `hard.samples` rows per caption.
        log_p: of its targets, given the sampled locations (with teachers, minus the loss that is theirs in part); no
            gradient goes through it.
        hard: weights.
        baseline: b.
    """
    mask, locations, states = output.mask, cast(Tensor, output.locations), cast(Tensor, output.states)
    log_probs, entropies = cast(Tensor, output.log_probs), cast(Tensor, output.entropies)
    log_p_by_word = by_word(log_p, mask)
    rewards = REWARDS[hard.reward](log_p_by_word)
    b = baseline(rewards, states, mask)
    first = locations if locations.dim() == 3 else locations[..., 0]  # of several glimpses
    sampled = mask & (first >= 0)  # where the mean context was taken there is nothing to credit
    lambda_r = hard.lambda_r if hard.relaxation == "none" else 0.0
    entropy = (entropies * mask).sum()
    loss = lambda_r * (reinforce(log_probs, rewards, b) * sampled).sum()
    if hard.lambda_e:  # without it no gradient has to find its way through the entropies, to be multiplied by zero
        loss = loss - hard.lambda_e * entropy
    squared = ((rewards - b).detach() * sampled).square().sum()
    own = baseline.loss(rewards, b)
    if own is not None:
        loss = loss + (own * sampled).sum()
    captions = torch.stack([(log_p_by_word * sampled).sum(), sampled.sum(), sampled.any(dim=-1).sum()])
    return HardTerms(loss, entropy.detach(), squared, captions)
