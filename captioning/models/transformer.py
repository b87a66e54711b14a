"""The Transformer as a captioner's decoder, Vaswani et al. (2017): words look at words, then at the image, all at once.

No recurrence carries the caption: each word reads the words before it itself. So a teacher-forced caption is one pass
under a causal mask, and in search the keys and values of the words so far are kept (the state), never made again.
"""

import math
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from captioning.config import DecoderConfig
from captioning.models.blocks import MLP, NORMS, sinusoids
from captioning.models.decoder import Decoder, Output, Step
from captioning.models.multihead import KeysValues, MultiHead, causal_mask
from captioning.vocabulary import PAD


class TransformerMemory(NamedTuple):
    """Keys and values of the annotation vectors, for the cross-attention of every layer (Y of them)."""

    k: Float[Tensor, "N Y H L d"]
    v: Float[Tensor, "N Y H L d"]


class TransformerState(NamedTuple):
    """Keys and values of the P words so far, for the self-attention of every layer; rows first, as beams reorder."""

    k: Float[Tensor, "R Y H P d"]
    v: Float[Tensor, "R Y H P d"]


class LearnedPositions(nn.Embedding):
    """A learned vector per position; Gehring et al. (2017).

    Args:
        size: how many positions.
        dim: d.
    """

    def __init__(self, size: int, dim: int):
        super().__init__(size, dim)

    def forward(self, start: int, length: int) -> Float[Tensor, "T d"]:  # type: ignore[override]
        """The vectors of positions start to start + length.

        Raises:
            ValueError: there are not so many.
        """
        if start + length > self.num_embeddings:
            raise ValueError(
                f"decoder.max_positions={self.num_embeddings} is too few for a caption of {start + length} words, the "
                "end word counted: lower max_length, or train with more of them or positions='sinusoidal'"
            )
        return self.weight[start : start + length]


class SinusoidalPositions(nn.Module):
    """Sines and cosines of the position, see `blocks.sinusoids`; for captions of any length.

    Args:
        size: not used; all positions take the same arguments.
        dim: d.
    """

    where: Tensor

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.dim = dim
        self.register_buffer("where", torch.zeros(0), persistent=False)  # knows device and type

    def forward(self, start: int, length: int) -> Float[Tensor, "T d"]:
        return sinusoids(length, self.dim, start=start, device=self.where.device).to(self.where.dtype)


class Layer(nn.Module):
    """Masked self-attention over the words, cross-attention over the image, MLP; each a residual with a norm; 3.1.

    Args:
        dim: d.
        memory_dim: D.
        heads: H; divides d.
        norm: pre or post.
        dropout: rate on the weights, on the MLP's inner layer and on what all three add.
    """

    def __init__(self, dim: int, memory_dim: int, *, heads: int, norm: str, dropout: float):
        super().__init__()
        self.read = MultiHead(dim, dim, heads=heads, dropout=dropout)
        self.look = MultiHead(dim, memory_dim, heads=heads, dropout=dropout)
        self.mlp = MLP(dim, dropout)
        self.around_read, self.around_look, self.around_mlp = (NORMS[norm](dim, dropout) for _ in range(3))

    def forward(
        self,
        x: Float[Tensor, "R T d"],
        past: KeysValues | None,
        memory: KeysValues,
        sees: Bool[Tensor, "..."],
    ) -> tuple[Float[Tensor, "R T d"], KeysValues, Float[Tensor, "N H KT L"]]:
        """T words of R rows, after P earlier ones of which only keys and values are known.

        Args:
            x: the words.
            past: keys and values of the earlier ones; None for none.
            memory: keys and values of the image.
            sees: who may look at whom, broadcast over (R, H, T, P + T).

        Returns:
            The words, the keys and values of all P + T, and the weights over the image: R = N K rows by image.
        """
        inner = self.around_read.enter(x)
        present = self.read.project(inner)
        if past is not None:
            present = KeysValues(*(torch.cat(pair, dim=2) for pair in zip(past, present, strict=True)))
        x = self.around_read.leave(x, self.read.attend(inner, present, sees)[0])
        # The K rows of an image ask as one with K T queries: its keys and values are shared, not copied.
        queries = self.around_look.enter(x).unflatten(0, (len(memory.k), -1))
        found, weights = self.look.attend(queries.flatten(1, 2), memory)
        x = self.around_look.leave(x, found.unflatten(1, queries.shape[1:3]).flatten(0, 1))
        return self.around_mlp.leave(x, self.mlp(self.around_mlp.enter(x))), present, weights


