"""What is minimised: caption NLL and the doubly stochastic penalty, Xu et al. (2015), eq. 14; REINFORCE, eq. 12;
self-critical training.

Functions return one value per word or caption; the caller takes means, so that a weight means the same for every batch
size, caption length and number of processes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer, Shaped
from torch import Tensor


def word_nll(
    logits: Float[Tensor, "W V"], targets: Integer[Tensor, " W"], *, label_smoothing: float = 0.0
) -> Float[Tensor, " W"]:
    """-log p(y_t | y_1..t-1, a) of every word; with label smoothing, Szegedy et al. (2016), section 7."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)


def expected_nll(logits: Float[Tensor, "W V"], expected: Float[Tensor, "W V"]) -> Float[Tensor, " W"]:
    """-sum_w q(w) log p(w) at every word, for the words q that teachers expect; Hinton et al. (2015), section 2."""
    return -(expected * logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)).sum(dim=-1)


def doubly_stochastic_penalty(alphas: Float[Tensor, "N K T L"], mask: Bool[Tensor, "N K T"]) -> Float[Tensor, "N K"]:
    """(1/L) sum_i (1 - sum_t alpha_ti)^2 of every caption, over its real words only; 0 for an absent caption.

    The mean over locations, where the paper has the sum: docs/differences.md relates the two.
    """
    attended = (alphas.float() * mask.unsqueeze(-1)).sum(dim=2)
    return (1 - attended).square().mean(dim=-1) * mask.any(dim=-1)


def by_word(values: Shaped[Tensor, " W"], mask: Bool[Tensor, "N K T"]) -> Shaped[Tensor, "N K T"]:
    """Values of the real words back at their places; 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def sentence_reward(log_p: Float[Tensor, "N K T"]) -> Float[Tensor, "N K T"]:
    """The paper's: every location of a caption is credited with log p(y|s,a), the sum over all its words."""
    return log_p.sum(dim=-1, keepdim=True).expand_as(log_p)


def reward_to_go(log_p: Float[Tensor, "N K T"]) -> Float[Tensor, "N K T"]:
    """s_t is credited with sum_{u >= t} log p(y_u): words before it cannot depend on it (Sutton et al., 2000)."""
    return log_p.flip(-1).cumsum(dim=-1).flip(-1)


REWARDS: dict[str, Callable[[Tensor], Tensor]] = {"sentence": sentence_reward, "to_go": reward_to_go}


def reinforce(
    log_probs: Float[Tensor, "N K T"], rewards: Float[Tensor, "N K T"], baselines: Float[Tensor, "N K T"]
) -> Float[Tensor, "N K T"]:
    """-(R_t - b_t) log p(s_t): its gradient is minus the middle term of eq. 12 (the gradient of the hard objective)."""
    return -(rewards - baselines).detach() * log_probs


def mean_of_others(rewards: Float[Tensor, "*shape"], *, dim: int) -> Float[Tensor, "*shape"]:
    """The mean reward of the other samples along a dimension: a baseline that knows nothing of the sample itself."""
    return (rewards.sum(dim=dim, keepdim=True) - rewards) / (rewards.shape[dim] - 1)


def leave_one_out(rewards: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
    """Advantage of each of an image's K samples over the mean of the others, Luo (2020): a baseline without bias."""
    return rewards - mean_of_others(rewards, dim=1)


def self_critical(
    log_p: Float[Tensor, " W"], mask: Bool[Tensor, "N K T"], advantage: Float[Tensor, "N K"]
) -> Float[Tensor, " W"]:
    """-advantage * log p(y_t) of every sampled word, in mask order; Rennie et al. (2017), eqs. 5-7.

    Summed over the words and averaged over the samples, its gradient has the expectation -d E[reward].
    """
    return -log_p * advantage.unsqueeze(-1).expand(mask.shape)[mask].to(log_p.dtype)
