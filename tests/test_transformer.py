"""The Transformer: one layer by hand, the whole against PyTorch's own, positions, and the cache of keys and values."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from benchmarks.transformer_cache import cached, recomputed
from captioning.api import Captioner
from captioning.checkpoint import load_checkpoint
from captioning.config import DecoderConfig, RegionEncoderConfig, SearchConfig
from captioning.decoding import search
from captioning.models.blocks import NORMS, EncoderBlock, sinusoids
from captioning.models.captioner import build_model
from captioning.models.multihead import MultiHead, show_head
from captioning.models.registry import build_decoder
from captioning.models.transformer import POSITIONS, TransformerDecoder, packed
from captioning.vocabulary import END, START

V, D, LOCATIONS = 11, 12, 5


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def decoder_of(**settings) -> TransformerDecoder:
    """In double precision, with no parameter at a round value."""
    settings = {"vocabulary_size": V, "annotation_dim": D, "dim": D, "layers": 2, "heads": 3, **settings}
    decoder = TransformerDecoder(**settings).double().eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return decoder


def annotations(n: int = 2) -> Tensor:
    return torch.randn(n, LOCATIONS, D, dtype=torch.float64)


def copy_attention(ours: MultiHead, torchs: nn.MultiheadAttention) -> None:
    any_key_bias = torch.randn_like(ours.query.bias)  # it shifts all scores of a query alike: ours has none
    torchs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
    torchs.in_proj_bias.copy_(torch.cat([ours.query.bias, any_key_bias, ours.value.bias]))
    torchs.out_proj.load_state_dict(ours.output.state_dict())


@torch.no_grad()
def torchs_decoder(ours: TransformerDecoder, *, norm: str) -> nn.TransformerDecoder:
    """PyTorch's stack of layers with the same weights."""
    layer = nn.TransformerDecoderLayer(D, 3, 4 * D, norm_first=norm == "pre", batch_first=True)
    last = nn.LayerNorm(D) if norm == "pre" else None
    theirs = nn.TransformerDecoder(layer, len(ours.layers), last).double().eval()
    for mine, layer in zip(ours.layers, theirs.layers, strict=True):
        copy_attention(mine.read, layer.self_attn)
        copy_attention(mine.look, layer.multihead_attn)
        layer.linear1.load_state_dict(mine.mlp[0].state_dict())
        layer.linear2.load_state_dict(mine.mlp[3].state_dict())
        for number, around in enumerate((mine.around_read, mine.around_look, mine.around_mlp), 1):
            getattr(layer, f"norm{number}").load_state_dict(around.norm.state_dict())
    if last is not None:
        theirs.norm.load_state_dict(ours.last_norm.state_dict())
    return theirs


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_equals_torch_transformer_decoder_with_copied_weights(norm):
    ours = decoder_of(norm=norm)
    theirs = torchs_decoder(ours, norm=norm)
    a, words = annotations(), torch.tensor([[[START, 5, 6, 7, END]], [[START, 8, 4, 9, END]]])
    x = ours.E(words[:, 0, :-1]) * math.sqrt(D) + sinusoids(4, D)
    future = torch.ones(4, 4, dtype=torch.bool).triu(1)
    expected = ours.L_o(theirs(x, a, tgt_mask=future))
    torch.testing.assert_close(ours(a, words).logits, expected.flatten(0, 1))


@pytest.mark.parametrize("norm", ["pre", "post"])
@torch.no_grad()
def test_an_encoder_block_equals_torchs_with_copied_weights(norm):
    ours = EncoderBlock(D, heads=3, norm=norm).eval()
    theirs = nn.TransformerEncoderLayer(D, 3, 4 * D, norm_first=norm == "pre", batch_first=True).eval()
    for parameter in ours.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    copy_attention(ours.read, theirs.self_attn)
    theirs.linear1.load_state_dict(ours.mlp[0].state_dict())
    theirs.linear2.load_state_dict(ours.mlp[3].state_dict())
    theirs.norm1.load_state_dict(ours.around_read.norm.state_dict())
    theirs.norm2.load_state_dict(ours.around_mlp.norm.state_dict())
    x = torch.randn(2, LOCATIONS, D)
    torch.testing.assert_close(ours(x), theirs(x))


def normed(x: list[float]) -> list[float]:
    """Layer norm of two numbers: plus and minus one, but for PyTorch's epsilon."""
    half = (x[0] - x[1]) / 2
    s = half / math.sqrt(half**2 + 1e-5)
    return [s, -s]


