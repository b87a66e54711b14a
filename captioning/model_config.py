"""What the network is: the configs of its three parts, which a checkpoint holds."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from captioning.checks import at_most, fraction, positive, refuse_unread

Fit = Literal["crop", "squash"]
Resample = Literal["bicubic", "bilinear"]


MAX_LAYERS = 64
"""Of a Transformer and of a region encoder: a config from elsewhere may not ask for millions."""
MAX_SIDE = 4096
"""Pixels: a larger square input takes gigabytes for each photo."""
MAX_SCALES = 8
"""Sizes at which one encoder looks."""


@dataclass(frozen=True)
class EncoderConfig:
    """A torchvision CNN cut at a named node, and the picture that it sees.

    Args:
        name: any torchvision classification model, e.g. vgg19, resnet50, mobilenet_v2.
        layer: the node to cut at, e.g. features.18; by default the last one with the asked grid.
        grid: side of the feature map (7 or 14 at 224 pixels); by default the paper's for vgg, 7 for the others.
        weights: DEFAULT or another name of torchvision's weights enum, a .pth or .safetensors file with the network's
            state dict, or null for random weights.
        image_size: side of the square input in pixels.
        scales: further such sides, each with a decoder of its own, which learns from its share of the batches; in a
            search with `multi_scale` all speak with one voice.
        fit: how a photo becomes square: crop (shorter side, then the centre) or squash (both sides, aspect is lost).
        resample: the filter by which it gets its size. Other filters cost score: docs/results.md.
        train_from: null freezes the network; all, or the name of the first stage that is trained, e.g. features.14.
        batch_norm: frozen keeps the running statistics while training, train updates them (networks from scratch).
    """

    name: str = "mobilenet_v2"
    layer: str | None = None
    grid: int | None = None
    weights: str | None = "DEFAULT"
    image_size: int = 224
    scales: tuple[int, ...] = ()
    fit: Fit = "crop"
    resample: Resample = "bicubic"
    train_from: str | None = None
    batch_norm: Literal["frozen", "train"] = "frozen"

    def __post_init__(self) -> None:
        positive(self, "image_size")
        at_most(self, MAX_SIDE, "image_size")
        one_by_one = len(set(self.sides)) == len(self.sides) <= MAX_SCALES
        if not (one_by_one and all(0 < side <= MAX_SIDE for side in self.scales)):
            raise ValueError(
                f"scales must be fewer than {MAX_SCALES} different sides of up to {MAX_SIDE} pixels, none of them "
                f"image_size={self.image_size} (got {list(self.scales[:MAX_SCALES])})"
            )

    @property
    def sides(self) -> tuple[int, ...]:
        """Of the square input, in pixels: `image_size` and the scales."""
        return self.image_size, *self.scales


class View(NamedTuple):
    """How an image is looked at: at which of the encoder's sides (`EncoderConfig.sides`), and mirrored or not."""

    scale: int = 0
    mirrored: bool = False


PLAIN = View()


def all_views(scales: int, *, mirrored: bool) -> list[View]:
    """Every way to look at an image: at each of so many scales, and if `mirrored` also at its mirror image there."""
    return [View(scale, turned) for scale in range(scales) for turned in ((False, True) if mirrored else (False,))]


@dataclass(frozen=True)
class RegionEncoderConfig:
    """What the annotation vectors go through between the CNN and the decoder.

    Args:
        name: none (the paper), lstm or bilstm (an RNN reads the regions row by row), self_attention (the regions look
            at each other; SAGAN, non-local networks) or transformer (encoder blocks over them).
        positions: what tells the vectors their places: none (the paper), learned (one vector per row and per column) or
            sinusoidal.
        dim: size of the LSTM's state (of each of the bilstm's two), of self_attention's queries, keys and values over
            all heads; of the transformer's vectors.
        blocks: how often self_attention or the transformer's block is repeated.
        heads: of their attention; 1 is SAGAN's.
        norm: the transformer's layer norm, inside the residual (pre) or after it (post).
        dropout: rate in the transformer's blocks.
    """

    name: Literal["none", "lstm", "bilstm", "self_attention", "transformer"] = "none"
    positions: Literal["none", "learned", "sinusoidal"] = "none"
    dim: int = 512
    blocks: int = 1
    heads: int = 8
    norm: Literal["pre", "post"] = "pre"
    dropout: float = 0.1

    def __post_init__(self) -> None:
        positive(self, "dim", "blocks", "heads")
        at_most(self, MAX_LAYERS, "blocks")
        fraction(self, "dropout")
        strange = [name for name, readers in _REGION_READERS.items() if self.name not in readers]
        refuse_unread(self, f"has no meaning with region_encoder.name={self.name!r}; leave it out", strange)
        if self.name in _REGION_READERS["heads"] and self.dim % self.heads:
            raise ValueError(f"region_encoder.heads must divide region_encoder.dim (got {self.heads} and {self.dim})")


_REGION_READERS = {
    "dim": ("lstm", "bilstm", "self_attention", "transformer"),
    **dict.fromkeys(("blocks", "heads"), ("self_attention", "transformer")),
    **dict.fromkeys(("norm", "dropout"), ("transformer",)),
}
"""Fields that not every region encoder reads -> those that do."""


