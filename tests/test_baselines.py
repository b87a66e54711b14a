"""Decoders without attention: by hand, where the image gets in, and what they say when asked where they looked."""

import math

import pytest
import torch
from known_weights import fill

from captioning.config import DecoderConfig, LossConfig, RegionEncoderConfig, Settings
from captioning.models.baselines import PlainLSTM
from captioning.models.decoder import AttentionLSTM, State
from captioning.models.registry import build_decoder
from captioning.vocabulary import START

NO_PENALTY = LossConfig(lambda_ds=0.0)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def one_dimensional(inject: str, context: str = "mean", **weights: list) -> PlainLSTM:
    """n = m = D = 1, V = 5, every weight known."""
    config = DecoderConfig("lstm", inject=inject, context=context, embedding_dim=1, hidden_dim=1, dropout=0.0)
    decoder = build_decoder(config, vocabulary_size=5, annotation_dim=1)
    known = {
        "E__weight": [0.0, 0.5, 0.0, 0.0, -1.0],
        "lstm_word__weight": [1.0, 0.0, 2.0, 1.0],  # rows: i, f, o, g
        "lstm_word__bias": [0.0, 1.0, 0.0, 0.0],
        "lstm_state__weight": [0.5, 0.0, 0.0, 1.0],
        "L_h__weight": [1.0],
        "L_h__bias": [0.0],
        "L_o__weight": [0.0, 0.0, 1.0, -1.0, 2.0],
        "L_o__bias": [0.0, 0.0, 0.1, 0.0, 0.0],
    }
    fill(decoder, **{**known, **weights})
    return decoder.eval()


A = torch.tensor([[[0.2], [0.6]]])  # mean 0.4, last 0.6
Y = 0.5  # E of START


def lstm(x: float, h: float, c: float, seen: tuple[float, float] = (0.0, 0.0)) -> tuple[float, float]:
    """Eqs. 1-3 with the weights above; `seen` is what an image adds to i and to g."""
    i, f, o = sigmoid(x + 0.5 * h + seen[0]), sigmoid(1), sigmoid(2 * x)
    c = f * c + i * math.tanh(x + h + seen[1])
    return o * math.tanh(c), c


def check_first_step(decoder: PlainLSTM, h: float, c: float, seen: float = 0.0) -> None:
    memory = decoder.prepare(A)
    step = decoder.step(torch.tensor([START]), decoder.initial_state(memory), memory)
    hidden = math.tanh(h + seen + Y)  # eq. 7
    assert step.logits[0].tolist() == pytest.approx([0.0, 0.0, hidden + 0.1, -hidden, 2 * hidden], rel=1e-5)
    assert (step.state.h.item(), step.state.c.item()) == pytest.approx((h, c), rel=1e-5)
    assert (step.alpha, step.beta) == (None, None)


@pytest.mark.parametrize(("context", "v"), [("mean", 0.4), ("last", 0.6)])
def test_the_image_as_first_input_by_hand(context, v):
    decoder = one_dimensional("first", context, inject__word__weight=[3.0], inject__word__bias=[-1.0])
    h, c = lstm(3 * v - 1, 0.0, 0.0)  # x_{-1} = 3 v - 1, read from a zero state
    check_first_step(decoder, *lstm(Y, h, c))


@pytest.mark.parametrize(("context", "v"), [("mean", 0.4), ("last", 0.6)])
def test_the_image_as_initial_state_by_hand(context, v):
    weights = {
        "inject__h__weight": [1.0],
        "inject__c__weight": [2.0],
        "inject__h__bias": [0.0],
        "inject__c__bias": [0.1],
    }
    decoder = one_dimensional("init", context, **weights)
    check_first_step(decoder, *lstm(Y, math.tanh(v), math.tanh(2 * v + 0.1)))


@pytest.mark.parametrize(("context", "v"), [("mean", 0.4), ("last", 0.6)])
def test_the_image_at_every_step_by_hand(context, v):
    decoder = one_dimensional(
        "each_step", context, inject__lstm__weight=[2.0, 0.0, 0.0, -1.0], inject__L_v__weight=[3.0]
    )
    check_first_step(decoder, *lstm(Y, 0.0, 0.0, seen=(2 * v, -v)), seen=3 * v)


