"""Each equation of Xu et al. (2015) as a test, with numbers worked by hand in the comments."""

import math

import pytest
import torch
from known_weights import fill

from captioning.config import DecoderConfig
from captioning.losses import doubly_stochastic_penalty, word_nll
from captioning.models.alignment import (
    AdditiveAlignment,
    DotAlignment,
    GeneralAlignment,
    ScaledDotAlignment,
)
from captioning.models.attention import Gate, OpenGate, SoftAttention
from captioning.models.decoder import AttentionLSTM, State
from captioning.models.registry import build_decoder
from captioning.vocabulary import END, PAD, START


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


A = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]])  # one image, L = 3, D = 2


def one_dimensional_decoder(*, query_word: bool = False) -> AttentionLSTM:
    """n = m = D = 1, V = 5, every weight known."""
    alignment = DotAlignment(query_dim=1, annotation_dim=1, dim=1)
    decoder = AttentionLSTM(
        SoftAttention(alignment),
        Gate(1, 1),
        vocabulary_size=5,
        annotation_dim=1,
        embedding_dim=1,
        hidden_dim=1,
        query_word=query_word,
    )
    fill(
        decoder,
        E__weight=[0.0, 0.5, 0.0, 0.0, -1.0],
        init_h__weight=[1.0],
        init_h__bias=[0.0],
        init_c__weight=[2.0],
        init_c__bias=[0.0],
        gate__f_beta__weight=[1.0],
        gate__f_beta__bias=[0.0],
        lstm_word__weight=[1.0, 0.0, 2.0, 1.0],  # rows: i, f, o, g
        lstm_word__bias=[0.0, 1.0, 0.0, 0.0],
        lstm_state__weight=[[0.5, 0.0], [0.0, 0.5], [0.0, 0.0], [1.0, 1.0]],  # columns: h, z
        L_h__weight=[1.0],
        L_h__bias=[0.0],
        L_z__weight=[0.5],
        L_o__weight=[0.0, 0.0, 1.0, -1.0, 2.0],
        L_o__bias=[0.0, 0.0, 0.1, 0.0, 0.0],
    )
    return decoder.eval()


def test_eqs_1_to_3_and_7_one_step_by_hand():
    decoder = one_dimensional_decoder()
    a = torch.tensor([[[0.2], [0.6]]])  # mean 0.4
    h0, c0 = math.tanh(0.4), math.tanh(0.8)
    e = [h0 * 0.2, h0 * 0.6]  # eq. 4, dot
    alpha = [math.exp(x) / sum(map(math.exp, e)) for x in e]  # eq. 5
    z = sigmoid(h0) * (alpha[0] * 0.2 + alpha[1] * 0.6)  # eq. 13, gated
    y = 0.5  # E of START
    i, f, o = sigmoid(y + 0.5 * h0), sigmoid(1 + 0.5 * z), sigmoid(2 * y)  # eq. 1
    g = math.tanh(y + h0 + z)
    c = f * c0 + i * g  # eq. 2
    h = o * math.tanh(c)  # eq. 3
    hidden = math.tanh(h + 0.5 * z + y)  # eq. 7, with the tanh of the original code
    expected = [0.0, 0.0, hidden + 0.1, -hidden, 2 * hidden]
    memory = decoder.prepare(a)
    step = decoder.step(torch.tensor([START]), decoder.initial_state(memory), memory)
    assert step.logits[0].tolist() == pytest.approx(expected, rel=1e-5)
    assert step.alpha[0].tolist() == pytest.approx(alpha, rel=1e-5)
    assert step.beta[0].item() == pytest.approx(sigmoid(h0), rel=1e-5)
    assert (step.state.h.item(), step.state.c.item()) == pytest.approx((h, c), rel=1e-5)