@dataclass(frozen=True)
class DecoderConfig:
    """The language model, Xu et al. (2015), section 3.1.2, and its relatives.

    Args:
        name: attention_lstm (the paper: attends with h_{t-1}, before the step), luong (attends with h_t, after it),
            transformer (attends to its words and to the image, no recurrence) or lstm (one vector of the whole image,
            no attention).
        attention: soft (deterministic, eq. 13), hard (sampled locations, eqs. 8-9; see `HardConfig`) or
            multi_head (several soft looks at once, scaled_dot with projected values; Vaswani et al., 2017).
        glimpses: how many different locations hard attention samples for a word: 1 (the paper), or more, weighed by
            their alphas; with all of them, and no window, it is soft.
        window: the share of the picture's side that a look of hard attention takes in, from 0 to below 1: the mean of
            the places in a square around its location, an odd number across; 0 (the paper) is the location alone.
        alignment: f_att of eq. 4: additive (the paper, Bahdanau), dot, general, concat (Luong) or scaled_dot.
        values: what a look brings back: the annotations (the paper), or projected to attention_dim by a matrix.
        query: what attention_lstm asks with: state (h_{t-1}, the paper) or state_and_word, which has also read y_{t-1}.
        gate: beta: scalar (the paper), vector (many ports) or none (Luong).
        embedding_dim: m, size of a word's embedding E y.
        hidden_dim: n, size of the LSTM state; of the transformer's layers, where it equals embedding_dim.
        attention_dim: size of the space in which additive, concat and scaled_dot compare query and key; of projected
            values; of multi_head's heads together.
        dropout: rate in the deep output (eq. 7), on h and on the tanh; everywhere in the transformer's layers.
        embedding_dropout: rate on the embedded words.
        annotation_dropout: rate on the annotation vectors.
        tie_embeddings: L_o shares its matrix with E.
        inject: how the lstm gets its vector: first (as the word before the first), init (as its initial state) or
            each_step.
        context: that vector: the mean of the annotation vectors or the last of them; by default the last after
            region_encoder.name='lstm', which by then has read them all, and else the mean.
        input_feeding: in luong, what was said enters the next step.
        layers: of the transformer.
        heads: of each of its attentions, where they divide hidden_dim; of multi_head, where they divide attention_dim.
        norm: its layer norm, inside the residual (pre) or after it (post; Vaswani et al., wants a warm-up).
        positions: what tells it the places of its words: sinusoidal or learned.
        max_positions: how many are learned: the words of the longest caption, the end word counted.
    """

    name: Literal["attention_lstm", "luong", "transformer", "lstm"] = "attention_lstm"
    attention: Literal["soft", "hard", "multi_head"] = "soft"
    glimpses: int = 1
    window: float = 0.0
    alignment: Literal["additive", "concat", "dot", "general", "scaled_dot"] = "additive"
    values: Literal["annotations", "projected"] = "annotations"
    query: Literal["state", "state_and_word"] = "state"
    gate: Literal["scalar", "vector", "none"] = "scalar"
    embedding_dim: int = 512
    hidden_dim: int = 512
    attention_dim: int = 512
    dropout: float = 0.5
    embedding_dropout: float = 0.0
    annotation_dropout: float = 0.0
    tie_embeddings: bool = False
    inject: Literal["first", "init", "each_step"] = "init"
    context: Literal["mean", "last"] | None = None
    input_feeding: bool = False
    layers: int = 3
    heads: int = 8
    norm: Literal["pre", "post"] = "pre"
    positions: Literal["sinusoidal", "learned"] = "sinusoidal"
    max_positions: int = 64

    def __post_init__(self) -> None:
        positive(self, "embedding_dim", "hidden_dim", "attention_dim", "layers", "heads", "max_positions", "glimpses")
        at_most(self, MAX_LAYERS, "layers")
        fraction(self, "dropout", "embedding_dropout", "annotation_dropout", "window")
        strange = [name for name, readers in _READERS.items() if self.name not in readers]
        refuse_unread(self, f"has no meaning with decoder.name={self.name!r}; leave it out", strange)
        if self.name == "transformer" and self.embedding_dim != self.hidden_dim:
            raise ValueError(
                "decoder.name='transformer' needs embedding_dim == hidden_dim "
                f"(got {self.embedding_dim} and {self.hidden_dim})"
            )
        if self.attention == "multi_head" and self.alignment not in ("additive", "scaled_dot"):  # additive: not set
            raise ValueError(f"alignment={self.alignment!r} has no meaning with multi_head, which scores by scaled_dot")
        if self.attention != "hard":
            refuse_unread(
                self, f"needs decoder.attention='hard' (got {self.attention!r})", HARD_ONLY, prefix="decoder."
            )
        self._check_heads()

    def _check_heads(self) -> None:
        whole = "attention_dim" if self.attention == "multi_head" else "hidden_dim"
        if self.attention != "multi_head" and self.name != "transformer":
            refuse_unread(
                self, "needs decoder.attention='multi_head' or decoder.name='transformer'; leave it out", ["heads"]
            )
        elif getattr(self, whole) % self.heads:
            raise ValueError(f"decoder.heads must divide decoder.{whole} (got {self.heads} and {getattr(self, whole)})")


HARD_ONLY = ("glimpses", "window")
"""Fields that hard attention alone reads."""
_READERS = {
    **dict.fromkeys(("attention", "alignment", "values", "gate"), ("attention_lstm", "luong")),
    "query": ("attention_lstm",),
    **dict.fromkeys(("inject", "context"), ("lstm",)),
    "input_feeding": ("luong",),
    **dict.fromkeys(("layers", "norm", "positions", "max_positions"), ("transformer",)),
}
"""Fields that not every decoder reads -> the decoders that do."""
