"""The Decoder contract, and the paper's attention LSTM: Xu et al. (2015), eqs. 1-3 and 7."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from captioning.config import DecoderConfig
from captioning.models.attention import Attention, Context, Memory, build_attention, build_gate
from captioning.models.late import LateLinear
from captioning.vocabulary import PAD

S = TypeVar("S", bound=tuple[Tensor, ...])


class State(NamedTuple):
    """What the recurrence carries; batch first, so that beams are reordered by indexing."""

    h: Float[Tensor, "R n"]
    c: Float[Tensor, "R n"]


class Step(NamedTuple):
    """One word for R rows. `alpha` is None for a model without attention, `beta` (its mean over features) likewise.

    `location` is where hard attention looked; None for all else.
    """

    logits: Float[Tensor, "R V"]
    state: Any
    alpha: Float[Tensor, "R L"] | None
    beta: Float[Tensor, " R"] | None
    location: Integer[Tensor, "R ..."] | None = None


class Output(NamedTuple):
    """A whole teacher-forced batch. Logits exist only where there is a target: W = mask.sum() words, in mask order.

    The next three are for hard attention: s_t, log p(s_t), H[p(s_t)]. `states` are what asked where to look: h_{t-1};
    in Luong's decoder h_t.
    """

    logits: Float[Tensor, "W V"]
    targets: Integer[Tensor, " W"]
    mask: Bool[Tensor, "N K T"]
    alphas: Float[Tensor, "N K T L"] | None
    betas: Float[Tensor, "N K T"] | None
    locations: Integer[Tensor, "N K T ..."] | None = None
    log_probs: Float[Tensor, "N K T"] | None = None
    entropies: Float[Tensor, "N K T"] | None = None
    states: Float[Tensor, "N K T n"] | None = None


class Decoder(nn.Module):
    """The contract of every language model here. `forward` equals repeated `step`.

    There are N images and R = N * K rows, grouped by image (captions of one image in training, beams in search).
    `attends` is false where there is no attention, hence no alphas.
    """

    attends = True

    def prepare(self, a: Any) -> Any:
        """All that depends on the image alone, once per image, of a (N, L, D); an `EnsembleDecoder` has several."""
        raise TypeError(f"{type(self).__name__} must define prepare")

    def initial_state(self, memory: Any, rows_per_image: int = 1) -> Any:
        """The state before the first word: a NamedTuple of tensors with R = N * rows_per_image rows."""
        raise TypeError(f"{type(self).__name__} must define initial_state")

    def step(self, word: Integer[Tensor, " R"], state: Any, memory: Any) -> Step:
        """Feed one word to every row."""
        raise TypeError(f"{type(self).__name__} must define step")

    def forward(self, a: Float[Tensor, "N L D"], words: Integer[Tensor, "N K S"]) -> Output:
        """Teacher forcing. `words` are framed by START and END and padded with PAD; an absent caption is all PAD."""
        raise TypeError(f"{type(self).__name__} must define forward")


class LSTMDecoder(Decoder):
    """What the LSTM decoders have in common: dropout, and initial values that are not PyTorch's own.

    A subclass makes its layers in its own order, E, lstm_word and L_o among them, and then calls `_complete`.
    """

    E: nn.Embedding
    lstm_word: nn.Linear
    L_o: nn.Linear

    def _complete(
        self, *, dropout: float, embedding_dropout: float, annotation_dropout: float, tie_embeddings: bool
    ) -> None:
        self.dropout = nn.Dropout(dropout)
        self.embedding_dropout = nn.Dropout(embedding_dropout)
        self.annotation_dropout = nn.Dropout(annotation_dropout)
        nn.init.normal_(
            self.E.weight, std=self.E.embedding_dim**-0.5
        )  # so that L_o, when tied, begins with unit logits
        hidden_dim = self.lstm_word.out_features // 4
        with torch.no_grad():
            self.E.weight[PAD] = 0
            self.lstm_word.bias[hidden_dim : 2 * hidden_dim] = 1.0  # an open forget gate (Jozefowicz et al., 2015)
        if tie_embeddings:
            self.L_o.weight = self.E.weight


class AttendingLSTM(LSTMDecoder):
    """What those with attention have in common beyond that: where they begin."""

    attention: Attention
    init_h: nn.Linear
    init_c: nn.Linear

    def prepare(self, a: Float[Tensor, "N L D"]) -> Memory:
        return self.attention.prepare(self.annotation_dropout(a))

    def _first_state(self, memory: Memory, rows_per_image: int) -> State:
        """h_0 and c_0 from the mean annotation vector, section 3.1.2."""
        mean = memory.a.mean(dim=1).repeat_interleave(rows_per_image, dim=0)
        h, c = torch.tanh(self.init_h(mean)), torch.tanh(self.init_c(mean))
        return State(h.to(self.E.weight.dtype), c.to(self.E.weight.dtype))  # the recurrence itself is never in bf16


class Reading(NamedTuple):
    """What a word gives to the step that reads it: its part of the query, and its half of the LSTM's gates (eq. 1).

    `gates` multiplies [h; z] (of `_project`: h alone) by its matrix, and adds the word's half.
    """

    gates: Callable[[Tensor], Tensor]
    query: Float[Tensor, "R n"] | None


class AttentionLSTM(AttendingLSTM):
    """Look with h_{t-1}, read the word and the place, write h_t, speak: Xu et al. (2015), section 3.1.2.

    Args:
        attention: eqs. 4-6.
        gate: beta_t from h_{t-1}.
        vocabulary_size: V.
        annotation_dim: D.
        embedding_dim: m.
        hidden_dim: n.
        query_word: attention is asked with h_{t-1} + W E y_{t-1}, not with h_{t-1} alone, which has not read y_{t-1}.
        dropout: in the deep output, on h and on the tanh.
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
        query_word: bool = False,
        dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        annotation_dropout: float = 0.0,
        tie_embeddings: bool = False,
    ):
        super().__init__()
        self.attention = attention
        self.gate = gate
        self.E = nn.Embedding(vocabulary_size, embedding_dim, padding_idx=PAD)
        self.init_h = nn.Linear(annotation_dim, hidden_dim)
        self.init_c = nn.Linear(annotation_dim, hidden_dim)
        self.lstm_word = nn.Linear(embedding_dim, 4 * hidden_dim)
        context_dim = attention.context_dim or annotation_dim
        self.lstm_state = nn.Linear(hidden_dim + context_dim, 4 * hidden_dim, bias=False)
        self.query_word = nn.Linear(embedding_dim, hidden_dim, bias=False) if query_word else None
        self.L_h = nn.Linear(hidden_dim, embedding_dim)
        self.L_z = nn.Linear(context_dim, embedding_dim, bias=False)
        self.L_o = nn.Linear(embedding_dim, vocabulary_size)
        self._complete(
            dropout=dropout,
            embedding_dropout=embedding_dropout,
            annotation_dropout=annotation_dropout,
            tie_embeddings=tie_embeddings,
        )

    def initial_state(self, memory: Memory, rows_per_image: int = 1) -> State:
        return self._first_state(memory, rows_per_image)

    def step(self, word: Integer[Tensor, " R"], state: State, memory: Memory) -> Step:
        embedded = self.embedding_dropout(self.E(word))
        word_gates = self.lstm_word(embedded)
        read = Reading(lambda x: word_gates + self.lstm_state(x), self._word_query(embedded))
        state, z, beta, context = self._recur(read, state, memory)
        logits = self._deep_output(state.h, self.L_z(z), embedded)
        return Step(logits, state, context.alpha, beta.mean(dim=-1), context.location)

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
        n, k = mask.shape[:2]
        memory = self.prepare(a)
        state = self.initial_state(memory, k)
        project = self._projects(memory, mask)
        embedded, word_gates, word_query = self._read(inputs)  # for all steps at once
        weight = self.lstm_state.weight
        if project:
            weight, memory = self._project(memory)
        corners = active_rows(mask)
        gates = LateLinear(weight, _by_step(word_gates, corners))
        queries = [None] * len(corners) if word_query is None else _by_step(word_query, corners)
        parts = iter(self.attention.by_step(memory, corners))

        def step(t: int, corner: tuple[int, int], state: State) -> tuple[State, Sequence[Tensor | None]]:
            forced = () if locations is None else (locations[: corner[0], : corner[1], t].flatten(0, 1),)
            word = Reading(gates, queries[t])
            state, z, beta, context = self._recur(word, state, next(parts), *forced, projected=project)
            return state, (state.h, z, beta, *context[1:])

        h, z, betas, *looked = unroll(step, state, corners, (n, k))
        seen = z[mask] if project else self.L_z(z[mask])
        logits = self._deep_output(h[mask], seen, embedded[mask])
        alphas, places, log_probs, entropies = looked
        states = torch.cat([state.h.unflatten(0, (n, k)).unsqueeze(2), h[:, :, :-1]], dim=2)
        betas = betas.mean(dim=-1)
        return Output(logits, targets[mask], mask, alphas, betas, places, log_probs, entropies, states)

    def _word_query(self, embedded: Float[Tensor, "... m"]) -> Float[Tensor, "... n"] | None:
        """W E y_{t-1}, if attention is asked with it."""
        return None if self.query_word is None else self.query_word(embedded)

    def _recur(
        self,
        word: Reading,
        state: State,
        memory: Memory,
        *location: Integer[Tensor, "R ..."],
        projected: bool = False,
    ) -> tuple[State, Float[Tensor, "R z"], Float[Tensor, "R b"], Context]:
        """Eqs. 4-6 and the gate, then the LSTM of eqs. 1-3, for one word.

        Returns the state, z (gated), beta and the look. With `projected` the memory is that of `_project`;
        then L_z z stands in the place of z.
        """
        query = state.h if word.query is None else state.h + word.query
        context = self.attention(query, memory, *location)
        beta = self.gate(state.h)
        z = beta * context.z
        if projected:
            gates_of_z, z = z.split([4 * state.h.shape[1], self.L_z.out_features], dim=-1)
            gates = word.gates(state.h) + gates_of_z
        else:
            gates = word.gates(torch.cat([state.h.to(z.dtype), z], dim=-1))
        return State(*lstm_cell(gates, state.c)), z, beta, context

    def _projects(self, memory: Memory, mask: Bool[Tensor, "N K T"]) -> bool:
        """Whether to multiply the locations by the matrices that meet z, instead of every z: where words are many.

        z_t is beta_t v_s in hard attention and beta_t sum_i alpha_i v_i in soft; with a scalar beta_t, W z_t is the
        same of the vectors W v_i.
        """
        possible = self.attention.linear and self.gate.size == 1
        return bool(possible) and int(mask.sum()) > 2 * memory.a.shape[0] * memory.a.shape[1]

    def _project(self, memory: Memory) -> tuple[Float[Tensor, "g n"], Memory]:
        """The gates' matrix of h alone, and a memory whose values are multiplied by that of z and by L_z."""
        w_h, w_z = self.lstm_state.weight.split([self.L_h.in_features, self.L_z.in_features], dim=1)
        values = F.linear(memory.values, torch.cat([w_z, self.L_z.weight]))
        return w_h, memory._replace(values=values.to(self.E.weight.dtype))  # many gradients are summed: not in bf16

    def _read(
        self, words: Integer[Tensor, "N K T"]
    ) -> tuple[Float[Tensor, "N K T m"], Float[Tensor, "N K T g"], Float[Tensor, "N K T n"] | None]:
        """E y, and the words' half of eq. 1 and of the query: once per different word, unless dropout makes all differ.

        E is asked once, since each time costs a gradient of its size.
        """
        if self.training and self.embedding_dropout.p:
            embedded = self.embedding_dropout(self.E(words))
            return embedded, self.lstm_word(embedded), self._word_query(embedded)
        different, places = words.unique(return_inverse=True)
        kinds = self.E(different)
        gates, query = self.lstm_word(kinds), self._word_query(kinds)
        dtype = self.E.weight.dtype  # the gradients of a word's many places are summed: not in bf16
        spread = partial(F.embedding, places)
        return spread(kinds), spread(gates.to(dtype)), None if query is None else spread(query.to(dtype))

    def _deep_output(
        self, h: Float[Tensor, "W n"], seen: Float[Tensor, "W m"], embedded: Float[Tensor, "W m"]
    ) -> Float[Tensor, "W V"]:
        """Eq. 7, with the tanh of the original code: L_o tanh(L_h h_t + L_z z_t + E y_{t-1}); `seen` is L_z z_t."""
        hidden = torch.tanh(self.L_h(self.dropout(h)) + seen + embedded)
        return self.L_o(self.dropout(hidden))


