"""Words per second of a training step, against a plain decoder and the machine: `python -m benchmarks.train_step`.

A step is forward, loss, backward, clipping and optimiser of the decoder on given annotation vectors. The plain decoder
has the same weights and equations in the manner of popular ports: every caption brings its own image, and each step
projects the annotations, gathers its output into one tensor and computes its logits.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from benchmarks.report import Line, best_of, formats, options, present
from benchmarks.roofline import Phase, measure
from captioning.config import DecoderConfig, OptimizerConfig
from captioning.losses import doubly_stochastic_penalty, word_nll
from captioning.models.decoder import AttentionLSTM
from captioning.models.registry import build_decoder
from captioning.optimization import OPTIMIZERS
from captioning.vocabulary import END, PAD, START


class Sizes(NamedTuple):
    """The sizes of a step: N images with K captions of `shortest` to `longest` words, END among them."""

    images: int
    captions: int
    locations: int
    annotation_dim: int
    dim: int
    attention_dim: int
    vocabulary: int
    shortest: int = 9
    longest: int = 21


class PlainDecoder(nn.Module):
    """Eqs. 1-7 as popular ports write them. One caption per image, the longest first."""

    def __init__(self, sizes: Sizes, dropout: float):
        super().__init__()
        annotation_dim, dim = sizes.annotation_dim, sizes.dim
        self.encoder_attention = nn.Linear(annotation_dim, sizes.attention_dim)
        self.decoder_attention = nn.Linear(dim, sizes.attention_dim)
        self.full_attention = nn.Linear(sizes.attention_dim, 1)
        self.embedding = nn.Embedding(sizes.vocabulary, dim)
        self.init_h = nn.Linear(annotation_dim, dim)
        self.init_c = nn.Linear(annotation_dim, dim)
        self.f_beta = nn.Linear(dim, 1)
        self.cell = nn.LSTMCell(dim + annotation_dim, dim)
        self.L_h = nn.Linear(dim, dim)
        self.L_z = nn.Linear(annotation_dim, dim)
        self.L_o = nn.Linear(dim, sizes.vocabulary)
        self.dropout = nn.Dropout(dropout)

    def forward(self, a: Tensor, words: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """Logits (R, T, V) and alphas (R, T, L) of R captions (R, S), zero behind their ends."""
        embedded = self.embedding(words)
        mean = a.mean(dim=1)
        h, c = torch.tanh(self.init_h(mean)), torch.tanh(self.init_c(mean))
        logits = a.new_zeros(len(a), max(lengths), self.L_o.out_features)
        alphas = a.new_zeros(len(a), max(lengths), a.shape[1])
        for t in range(max(lengths)):
            rows = sum(length > t for length in lengths)
            a, h, c = a[:rows], h[:rows], c[:rows]
            keys, query = self.encoder_attention(a), self.decoder_attention(h).unsqueeze(1)
            alpha = self.full_attention(torch.tanh(keys + query)).squeeze(2).softmax(dim=1)  # eqs. 4, 5
            z = torch.sigmoid(self.f_beta(h)) * (a * alpha.unsqueeze(2)).sum(dim=1)  # eq. 13, gated
            y = embedded[:rows, t]
            h, c = self.cell(torch.cat([y, z], dim=1), (h, c))  # eqs. 1-3
            hidden = torch.tanh(self.L_h(self.dropout(h)) + self.L_z(z) + y)
            logits[:rows, t] = self.L_o(self.dropout(hidden)).to(logits.dtype)  # eq. 7
            alphas[:rows, t] = alpha.to(alphas.dtype)
        return logits, alphas

    def loss(self, a: Tensor, words: Tensor, lengths: list[int]) -> Tensor:
        """Eq. 14 with means, as the project has it."""
        logits, alphas = self(a, words, lengths)
        packed, targets = (
            pack_padded_sequence(x, lengths, batch_first=True).data for x in (logits, words[:, 1 : max(lengths) + 1])
        )
        return F.cross_entropy(packed, targets) + (1 - alphas.sum(dim=1)).square().mean()

    @torch.no_grad()
    def copy_weights(self, ours: AttentionLSTM) -> None:
        """Take the weights of the project's decoder (additive alignment, scalar gate), for a test that both agree."""
        n = self.cell.hidden_size
        ifgo = torch.cat([torch.arange(n) + part * n for part in (0, 1, 3, 2)])  # ours are i, f, o, g
        alignment: Any = ours.attention.alignment
        gate: Any = ours.gate
        state = ours.lstm_state.weight[ifgo]
        for module in (self.decoder_attention, self.full_attention, self.L_z):
            module.bias.zero_()
        self.encoder_attention.load_state_dict(alignment.key.state_dict())
        self.decoder_attention.weight.copy_(alignment.query.weight)
        self.full_attention.weight.copy_(alignment.v.weight)
        self.embedding.load_state_dict(ours.E.state_dict())
        self.f_beta.load_state_dict(gate.f_beta.state_dict())
        self.L_z.weight.copy_(ours.L_z.weight)
        for name in ("init_h", "init_c", "L_h", "L_o"):
            getattr(self, name).load_state_dict(getattr(ours, name).state_dict())
        self.cell.weight_ih.copy_(torch.cat([ours.lstm_word.weight[ifgo], state[:, n:]], dim=1))
        self.cell.weight_hh.copy_(state[:, :n])
        self.cell.bias_ih.copy_(ours.lstm_word.bias[ifgo])
        self.cell.bias_hh.zero_()


