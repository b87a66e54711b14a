"""Hard attention with several glimpses per word: between the paper's one location and soft attention's all of them."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from test_decoder import batch
from test_hard_estimators import EXACT, many_estimates
from tiny_runs import TINY, tiny_settings

from benchmarks.hard_oracle import paths, small_oracle
from captioning import training
from captioning.api import load_captioner
from captioning.checkpoint import load_checkpoint, save_checkpoint
from captioning.config import DecoderConfig, HardConfig, SearchConfig
from captioning.data import CaptionData
from captioning.decoding import search
from captioning.diagnosis import diagnose
from captioning.models.alignment import GeneralAlignment
from captioning.models.attention import HardAttention, Look, SoftAttention, drawn_in_order, looking
from captioning.models.captioner import build_model
from captioning.models.decoder import Decoder
from captioning.models.registry import build_decoder
from captioning.run import start
from captioning.vocabulary import END, START


def attention_of(glimpses: int) -> HardAttention:
    torch.manual_seed(0)
    alignment = GeneralAlignment(query_dim=5, annotation_dim=3, dim=0)
    return HardAttention(alignment, glimpses=glimpses).double().eval()


def memory_and_query(attention: HardAttention, rows: int = 6):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    return attention.prepare(a), torch.randn(rows, 5, generator=generator, dtype=torch.float64)


def decoder_with(name: str, attention: str, glimpses: int = 1) -> Decoder:
    torch.manual_seed(0)
    sizes = {"embedding_dim": 4, "hidden_dim": 6, "attention_dim": 3, "dropout": 0.0}
    config = DecoderConfig(name=name, attention=attention, glimpses=glimpses, **sizes)
    decoder = build_decoder(config, vocabulary_size=11, annotation_dim=6).double().eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(std=0.7)
    return decoder


def test_the_context_is_of_the_likeliest_locations_weighed_among_themselves():
    attention = attention_of(2)
    memory, query = memory_and_query(attention)
    context = attention(query, memory)
    for row in range(6):
        first, second = context.alpha[row].argsort(descending=True)[:2].tolist()
        assert context.location[row].tolist() == [first, second]
        p, q = context.alpha[row, first], context.alpha[row, second]
        z = (p * memory.a[row // 3, first] + q * memory.a[row // 3, second]) / (p + q)
        torch.testing.assert_close(context.z[row], z)
        assert context.log_prob[row].item() == pytest.approx((p * q / (1 - p)).log().item())


def test_ordered_draws_have_probability_one_together():
    log_alpha = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()
    for m in (1, 2, 3, 4):
        every = torch.tensor(list(itertools.permutations(range(4), m)))
        found = drawn_in_order(log_alpha.expand(len(every), -1), every)
        assert found.exp().sum().item() == pytest.approx(1)


def test_a_draw_from_what_is_hardly_left_is_exact_in_single_precision():
    results = []
    for dtype in (torch.float32, torch.float64):
        scores = torch.tensor([[0.0, -30.0, -31.0, -60.0]], dtype=dtype, requires_grad=True)
        found = drawn_in_order(scores.log_softmax(dim=-1), torch.tensor([[0, 2, 1]]))
        found.sum().backward()
        results.append(torch.cat([found.detach(), scores.grad.flatten()]).double())
    # The second is drawn from e^-30, e^-31 and e^-60 alone: log p = -1 - log(1 + e^-1) up to e^-30; the third for sure.
    assert results[1][0].item() == pytest.approx(-1 - math.log1p(math.exp(-1)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_ordered_pairs_are_drawn_as_often_as_their_log_prob_says():
    attention = attention_of(2)
    memory, query = memory_and_query(attention)
    one = memory.first(1)
    with looking(attention, Look("sample", generator=torch.Generator().manual_seed(1))):
        drawn = attention(query[:1].expand(20000, -1), one)
    seen = drawn.location[:, 0] * 4 + drawn.location[:, 1]
    for pair in seen.unique().tolist():
        share = (seen == pair).double().mean().item()
        wanted = drawn.log_prob[seen == pair][0].exp().item()
        assert share == pytest.approx(wanted, abs=4.5 * math.sqrt(wanted * (1 - wanted) / 20000) + 1e-4)
    assert (drawn.location[:, 0] != drawn.location[:, 1]).all()


@pytest.mark.parametrize("name", ["attention_lstm", "luong"])
@pytest.mark.parametrize("look", ["argmax", "sample"])
def test_with_all_locations_hard_is_soft(name, look):
    hard, soft = decoder_with(name, "hard", 5), decoder_with(name, "soft")
    a, words = batch()
    with looking(hard, Look(look)):
        one, other = hard(a, words).logits, soft(a, words).logits
    torch.testing.assert_close(one, other)
    found, expected = (
        torch.autograd.grad(logits.sin().sum(), list(decoder.parameters()), materialize_grads=True)
        for logits, decoder in ((one, hard), (other, soft))
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["attention_lstm", "luong"])
@pytest.mark.parametrize("projects", [False, True])
def test_forward_equals_repeated_steps(name, projects, monkeypatch):
    decoder, (a, words) = decoder_with(name, "hard", 3), batch()
    if name == "attention_lstm":
        monkeypatch.setattr(type(decoder), "_projects", lambda *_: projects)
    output = decoder(a, words)
    memory = decoder.prepare(a)
    state = decoder.initial_state(memory, words.shape[1])
    logits, places = [], []
    for t in range(words.shape[2] - 1):
        step = decoder.step(words[:, :, t].flatten(), state, memory)
        state = step.state
        logits.append(step.logits.unflatten(0, words.shape[:2]))
        places.append(step.location.unflatten(0, words.shape[:2]))
    torch.testing.assert_close(output.logits, torch.stack(logits, dim=2)[output.mask])
    assert torch.equal(output.locations[output.mask], torch.stack(places, dim=2)[output.mask])
    again = decoder(a, words, locations=output.locations)
    torch.testing.assert_close(again.logits, output.logits)


def test_an_image_with_the_mean_context_has_no_locations():
    attention = attention_of(2)
    with looking(attention, Look("sample", expectation_probability=1.0)):
        memory, query = memory_and_query(attention)
        context = attention(query, memory)
    assert (context.location == -1).all()
    assert context.location.shape == (6, 2)
    assert (context.log_prob == 0).all()
    soft = SoftAttention(attention.alignment).double()
    torch.testing.assert_close(context.z, soft(query, soft.prepare(memory.a)).z)


# The oracle: 6 ordered pairs at each of 3 words, 216 paths


PAIRS = [
    dataclasses.replace(EXACT, reward="sentence", baseline="none"),
    dataclasses.replace(EXACT, baseline="leave_one_out", samples=3),
]


def test_the_paths_of_pairs_have_probability_one():
    log_q, _ = paths(small_oracle(glimpses=2))
    assert log_q.shape == (216,)
    assert log_q.exp().sum().item() == pytest.approx(1)


@pytest.mark.parametrize("hard", PAIRS, ids=lambda hard: f"{hard.reward}-{hard.baseline}")
def test_estimators_are_unbiased_for_pairs(hard):
    exact, mean, error = many_estimates(small_oracle(glimpses=2), hard)
    assert torch.cosine_similarity(mean, exact, dim=0) >= 0.999
    assert ((mean - exact).abs() / error.clamp(min=1e-12)).max() < 4.5


# Settings, training, captions


def test_only_hard_attention_has_glimpses():
    with pytest.raises(ValueError, match=r"decoder.glimpses=2 needs decoder.attention='hard' \(got 'soft'\)"):
        DecoderConfig(glimpses=2)
    with pytest.raises(ValueError, match="glimpses must be"):
        DecoderConfig(attention="hard", glimpses=0)


def test_the_relaxation_knows_one_glimpse(tiny_data, tmp_path):
    hard = HardConfig(baseline="none", relaxation="gumbel_straight_through")
    with pytest.raises(ValueError, match=r"hard.relaxation='gumbel_straight_through' needs decoder.glimpses=1"):
        tiny_settings(tiny_data, tmp_path, decoder=with_glimpses(2), hard=hard)


def test_more_glimpses_than_locations_are_refused_when_a_model_is_built():
    encoder = dataclasses.replace(TINY["encoder"], scales=(16,))  # 4x4 places, and 2x2
    build_model(encoder, with_glimpses(4), 9)
    with pytest.raises(ValueError, match=r"decoder.glimpses=5 must not exceed the 4 locations"):
        build_model(encoder, with_glimpses(5), 9)


def test_training_refuses_more_glimpses_than_locations_before_it_begins(tiny_data, tmp_path):
    with pytest.raises(ValueError, match=r"decoder.glimpses=17 must not exceed the 16 locations"):
        start(tiny_settings(tiny_data, tmp_path / "run", decoder=with_glimpses(17)))
    assert not (tmp_path / "run").exists()


def with_glimpses(glimpses: int) -> DecoderConfig:
    return dataclasses.replace(TINY["decoder"], attention="hard", glimpses=glimpses)


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory):
    """A run with three glimpses, from a soft model; its checkpoint, told to go on talking."""
    folder = tmp_path_factory.mktemp("glimpses")
    soft = training.train(tiny_settings(tiny_data, folder / "soft", epochs=1))
    hard = HardConfig(baseline="leave_one_out", samples=2)
    settings = tiny_settings(tiny_data, folder / "run", decoder=with_glimpses(3), hard=hard, init_from=str(soft))
    best = training.train(dataclasses.replace(settings, epochs=1))
    checkpoint = load_checkpoint(best)
    with torch.no_grad():
        checkpoint.model.decoder.get_parameter("L_o.bias")[END] = -9.0  # so that it has something to say
    save_checkpoint(folder / "talkative", checkpoint)
    return folder / "talkative"


def test_a_run_with_glimpses_is_saved_and_captions(trained, tiny_data):
    photo = CaptionData(tiny_data).image(0).permute(1, 2, 0).numpy()
    caption = load_captioner(trained).caption(photo, max_length=5)[0]
    assert caption.locations.shape == (len(caption.words), 3)
    for alpha, places in zip(caption.alphas.reshape(len(caption.words), -1), caption.locations, strict=True):
        assert places.tolist() == np.argsort(-alpha, kind="stable")[:3].tolist()
    mirrored = load_captioner(trained).caption(photo, max_length=5, mirror=True)[0]
    assert mirrored.locations.shape == (len(mirrored.words), 6)


def test_another_number_of_glimpses_may_follow(trained, tiny_data, tmp_path):
    one = tiny_settings(tiny_data, tmp_path / "run", decoder=with_glimpses(1), init_from=str(trained))
    first = load_checkpoint(trained).model.state_dict()
    assert all(torch.equal(x, first[name]) for name, x in start(one).model.state_dict().items())


def test_the_listening_test_moves_the_glimpses_and_their_weights(trained, tiny_data, monkeypatch):
    from captioning import diagnosis

    seen = []
    own = diagnosis.replacements
    monkeypatch.setattr(diagnosis, "replacements", lambda looked, *rest: seen.append(looked) or own(looked, *rest))
    checkpoint, data = load_checkpoint(trained), CaptionData(tiny_data)
    diagnose(checkpoint.model, data, data.indices("val").tolist(), checkpoint.vocabulary)
    looked = seen[0]
    real = looked.sum(dim=-1) > 0.5
    assert ((looked > 0).sum(dim=-1)[real] == 3).all()
    torch.testing.assert_close(looked.sum(dim=-1)[real], torch.ones(int(real.sum())))


def test_a_search_keeps_each_beams_glimpses():
    decoder, (a, _) = decoder_with("attention_lstm", "hard", 2), batch()
    for found in search(decoder, a[:1], SearchConfig(beam_size=4, num_captions=4, max_length=5))[0]:
        memory = decoder.prepare(a[:1])
        state, word = decoder.initial_state(memory), torch.tensor([START])
        for t, chosen in enumerate(found.ids):
            step = decoder.step(word, state, memory)
            assert found.locations[t].tolist() == step.location[0].tolist()
            state, word = step.state, torch.tensor([chosen])
