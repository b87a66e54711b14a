"""b of Xu et al. (2015), eq. 12: what of a reward was to be expected, and so says nothing about the sampled location.

Any b that does not depend on the location itself leaves the gradient's mean as it is and changes its variance alone.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from captioning.config import HardConfig
from captioning.losses import REWARDS, mean_of_others


class Baseline(nn.Module):
    """No baseline, b = 0, and the contract. Rows are captions with `samples` paths each: (N, C * samples, T).

    Args:
        hidden_dim: n, size of h.
        samples: paths per caption.
        to_go: a step's reward is that of its word and those after it; otherwise of the whole caption.
    """

    def __init__(self, *, hidden_dim: int, samples: int, to_go: bool):
        super().__init__()
        self.samples = samples
        self.to_go = to_go

    def forward(
        self, rewards: Float[Tensor, "N K T"], states: Float[Tensor, "N K T n"], mask: Bool[Tensor, "N K T"]
    ) -> Float[Tensor, "N K T"]:
        """The b of every step, from the rewards of its batch, h_{t-1} and the real words."""
        return torch.zeros_like(rewards)

    def loss(self, rewards: Float[Tensor, "N K T"], baselines: Float[Tensor, "N K T"]) -> Float[Tensor, "N K T"] | None:
        """What the baseline's own parameters minimise, if it has any."""
        return None

    def observe(self, log_p: Float[Tensor, ""], words: Float[Tensor, ""], captions: Float[Tensor, ""]) -> None:
        """Take note of a batch, after it was used: its summed log p and words, of so many sampled captions."""

    def _words(self, mask: Bool[Tensor, "N K T"]) -> Float[Tensor, "N K T"]:
        """How many words a step's reward sums."""
        return REWARDS["to_go" if self.to_go else "sentence"](mask.float())


class MovingAverage(Baseline):
    """The paper's: b <- 0.9 b + 0.1 log p(y|s,a), from the batches before; it starts at 0.

    With to-go rewards it is per word, times the number of words that the step's reward sums.
    """

    def __init__(self, *, hidden_dim: int, samples: int, to_go: bool):
        super().__init__(hidden_dim=hidden_dim, samples=samples, to_go=to_go)
        self.b: Tensor
        self.register_buffer("b", torch.zeros(()))

    def forward(
        self, rewards: Float[Tensor, "N K T"], states: Float[Tensor, "N K T n"], mask: Bool[Tensor, "N K T"]
    ) -> Float[Tensor, "N K T"]:
        b = self.b.to(rewards.dtype)
        return b * self._words(mask) if self.to_go else b.expand_as(rewards)

    def observe(self, log_p: Float[Tensor, ""], words: Float[Tensor, ""], captions: Float[Tensor, ""]) -> None:
        if captions:
            self.b.lerp_((log_p / (words if self.to_go else captions)).to(self.b.dtype), 0.1)


class LeaveOneOut(Baseline):
    """The mean reward of the caption's other samples at the same step, Kool et al. (2019); they know nothing of s_t."""

    def forward(
        self, rewards: Float[Tensor, "N K T"], states: Float[Tensor, "N K T n"], mask: Bool[Tensor, "N K T"]
    ) -> Float[Tensor, "N K T"]:
        return mean_of_others(rewards.unflatten(1, (-1, self.samples)), dim=2).flatten(1, 2)


class Learned(Baseline):
    """b(h_{t-1}) by a small net with a squared loss of its own, Mnih and Gregor (2014), section 2.3.

    The net says the log p of a word, which is multiplied by the number of words that the step's reward sums. h_{t-1} is
    detached: nothing of this reaches the decoder.
    """

    def __init__(self, *, hidden_dim: int, samples: int, to_go: bool):
        super().__init__(hidden_dim=hidden_dim, samples=samples, to_go=to_go)
        self.net = nn.Sequential(nn.Linear(hidden_dim, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(
        self, rewards: Float[Tensor, "N K T"], states: Float[Tensor, "N K T n"], mask: Bool[Tensor, "N K T"]
    ) -> Float[Tensor, "N K T"]:
        per_word = self.net(states.detach()).squeeze(-1)
        return per_word.to(rewards.dtype) * self._words(mask)

    def loss(self, rewards: Float[Tensor, "N K T"], baselines: Float[Tensor, "N K T"]) -> Float[Tensor, "N K T"] | None:
        return (rewards.detach() - baselines).square()


BASELINES: dict[str, type[Baseline]] = {
    "none": Baseline,
    "moving_average": MovingAverage,
    "leave_one_out": LeaveOneOut,
    "learned": Learned,
}


def build_baseline(hard: HardConfig, *, hidden_dim: int) -> Baseline:
    """The baseline of an estimator; `hidden_dim` is n of the decoder."""
    return BASELINES[hard.baseline](hidden_dim=hidden_dim, samples=hard.samples, to_go=hard.reward == "to_go")
