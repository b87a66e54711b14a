"""Hard attention: sampled and gathered locations, its search, and its settings."""

import math

import pytest
import torch
from test_decoder import batch

from captioning.config import DecoderConfig, HardConfig, LossConfig, SearchConfig, Settings
from captioning.decoding import greedy, search
from captioning.models.alignment import GeneralAlignment
from captioning.models.attention import HardAttention, Look, SoftAttention, is_hard, looking
from captioning.models.decoder import Decoder
from captioning.models.registry import build_decoder


def decoder_with(attention: str, *, seed: int = 0, scale: float = 0.7) -> Decoder:
    torch.manual_seed(seed)
    config = DecoderConfig(attention=attention, embedding_dim=4, hidden_dim=6, attention_dim=3, dropout=0.0)
    decoder = build_decoder(config, vocabulary_size=11, annotation_dim=6).double().eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(std=scale)
    return decoder


def attention_and_memory(rows: int = 3, images: int = 2, places: int = 4):
    torch.manual_seed(0)
    attention = HardAttention(GeneralAlignment(query_dim=5, annotation_dim=3, dim=0)).eval()
    return attention, attention.prepare(torch.randn(images, places, 3)), torch.randn(images * rows, 5)


# Eqs. 8 and 9


def test_eq_9_the_context_is_the_annotation_at_the_location_of_each_rows_own_image():
    attention, memory, query = attention_and_memory()
    for look in (Look("argmax"), Look("sample"), Look("gumbel_straight_through")):
        with looking(attention, look):
            context = attention(query, memory)
        for row in range(6):
            assert torch.equal(context.z[row], memory.a[row // 3, context.location[row]])
            assert context.log_prob[row].item() == pytest.approx(context.alpha[row, context.location[row]].log().item())


@pytest.mark.parametrize("location", ["argmax", "sample"])
def test_one_location_is_gathered_and_no_sum_over_all_is_made(location, monkeypatch):
    attention, memory, query = attention_and_memory()
    monkeypatch.setattr(HardAttention, "mix", lambda *_: pytest.fail("all locations were multiplied out"))
    with looking(attention, Look(location)):
        attention(query, memory)


def test_eq_8_locations_are_drawn_with_the_probabilities_alpha():
    attention, memory, query = attention_and_memory(images=1, rows=1)
    with looking(attention, Look("sample", generator=torch.Generator().manual_seed(1))):
        drawn = attention(query.expand(20000, -1), memory)
    shares = torch.bincount(drawn.location, minlength=4) / 20000
    torch.testing.assert_close(shares, drawn.alpha[0], rtol=0, atol=4 * 0.5 / math.sqrt(20000))


def test_the_mean_of_many_sampled_contexts_approaches_the_soft_context():
    attention, memory, query = attention_and_memory(images=1, rows=1)
    soft = SoftAttention(attention.alignment)(query, memory)
    with looking(attention, Look("sample", generator=torch.Generator().manual_seed(2))):
        mean = attention(query.expand(40000, -1), memory).z.mean(dim=0)
    spread = (soft.alpha.unsqueeze(-1) * (memory.a - soft.z.unsqueeze(1)).square()).sum(dim=1).sqrt()
    assert ((mean - soft.z[0]).abs() < 4 * spread[0] / math.sqrt(40000)).all()


def test_the_entropy_is_that_of_alpha():
    attention, memory, query = attention_and_memory()
    context = attention(query, memory)
    expected = [-sum(p * math.log(p) for p in alpha) for alpha in context.alpha.tolist()]
    assert context.entropy.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_expected_context_is_that_of_soft_attention():
    attention, memory, query = attention_and_memory()
    soft = SoftAttention(attention.alignment)(query, memory)
    with looking(attention, Look("expected")):
        context = attention(query, memory)
    torch.testing.assert_close(context.z, soft.z)
    torch.testing.assert_close(context.alpha, soft.alpha)
    assert context.location is None
    assert context.log_prob is None


def test_all_rows_of_an_image_share_the_coin_of_the_mean_context():
    attention, _, query = attention_and_memory(images=8)
    soft = SoftAttention(attention.alignment)
    with looking(attention, Look("sample", 0.5, torch.Generator().manual_seed(0))):
        memory = attention.prepare(torch.randn(8, 4, 3))
        context = attention(query, memory)
    assert 0 < memory.expected.sum() < 8
    mean = memory.expected.repeat_interleave(3)
    assert ((context.location == -1) == mean).all()
    assert (context.log_prob[mean] == 0).all()
    torch.testing.assert_close(context.z[mean], soft(query, memory).z[mean])
    for row in (~mean).nonzero().flatten().tolist():
        assert torch.equal(context.z[row], memory.a[row // 3, context.location[row]])


def test_the_coin_falls_as_often_as_asked():
    attention, _, _ = attention_and_memory()
    with looking(attention, Look("sample", 0.3, torch.Generator().manual_seed(0))):
        coins = attention.prepare(torch.zeros(10000, 1, 3)).expected
    assert coins.float().mean().item() == pytest.approx(0.3, abs=4 * 0.5 / 100)


def test_with_one_location_hard_equals_soft():
    hard, soft = decoder_with("hard"), decoder_with("soft")
    a, words = batch()
    for look in ("sample", "argmax", "expected", "gumbel_straight_through"):
        with looking(hard, Look(look)):
            one, other = hard(a[:, :1], words), soft(a[:, :1], words)
        torch.testing.assert_close(one.logits, other.logits)
    assert one.log_probs.abs().max() == 0


def test_it_samples_in_training_and_looks_at_the_likeliest_location_in_evaluation():
    decoder, (a, words) = decoder_with("hard"), batch()
    output = decoder(a, words)
    assert (output.locations == output.alphas.argmax(dim=-1))[output.mask].all()
    torch.manual_seed(0)
    drawn = [decoder.train()(a, words).locations[output.mask] for _ in range(5)]
    assert any(not torch.equal(drawn[0], other) for other in drawn)


def test_a_seed_fixes_what_is_sampled():
    decoder, (a, words) = decoder_with("hard"), batch()
    locations = []
    for _ in range(2):
        with looking(decoder, Look("sample", 0.5, torch.Generator().manual_seed(5))):
            locations.append(decoder(a, words).locations)
    assert torch.equal(*locations)


def test_captions_of_one_length_sampled_by_forward_equal_repeated_step_with_the_same_seed():
    decoder, (a, words) = decoder_with("hard"), batch()
    words = words[:1, :1, :6].expand(2, 2, -1)
    with looking(decoder, Look("sample", 0.5, torch.Generator().manual_seed(3))):
        output = decoder(a, words)
    with looking(decoder, Look("sample", 0.5, torch.Generator().manual_seed(3))):
        memory = decoder.prepare(a)
        state = decoder.initial_state(memory, 2)
        for t in range(5):
            step = decoder.step(words[..., t].flatten(), state, memory)
            state = step.state
            assert torch.equal(step.location, output.locations[..., t].flatten())
            torch.testing.assert_close(step.logits, output.logits.unflatten(0, (4, 5))[:, t])


def test_forced_locations_are_looked_at():
    decoder, (a, words) = decoder_with("hard"), batch()
    forced = torch.arange(2 * 3 * 5).view(2, 3, 5) % 5
    output = decoder(a, words, locations=forced)
    assert torch.equal(output.locations[output.mask], forced[output.mask])
    again = decoder(a, words, locations=decoder(a, words).locations)
    torch.testing.assert_close(again.logits, decoder(a, words).logits)


def test_looking_ends_with_its_block_even_after_an_error():
    decoder = decoder_with("hard")
    with pytest.raises(RuntimeError), looking(decoder, Look("sample")):
        raise RuntimeError
    assert decoder.attention.look is None
    assert is_hard(decoder)
    assert not is_hard(decoder_with("soft"))


# Search


@pytest.mark.parametrize("location", ["argmax", "sample", "expected"])
@pytest.mark.parametrize("options", [{"beam_size": 3, "num_captions": 3}, {"sample": True, "num_captions": 3}])
def test_every_search_carries_the_locations_of_its_hypotheses(location, options):
    decoder, (a, _) = decoder_with("hard", scale=1.5), batch()
    config = SearchConfig(max_length=6, location=location, **options)
    for image, found in enumerate(search(decoder, a, config, generator=torch.Generator().manual_seed(0))):
        for hypothesis in found:
            if location == "expected":
                assert hypothesis.locations is None
                continue
            words = torch.tensor([[[2, *hypothesis.ids]]])
            words[..., 0] = 1  # START
            path = hypothesis.locations.view(1, 1, -1)
            output = decoder(a[image : image + 1], words, locations=path)
            log_p = output.logits.log_softmax(-1).gather(-1, output.targets.unsqueeze(-1)).flatten()
            assert log_p.tolist() == pytest.approx(list(hypothesis.log_probs))  # so it is this path, in this order
            torch.testing.assert_close(output.alphas[0, 0], hypothesis.alphas)
            if location == "argmax":
                assert torch.equal(hypothesis.locations, hypothesis.alphas.argmax(dim=-1, keepdim=True))


def test_decoding_with_the_mean_context_is_decoding_softly():
    hard, soft, (a, _) = decoder_with("hard"), decoder_with("soft"), batch()
    found = search(hard, a, SearchConfig(max_length=6, location="expected"))
    for one, other in zip(found, search(soft, a, SearchConfig(max_length=6)), strict=True):
        assert one[0].ids == other[0].ids
        assert one[0].score == pytest.approx(other[0].score)


def test_a_hard_model_is_searched_at_its_likeliest_locations_unless_told_otherwise():
    decoder, (a, _) = decoder_with("hard"), batch()
    decoder.eval()
    for one, other in zip(
        search(decoder, a, SearchConfig(beam_size=1, max_length=5)),
        greedy(decoder, a, SearchConfig(max_length=5)),
        strict=True,
    ):
        assert torch.equal(one[0].locations, other[0].locations)


@pytest.mark.parametrize("location", ["sample", "expected"])
def test_a_location_for_a_model_without_hard_attention_is_refused(location):
    with pytest.raises(ValueError, match=f"location='{location}' needs a model with hard attention"):
        search(decoder_with("soft"), batch()[0], SearchConfig(location=location))


# Settings


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (HardConfig, {"baseline": "leave_one_out"}, "baseline='leave_one_out' needs samples of at least 2 (got 1)"),
        (
            HardConfig,
            {"relaxation": "gumbel_straight_through"},
            "relaxation='gumbel_straight_through' uses no reward: it needs baseline='none' (got 'moving_average')",
        ),
        (
            HardConfig,
            {"relaxation": "gumbel_straight_through", "baseline": "none", "lambda_r": 0.5},
            "lambda_r=0.5 must be left out: relaxation='gumbel_straight_through' uses no reward",
        ),
        (HardConfig, {"samples": 0}, "samples must be positive (got 0)"),
        (HardConfig, {"lambda_r": -1.0}, "lambda_r must not be negative (got -1.0)"),
        (HardConfig, {"expectation_probability": 1.0}, "expectation_probability must lie in [0, 1) (got 1.0)"),
        (
            Settings,
            {"data": "x", "output": "y", "hard": HardConfig(lambda_r=0.5)},
            "hard.lambda_r=0.5 needs decoder.attention='hard' (got 'soft')",
        ),
        (
            Settings,
            {"data": "x", "output": "y", "hard": HardConfig(samples=2)},
            "hard.samples=2 needs decoder.attention='hard' (got 'soft')",
        ),
    ],
)
def test_impossible_combinations_are_refused_when_they_are_read(kind, values, message):
    with pytest.raises(ValueError, match=r"needs|must") as caught:
        kind(**values)
    assert str(caught.value) == message


def test_hard_settings_go_with_hard_attention():
    settings = Settings("x", "y", decoder=DecoderConfig(attention="hard"), hard=HardConfig(lambda_r=0.5))
    assert settings.loss == LossConfig()