class TransformerDecoder(Decoder):
    """x_t = sqrt(d) E y_{t-1} + p_t; Y layers; p(y_t) = softmax(L_o x_t): Vaswani et al. (2017), sections 3.1 to 3.5.

    The alphas are the last layer's weights over the locations: the mean of its heads, or one head (`show_head`).

    Args:
        vocabulary_size: V.
        annotation_dim: D.
        dim: d, size of words, layers and all heads together.
        layers: Y.
        heads: H; divides d.
        norm: pre or post.
        positions: sinusoidal or learned.
        max_positions: how many are learned.
        dropout: in the layers.
        embedding_dropout: on embeddings with positions.
        annotation_dropout: on a.
        tie_embeddings: L_o is E.
    """

    def __init__(
        self,
        *,
        vocabulary_size: int,
        annotation_dim: int,
        dim: int,
        layers: int = 3,
        heads: int = 8,
        norm: str = "pre",
        positions: str = "sinusoidal",
        max_positions: int = 64,
        dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        annotation_dropout: float = 0.0,
        tie_embeddings: bool = False,
    ):
        super().__init__()
        self.E = nn.Embedding(vocabulary_size, dim, padding_idx=PAD)
        self.positions = POSITIONS[positions](max_positions, dim)
        self.layers = nn.ModuleList(
            Layer(dim, annotation_dim, heads=heads, norm=norm, dropout=dropout) for _ in range(layers)
        )
        self.last_norm = NORMS[norm].last(dim)
        self.L_o = nn.Linear(dim, vocabulary_size)
        self.embedding_dropout = nn.Dropout(embedding_dropout)
        self.annotation_dropout = nn.Dropout(annotation_dropout)
        nn.init.normal_(self.E.weight, std=dim**-0.5)  # sqrt(d) E has variance 1; tied logits begin with it, too
        with torch.no_grad():
            self.E.weight[PAD] = 0
        if tie_embeddings:
            self.L_o.weight = self.E.weight

    def prepare(self, a: Float[Tensor, "N L D"]) -> TransformerMemory:
        """Every layer's keys and values of the annotation vectors."""
        a = self.annotation_dropout(a)
        return TransformerMemory(*_stack([layer.look.project(a) for layer in self._stacked()]))

    def initial_state(self, memory: TransformerMemory, rows_per_image: int = 1) -> TransformerState:
        """No words yet."""
        n, layers, heads, _, dim = memory.k.shape
        nothing = memory.k.new_empty(n * rows_per_image, layers, heads, 0, dim)
        return TransformerState(nothing, nothing)

    def step(self, word: Integer[Tensor, " R"], state: TransformerState, memory: TransformerMemory) -> Step:
        x, state, alphas = self.read_on(word.unsqueeze(1), state, memory)
        return Step(self.L_o(x[:, 0]), state, alphas.flatten(0, 1), None)

    def forward(self, a: Float[Tensor, "N L D"], words: Integer[Tensor, "N K S"]) -> Output:
        """Teacher forcing. An image's captions are read as one row, end to end, so that there is little padding."""
        inputs, targets = words[..., :-1], words[..., 1:]
        mask = targets != PAD
        places, real, sees = packed(mask)
        codes = self.positions(0, mask.shape[2])[places % mask.shape[2]]
        x, _, packed_alphas = self._through(inputs.flatten(1).gather(1, places), codes, None, self.prepare(a), sees)
        alphas = packed_alphas.new_zeros(*mask.shape, a.shape[1])
        alphas[mask] = packed_alphas[real]  # both in the order of images, captions, words
        return Output(self.L_o(x[real]), targets[mask], mask, alphas, None)

    def read_on(
        self, words: Integer[Tensor, "R T"], state: TransformerState, memory: TransformerMemory
    ) -> tuple[Float[Tensor, "R T d"], TransformerState, Float[Tensor, "N KT L"]]:
        """Read T more words of every row.

        Returns:
            What L_o is given, the state after them, and their alphas.
        """
        past, more = state.k.shape[3], words.shape[1]
        sees = causal_mask(more, past=past, device=words.device)
        x, cache, alphas = self._through(words, self.positions(past, more), state, memory, sees)
        return x, TransformerState(*_stack(cache)), alphas

    def _through(
        self,
        words: Integer[Tensor, "R T"],
        codes: Float[Tensor, "*B d"],
        state: TransformerState | None,
        memory: TransformerMemory,
        sees: Bool[Tensor, "..."],
    ) -> tuple[Float[Tensor, "R T d"], list[KeysValues], Float[Tensor, "N KT L"]]:
        """Words, with the codes of their positions and what they may see, through all layers."""
        x = self.embedding_dropout(self.E(words) * math.sqrt(self.E.embedding_dim) + codes)
        layers, cache = self._stacked(), []
        for y, layer in enumerate(layers):
            past = None if state is None else KeysValues(state.k[:, y], state.v[:, y])
            x, present, weights = layer(x, past, KeysValues(memory.k[:, y], memory.v[:, y]), sees)
            cache.append(present)
        return self.last_norm(x), cache, layers[-1].look.shown(weights)

    def _stacked(self) -> list[Layer]:
        """The layers, with their type."""
        return cast(list[Layer], list(self.layers))


