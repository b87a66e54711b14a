"""The listening test: forced attention, and what a decoder loses by it."""

import math

import pytest
import torch
from test_decoder import LOCATIONS, VARIANTS, batch, build, different, every_variant
from torch import Tensor

from captioning.listening import attention_of, exchange, forced, replacements
from captioning.models.alignment import DotAlignment
from captioning.models.attention import Context, Memory, ScoredAttention
from captioning.models.decoder import Decoder, Output
from captioning.vocabulary import END, PAD, START

FORCED = [config for config in VARIANTS if attention_of(build(config)) is not None]
every_forced_variant = pytest.mark.parametrize("config", FORCED, ids=different)
V, C = 8, 3.0  # words, and the logit of the word that is seen


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class MarkAttention(ScoredAttention):
    """Looks at the location whose annotation vector bears the mark of this time."""

    def forward(self, query: Tensor, memory: Memory) -> Context:
        alpha = memory.a[..., V + int(query[0, 0])]
        return Context(z=torch.einsum("nl,nld->nd", alpha, memory.a), alpha=alpha)


class Reader(Decoder):
    """Says the word that stands where it looks: logits are C for that word and 0 for the others."""

    def __init__(self):
        super().__init__()
        self.attention = MarkAttention(DotAlignment(query_dim=1, annotation_dim=1, dim=1))

    def forward(self, a: Tensor, words: Tensor) -> Output:
        memory = self.attention.prepare(a)
        contexts = [self.attention(torch.full((len(a), 1), float(t)), memory) for t in range(words.shape[-1] - 1)]
        logits = C * torch.stack([context.z[:, :V] for context in contexts], dim=1)
        targets = words[:, 0, 1:]
        alphas = torch.stack([context.alpha for context in contexts], dim=1)
        return Output(logits.flatten(0, 1), targets.flatten(), (targets != PAD)[:, None], alphas[:, None], None)


def two_pages() -> tuple[Tensor, Tensor]:
    """Two images with two locations each, a word and the mark of a time on each; in the second in the other order."""
    words = torch.tensor([[[START, 4, END]], [[START, 5, END]]])
    a = torch.zeros(2, 2, V + 2)
    for n, first in enumerate((0, 1)):
        for t, place in enumerate((first, 1 - first)):
            a[n, place, words[n, 0, 1 + t]] = 1
            a[n, place, V + t] = 1
    return a, words


def nll(output: Output) -> float:
    return torch.nn.functional.cross_entropy(output.logits, output.targets).item()


def test_a_decoder_that_reads_loses_what_it_read():
    decoder, (a, words) = Reader(), two_pages()
    output = decoder(a, words)
    changes = {}
    for name, alphas in replacements(output.alphas, output.mask, (1, 2), generator()).items():
        with forced(decoder, alphas):
            changes[name] = nll(decoder(a, words)) - nll(output)
    own = math.log(1 + (V - 1) * math.exp(-C))
    assert nll(output) == pytest.approx(own)
    # Exchanged, every look falls on the other word: its logit is C, the right one's 0.
    assert changes["exchanged"] == pytest.approx(C)
    # Uniform: both words have C/2.
    assert changes["uniform"] == pytest.approx(math.log(2 * math.exp(C / 2) + V - 2) - C / 2 - own)
    # The centre of a 1x2 grid is location 1: right for one word of two in each image.
    assert changes["centre"] == pytest.approx(C / 2)


def test_replacements_are_what_they_say():
    alphas = torch.rand(2, 3, 4, 9, generator=generator()).softmax(dim=-1)
    found = replacements(alphas, torch.ones(2, 3, 4, dtype=torch.bool), (3, 3), generator())
    assert list(found) == ["exchanged", "random", "uniform", "centre"]
    for weights in found.values():
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 3, 4))
    torch.testing.assert_close(found["random"].sort(dim=-1).values, alphas.sort(dim=-1).values)
    assert not torch.equal(found["random"], alphas)
    assert found["uniform"].unique().tolist() == pytest.approx([1 / 9])
    assert found["centre"].argmax(dim=-1).unique().tolist() == [4]


def test_weights_are_exchanged_with_other_images_and_with_captions_as_long():
    lengths = torch.tensor([[3, 2], [3, 1], [2, 0]])
    mask = torch.arange(3) < lengths.unsqueeze(-1)
    source = torch.arange(3 * 2 * 3).reshape(3, 2, 3, 1).float()  # every word's weights are its own number
    for seed in range(20):
        found = exchange(source, mask, generator().manual_seed(seed)).long().squeeze(-1)
        image, caption, position = found // 6, found // 3 % 2, found % 3
        assert (image != torch.arange(3).reshape(3, 1, 1))[mask].all()
        assert (position == torch.arange(3))[mask].all()
        assert (lengths[image, caption] >= lengths.unsqueeze(-1))[mask].all()


def test_the_last_weights_of_a_shorter_caption_are_repeated():
    mask = torch.tensor([[[True, True, True]], [[True, False, False]]])
    source = torch.arange(6).reshape(2, 1, 3, 1).float()
    assert exchange(source, mask, generator())[0].flatten().tolist() == [3, 3, 3]


def test_one_image_alone_has_nobody_to_exchange_with():
    with pytest.raises(ValueError, match="two images or more"):
        exchange(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, dtype=torch.bool), generator())


@every_variant
def test_forcing_a_decoders_own_weights_changes_nothing(config):
    decoder = build(config).eval()
    a, words = batch()
    own = decoder(a, words)
    attention = attention_of(decoder)
    if attention is None:
        uniform = torch.full((*own.mask.shape, LOCATIONS), 1 / LOCATIONS)
        with pytest.raises(ValueError, match="has no attention that could be forced"), forced(decoder, uniform):
            pass
        return
    looked = own.alphas
    if own.locations is not None:
        looked = torch.nn.functional.one_hot(own.locations, own.alphas.shape[-1]).double()
    with forced(decoder, looked):
        again = decoder(a, words)
    torch.testing.assert_close(again.logits, own.logits)
    assert decoder.attention is attention


@every_forced_variant
def test_forcing_other_weights_is_heard(config):
    decoder = build(config).eval()
    a, words = batch()
    own = decoder(a, words)
    with forced(decoder, own.alphas.roll(1, dims=-1)):
        other = decoder(a, words)
    torch.testing.assert_close(other.alphas[own.mask], own.alphas.roll(1, dims=-1)[own.mask])
    assert not torch.allclose(other.logits, own.logits)


def test_attention_is_given_back_after_an_error():
    decoder = Reader()
    own = decoder.attention
    with pytest.raises(KeyError), forced(decoder, torch.ones(1, 1, 1, 1)):
        raise KeyError
    assert decoder.attention is own