def test_a_query_that_has_read_the_word_shifts_the_scores_and_nothing_else():
    decoder = one_dimensional_decoder(query_word=True)
    fill(decoder, query_word__weight=[3.0])
    a = torch.tensor([[[0.2], [0.6]]])
    memory = decoder.prepare(a)
    state = decoder.initial_state(memory)
    step = decoder.step(torch.tensor([START]), state, memory)
    query = math.tanh(0.4) + 3 * 0.5  # h_0 + W E y_0
    e = [query * 0.2, query * 0.6]
    assert step.alpha[0].tolist() == pytest.approx([math.exp(x) / sum(map(math.exp, e)) for x in e], rel=1e-5)
    assert step.beta[0].item() == pytest.approx(sigmoid(math.tanh(0.4)), rel=1e-5)  # the gate sees h_0 alone


def test_the_initial_state_is_two_mlps_of_the_mean_annotation():
    decoder = one_dimensional_decoder()
    state = decoder.initial_state(decoder.prepare(torch.tensor([[[0.2], [0.6]], [[-1.0], [0.0]]])), 2)
    assert state.h.flatten().tolist() == pytest.approx([math.tanh(0.4)] * 2 + [math.tanh(-0.5)] * 2, rel=1e-5)
    assert state.c.flatten().tolist() == pytest.approx([math.tanh(0.8)] * 2 + [math.tanh(-1.0)] * 2, rel=1e-5)


def test_eq_4_additive_is_v_tanh_of_key_plus_query():
    alignment = AdditiveAlignment(query_dim=1, annotation_dim=2, dim=2)
    fill(
        alignment,
        key__weight=[[1.0, 0.0], [0.0, 1.0]],
        key__bias=[0.0, 0.5],
        query__weight=[1.0, -1.0],
        v__weight=[2.0, 3.0],
    )
    e = alignment(torch.tensor([[[0.3]]]), alignment.keys(A))
    # location 0: 2 tanh(1 + 0.3) + 3 tanh(0 + 0.5 - 0.3), and so on
    expected = [
        2 * math.tanh(1.3) + 3 * math.tanh(0.2),
        2 * math.tanh(0.3) + 3 * math.tanh(2.2),
        2 * math.tanh(1.3) + 3 * math.tanh(1.2),
    ]
    assert e.flatten().tolist() == pytest.approx(expected, rel=1e-5)


def test_eq_4_dot_general_and_scaled_dot_by_hand():
    query = torch.tensor([[[2.0, 3.0]]])
    dot = DotAlignment(query_dim=2, annotation_dim=2, dim=9)
    assert dot(query, dot.keys(A)).flatten().tolist() == [2.0, 6.0, 5.0]
    general = GeneralAlignment(query_dim=2, annotation_dim=2, dim=9)
    fill(general, key__weight=[[0.0, 1.0], [1.0, 0.0]])  # swaps: W a = (0, 1), (2, 0), (1, 1)
    assert general(query, general.keys(A)).flatten().tolist() == [3.0, 4.0, 5.0]
    scaled = ScaledDotAlignment(query_dim=2, annotation_dim=2, dim=4)
    fill(
        scaled,
        key__weight=[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]],
        query__weight=[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]],
        query__bias=[0.0] * 4,
    )
    assert scaled(query, scaled.keys(A)).flatten().tolist() == pytest.approx([1.0, 3.0, 2.5])  # halves: sqrt(4) = 2


def test_a_dot_alignment_refuses_unequal_dimensions():
    with pytest.raises(
        ValueError, match=r"alignment='dot' needs hidden_dim == encoder dim \(got 5 and 2\); use 'general'"
    ):
        build_decoder(DecoderConfig(alignment="dot", hidden_dim=5), vocabulary_size=9, annotation_dim=2)


def test_eqs_5_and_13_soft_attention_is_the_expectation_of_the_annotations():
    attention = SoftAttention(DotAlignment(query_dim=2, annotation_dim=2, dim=2))
    query = torch.tensor([[math.log(2.0), 0.0]])  # e = ln 2, 0, ln 2: weights 2/5, 1/5, 2/5
    context = attention(query, attention.prepare(A))
    assert context.alpha[0].tolist() == pytest.approx([0.4, 0.2, 0.4])
    assert context.z[0].tolist() == pytest.approx([0.4 * 1 + 0.4 * 1, 0.2 * 2 + 0.4 * 1])


