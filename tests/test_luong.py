"""Luong's decoder by hand, and what its order of operations means."""

import math

import pytest
import torch
from known_weights import fill

from captioning.config import DecoderConfig
from captioning.listening import forced
from captioning.models.alignment import AdditiveAlignment, ConcatAlignment, DotAlignment, GeneralAlignment
from captioning.models.attention import Look, OpenGate, SoftAttention, looking
from captioning.models.decoder import Step
from captioning.models.luong import LuongDecoder, LuongState
from captioning.models.registry import build_decoder
from captioning.vocabulary import END, PAD, START


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


A = torch.tensor([[[0.2], [0.6]]])  # one image, L = 2, D = 1; mean 0.4


def one_dimensional_decoder(*, input_feeding: bool) -> LuongDecoder:
    """n = m = D = 1, V = 5, every weight known."""
    decoder = LuongDecoder(
        SoftAttention(DotAlignment(query_dim=1, annotation_dim=1, dim=1)),
        OpenGate(),
        vocabulary_size=5,
        annotation_dim=1,
        embedding_dim=1,
        hidden_dim=1,
        input_feeding=input_feeding,
    )
    fed = [[0.0], [0.0], [0.0], [2.0]] if input_feeding else [[]] * 4
    fill(
        decoder,
        E__weight=[0.0, 0.5, 0.0, 0.0, -1.0],
        init_h__weight=[1.0],
        init_h__bias=[0.0],
        init_c__weight=[2.0],
        init_c__bias=[0.0],
        lstm_word__weight=[1.0, 0.0, 2.0, 1.0],  # rows: i, f, o, g
        lstm_word__bias=[0.0, 1.0, 0.0, 0.0],
        lstm_state__weight=[[w, *f] for w, f in zip([0.5, 0.0, 0.0, 1.0], fed, strict=True)],  # columns: h, h~
        W_c__weight=[[3.0, 1.0]],  # columns: c, h
        W_c__bias=[0.1],
        L_o__weight=[0.0, 0.0, 1.0, -1.0, 2.0],
        L_o__bias=[0.0, 0.0, 0.1, 0.0, 0.0],
    )
    return decoder.eval()


def test_a_config_says_whether_what_was_said_is_fed():
    sizes = {"vocabulary_size": 9, "annotation_dim": 6}
    for fed in (False, True):
        assert build_decoder(DecoderConfig("luong", input_feeding=fed), **sizes).input_feeding == fed


def one_step(y: float, h: float, c: float, fed: float) -> tuple[float, float, float, list[float]]:
    """h_t, c_t, h~_t and alpha_t from E y_{t-1}, h_{t-1}, c_{t-1} and h~_{t-1}, with the weights above."""
    i, f, o = sigmoid(y + 0.5 * h), sigmoid(1.0), sigmoid(2 * y)
    g = math.tanh(y + h + 2 * fed)
    c = f * c + i * g
    h = o * math.tanh(c)
    e = [math.exp(h * 0.2), math.exp(h * 0.6)]  # eq. 8, dot, with the new h
    alpha = [x / sum(e) for x in e]  # eq. 7
    context = alpha[0] * 0.2 + alpha[1] * 0.6
    return h, c, math.tanh(3 * context + h + 0.1), alpha  # eq. 5


@pytest.mark.parametrize("input_feeding", [False, True])
def test_two_steps_by_hand(input_feeding):
    decoder = one_dimensional_decoder(input_feeding=input_feeding)
    memory = decoder.prepare(A)
    state = decoder.initial_state(memory)
    h, c, spoken = math.tanh(0.4), math.tanh(0.8), 0.0
    for word, y in ((START, 0.5), (4, -1.0)):
        h, c, spoken, alpha = one_step(y, h, c, spoken if input_feeding else 0.0)
        step = decoder.step(torch.tensor([word]), state, memory)
        state = step.state
        assert (state.h.item(), state.c.item(), state.spoken.item()) == pytest.approx((h, c, spoken), rel=1e-5)
        assert step.alpha[0].tolist() == pytest.approx(alpha, rel=1e-5)
        assert step.logits[0].tolist() == pytest.approx([0, 0, spoken + 0.1, -spoken, 2 * spoken], rel=1e-5)


def test_input_feeding_lets_the_last_look_change_the_next_step():
    for input_feeding in (False, True):
        decoder = one_dimensional_decoder(input_feeding=input_feeding)
        memory, h = decoder.prepare(A), torch.tensor([[0.3]])
        states = [LuongState(h, h, torch.tensor([[x]])) for x in (-0.5, 0.5)]
        logits = [decoder.step(torch.tensor([4]), state, memory).logits for state in states]
        assert torch.equal(*logits) != input_feeding


def test_the_look_depends_on_the_word_just_read():
    decoder = one_dimensional_decoder(input_feeding=False)
    memory = decoder.prepare(A)
    state = decoder.initial_state(memory)
    alphas = [decoder.step(torch.tensor([word]), state, memory).alpha for word in (START, 4)]
    assert (alphas[0] - alphas[1]).abs().max() > 1e-3


def test_without_input_feeding_a_caption_looks_once_for_all_its_words(monkeypatch):
    calls = []
    look = SoftAttention.forward
    monkeypatch.setattr(SoftAttention, "forward", lambda *given: calls.append(len(given[1])) or look(*given))
    words = torch.tensor([[[START, 4, 4, END]]])
    for input_feeding, expected in ((False, [3]), (True, [1, 1, 1])):
        calls.clear()
        one_dimensional_decoder(input_feeding=input_feeding)(A, words)
        assert calls == expected


