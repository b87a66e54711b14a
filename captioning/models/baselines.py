"""The captioners that the paper improves on: an LSTM that gets one vector of the whole image, and never looks again.

There are no alphas: overlays and penalties on the attention have nothing to act on. The vector v is the mean of the
annotation vectors, or the last of them, which after an LSTM over the regions has read them all: the single context
vector of a sequence-to-sequence model (Sutskever et al., 2014; Cho et al., 2014).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from captioning.config import DecoderConfig
from captioning.models.decoder import LSTMDecoder, Output, State, Step, active_rows, lstm_arguments, lstm_cell, unroll
from captioning.vocabulary import PAD


class ImageVector(NamedTuple):
    """What depends on the image alone; N images. Where v has no part in a step, `gates` and `hidden` are 0, 1 wide."""

    v: Float[Tensor, "N D"]
    gates: Float[Tensor, "N g"]
    hidden: Float[Tensor, "N p"]


class Injection(nn.Module):
    """How v gets into the LSTM; here: not at all. Every one takes the same arguments.

    Args:
        annotation_dim: D.
        embedding_dim: m.
        hidden_dim: n.
    """

    def __init__(self, *, annotation_dim: int, embedding_dim: int, hidden_dim: int):
        super().__init__()
        self.hidden_dim = hidden_dim

    def state(self, v: Float[Tensor, "N D"]) -> State:
        """h_0 and c_0."""
        zero = v.new_zeros(len(v), self.hidden_dim)
        return State(zero, zero)

    def first_input(self, v: Float[Tensor, "N D"]) -> Float[Tensor, "N m"] | None:
        """What is read before <start>."""
        return None

    def gates(self, v: Float[Tensor, "N D"]) -> Float[Tensor, "N g"]:
        """What v adds to the gates of every step, eq. 1."""
        return v.new_zeros(len(v), 1)

    def hidden(self, v: Float[Tensor, "N D"]) -> Float[Tensor, "N p"]:
        """What v adds to the deep output of every step, eq. 7."""
        return v.new_zeros(len(v), 1)


class FirstInput(Injection):
    """Show and Tell, Vinyals et al. (2015), eqs. 10-12: the image is the first word, x_{-1} = W v, x_t = E y_{t-1}."""

    def __init__(self, *, annotation_dim: int, embedding_dim: int, hidden_dim: int):
        super().__init__(annotation_dim=annotation_dim, embedding_dim=embedding_dim, hidden_dim=hidden_dim)
        self.word = nn.Linear(annotation_dim, embedding_dim)

    def first_input(self, v: Float[Tensor, "N D"]) -> Float[Tensor, "N m"]:
        return self.word(v)


class InitialState(Injection):
    """What the LSTM remembers before the first word: h_0 = tanh(W_h v), c_0 = tanh(W_c v).

    So begin the decoders of Sutskever et al. (2014) and Cho et al. (2014), and the paper's, section 3.1.2.
    """

    def __init__(self, *, annotation_dim: int, embedding_dim: int, hidden_dim: int):
        super().__init__(annotation_dim=annotation_dim, embedding_dim=embedding_dim, hidden_dim=hidden_dim)
        self.h = nn.Linear(annotation_dim, hidden_dim)
        self.c = nn.Linear(annotation_dim, hidden_dim)

    def state(self, v: Float[Tensor, "N D"]) -> State:
        return State(torch.tanh(self.h(v)), torch.tanh(self.c(v)))


class EachStep(Injection):
    """The image at every step, Donahue et al. (2015): gates from [E y; h; v], output L_o tanh(L_h h + L_v v + E y).

    The paper's decoder, were its attention always the same: v stands where z_t stood.
    """

    def __init__(self, *, annotation_dim: int, embedding_dim: int, hidden_dim: int):
        super().__init__(annotation_dim=annotation_dim, embedding_dim=embedding_dim, hidden_dim=hidden_dim)
        self.lstm = nn.Linear(annotation_dim, 4 * hidden_dim, bias=False)
        self.L_v = nn.Linear(annotation_dim, embedding_dim, bias=False)

    def gates(self, v: Float[Tensor, "N D"]) -> Float[Tensor, "N g"]:
        return self.lstm(v)

    def hidden(self, v: Float[Tensor, "N D"]) -> Float[Tensor, "N p"]:
        return self.L_v(v)


class PlainLSTM(LSTMDecoder):
    """An LSTM without attention: i, f, o, g from [E y_{t-1}; h_{t-1}], p(y_t) from L_o tanh(L_h h_t + E y_{t-1}).

    All but the context is as in `AttentionLSTM`, so that the two can be compared.

    Args:
        inject: how v gets in.
        vocabulary_size: V.
        embedding_dim: m.
        hidden_dim: n.
        context: mean or last: which vector v is.
        dropout: in the deep output, on h and on the tanh.
        embedding_dropout: on E y.
        annotation_dropout: on a.
        tie_embeddings: L_o is E.
    """

    attends = False

    def __init__(
        self,
        inject: Injection,
        *,
        vocabulary_size: int,
        embedding_dim: int,
        hidden_dim: int,
        context: str = "mean",
        dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        annotation_dropout: float = 0.0,
        tie_embeddings: bool = False,
    ):
        super().__init__()
        self.inject = inject
        self.context = CONTEXTS[context]
        self.E = nn.Embedding(vocabulary_size, embedding_dim, padding_idx=PAD)
        self.lstm_word = nn.Linear(embedding_dim, 4 * hidden_dim)
        self.lstm_state = nn.Linear(hidden_dim, 4 * hidden_dim, bias=False)
        self.L_h = nn.Linear(hidden_dim, embedding_dim)
        self.L_o = nn.Linear(embedding_dim, vocabulary_size)
        self._complete(
            dropout=dropout,
            embedding_dropout=embedding_dropout,
            annotation_dropout=annotation_dropout,
            tie_embeddings=tie_embeddings,
        )

    def prepare(self, a: Float[Tensor, "N L D"]) -> ImageVector:
        v = self.context(self.annotation_dropout(a))
        return ImageVector(v, self.inject.gates(v), self.inject.hidden(v))

    def initial_state(self, memory: ImageVector, rows_per_image: int = 1) -> State:
        """Of the image alone, so for all rows of an image alike."""
        dtype = self.E.weight.dtype  # the recurrence itself is never in bf16
        state = State(*(x.to(dtype) for x in self.inject.state(memory.v)))
        first = self.inject.first_input(memory.v)
        if first is not None:
            state = self._recur(self.lstm_word(first), state)
        return State(*(x.repeat_interleave(rows_per_image, dim=0) for x in state))

    def step(self, word: Integer[Tensor, " R"], state: State, memory: ImageVector) -> Step:
        rows = len(word) // len(memory.v)
        gates, hidden = (x.repeat_interleave(rows, dim=0) for x in (memory.gates, memory.hidden))
        embedded = self.embedding_dropout(self.E(word))
        state = self._recur(self.lstm_word(embedded) + gates, state)
        return Step(self._deep_output(state.h, hidden, embedded), state, None, None)

    def forward(self, a: Float[Tensor, "N L D"], words: Integer[Tensor, "N K S"]) -> Output:
        inputs, targets = words[..., :-1], words[..., 1:]
        mask = targets != PAD
        n, k, length = mask.shape
        memory = self.prepare(a)
        embedded = self.embedding_dropout(self.E(inputs))
        gates = self.lstm_word(embedded) + memory.gates[:, None, None]
        state = self.initial_state(memory, k)

        def step(t: int, corner: tuple[int, int], state: State) -> tuple[State, list[Tensor]]:
            state = self._recur(gates[: corner[0], : corner[1], t].flatten(0, 1), state)
            return state, [state.h]

        (h,) = unroll(step, state, active_rows(mask), (n, k))
        hidden = memory.hidden[:, None, None].expand(-1, k, length, -1)
        logits = self._deep_output(h[mask], hidden[mask], embedded[mask])
        return Output(logits, targets[mask], mask, None, None)

    def _recur(self, gates: Float[Tensor, "R g"], state: State) -> State:
        """Eqs. 1-3, with all of eq. 1 but the state's part given."""
        return State(*lstm_cell(gates + self.lstm_state(state.h), state.c))

    def _deep_output(
        self, h: Float[Tensor, "W n"], hidden: Float[Tensor, "W p"], embedded: Float[Tensor, "W m"]
    ) -> Float[Tensor, "W V"]:
        """Eq. 7, with what v adds to it."""
        return self.L_o(self.dropout(torch.tanh(self.L_h(self.dropout(h)) + hidden + embedded)))


def mean_vector(a: Float[Tensor, "N L D"]) -> Float[Tensor, "N D"]:
    """The pooled features of a CNN."""
    return a.mean(dim=1)


def last_vector(a: Float[Tensor, "N L D"]) -> Float[Tensor, "N D"]:
    """The last state of an LSTM over the regions."""
    return a[:, -1]


def build_lstm(config: DecoderConfig, vocabulary_size: int, annotation_dim: int) -> PlainLSTM:
    """The decoder without attention of a config."""
    inject = INJECTIONS[config.inject](
        annotation_dim=annotation_dim, embedding_dim=config.embedding_dim, hidden_dim=config.hidden_dim
    )
    return PlainLSTM(inject, context=config.context or "mean", **lstm_arguments(config, vocabulary_size))


CONTEXTS: dict[str, Callable[[Tensor], Tensor]] = {"mean": mean_vector, "last": last_vector}
INJECTIONS: dict[str, type[Injection]] = {"first": FirstInput, "init": InitialState, "each_step": EachStep}