def looked(q: list[float], places: list[list[float]]) -> tuple[list[float], list[float]]:
    """One head of size 2 whose projections are all the identity: the context, and the weights."""
    scores = [math.exp((q[0] * k[0] + q[1] * k[1]) / math.sqrt(2)) for k in places]
    weights = [score / sum(scores) for score in scores]
    return [sum(w * v[j] for w, v in zip(weights, places, strict=True)) for j in (0, 1)], weights


def plus(x: list[float], y: list[float]) -> list[float]:
    return [x[0] + y[0], x[1] + y[1]]


def test_one_layer_two_words_by_hand():
    decoder = TransformerDecoder(vocabulary_size=5, annotation_dim=2, dim=2, layers=1, heads=1, norm="pre").eval()
    layer = decoder.layers[0]
    with torch.no_grad():
        for attention in (layer.read, layer.look):
            for inner in (attention.query, attention.key, attention.value, attention.output):
                inner.weight.copy_(torch.eye(2))
        layer.mlp[0].weight.copy_(torch.eye(8, 2))  # max(0, x), and six zeros
        layer.mlp[0].bias.zero_()
        layer.mlp[3].weight.copy_(0.5 * torch.eye(2, 8))
        layer.mlp[3].bias.copy_(torch.tensor([0.1, -0.2]))
        decoder.E.weight.copy_(torch.tensor([[0, 0], [0.3, 0.1], [0, 0], [0, 0], [-0.4, 0.9]]))
        decoder.L_o.weight.copy_(torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1], [2.0, 0]]))
        decoder.L_o.bias.zero_()
    a = [[1.0, 0.5], [-0.5, 2.0], [0.2, 0.1]]
    root = math.sqrt(2)  # positions 0 and 1 have the sines (sin 0, cos 0) and (sin 1, cos 1)
    x = [[0.3 * root, 0.1 * root + 1], [-0.4 * root + math.sin(1), 0.9 * root + math.cos(1)]]
    memory = decoder.prepare(torch.tensor([a]))
    state = decoder.initial_state(memory)
    for t, word in enumerate([START, 4]):
        y = plus(x[t], looked(normed(x[t]), [normed(earlier) for earlier in x[: t + 1]])[0])
        context, alpha = looked(normed(y), a)
        y = plus(y, context)
        y = plus(y, [0.5 * max(0, normed(y)[0]) + 0.1, 0.5 * max(0, normed(y)[1]) - 0.2])
        y = normed(y)
        step = decoder.step(torch.tensor([word]), state, memory)
        state = step.state
        assert step.alpha[0].tolist() == pytest.approx(alpha, rel=1e-4)
        assert step.logits[0].tolist() == pytest.approx([0, y[0], y[1], y[0] + y[1], 2 * y[0]], rel=1e-4, abs=1e-6)


def test_sinusoids_can_start_anywhere_and_have_any_size():
    whole = sinusoids(9, 6)
    torch.testing.assert_close(sinusoids(4, 6, start=5), whole[5:])
    assert sinusoids(3, 5).shape == (3, 5)
    assert whole[2, 2:4].tolist() == pytest.approx(
        [math.sin(2 / 10_000 ** (2 / 6)), math.cos(2 / 10_000 ** (2 / 6))], rel=1e-5
    )


@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_the_same_word_at_another_place_is_another_input(positions):
    decoder = decoder_of(positions=positions)
    words = torch.tensor([[[5, 5, 5, END]]])  # without positions all three would look alike to each other
    logits = decoder(annotations(1), words).logits
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    assert (logits[1] - logits[2]).abs().max() > 1e-3


def test_the_state_holds_keys_and_values_of_the_words_so_far_and_of_no_image():
    decoder = decoder_of()
    memory = decoder.prepare(annotations(2))
    assert memory.k.shape == memory.v.shape == (2, 2, 3, LOCATIONS, 4)  # images, layers, heads, places, size of a head
    state = decoder.initial_state(memory, 3)
    assert state.k.shape == (6, 2, 3, 0, 4)
    for t in range(1, 4):
        before, state = state, decoder.step(torch.full((6,), 5), state, memory).state
        assert state.k.shape == state.v.shape == (6, 2, 3, t, 4)
        assert torch.equal(state.k[..., : t - 1, :], before.k)


def test_captions_of_an_image_are_packed_end_to_end_and_see_only_themselves():
    # Image 1: captions of 2 and 1 words; image 2: of 1 and none. T = 3.
    mask = torch.tensor([[[1, 1, 0], [1, 0, 0]], [[1, 0, 0], [0, 0, 0]]], dtype=torch.bool)
    places, real, sees = packed(mask)
    assert places[0].tolist() == [0, 1, 3]
    assert places[1, 0] == 0
    assert real.tolist() == [[True, True, True], [True, False, False]]
    assert sees[0, 0].tolist() == [[True, False, False], [True, True, False], [False, False, True]]
    assert sees[1, 0, 0].tolist() == [True, False, False]
    assert sees.any(dim=-1).all()  # padding, too, sees something: there is no softmax of nothing


