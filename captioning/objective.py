"""What a step of likelihood training minimises; `Objective` and the penalty serve self-critical training, too."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from captioning.distillation import Photos
from captioning.hard_objective import HardTerms, hard_terms, training_look
from captioning.losses import doubly_stochastic_penalty, expected_nll, word_nll
from captioning.models.attention import looking
from captioning.models.decoder import Output
from captioning.reward_baselines import Baseline
from captioning.run import Run


class Objective(NamedTuple):
    """One step's loss, and what it reports.

    Args:
        loss: what is minimised; a mean over all processes once their gradients are averaged.
        words: targets in this process's batch.
        means: for the log: `nll` per word and others, or `reward` and `length` of sampled captions.
    """

    loss: Float[Tensor, ""]
    words: int
    means: dict[str, Tensor]

    def numbers(self) -> dict[str, float]:
        """The means, fetched from their device at once."""
        values = torch.stack([x.detach().float() for x in self.means.values()]).tolist()
        return dict(zip(self.means, values, strict=True))


def teacher_forced(
    run: Run, images: Shaped[Tensor, "N ..."], captions: Integer[Tensor, "N K S"], photos: Photos | None = None
) -> Objective:
    """The NLL of the captions and the penalty, eq. 14; with hard attention, the terms of eq. 12 too.

    Teachers replace a part of the NLL by that of the words that they expect of these photos; sampled locations are
    rewarded for both alike, but never for smoothed labels. The `nll` that is reported is of the captions alone.
    """
    settings, samples = run.settings, run.settings.hard.samples
    with run.accelerator.autocast(), looking(run.model, training_look(settings.hard)):
        output: Output = run.wrapped(images, captions.repeat_interleave(samples, dim=1))
    (words,) = run.mean_over_processes(output.mask.sum())
    smoothing = settings.loss.label_smoothing
    nlls = word_nll(output.logits, output.targets, label_smoothing=smoothing)
    exact = word_nll(output.logits.detach(), output.targets) if smoothing else nlls.detach()
    learned, judged = nlls, exact
    if run.teachers is not None:
        with run.accelerator.autocast():
            words_of_teachers = run.teachers(images, captions, samples=samples, photos=photos)
        expected, weight = expected_nll(output.logits, words_of_teachers), settings.distillation.weight
        learned, judged = torch.lerp(nlls, expected, weight), torch.lerp(exact, expected.detach(), weight)
    loss, means = with_penalty(run, output, learned.sum() / words)
    means["nll"] = exact.sum() / words
    if run.baseline is not None:
        terms = hard_terms(output, -judged, settings.hard, run.baseline)
        loss = loss + terms.loss / words
        (sampled,) = run.mean_over_processes(terms.captions[1])
        means["entropy"] = terms.entropy / words
        means["squared_advantage"] = terms.squared_advantage / sampled.clamp(min=1)
        update_baseline(run, run.baseline, terms)
    return Objective(loss, int(output.mask.sum()) // settings.hard.samples, means)


def with_penalty(run: Run, output: Output, loss: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The loss and `lambda_ds` times the mean penalty of eq. 14; and that mean, for the log."""
    weight = run.settings.loss.lambda_ds
    if output.alphas is None or not weight:
        return loss, {}
    (rows,) = run.mean_over_processes(output.mask.any(dim=-1).sum())
    penalty = doubly_stochastic_penalty(output.alphas, output.mask).sum() / rows
    return loss + weight * penalty, {"penalty": penalty}


def update_baseline(run: Run, baseline: Baseline, terms: HardTerms) -> None:
    """Let the baseline learn from the sampled captions of all processes."""
    baseline.observe(*run.accelerator.reduce(terms.captions))
