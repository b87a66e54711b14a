"""Self-critical sequence training: the last phase of a run may maximise the expected CIDEr-D of its own captions.

Rennie et al. (2017), with the mean reward of an image's other samples as baseline (Luo, 2020). Captions are drawn from
the decoder without dropout, and the same model then gives the gradient of their log p: encoder and annotation vectors
are shared by the two. The baseline belongs to one image, so several processes need not talk about it.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from captioning.config import SearchConfig, SelfCriticalConfig
from captioning.data import Batch
from captioning.decoding import draw_words, sayable
from captioning.losses import leave_one_out, self_critical, word_nll
from captioning.models.captioner import CaptioningModel
from captioning.models.decoder import Output
from captioning.objective import Objective, with_penalty
from captioning.rewards import CiderD
from captioning.run import Run
from captioning.vocabulary import PAD, START


class Rollout:
    """Draws K captions per image once the model has the annotation vectors; the longest first, images too.

    Args:
        model: in training mode.
        batch: its images; those without captions of their own are fillers and get none.
        config: how many, how long.
        generator: of the draws, on the device of the batch.
    """

    def __init__(self, model: CaptioningModel, batch: Batch, config: SelfCriticalConfig, generator: torch.Generator):
        self.model, self.batch, self.config, self.generator = model, batch, config, generator

    def __call__(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Annotation vectors (N, L, D) in a new order, and words (N, K, S) for them: samples, then own captions."""
        decoder, config = self.model.decoder_of(a), self.config
        search = SearchConfig(sample=True, num_captions=config.samples, max_length=config.max_length)
        decoder.eval()
        words = draw_words(decoder, a.detach(), search, generator=self.generator)
        torch.clear_autocast_cache()  # it holds the weights in bf16 as they were cast without gradient
        decoder.train(config.dropout)
        present = (self.batch.words != PAD).any(dim=-1).any(dim=-1)
        words = words.masked_fill(~present[:, None, None], PAD)
        lengths = (words != PAD).sum(dim=-1)
        longest = lengths.argsort(dim=1, descending=True, stable=True)
        order = lengths.amax(dim=1).argsort(descending=True, stable=True)
        words = words.gather(1, longest.unsqueeze(-1).expand_as(words))[order]
        self.samples, self.indices = words, self.batch.indices[order]
        if config.nll_weight:
            words = _side_by_side(words, self.batch.words[order])
        return a[order], words


def self_critical_sampled(run: Run, batch: Batch) -> Objective:
    """Draw captions and score them: -advantage * log p as a mean over words, and the penalty of eq. 14.

    Its means for the log: `reward` (CIDEr-D of the samples, 0 to 10), `length` (their words, the end word counted),
    `penalty` and, if it has a weight, the `nll` of the images' own captions.
    """
    config, device = run.settings.self_critical, run.accelerator.device
    generator = torch.Generator(device).manual_seed(int(torch.randint(2**62, (1,))))  # the step has seeded torch
    rollout = Rollout(run.model, batch, config, generator)
    for part in run.model.regions.modules():  # no more than dropout: cuDNN's LSTM has no way back in evaluation mode
        if isinstance(part, nn.Dropout):
            part.train(config.dropout)
    with run.accelerator.autocast():
        output: Output = run.wrapped(batch.images, rollout)
    run.model.train()
    rewards = reward_of(cast(CiderD, run.reward), rollout.samples, rollout.indices)
    drawn = rollout.samples[..., 1:] != PAD
    k = config.samples
    is_sample = torch.zeros_like(output.mask)
    is_sample[:, :k] = True
    is_sample = is_sample[output.mask]
    log_p = -word_nll(sayable(output.logits[is_sample].float()), output.targets[is_sample])
    words, captions, truths = run.mean_over_processes(drawn.sum(), drawn.any(dim=-1).sum(), output.mask[:, k:].sum())
    loss = self_critical(log_p, output.mask[:, :k], leave_one_out(rewards)).sum() / words
    loss, means = with_penalty(run, output, loss)
    means |= {"reward": rewards.sum() / captions, "length": drawn.sum() / captions}
    if config.nll_weight:
        nll = word_nll(output.logits[~is_sample], output.targets[~is_sample]).sum() / truths
        loss, means["nll"] = loss + config.nll_weight * nll, nll
    return Objective(loss, int(output.mask.sum()), means)


def reward_of(reward: Callable[[list[int], list[list[int]]], Any], samples: Tensor, indices: Tensor) -> Tensor:
    """Rewards (N, K) of framed samples (N, K, S) of N images; 0 for an absent one."""
    n, k = samples.shape[:2]
    captions = [[word for word in row if word not in (START, PAD)] for row in samples.flatten(0, 1).tolist()]
    images = indices.repeat_interleave(k).tolist()
    return torch.from_numpy(reward(images, captions)).float().view(n, k).to(samples.device)


def _side_by_side(one: Tensor, other: Tensor) -> Tensor:
    """Words (N, K, S) and (N, K', S') as (N, K + K', the larger S), filled up with PAD."""
    words = one.new_full((len(one), one.shape[1] + other.shape[1], max(one.shape[2], other.shape[2])), PAD)
    words[:, : one.shape[1], : one.shape[2]] = one
    words[:, one.shape[1] :, : other.shape[2]] = other
    return words
