"""From scores to a context vector: phi of Xu et al. (2015), eq. 6, and the gate beta of section 4.2.1."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from captioning.config import DecoderConfig
from captioning.models.alignment import ALIGNMENTS, Alignment
from captioning.models.late import cast_for_autocast
from captioning.models.multihead import KeysValues, MultiHead


class Memory(NamedTuple):
    """What depends on the image alone; N images. `keys` are their alignment's, mostly (N, L, k).

    `expected`: hard attention takes the mean context there (its coin).
    """

    a: Float[Tensor, "N L D"]
    keys: Any
    values: Float[Tensor, "N ... L v"]
    expected: Bool[Tensor, " N"] | None = None

    def first(self, n: int) -> "Memory":
        """The memory of the first n images."""
        return Memory(*(None if x is None else x[:n] for x in self))  # type: ignore[arg-type]


class Context(NamedTuple):
    """What one attention step yields for R rows; the last three are there for hard attention only.

    Where it took the mean context, `location` is -1 and `log_prob` 0; when asked for that everywhere, both are None.
    With several glimpses `location` is (R, M), and `log_prob` that of all of them in their order.
    """

    z: Float[Tensor, "R D"]
    alpha: Float[Tensor, "R L"]
    location: Integer[Tensor, "R ..."] | None = None
    log_prob: Float[Tensor, " R"] | None = None
    entropy: Float[Tensor, " R"] | None = None


class Attention(nn.Module):
    """The contract: a query per row and the memory of the images give a Context.

    There are R = N * K queries, grouped by image: rows i * K to (i + 1) * K belong to image i. In a batch of single
    captions K is 1; captions of one image, or beams, share its annotation vectors, keys and values.

    `context_dim` is the size of z; None means that of the annotation vectors. `single` is whether alpha alone makes z
    of the values: several heads have several alphas, of which one is shown. `linear` is whether z is a weighted sum of
    the values themselves, so that W z is the same sum of the vectors W v_i.
    """

    context_dim: int | None = None
    single = True
    linear = False

    def prepare(self, a: Float[Tensor, "N L D"]) -> Memory:
        """The memory of N images."""
        raise TypeError(f"{type(self).__name__} must define prepare")

    def by_step(self, memory: Memory, corners: Sequence[tuple[int, int]]) -> list[Memory]:
        """The memory for each step of a recurrence that has queries for the first (images, captions) of `corners`."""
        return [memory.first(n) for n, _ in corners]

    def forward(self, query: Float[Tensor, "R n"], memory: Memory) -> Context:
        """Attend."""
        raise TypeError(f"{type(self).__name__} must define forward")

    def mix(self, alpha: Float[Tensor, "N K L"], memory: Memory) -> Float[Tensor, "N K v"]:
        """The context for given weights, eq. 13."""
        raise TypeError(f"{type(self).__name__} must define mix")


class ScoredAttention(Attention):
    """What soft and hard attention share: scores from an alignment, and values: v_i = a_i (the paper) or W_v a_i.

    With alignment scaled_dot and projected values this is Vaswani et al. (2017), eq. 1: queries, keys and values.

    Args:
        alignment: f_att.
        value: W_v, or None.
    """

    linear = True

    def __init__(self, alignment: Alignment, value: nn.Linear | None = None):
        super().__init__()
        self.alignment = alignment
        self.value = value
        self.context_dim = None if value is None else value.out_features

    def prepare(self, a: Float[Tensor, "N L D"]) -> Memory:
        a = cast_for_autocast(a)
        return Memory(a=a, keys=self.alignment.keys(a), values=a if self.value is None else self.value(a))

    def by_step(self, memory: Memory, corners: Sequence[tuple[int, int]]) -> list[Memory]:
        keys = self.alignment.by_step(memory.keys, corners)
        return [memory.first(n)._replace(keys=part) for (n, _), part in zip(corners, keys, strict=True)]

    def mix(self, alpha: Float[Tensor, "N K L"], memory: Memory) -> Float[Tensor, "N K v"]:
        return torch.bmm(alpha.to(memory.values.dtype), memory.values)


class SoftAttention(ScoredAttention):
    """Deterministic soft attention, Xu et al. (2015), eq. 13: z_t = sum_i alpha_ti v_i, in the paper v_i = a_i."""

    def forward(self, query: Float[Tensor, "R n"], memory: Memory) -> Context:
        e = self.alignment(query.unflatten(0, (len(memory.a), -1)), memory.keys)  # eq. 4
        alpha = e.softmax(dim=-1)  # eq. 5
        return Context(z=self.mix(alpha, memory).flatten(0, 1), alpha=alpha.flatten(0, 1))


class MultiHeadAttention(Attention):
    """Several soft looks at once, Vaswani et al. (2017), section 3.2.2: z_t = W_o [head_1; ...; head_H].

    head_j = sum_i alpha_tij v_ij, alpha_tj = softmax(q_tj k_j' / sqrt(d)); see `MultiHead`. alpha is the mean of the
    heads, or that of the one to be shown. One head is scaled_dot with projected values, and W_o.

    Args:
        multihead: all heads, asked by h.
    """

    def __init__(self, multihead: MultiHead):
        super().__init__()
        self.multihead = multihead
        self.context_dim = multihead.output.out_features
        self.single = multihead.heads == 1

    def prepare(self, a: Float[Tensor, "N L D"]) -> Memory:
        a = cast_for_autocast(a)
        keys, values = self.multihead.project(a)
        return Memory(a=a, keys=keys, values=values)

    def forward(self, query: Float[Tensor, "R n"], memory: Memory) -> Context:
        known = KeysValues(memory.keys, memory.values)
        z, weights = self.multihead.attend(query.unflatten(0, (len(memory.a), -1)), known)
        return Context(z=z.flatten(0, 1), alpha=self.multihead.shown(weights).flatten(0, 1))

    def mix(self, alpha: Float[Tensor, "N K L"], memory: Memory) -> Float[Tensor, "N K v"]:
        """Every head looks as it is told."""
        heads = alpha.unsqueeze(1).to(memory.values.dtype) @ memory.values
        return self.multihead.output(heads.transpose(1, 2).flatten(2))


class Look(NamedTuple):
    """How hard attention makes a place out of alpha.

    Args:
        location: sample (eq. 8), argmax, expected (the mean context, eq. 13) or gumbel_straight_through (a sample whose
            gradient is that of the softmax of alpha's logits and Gumbel noise; Jang et al., 2017, section 2.2).
        expectation_probability: that an image, in all its rows and steps, takes the mean context; section 4.1.
        generator: of samples and coins, on the device of the memory; None is torch's own, as for dropout.
    """

    location: Literal["sample", "argmax", "expected", "gumbel_straight_through"]
    expectation_probability: float = 0.0
    generator: torch.Generator | None = None


def check_looks(glimpses: int, window: float, grids: Sequence[tuple[int, int]]) -> None:
    """The looks of hard attention must fit every grid (h, w).

    Raises:
        ValueError: more glimpses than locations, or a window that is one location.
    """
    fewest, across = min(h * w for h, w in grids), min(h for h, _ in grids)
    if glimpses > fewest:
        raise ValueError(f"decoder.glimpses={glimpses} must not exceed the {fewest} locations")
    if window and window_size(window, across) == 1:
        raise ValueError(f"decoder.window={window} must take in 3 of the {across} locations across the grid, or be 0")


class HardAttention(ScoredAttention):
    """Stochastic hard attention, Xu et al. (2015), eqs. 8 and 9: s_t ~ Multinoulli(alpha_t), z_t = v_{s_t}.

    It samples in training, and looks at the likeliest location in evaluation; `looking` changes that for a while. No
    gradient reaches alpha through z, but where z is the mean context or relaxed: that is eq. 12's part (`losses`).

    With M glimpses s_t are M different locations, drawn one after the other from what is left of alpha, or the M
    likeliest, and z_t = sum_m w_m v_{s_tm} with w_m = alpha_{s_tm} / sum_l alpha_{s_tl}: with M = 1 it is the paper's,
    with M = L (and no window) soft attention. Then z has a gradient for alpha through w, beside that of eq. 12 for what
    was drawn.

    With a window a look takes in the places around s_t, as a glimpse of Mnih et al. (2014, section 3.1) takes in a
    patch: v_s is the mean of their vectors (`window_means`). The places still score by their own.

    Args:
        alignment: f_att.
        value: W_v, or None.
        glimpses: M.
        window: the share of the grid's side that a look takes in at most; 0 is the place itself.
    """

    look: Look | None = None

    def __init__(self, alignment: Alignment, value: nn.Linear | None = None, *, glimpses: int = 1, window: float = 0.0):
        super().__init__(alignment, value)
        self.glimpses = glimpses
        self.window = window

    def prepare(self, a: Float[Tensor, "N L D"]) -> Memory:
        """The memory of N images, each with its coin.

        Raises:
            ValueError: the locations are no square grid to have windows.
        """
        memory, look = super().prepare(a), self._look()
        if self.window:
            memory = memory._replace(values=window_means(memory.values, self.window))
        if not look.expectation_probability:
            return memory
        coins = torch.rand(len(a), generator=look.generator, device=a.device)
        return memory._replace(expected=coins < look.expectation_probability)

    def forward(
        self, query: Float[Tensor, "R n"], memory: Memory, location: Integer[Tensor, "R ..."] | None = None
    ) -> Context:
        """Attend; at `location` if that is given."""
        look = self._look()
        e = self.alignment(query.unflatten(0, (len(memory.a), -1)), memory.keys).flatten(0, 1)  # eq. 4
        log_alpha = e.to(torch.promote_types(e.dtype, torch.float32)).log_softmax(dim=-1)  # eq. 5
        alpha = log_alpha.exp()
        entropy = -(alpha * log_alpha).sum(dim=-1)
        if location is None and look.location == "expected":
            return Context(z=self._mean(alpha, memory), alpha=alpha, entropy=entropy)
        noisy = log_alpha
        if location is None:
            if look.location != "argmax":  # the largest of logits with Gumbel noise is a sample of eq. 8
                noise = torch.empty_like(log_alpha).exponential_(generator=look.generator)
                noisy = log_alpha - noise.log()
            location = self._largest(noisy.detach())
        if self.glimpses == 1:
            log_prob = log_alpha.gather(-1, location.unsqueeze(-1)).squeeze(-1)
            z = _gather(location, memory)  # eq. 9
        else:
            log_prob = drawn_in_order(log_alpha, location)
            looked = torch.stack([_gather(one, memory) for one in location.unbind(dim=-1)], dim=1)
            weights = log_alpha.gather(-1, location).softmax(dim=-1)
            z = (weights.unsqueeze(-1).to(looked.dtype) * looked).sum(dim=1)
        if look.location == "gumbel_straight_through":
            relaxed = noisy.softmax(dim=-1)
            z = z + self._mean(relaxed - relaxed.detach(), memory)  # adds zero, and the gradient
        if memory.expected is not None:
            mean = memory.expected.repeat_interleave(len(query) // len(memory.a))
            z = torch.where(mean.unsqueeze(-1), self._mean(alpha, memory), z)
            nowhere = mean if self.glimpses == 1 else mean.unsqueeze(-1)
            location, log_prob = location.masked_fill(nowhere, -1), log_prob.masked_fill(mean, 0.0)
        return Context(z, alpha, location, log_prob, entropy)

    def _largest(self, values: Float[Tensor, "R L"]) -> Integer[Tensor, "R ..."]:
        """Where the M largest are; with Gumbel noise that is a draw without replacement (Kool et al., 2019b)."""
        return values.argmax(dim=-1) if self.glimpses == 1 else values.topk(self.glimpses, dim=-1).indices

    def _mean(self, alpha: Float[Tensor, "R L"], memory: Memory) -> Float[Tensor, "R v"]:
        return self.mix(alpha.unflatten(0, (len(memory.a), -1)), memory).flatten(0, 1)

    def _look(self) -> Look:
        return self.look or Look("sample" if self.training else "argmax")


def window_size(window: float, side: int) -> int:
    """The largest odd number of places that lie within a share of a grid's side; at least one."""
    return max(1, int(window * side + 1e-6) - 1 | 1)


def window_means(values: Float[Tensor, "N L v"], window: float) -> Float[Tensor, "N L v"]:
    """Of every place the mean over the square of places around it, `window_size` across; at the edges, over fewer.

    Raises:
        ValueError: the L places are no square grid.
    """
    places = values.shape[1]
    side = math.isqrt(places)
    if side * side != places:
        raise ValueError(f"decoder.window={window} needs a square grid (got {places} locations)")
    size = window_size(window, side)
    grid = values.transpose(1, 2).unflatten(2, (side, side))
    means = F.avg_pool2d(grid, size, stride=1, padding=size // 2, count_include_pad=False)
    return means.flatten(2).transpose(1, 2).contiguous()


def drawn_in_order(log_alpha: Float[Tensor, "R L"], location: Integer[Tensor, "R M"]) -> Float[Tensor, " R"]:
    """Log of prod_m alpha_m / (1 - sum_{l<m} alpha_l): M locations, one after the other, none twice; Plackett (1975).

    What is left is summed up in logarithms: 1 - sum would lose it where attention is sharp.
    """
    log_prob, left = log_alpha.new_zeros(len(log_alpha)), log_alpha
    for one in location.split(1, dim=-1):
        log_prob = log_prob + (left.gather(-1, one) - left.logsumexp(dim=-1, keepdim=True)).squeeze(-1)
        left = left.scatter(-1, one, -torch.inf)
    return log_prob


def _gather(location: Integer[Tensor, " R"], memory: Memory) -> Float[Tensor, "R D"]:
    """v_s of every row; nothing is copied per row but the one vector."""
    n, places = memory.values.shape[:2]
    first = torch.arange(n, device=location.device).repeat_interleave(len(location) // n) * places
    return memory.values.flatten(0, 1).index_select(0, first + location)


def is_hard(module: nn.Module) -> bool:
    """Whether there is hard attention anywhere in a module."""
    return any(isinstance(part, HardAttention) for part in module.modules())


@contextmanager
def looking(module: nn.Module, look: Look) -> Iterator[None]:
    """Within, every hard attention of a module looks as told."""
    parts = [part for part in module.modules() if isinstance(part, HardAttention)]
    before = [part.look for part in parts]
    try:
        for part in parts:
            part.look = look
        yield
    finally:
        for part, old in zip(parts, before, strict=True):
            part.look = old


class Gate(nn.Module):
    """beta_t = sigmoid(f_beta(h_{t-1})), which weighs the image against the language, Xu et al. (2015), section 4.2.1.

    Args:
        hidden_dim: n.
        gate_dim: 1 for the paper's scalar, D for one gate per feature.
    """

    def __init__(self, hidden_dim: int, gate_dim: int):
        super().__init__()
        self.size = gate_dim
        self.f_beta = nn.Linear(hidden_dim, gate_dim)

    def forward(self, h: Float[Tensor, "R n"]) -> Float[Tensor, "R g"]:
        return torch.sigmoid(self.f_beta(h))


class OpenGate(nn.Module):
    """No gate: beta is 1 everywhere."""

    size = 1

    def forward(self, h: Float[Tensor, "R n"]) -> Float[Tensor, "R 1"]:
        return h.new_ones(len(h), 1)


def build_gate(name: str, *, hidden_dim: int, context_dim: int) -> nn.Module:
    """The gate by its name: scalar, vector or none."""
    if name == "none":
        return OpenGate()
    return Gate(hidden_dim, {"scalar": 1, "vector": context_dim}[name])


def build_attention(config: DecoderConfig, annotation_dim: int) -> Attention:
    """The attention of a config, asked by a state of `hidden_dim`.

    Raises:
        ValueError: the alignment does not fit the dimensions.
    """
    return ATTENTIONS[config.attention](config, annotation_dim)


def _build_scored(kind: Callable[..., ScoredAttention], config: DecoderConfig, annotation_dim: int) -> ScoredAttention:
    alignment = ALIGNMENTS[config.alignment](
        query_dim=config.hidden_dim, annotation_dim=annotation_dim, dim=config.attention_dim
    )
    projected = config.values == "projected"
    return kind(alignment, nn.Linear(annotation_dim, config.attention_dim) if projected else None)


def _build_hard(config: DecoderConfig, annotation_dim: int) -> ScoredAttention:
    return _build_scored(partial(HardAttention, glimpses=config.glimpses, window=config.window), config, annotation_dim)


def _build_multi_head(config: DecoderConfig, annotation_dim: int) -> MultiHeadAttention:
    dim = config.attention_dim
    return MultiHeadAttention(MultiHead(config.hidden_dim, annotation_dim, heads=config.heads, dim=dim, output_dim=dim))


ATTENTIONS: dict[str, Callable[[DecoderConfig, int], Attention]] = {
    "soft": partial(_build_scored, SoftAttention),
    "hard": _build_hard,
    "multi_head": _build_multi_head,
}
"""Name -> builder from (config, annotation_dim)."""