def lstm_cell(
    gates: Float[Tensor, "R g"], c: Float[Tensor, "R n"]
) -> tuple[Float[Tensor, "R n"], Float[Tensor, "R n"]]:
    """h_t and c_t from the four gates before their sigmoids and tanh, and c_{t-1}; in the type of c."""
    i, f, o, g = gates.to(c.dtype).chunk(4, dim=-1)  # eq. 1
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)  # eq. 2
    return torch.sigmoid(o) * torch.tanh(c), c  # eq. 3


def active_rows(mask: Bool[Tensor, "N K T"]) -> list[tuple[int, int]]:
    """For every step, the smallest (images, captions) corner of the batch that holds all captions still going on.

    With long captions first (as `data.Collate` orders them) the corner shrinks as captions end.
    """
    images = mask.any(dim=1) * torch.arange(1, mask.shape[0] + 1, device=mask.device).unsqueeze(1)
    captions = mask.any(dim=0) * torch.arange(1, mask.shape[1] + 1, device=mask.device).unsqueeze(1)
    corners = torch.stack([images.amax(dim=0), captions.amax(dim=0)], dim=1).clamp(min=1)
    return [(int(n), int(k)) for n, k in corners.tolist()]


def unroll(
    step: Callable[[int, tuple[int, int], S], tuple[S, Sequence[Tensor | None]]],
    state: S,
    corners: Sequence[tuple[int, int]],
    rows: tuple[int, int],
) -> list[Any]:
    """Run a recurrence over a batch that captions leave when they have ended.

    Args:
        step: from word t, the corner of the batch that goes on, and its rows' state to their next state and results.
        state: of all rows before the first word; a named tuple of tensors (R, ...).
        corners: of every word, see `active_rows`.
        rows: (images, captions) of the whole batch.

    Returns:
        The results, each (N, K, T, ...) with zeros behind a caption's end, or None.
    """
    before, steps = rows, []
    for t, corner in enumerate(corners):
        state = cast(Any, type(state))(*(_resize(x, before, corner) for x in state))
        state, results = step(t, corner, state)
        steps.append([None if x is None else _resize(x, corner, rows) for x in results])
        before = corner
    return [_stack_steps(x, rows) for x in zip(*steps, strict=True)]