def packed(
    mask: Bool[Tensor, "N K T"],
) -> tuple[Integer[Tensor, "N P"], Bool[Tensor, "N P"], Bool[Tensor, "N 1 P P"]]:
    """The words of an image's K captions end to end: P places for the K T of the longest.

    Returns:
        Where in K T the word at each place comes from, which places have a real word, and who sees whom: the words of
        the same caption up to the own one.
    """
    length, flat = mask.shape[2], mask.flatten(1)
    width = max(int(flat.sum(dim=1).amax()), 1)
    places = flat.int().argsort(dim=1, descending=True, stable=True)[:, :width]  # real words first, in order
    caption, time = places // length, places % length
    same = caption.unsqueeze(2) == caption.unsqueeze(1)
    sees = same & (time.unsqueeze(2) >= time.unsqueeze(1))
    return places, flat.gather(1, places), sees.unsqueeze(1)


def _stack(layers: list[KeysValues]) -> tuple[Tensor, Tensor]:
    """Keys and values of all layers, batch first."""
    k, v = (torch.stack(parts, dim=1) for parts in zip(*layers, strict=True))
    return k, v


def build_transformer(config: DecoderConfig, vocabulary_size: int, annotation_dim: int) -> TransformerDecoder:
    """The Transformer of a config."""
    return TransformerDecoder(
        vocabulary_size=vocabulary_size,
        annotation_dim=annotation_dim,
        dim=config.hidden_dim,
        layers=config.layers,
        heads=config.heads,
        norm=config.norm,
        positions=config.positions,
        max_positions=config.max_positions,
        dropout=config.dropout,
        embedding_dropout=config.embedding_dropout,
        annotation_dropout=config.annotation_dropout,
        tie_embeddings=config.tie_embeddings,
    )


POSITIONS: dict[str, type[LearnedPositions] | type[SinusoidalPositions]] = {
    "learned": LearnedPositions,
    "sinusoidal": SinusoidalPositions,
}