def test_the_rows_of_an_image_share_its_memory():
    attention = SoftAttention(GeneralAlignment(query_dim=4, annotation_dim=3, dim=0))
    a, query = torch.randn(2, 5, 3), torch.randn(6, 4)
    shared = attention(query, attention.prepare(a))
    copied = attention(query, attention.prepare(a.repeat_interleave(3, dim=0)))
    torch.testing.assert_close(shared.z, copied.z)
    torch.testing.assert_close(shared.alpha, copied.alpha)


def test_the_gate_is_a_sigmoid_of_the_state_scalar_or_per_feature():
    gate = Gate(2, 1)
    fill(gate, f_beta__weight=[1.0, -2.0], f_beta__bias=[0.5])
    assert gate(torch.tensor([[3.0, 1.0]])).item() == pytest.approx(sigmoid(3 - 2 + 0.5))
    assert Gate(2, 7)(torch.zeros(4, 2)).shape == (4, 7)
    assert OpenGate()(torch.randn(4, 2)).tolist() == [[1.0]] * 4


def test_a_closed_gate_hides_the_image():
    torch.manual_seed(0)
    decoder = build_decoder(DecoderConfig(embedding_dim=4, hidden_dim=4), vocabulary_size=7, annotation_dim=3).eval()
    fill(decoder, gate__f_beta__weight=[0.0] * 4, gate__f_beta__bias=[-100.0])
    state = State(torch.randn(1, 4), torch.randn(1, 4))
    logits = [decoder.step(torch.tensor([5]), state, decoder.prepare(torch.randn(1, 6, 3))).logits for _ in range(2)]
    torch.testing.assert_close(*logits)


def test_eq_14_the_penalty_by_hand_over_real_words_only():
    # L = 2. Caption 1 has two words: sums (0.9, 1.1). Caption 2 has one: sums (0.7, 0.3). Caption 3 is absent.
    alphas = torch.tensor([[[[0.5, 0.5], [0.4, 0.6]], [[0.7, 0.3], [9.0, 9.0]], [[9.0, 9.0], [9.0, 9.0]]]])
    mask = torch.tensor([[[True, True], [True, False], [False, False]]])
    penalty = doubly_stochastic_penalty(alphas, mask)
    expected = [(0.1**2 + 0.1**2) / 2, (0.3**2 + 0.7**2) / 2, 0.0]
    assert penalty[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_penalty_vanishes_when_every_location_gets_attention_one():
    alphas = torch.full((1, 1, 4, 4), 0.25)
    assert doubly_stochastic_penalty(alphas, torch.ones(1, 1, 4, dtype=torch.bool)).item() == pytest.approx(
        0, abs=1e-12
    )


def test_the_nll_is_minus_log_p_of_each_word_and_smoothing_mixes_in_the_uniform():
    logits = torch.tensor([[math.log(1.0), math.log(2.0), math.log(5.0)]])  # p = 1/8, 2/8, 5/8
    target = torch.tensor([1])
    assert word_nll(logits, target).item() == pytest.approx(math.log(4))
    uniform = (math.log(8) + math.log(4) + math.log(8 / 5)) / 3
    smoothed = word_nll(logits, target, label_smoothing=0.1).item()
    assert smoothed == pytest.approx(0.9 * math.log(4) + 0.1 * uniform)


def test_teacher_forcing_scores_each_word_after_the_ones_before_it():
    decoder = one_dimensional_decoder()
    output = decoder(torch.tensor([[[0.2], [0.6]]]), torch.tensor([[[START, 4, END, PAD, PAD]]]))
    assert output.targets.tolist() == [4, END]
    assert output.mask.tolist() == [[[True, True, False, False]]]