def _by_step(x: Float[Tensor, "N K T q"], corners: Sequence[tuple[int, int]]) -> list[Float[Tensor, "_ q"]]:
    """The active rows of every step."""
    return [step[:n, :k].flatten(0, 1) for step, (n, k) in zip(x.unbind(2), corners, strict=True)]


def _resize(x: Tensor, rows: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Cut rows grouped as (images, captions) to another corner, or fill up with zeros."""
    if rows == wanted:
        return x
    (n, k), (n_wanted, k_wanted) = rows, wanted
    x = x.unflatten(0, rows)[:n_wanted, :k_wanted]
    inner = (0, 0) * (x.dim() - 2)
    return F.pad(x, (*inner, 0, max(k_wanted - k, 0), 0, max(n_wanted - n, 0))).flatten(0, 1)


def _stack_steps(steps: Sequence[Tensor | None], rows: tuple[int, int]) -> Any:
    """What T steps gave for all rows as (N, K, T, ...); None if they gave nothing."""
    if steps[0] is None:
        return None
    return torch.stack(cast(list[Tensor], steps), dim=1).unflatten(0, rows)


def lstm_arguments(config: DecoderConfig, vocabulary_size: int) -> dict[str, Any]:
    """What every LSTM decoder takes of a config."""
    names = ("embedding_dim", "hidden_dim", "dropout", "embedding_dropout", "annotation_dropout", "tie_embeddings")
    return {"vocabulary_size": vocabulary_size, **{name: getattr(config, name) for name in names}}


def build_attention_lstm(config: DecoderConfig, vocabulary_size: int, annotation_dim: int) -> AttentionLSTM:
    """The paper's decoder, from a config."""
    attention = build_attention(config, annotation_dim)
    context_dim = attention.context_dim or annotation_dim
    return AttentionLSTM(
        attention,
        build_gate(config.gate, hidden_dim=config.hidden_dim, context_dim=context_dim),
        annotation_dim=annotation_dim,
        **lstm_arguments(config, vocabulary_size),
        query_word=config.query == "state_and_word",
    )
