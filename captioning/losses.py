"""What is minimised: caption NLL and the doubly stochastic penalty, Xu et al. (2015), eq. 14.

Functions return one value per word or caption; the caller takes means, so that a weight means the same for every batch
size, caption length and number of processes.
"""

import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor


def word_nll(
    logits: Float[Tensor, "W V"], targets: Integer[Tensor, " W"], *, label_smoothing: float = 0.0
) -> Float[Tensor, " W"]:
    """-log p(y_t | y_1..t-1, a) of every word; with label smoothing, Szegedy et al. (2016), section 7."""
    return F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=label_smoothing)


def doubly_stochastic_penalty(alphas: Float[Tensor, "N K T L"], mask: Bool[Tensor, "N K T"]) -> Float[Tensor, "N K"]:
    """(1/L) sum_i (1 - sum_t alpha_ti)^2 of every caption, over its real words only; 0 for an absent caption.

    The mean over locations, where the paper has the sum: docs/differences.md relates the two.
    """
    attended = (alphas.float() * mask.unsqueeze(-1)).sum(dim=2)
    return (1 - attended).square().mean(dim=-1) * mask.any(dim=-1)