def test_reading_in_pieces_equals_reading_at_once():
    decoder = decoder_of()
    memory = decoder.prepare(annotations(1))
    words = torch.tensor([[START, 5, 6, 7, 8]])
    at_once, _, alphas = decoder.read_on(words, decoder.initial_state(memory), memory)
    first, state, _ = decoder.read_on(words[:, :3], decoder.initial_state(memory), memory)
    later, _, later_alphas = decoder.read_on(words[:, 3:], state, memory)
    torch.testing.assert_close(torch.cat([first, later], dim=1), at_once)
    torch.testing.assert_close(later_alphas, alphas[:, 3:])


def test_cached_stepping_says_what_reading_all_again_says():
    decoder, a = decoder_of(), annotations(2)
    words = torch.randint(3, V, (6, 5))
    torch.testing.assert_close(cached(decoder, a, words), recomputed(decoder, a, words))


def test_alphas_are_the_mean_of_the_last_layers_heads_or_one_of_them():
    decoder = decoder_of()
    a, words = annotations(1), torch.tensor([[[START, 5, 6, END]]])
    mean = decoder(a, words).alphas
    single = []
    for head in range(3):
        show_head(decoder, head)
        single.append(decoder(a, words).alphas)
    torch.testing.assert_close(sum(single) / 3, mean)
    assert (single[0] - single[1]).abs().max() > 1e-3
    show_head(decoder, None)
    torch.testing.assert_close(decoder(a, words).alphas, mean)


def test_a_head_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="head=3: this model has heads 0 to 2"):
        show_head(decoder_of(), 3)
    with pytest.raises(ValueError, match="head=0: this model's attention has no heads"):
        show_head(nn.Linear(2, 2), 0)


@pytest.mark.parametrize("norm", NORMS)
def test_a_config_reaches_the_transformer(norm):
    config = DecoderConfig("transformer", embedding_dim=8, hidden_dim=8, heads=2, layers=5, norm=norm)
    for positions in POSITIONS:
        named = dataclasses.replace(
            config, positions=positions, **{"max_positions": 9} if positions == "learned" else {}
        )
        decoder = build_decoder(named, vocabulary_size=9, annotation_dim=6)
        assert len(decoder.layers) == 5
        assert type(decoder.last_norm) is type(NORMS[norm].last(8))
        assert type(decoder.positions) is POSITIONS[positions]


def test_the_heads_that_are_shown_are_the_decoders_own(tiny_checkpoint):
    first = load_checkpoint(tiny_checkpoint)
    regions = RegionEncoderConfig(name="transformer", dim=8, heads=2)
    for attention, heads in (("soft", 0), ("multi_head", 4)):
        decoder = dataclasses.replace(first.decoder, attention=attention, attention_dim=8, heads=heads or 8)
        model, encoder = build_model(first.encoder, decoder, len(first.vocabulary), region_encoder=regions)
        checkpoint = dataclasses.replace(first, model=model, encoder=encoder, decoder=decoder, region_encoder=regions)
        if heads:
            assert Captioner(checkpoint, head=3).attends  # of four, though the region encoder has two
        with pytest.raises(ValueError, match="heads 0 to 3" if heads else "this model's attention has no heads"):
            Captioner(checkpoint, head=4 if heads else 0)


def test_a_caption_longer_than_the_learned_positions_is_refused_with_the_way_out():
    decoder = decoder_of(positions="learned", max_positions=4)
    a = annotations(1)
    assert decoder(a, torch.tensor([[[START, 5, 6, 7, END]]])).logits.shape == (4, V)
    with pytest.raises(ValueError, match=r"max_positions=4 is too few for a caption of 5 words.*max_length"):
        decoder(a, torch.tensor([[[START, 5, 6, 7, 8, END]]]))
    with torch.no_grad():
        decoder.L_o.bias[END] = -100.0  # never ends
    with pytest.raises(ValueError, match=r"max_positions=4 is too few for a caption of 5 words"):
        search(decoder, a, SearchConfig(beam_size=2, max_length=30))
    assert len(search(decoder, a, SearchConfig(beam_size=2, max_length=3))[0][0].ids) == 3


def test_the_alphas_are_the_last_layers():
    decoder = decoder_of()
    with torch.no_grad():  # the last layer asks nothing: it looks everywhere alike
        for weight in decoder.layers[-1].look.query.parameters():
            weight.zero_()
    alphas = decoder(annotations(1), torch.tensor([[[START, 5, 6, END]]])).alphas
    torch.testing.assert_close(alphas, torch.full_like(alphas, 1 / LOCATIONS))