def test_eq_8_dot_general_and_concat_by_hand():
    # h = (1, 2), a = (3, 4): dot 3 + 8 = 11; general, W swaps: h . (4, 3) = 10.
    h, a = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 4.0]]])
    dot = DotAlignment(query_dim=2, annotation_dim=2, dim=0)
    assert dot(h, dot.keys(a)).item() == 11
    general = GeneralAlignment(query_dim=2, annotation_dim=2, dim=0)
    fill(general, key__weight=[[0.0, 1.0], [1.0, 0.0]])
    assert general(h, general.keys(a)).item() == 10
    # concat, k = 2: W [h; a] = (0.1 * 1 + 0.2 * 4, -0.5 * 2 + 0.1 * 3) = (0.9, -0.7).
    concat = ConcatAlignment(query_dim=2, annotation_dim=2, dim=2)
    fill(concat, W__weight=[[0.1, 0.0, 0.0, 0.2], [0.0, -0.5, 0.1, 0.0]], v__weight=[2.0, 3.0])
    expected = 2 * math.tanh(0.9) + 3 * math.tanh(-0.7)
    assert concat(h, concat.keys(a)).item() == pytest.approx(expected, rel=1e-5)


def test_concat_is_the_additive_score_by_another_name():
    torch.manual_seed(0)
    concat = ConcatAlignment(query_dim=4, annotation_dim=3, dim=5)
    additive = AdditiveAlignment(query_dim=4, annotation_dim=3, dim=5)
    with torch.no_grad():
        additive.query.weight.copy_(concat.W.weight[:, :4])
        additive.key.weight.copy_(concat.W.weight[:, 4:])
        additive.key.bias.zero_()
        additive.v.weight.copy_(concat.v.weight)
    query, a = torch.randn(2, 3, 4), torch.randn(2, 6, 3)
    torch.testing.assert_close(concat(query, concat.keys(a)), additive(query, additive.keys(a)))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two images with two captions each, of different lengths."""
    torch.manual_seed(0)
    words = torch.tensor([[[START, 4, 5, 6, END], [START, 5, END, PAD, PAD]], [[START, 6, 4, END, PAD], [PAD] * 5]])
    return torch.randn(2, 5, 3), words


@pytest.mark.parametrize("input_feeding", [False, True])
def test_dropout_acts_on_the_state_in_eq_5_and_on_what_is_said_in_eq_6(input_feeding):
    a, words = batch()
    config = DecoderConfig(name="luong", embedding_dim=8, hidden_dim=4, dropout=0.5, input_feeding=input_feeding)
    decoder = build_decoder(config, vocabulary_size=7, annotation_dim=3).train()
    memory = decoder.prepare(a)

    def twice() -> tuple[Step, Step]:
        one, other = (decoder.step(words[:, 0, 0], decoder.initial_state(memory), memory) for _ in range(2))
        return one, other

    one, other = twice()
    assert torch.equal(one.state.h, other.state.h)
    assert not torch.equal(one.state.spoken, other.state.spoken)
    with torch.no_grad():
        decoder.W_c.weight[:, 3:] = 0  # eq. 5 without h_t
    one, other = twice()
    assert torch.equal(one.state.spoken, other.state.spoken)
    assert not torch.equal(one.logits, other.logits)
    assert not torch.equal(decoder(a, words).logits, decoder(a, words).logits)


@pytest.mark.parametrize("input_feeding", [False, True])
def test_it_can_be_made_to_look_elsewhere_word_by_word_or_all_at_once(input_feeding):
    a, words = batch()
    config = DecoderConfig(name="luong", embedding_dim=4, hidden_dim=4, input_feeding=input_feeding)
    decoder = build_decoder(config, vocabulary_size=7, annotation_dim=3).eval()
    own = decoder(a, words)
    with forced(decoder, own.alphas):
        torch.testing.assert_close(decoder(a, words).logits, own.logits)
    with forced(decoder, own.alphas.flip(-1)):
        assert (decoder(a, words).logits - own.logits).abs().max() > 1e-3


@pytest.mark.parametrize("input_feeding", [False, True])
def test_hard_attention_is_asked_with_the_new_state_and_can_be_told_where_to_look(input_feeding):
    a, words = batch()
    config = DecoderConfig(
        name="luong", attention="hard", gate="none", embedding_dim=4, hidden_dim=4, input_feeding=input_feeding
    )
    decoder = build_decoder(config, vocabulary_size=7, annotation_dim=3).train(False)
    with looking(decoder, Look("sample", generator=torch.Generator().manual_seed(0))):
        sampled = decoder(a, words)
    assert sampled.locations.shape == sampled.log_probs.shape == sampled.entropies.shape == (2, 2, 4)
    told = decoder(a, words, locations=sampled.locations)
    torch.testing.assert_close(told.logits, sampled.logits)
    torch.testing.assert_close(told.log_probs[told.mask], sampled.log_probs[told.mask])
    e = decoder.attention.alignment(told.states.flatten(1, 2), decoder.prepare(a).keys)  # of the h_t themselves
    torch.testing.assert_close(e.softmax(-1).view_as(told.alphas)[told.mask], told.alphas[told.mask])
    likeliest = decoder(a, words)
    assert torch.equal(likeliest.locations[told.mask], likeliest.alphas.argmax(-1)[told.mask])
