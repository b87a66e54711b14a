"""Luong et al. (2015), section 3: write first, then look with what was written, and speak from both."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from captioning.config import DecoderConfig
from captioning.models.attention import Attention, Context, Memory, build_attention, build_gate
from captioning.models.decoder import (
    AttendingLSTM,
    Output,
    Step,
    active_rows,
    lstm_arguments,
    lstm_cell,
    unroll,
)
from captioning.vocabulary import PAD


class LuongState(NamedTuple):
    """What the recurrence carries; batch first. Without input feeding nobody reads `spoken`."""

    h: Float[Tensor, "R n"]
    c: Float[Tensor, "R n"]
    spoken: Float[Tensor, "R m"]


class LuongDecoder(AttendingLSTM):
    """Luong et al. (2015): the attention follows the LSTM, where the paper's (Bahdanau's) precedes it.

    h_t = LSTM(E y_{t-1}, h_{t-1}), or with input feeding (section 3.3) LSTM([E y_{t-1}; h~_{t-1}], h_{t-1});
    alpha_t = softmax(score(h_t, a)), eq. 7, with a score of eq. 8: dot, general, concat, or any other alignment;
    c_t = sum_i alpha_ti a_i, the context; h~_t = tanh(W_c [c_t; h_t]), eq. 5; p(y_t) = softmax(W_s h~_t), eq. 6.

    W_s is called L_o here, as in the other decoders, and h~ has the size m of E y, so that W_s may be E. h_0 and c_0
    are those of Xu et al. (2015), h~_0 is 0. A gate, which Luong et al. have not, takes beta_t from h_t.

    Without input feeding no attention enters the recurrence: all words of a teacher-forced caption look at once.

    Args:
        attention: eqs. 7 and 8.
        gate: beta_t from h_t.
        vocabulary_size: V.
        annotation_dim: D.
        embedding_dim: m.
        hidden_dim: n.
        input_feeding: h~_{t-1} is an input of the LSTM.
        dropout: on h_t in eq. 5 and on h~_t in eq. 6.
        embedding_dropout: on E y.
        annotation_dropout: on a.
        tie_embeddings: L_o is E.
    """

    def __init__(
        self,
        attention: Attention,
        gate: nn.Module,
        *,
        vocabulary_size: int,
        annotation_dim: int,
        embedding_dim: int,
        hidden_dim: int,
        input_feeding: bool = False,
        dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        annotation_dropout: float = 0.0,
        tie_embeddings: bool = False,
    ):
        super().__init__()
        self.attention = attention
        self.gate = gate
        self.input_feeding = input_feeding
        self.E = nn.Embedding(vocabulary_size, embedding_dim, padding_idx=PAD)
        self.init_h = nn.Linear(annotation_dim, hidden_dim)
        self.init_c = nn.Linear(annotation_dim, hidden_dim)
        self.lstm_word = nn.Linear(embedding_dim, 4 * hidden_dim)
        fed = embedding_dim if input_feeding else 0
        self.lstm_state = nn.Linear(hidden_dim + fed, 4 * hidden_dim, bias=False)
        self.W_c = nn.Linear((attention.context_dim or annotation_dim) + hidden_dim, embedding_dim)
        self.L_o = nn.Linear(embedding_dim, vocabulary_size)
        self._complete(
            dropout=dropout,
            embedding_dropout=embedding_dropout,
            annotation_dropout=annotation_dropout,
            tie_embeddings=tie_embeddings,
        )

    def initial_state(self, memory: Memory, rows_per_image: int = 1) -> LuongState:
        h, c = self._first_state(memory, rows_per_image)
        return LuongState(h, c, h.new_zeros(len(h), self.E.embedding_dim))

    def step(self, word: Integer[Tensor, " R"], state: LuongState, memory: Memory) -> Step:
        h, c = self._write(self.lstm_word(self.embedding_dropout(self.E(word))), state)
        spoken, beta, context = self._look(h, memory)
        logits = self.L_o(self.dropout(spoken))
        return Step(logits, LuongState(h, c, spoken), context.alpha, beta.mean(dim=-1), context.location)

    def forward(
        self,
        a: Float[Tensor, "N L D"],
        words: Integer[Tensor, "N K S"],
        *,
        locations: Integer[Tensor, "N K T ..."] | None = None,
    ) -> Output:
        """Teacher forcing; hard attention looks at `locations` if they are given."""
        inputs, targets = words[..., :-1], words[..., 1:]
        mask = targets != PAD
        memory = self.prepare(a)
        word_gates = self.lstm_word(self.embedding_dropout(self.E(inputs)))
        read = self._read_fed if self.input_feeding else self._read
        h, spoken, betas, *looked = read(word_gates, mask, memory, locations)
        alphas, locations, log_probs, entropies = looked
        betas, logits = betas.mean(dim=-1), self.L_o(self.dropout(spoken[mask]))
        return Output(logits, targets[mask], mask, alphas, betas, locations, log_probs, entropies, h)

    def _read(
        self,
        word_gates: Float[Tensor, "N K T g"],
        mask: Bool[Tensor, "N K T"],
        memory: Memory,
        locations: Integer[Tensor, "N K T ..."] | None,
    ) -> list[Any]:
        """The LSTM word by word, then one look for all words: an image's K captions of T words are K T rows.

        Returns:
            h_t, h~_t, beta_t and what was looked at but z, each (N, K, T, ...) or None.
        """

        def step(t: int, corner: tuple[int, int], state: LuongState) -> tuple[LuongState, list[Tensor]]:
            h, c = self._write(word_gates[: corner[0], : corner[1], t].flatten(0, 1), state)
            return LuongState(h, c, state.spoken), [h]

        rows = (mask.shape[0], mask.shape[1])
        (h,) = unroll(step, self.initial_state(memory, rows[1]), active_rows(mask), rows)
        h = h.flatten(0, 2)
        forced = () if locations is None else (locations.flatten(0, 2),)
        spoken, beta, context = self._look(h, memory, *forced)
        return [None if x is None else x.unflatten(0, mask.shape) for x in (h, spoken, beta, *context[1:])]

    def _read_fed(
        self,
        word_gates: Float[Tensor, "N K T g"],
        mask: Bool[Tensor, "N K T"],
        memory: Memory,
        locations: Integer[Tensor, "N K T ..."] | None,
    ) -> list[Any]:
        """The same, looking word by word, since each look enters the next step."""
        rows, corners = (mask.shape[0], mask.shape[1]), active_rows(mask)
        parts = iter(self.attention.by_step(memory, corners))

        def step(t: int, corner: tuple[int, int], state: LuongState) -> tuple[LuongState, list[Tensor | None]]:
            h, c = self._write(word_gates[: corner[0], : corner[1], t].flatten(0, 1), state)
            forced = () if locations is None else (locations[: corner[0], : corner[1], t].flatten(0, 1),)
            spoken, beta, context = self._look(h, next(parts), *forced)
            return LuongState(h, c, spoken), [h, spoken, beta, *context[1:]]

        return unroll(step, self.initial_state(memory, rows[1]), corners, rows)

    def _write(
        self, word_gates: Float[Tensor, "R g"], state: LuongState
    ) -> tuple[Float[Tensor, "R n"], Float[Tensor, "R n"]]:
        """h_t and c_t: the LSTM, whose word's half of the gates is given."""
        inputs = torch.cat([state.h, state.spoken], dim=-1) if self.input_feeding else state.h
        return lstm_cell(word_gates + self.lstm_state(inputs), state.c)

    def _look(
        self, h: Float[Tensor, "R n"], memory: Memory, *location: Integer[Tensor, "R ..."]
    ) -> tuple[Float[Tensor, "R m"], Float[Tensor, "R b"], Context]:
        """Eqs. 5, 7 and 8: h~_t (never in bf16, since it may be fed), beta_t and the look."""
        context, beta = self.attention(h, memory, *location), self.gate(h)
        spoken = torch.tanh(self.W_c(torch.cat([beta * context.z, self.dropout(h)], dim=-1)))
        return spoken.to(h.dtype), beta, context


def build_luong(config: DecoderConfig, vocabulary_size: int, annotation_dim: int) -> LuongDecoder:
    """Luong's decoder of a config."""
    attention = build_attention(config, annotation_dim)
    context_dim = attention.context_dim or annotation_dim
    return LuongDecoder(
        attention,
        build_gate(config.gate, hidden_dim=config.hidden_dim, context_dim=context_dim),
        annotation_dim=annotation_dim,
        **lstm_arguments(config, vocabulary_size),
        input_feeding=config.input_feeding,
    )