def test_the_image_at_every_step_is_the_papers_decoder_with_a_look_that_never_moves():
    torch.manual_seed(0)
    sizes = {"embedding_dim": 4, "hidden_dim": 5}
    attending = build_decoder(DecoderConfig(gate="none", **sizes), vocabulary_size=9, annotation_dim=3)
    plain = build_decoder(DecoderConfig("lstm", inject="each_step", **sizes), vocabulary_size=9, annotation_dim=3)
    assert isinstance(attending, AttentionLSTM)
    with torch.no_grad():
        attending.attention.alignment.v.weight.zero_()  # all scores alike: alpha is uniform, z the mean
        plain.load_state_dict(
            {name: x for name, x in attending.state_dict().items() if name in plain.state_dict()}
            | {
                "lstm_state.weight": attending.lstm_state.weight[:, :5],
                "inject.lstm.weight": attending.lstm_state.weight[:, 5:],
                "inject.L_v.weight": attending.L_z.weight,
            }
        )
    a, words = torch.randn(2, 6, 3), torch.randint(4, 9, (4,))
    state = State(torch.randn(4, 5), torch.randn(4, 5))
    expected = attending.eval().step(words, state, attending.prepare(a))
    found = plain.eval().step(words, state, plain.prepare(a))
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.state, expected.state)


@pytest.mark.parametrize("inject", ["first", "init", "each_step"])
def test_the_mean_knows_no_order_of_the_regions_and_the_last_one_only_itself(inject):
    torch.manual_seed(0)
    a = torch.randn(1, 6, 3)
    words = torch.tensor([[[START, 4, 5, 6]]])
    for context in ("mean", "last"):
        config = DecoderConfig("lstm", inject=inject, context=context, embedding_dim=4, hidden_dim=5)
        decoder = build_decoder(config, vocabulary_size=9, annotation_dim=3).eval()
        reordered = a[:, [4, 2, 0, 1, 3, 5]]
        torch.testing.assert_close(decoder(reordered, words).logits, decoder(a, words).logits)
        moved = decoder(a.roll(1, dims=1), words).logits
        assert torch.allclose(moved, decoder(a, words).logits, atol=1e-5) == (context == "mean")


def settings(decoder: DecoderConfig, regions: str = "none", loss: LossConfig = NO_PENALTY) -> Settings:
    return Settings("d.h5", "runs/x", decoder=decoder, region_encoder=RegionEncoderConfig(regions), loss=loss)


@pytest.mark.parametrize(("regions", "context"), [("none", "mean"), ("bilstm", "mean"), ("lstm", "last")])
def test_by_default_the_context_is_the_last_state_of_an_lstm_over_the_regions_and_else_the_mean(regions, context):
    assert settings(DecoderConfig("lstm"), regions).decoder.context == context
    assert settings(DecoderConfig(), regions).decoder.context is None


def test_the_mean_of_an_lstms_states_can_be_had_too():
    assert settings(DecoderConfig("lstm", context="mean"), "lstm").decoder.context == "mean"


@pytest.mark.parametrize("regions", ["none", "bilstm", "self_attention"])
def test_the_last_vector_means_nothing_where_it_has_not_read_the_others(regions):
    with pytest.raises(ValueError, match=r"decoder\.context='last' needs region_encoder\.name='lstm'.* use 'mean'"):
        settings(DecoderConfig("lstm", context="last"), regions)


def test_a_penalty_on_the_attention_needs_one():
    with pytest.raises(ValueError, match=r"loss\.lambda_ds=1\.0 needs attention, and decoder\.name='lstm' has none"):
        settings(DecoderConfig("lstm"), loss=LossConfig())


@pytest.mark.parametrize("changed", [{"alignment": "dot"}, {"gate": "none"}])
def test_settings_of_the_attention_are_refused_where_there_is_none(changed):
    (name,) = changed
    with pytest.raises(ValueError, match=rf"^{name}='\w+' has no meaning with decoder\.name='lstm'; leave it out$"):
        DecoderConfig("lstm", **changed)


@pytest.mark.parametrize("changed", [{"inject": "first"}, {"context": "last"}])
def test_how_the_image_gets_into_the_lstm_is_refused_where_something_attends(changed):
    (name,) = changed
    with pytest.raises(ValueError, match=rf"^{name}='\w+' has no meaning with decoder\.name='attention_lstm'"):
        DecoderConfig(**changed)
