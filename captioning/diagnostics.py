"""Is the attention alive, and does the decoder listen to it: numbers from weights, words and gradients alone.

W words of a split lie one after another, caption by caption; `alphas` (W, L) are the attention weights with which they
were said. docs/diagnostics.md says what each number means, and which values are good and bad.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

FLAT = 0.98
"""Above this H[alpha] / ln L, attention is as good as uniform."""
DEAF = 0.01
"""Below this listening gap, in nats per word, the decoder does not use where the attention lies."""
PATIENCE = 3
"""So many validations in a row, or all of a run that has fewer, and training says so."""


def normalised_entropy(alphas: Float[Tensor, "*W L"]) -> Float[Tensor, "*W"]:
    """H[alpha_t] / ln L of every word: 1 for uniform attention, 0 for a single location (and where L is 1)."""
    return torch.special.entr(alphas.double()).sum(dim=-1) / max(math.log(alphas.shape[-1]), 1e-12)


def share_off_argmax(alphas: Float[Tensor, "W L"]) -> float:
    """Share of sampled locations that are not the likeliest, as expected: 1 - mean max alpha."""
    return 1 - alphas.double().amax(dim=-1).mean().item()


def means_by(values: Float[Tensor, " W"], groups: Integer[Tensor, " W"], count: int) -> tuple[list[float], list[int]]:
    """Mean of the values in each of `count` groups (NaN for an empty one), and how many there are."""
    sizes = groups.bincount(minlength=count)
    sums = groups.bincount(values.double(), minlength=count)
    return (sums / sizes).tolist(), sizes.tolist()


def mutual_information(alphas: Float[Tensor, "W L"], words: Integer[Tensor, " W"]) -> float:
    """I(location; word) in nats, if every word's location is drawn from its alpha.

    The plug-in estimate from expected counts, p(l, w) = (1/W) sum_t alpha_t(l) [w_t = w], which is what counts of
    sampled locations converge to with many samples of each word. It is never below 0 and biased upwards: with few words
    per cell of the table even unrelated ones seem to go together, for counts by about (L - 1)(V - 1) / 2W (Miller,
    1955), for soft weights by less. `shuffled_mutual_information` is its value where there is nothing to find.
    """
    _, ids = words.unique(return_inverse=True)
    joint = torch.zeros(int(ids.max()) + 1, alphas.shape[-1], dtype=torch.float64, device=alphas.device)
    joint.index_add_(0, ids, alphas.double() / len(words))
    entropy = torch.special.entr
    return (entropy(joint.sum(0)).sum() + entropy(joint.sum(1)).sum() - entropy(joint).sum()).item()


def shuffled_mutual_information(
    alphas: Float[Tensor, "W L"], words: Integer[Tensor, " W"], generator: torch.Generator, *, shuffles: int = 5
) -> float:
    """Mean of `mutual_information` after the words were shuffled over all captions and positions: the null."""
    orders = [torch.randperm(len(words), generator=generator).to(words.device) for _ in range(shuffles)]
    return sum(mutual_information(alphas, words[order]) for order in orders) / shuffles


def movement(alphas: Float[Tensor, "W L"], captions: Integer[Tensor, " W"], chosen: Bool[Tensor, " W"]) -> float:
    """Mean total variation 1/2 sum_i |alpha_ti - alpha_ui| between successive chosen words t, u of a caption.

    0: attention stays where it is; 1: it leaves no weight where it was. NaN if no caption has two chosen words.
    """
    alphas, captions = alphas[chosen].double(), captions[chosen]
    pairs = captions[1:] == captions[:-1]
    return (0.5 * (alphas[1:] - alphas[:-1]).abs().sum(dim=-1))[pairs].mean().item()


def histories(ids: Integer[Tensor, " W"], captions: Integer[Tensor, " W"]) -> Integer[Tensor, " W"]:
    """A number for all that came before each word in its caption: the same number where the same words did."""
    numbers: dict[tuple[int, int], int] = {}
    found: list[int] = []
    begins = [True, *(captions[1:] != captions[:-1]).tolist()]
    for word, begin in zip([0, *ids[:-1].tolist()], begins, strict=True):
        found.append(0 if begin else numbers.setdefault((found[-1], word), len(numbers) + 1))
    return torch.tensor(found, device=ids.device)


def apart(
    alphas: Float[Tensor, "W L"],
    ids: Integer[Tensor, " W"],
    captions: Integer[Tensor, " W"],
    images: Integer[Tensor, " W"],
    positions: Integer[Tensor, " W"],
    history: Integer[Tensor, " W"],
) -> tuple[float, float, float]:
    """Mean total variation between the weights of a word and its like, of two captions that tell of one image or two.

    Words at most one position apart in their captions are compared, lest attention that counts words should pass for
    attention that follows them; and none that the same words came before (equal `histories`), for attention, which
    knows no more than those, is then the same whatever the word. Words must lie image by image.

    Returns:
        For a word in two captions of one image; for two different words of two captions of one image; for a word in
        captions of two neighbouring images. Attention that goes where the word's thing is has the first below both
        others. NaN where there is no pair.
    """
    sizes = images.unique_consecutive(return_counts=True)[1].tolist()
    parts = list(zip(*(x.split(sizes) for x in (alphas.double(), ids, captions, positions, history)), strict=True))
    found: tuple[list[Tensor], ...] = ([], [], [])
    for i, here in enumerate(parts):
        for there in parts[i : i + 2]:
            distance = torch.cdist(here[0], there[0], p=1) / 2
            word, caption, shift, past = (x[:, None] - y for x, y in zip(here[1:], there[1:], strict=True))
            compared = (caption != 0) & (shift.abs() <= 1) & (past != 0)
            if there is here:
                found[0].append(distance[compared & (word == 0)])
                found[1].append(distance[compared & (word != 0)])
            else:
                found[2].append(distance[compared & (word == 0)])
    again, other, elsewhere = (torch.cat([alphas.new_empty(0), *x]).mean().item() for x in found)
    return again, other, elsewhere


def as_many_at_random(
    captions: Integer[Tensor, " W"], chosen: Bool[Tensor, " W"], generator: torch.Generator
) -> Bool[Tensor, " W"]:
    """As many words of each caption as are chosen there, at random: what `movement` between nouns is compared with.

    Words must lie caption by caption, `captions` ascending.
    """
    noise = torch.rand(len(captions), generator=generator, dtype=torch.float64).to(captions.device)
    shuffled = torch.argsort(captions.double() + noise)  # any order within a caption, the captions in their own
    return chosen[shuffled]


def gradient_signal_to_noise(gradients: Float[Tensor, "B P"]) -> float:
    """|G|^2 / tr(S) of the gradients of B batches: squared length of the mean over the variance of one.

    The inverse of the simple noise scale of McCandlish et al. (2018), section 2.2, in units of these batches: at 1 a
    step is half signal, and 1/x batches would have to be averaged to make it so. |G|^2 is estimated without
    bias, as |mean|^2 - tr(S)/B with S the sample covariance, and so may come out below 0: no signal is to be seen.
    """
    if len(gradients) < 2:
        raise ValueError(f"signal to noise needs the gradients of two batches or more (got {len(gradients)})")
    gradients = gradients.double()
    noise = gradients.var(dim=0).sum()
    return ((gradients.mean(dim=0).square().sum() - noise / len(gradients)) / noise).item()


def importance_weighted_bound(log_weights: Float[Tensor, "*B K"]) -> Float[Tensor, "*B"]:
    """Log (1/K) sum_k p(y|s_k,a), with paths s_k drawn from p(s|a): a bound on log p(y|a), Burda et al. (2016), eq. 8.

    Its mean over draws is L_s (Xu et al., 2015, eq. 10) for K = 1, grows with K and tends to log p(y|a).

    Args:
        log_weights: log p(y|s_k,a) of K sampled paths.
    """
    return log_weights.logsumexp(dim=-1) - math.log(log_weights.shape[-1])


def collapse(
    history: Sequence[Mapping[str, Any]], *, hard: bool = False, at: str = "", patience: int = PATIENCE
) -> str | None:
    """What to say if the attention has been dead for the last validations, else None.

    Args:
        history: what each validation found; `entropy` and `listening_gap` where it was diagnosed.
        hard: whether locations are sampled: other settings help.
        at: what is behind these names where the attention of a further scale was diagnosed.
        patience: how many validations.
    """
    entropy, gap = f"entropy{at}", f"listening_gap{at}"
    last = [entry for entry in history if entropy in entry][-patience:]
    if len(last) < patience:
        return None
    flat, deaf = (
        all(entry[entropy] > FLAT for entry in last),
        all(entry.get(gap, math.inf) < DEAF for entry in last),
    )
    if not (flat or deaf):
        return None
    signs = [f"H/ln L above {FLAT}"] * flat + [f"a listening gap below {DEAF} nats per word"] * deaf
    advice = (
        "start from a soft checkpoint (init_from), lower hard.lambda_e, take hard.baseline leave_one_out with more "
        "hard.samples, or raise hard.expectation_probability"
        if hard
        else "set loss.lambda_ds to 0 if it is not, try another decoder.alignment, a higher optimizer.learning_rate or "
        "a finer encoder.grid"
    )
    return (
        f"the attention has collapsed ({' and '.join(signs)} for {patience} validation{'s' * (patience > 1)}): {advice}"
    )