def make_batch(sizes: Sizes, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Annotation vectors (N, L, D) as after a ReLU, and captions (N, K, S) as `data.Collate` orders them."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(sizes.images, sizes.locations, sizes.annotation_dim, generator=generator).relu()
    shape = (sizes.images, sizes.captions)
    lengths = torch.randint(sizes.shortest, sizes.longest + 1, shape, generator=generator)
    lengths = lengths.sort(dim=1, descending=True).values
    lengths = lengths[lengths[:, 0].argsort(descending=True)].unsqueeze(-1)
    places = torch.arange(sizes.longest + 1)
    words = torch.randint(END + 1, sizes.vocabulary, (*shape, sizes.longest + 1), generator=generator)
    words = words.where(places > 0, START).where(places != lengths, END).where(places <= lengths, PAD)
    return a, words[..., : int(lengths.max()) + 1]


def as_ports_batch(a: Tensor, words: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """The same captions, each with its own copy of its image, the longest first."""
    rows = words.flatten(0, 1)
    lengths = (rows[:, 1:] != PAD).sum(dim=1)
    order = lengths.argsort(descending=True, stable=True)
    return a.repeat_interleave(words.shape[1], dim=0)[order], rows[order], lengths[order].tolist()


def ours_loss(decoder: AttentionLSTM, a: Tensor, words: Tensor) -> Tensor:
    """Eq. 14 with means, from the project's own parts."""
    output = decoder(a, words)
    captions = output.mask.any(dim=-1).sum()
    penalty = doubly_stochastic_penalty(output.alphas, output.mask).sum() / captions
    return word_nll(output.logits, output.targets).mean() + penalty


def build_pair(sizes: Sizes, *, dropout: float = 0.5) -> tuple[AttentionLSTM, PlainDecoder]:
    """The project's decoder and the plain one."""
    config = DecoderConfig(
        embedding_dim=sizes.dim, hidden_dim=sizes.dim, attention_dim=sizes.attention_dim, dropout=dropout
    )
    torch.manual_seed(0)
    ours = build_decoder(config, vocabulary_size=sizes.vocabulary, annotation_dim=sizes.annotation_dim)
    return cast(AttentionLSTM, ours), PlainDecoder(sizes, dropout)


def trainer(module: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype) -> Callable[[], None]:
    """One training step, with the recipes' optimiser and clipping."""
    optimizer = OPTIMIZERS["adamw"](module.parameters(), lr=1e-4)
    clip = OptimizerConfig().clip_norm

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def necessary(sizes: Sizes, words: Tensor, parameters: int, dtype: torch.dtype) -> list[Phase]:
    """What a step cannot do without. Annotation vectors get no gradient, everything else does.

    A product of (r, p) and (p, q) takes 2rpq operations; training takes it three times: forward, and for the gradients
    of both its factors. Of tanh and softmax only the bytes count. Bytes: weights and annotations are read once in each
    of these passes, but at every step of the recurrence as long as captions go on; what fits a cache is not counted.
    """
    mask = words[..., 1:] != PAD
    rows, steps = int(mask.sum()), mask.shape[-1]
    image_steps = int(mask.any(dim=1).sum())  # an image is read once per step, whatever captions it has
    n, _, locations, annotation_dim, dim, k, vocabulary, *_ = sizes
    size = dtype.itemsize
    state = (dim + annotation_dim) * 4 * dim + dim * (k + 1)  # gates, query and beta from h and z
    word = dim * 4 * dim + dim * (dim + annotation_dim)  # gates from the word, and L_h and L_z
    return [
        Phase("keys, and their weights' gradient", 4 * n * locations * annotation_dim * k, 0),
        Phase("annotations read", 0, 2 * n * locations * annotation_dim * size),
        Phase("initial state", 4 * n * 2 * annotation_dim * dim, 0),
        Phase("scores", 4 * rows * locations * k, 2 * image_steps * locations * k * size),
        Phase("context", 4 * rows * locations * annotation_dim, 2 * image_steps * locations * annotation_dim * size),
        Phase("recurrence", 4 * rows * state, 2 * steps * state * size),
        Phase("gradient of its weights", 2 * rows * state, state * 4),
        Phase("words and deep output", 6 * rows * word, 3 * word * size),
        Phase("logits", 6 * rows * dim * vocabulary, 3 * dim * vocabulary * size),
        Phase("softmax: logits written and read, and their gradient", 0, 4 * rows * vocabulary * size),
        Phase("clipping and AdamW: gradient twice, weights and two moments read and written", 0, 8 * parameters * 4),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. One caption per image, then five that share theirs, then a small decoder."""
    parser = options(__doc__.splitlines()[0], images=32, locations=196, annotation_dim=2048, dim=512, vocabulary=9000)
    parser.add_argument("--repeats", type=int, default=3, help="timed steps, of which the shortest counts")
    parser.add_argument("--product", type=int, default=2048, help="side of the matrices that the roofline multiplies")
    chosen = parser.parse_args(arguments)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    shared = (chosen.locations, chosen.annotation_dim, chosen.dim, chosen.dim, chosen.vocabulary)
    cases = [  # 7 images with 5 captions stand for the 32 captions of the first case: words per second are scaled
        ("one caption per image", Sizes(chosen.images, 1, *shared), 6.0),
        ("five captions per image", Sizes(-(-chosen.images // 5), 5, *shared), 10.0),
        ("a small decoder", Sizes(max(chosen.images // 2, 1), 5, 256, 64, 128, 64, 40), None),
    ]
    machine = measure(repeats=max(chosen.repeats, 2), size=chosen.product, megabytes=max(chosen.product // 8, 1))
    lines = []
    for precision, dtype in formats().items():
        lines.append(Line(f"{precision} matrix products", f"{machine.products[dtype] / 1e9:.0f} GFLOP/s"))
        for name, sizes, goal in cases:
            found = measure_case(sizes, dtype, chosen.repeats)
            limit = found.words / machine.seconds(found.phases, dtype)
            rate, plain = found.words / found.ours, found.words / found.plain
            what, figure, most = f"{precision}, {name}", f"{rate:,.0f} words/s", f"{limit:,.0f} words/s"
            wanted = (">=", goal) if goal and (dtype == torch.float32 or goal == 10) else None
            lines.append(Line(what, figure, rate / plain, f"x plain ({plain:,.0f})", most, wanted))
            lines.append(
                Line(what, figure, limit / rate, "x its time at the limit", most, ("<=", 1.6) if goal else None)
            )
    lines.append(Line("memory", f"{machine.bandwidth / 1e9:.1f} GB/s"))
    present(lines, markdown=chosen.markdown)
    return 0


class Measured(NamedTuple):
    """Seconds per step of both decoders, the words of a step, and what it cannot do without."""

    ours: float
    plain: float
    words: int
    phases: list[Phase]


def measure_case(sizes: Sizes, dtype: torch.dtype, repeats: int) -> Measured:
    """Time both decoders on the same captions, in turns."""
    a, words = make_batch(sizes)
    ours, plain = build_pair(sizes)
    ports = as_ports_batch(a, words)
    steps = [
        trainer(ours, lambda: ours_loss(ours, a, words), dtype),
        trainer(plain, lambda: plain.loss(*ports), dtype),
    ]
    parameters = sum(p.numel() for p in ours.parameters())
    fast, slow = best_of(steps, repeats)
    return Measured(fast, slow, int((words[..., 1:] != PAD).sum()), necessary(sizes, words, parameters, dtype))


if __name__ == "__main__":
    sys.exit(main())
