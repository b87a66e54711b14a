"""Hard attention: sampled and gathered locations, its search, and its estimators against an exact oracle."""

import dataclasses
import itertools
import math

import pytest
import torch
from test_decoder import batch

from benchmarks.hard_oracle import (
    Oracle,
    estimate,
    exact_bound,
    exact_gradient,
    marginal,
    new_baseline,
    paths,
    small_oracle,
)
from captioning.config import DecoderConfig, HardConfig, LossConfig, SearchConfig, Settings
from captioning.decoding import greedy, search
from captioning.diagnostics import importance_weighted_bound
from captioning.losses import REWARDS, by_word, reinforce, word_nll
from captioning.models.alignment import GeneralAlignment
from captioning.models.attention import HardAttention, Look, SoftAttention, is_hard, looking
from captioning.models.decoder import Decoder
from captioning.models.registry import build_decoder
from captioning.objective import hard_terms, training_look
from captioning.reward_baselines import BASELINES, Learned, MovingAverage

EXACT = HardConfig(lambda_e=0.0, expectation_probability=0.0)
"""Eq. 12 as the gradient of the bound: lambda_r is 1, no entropy, no mean contexts."""
UNBIASED = [
    dataclasses.replace(EXACT, reward=reward, baseline=baseline, samples=3 if baseline == "leave_one_out" else 1)
    for reward, baseline in itertools.product(REWARDS, BASELINES)
]


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
                assert torch.equal(hypothesis.locations, hypothesis.alphas.argmax(dim=-1))


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


# Rewards and baselines


def test_the_rewards_by_hand():
    log_p = torch.tensor([[[-1.0, -2.0, -4.0], [-3.0, -0.5, 0.0]]])
    assert REWARDS["sentence"](log_p).tolist() == [[[-7.0] * 3, [-3.5] * 3]]
    assert REWARDS["to_go"](log_p).tolist() == [[[-7.0, -6.0, -4.0], [-3.5, -0.5, 0.0]]]


def test_the_values_of_words_find_back_to_their_places():
    mask = torch.tensor([[[True, True], [True, False]], [[False, False], [True, True]]])
    values = by_word(torch.arange(1.0, 6.0), mask)
    assert values.tolist() == [[[1, 2], [3, 0]], [[0, 0], [4, 5]]]


def test_reinforce_pushes_log_p_of_the_location_by_reward_minus_baseline_and_nothing_else():
    log_probs = torch.zeros(1, 1, 2, requires_grad=True)
    rewards = torch.tensor([[[-3.0, -1.0]]], requires_grad=True)
    baselines = torch.tensor([[[-2.0, -4.0]]], requires_grad=True)
    reinforce(log_probs, rewards, baselines).sum().backward()
    assert log_probs.grad.tolist() == [[[1.0, -3.0]]]
    assert rewards.grad is None
    assert baselines.grad is None


def baseline_of(name: str, reward: str = "to_go", samples: int = 1):
    return BASELINES[name](hidden_dim=4, samples=samples, to_go=reward == "to_go")


def test_leave_one_out_is_the_mean_of_the_captions_other_samples():
    rewards = torch.tensor([[[-1.0], [-2.0], [-6.0], [-10.0], [-20.0], [-60.0]]])  # two captions with three paths each
    mask = torch.ones(1, 6, 1, dtype=torch.bool)
    b = baseline_of("leave_one_out", samples=3)(rewards, torch.zeros(1, 6, 1, 4), mask)
    assert b.flatten().tolist() == [-4.0, -3.5, -1.5, -40.0, -35.0, -15.0]


def test_the_moving_average_is_the_papers_and_per_word_for_rewards_to_go():
    mask = torch.tensor([[[True, True, True], [True, False, False]]])
    rewards, states = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3, 4)
    sentence, to_go = baseline_of("moving_average", "sentence"), baseline_of("moving_average")
    for baseline in (sentence, to_go):
        assert baseline(rewards, states, mask).abs().max() == 0
        baseline.update(torch.tensor(-20.0), torch.tensor(10.0))
        baseline.update(torch.tensor(-30.0), torch.tensor(10.0))
    b = 0.9 * 0.1 * -20 + 0.1 * -30  # -4.8
    assert sentence(rewards, states, mask).flatten().tolist() == pytest.approx([b] * 6)
    assert to_go(rewards, states, mask).flatten().tolist() == pytest.approx([x * b / 10 for x in (3, 2, 1, 1, 0, 0)])


def test_the_learned_baseline_learns_and_gives_the_decoder_no_gradient():
    torch.manual_seed(0)
    baseline = baseline_of("learned")
    assert isinstance(baseline, Learned)
    states = torch.randn(8, 1, 3, 4, requires_grad=True)
    mask = torch.ones(8, 1, 3, dtype=torch.bool)
    rewards = REWARDS["to_go"](states.detach()[..., 0] - 2)
    optimizer = torch.optim.Adam(baseline.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        loss = baseline.loss(rewards, baseline(rewards, states, mask)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert states.grad is None
    assert losses[-1] < 0.3 * losses[0]


# What training adds to the NLL


def terms_of(decoder: Decoder, a, words, hard: HardConfig, seed: int = 0):
    with looking(decoder, training_look(hard, torch.Generator().manual_seed(seed))):
        output = decoder(a, words.repeat_interleave(hard.samples, dim=1))
    baseline = BASELINES[hard.baseline](hidden_dim=6, samples=hard.samples, to_go=hard.reward == "to_go").double()
    log_p = -word_nll(output.logits, output.targets)
    return output, hard_terms(output, log_p.detach(), hard, baseline)


def test_eq_12_by_hand_over_real_words_only():
    decoder, (a, words) = decoder_with("hard"), batch()
    hard = HardConfig(baseline="none", reward="to_go", lambda_r=0.5, lambda_e=0.25, expectation_probability=0.0)
    output, terms = terms_of(decoder, a, words, hard)
    log_p = by_word(-word_nll(output.logits, output.targets), output.mask)
    expected = 0.0
    for n, k, t in output.mask.nonzero().tolist():
        expected -= 0.5 * log_p[n, k, t:].sum().item() * output.log_probs[n, k, t].item()
        expected -= 0.25 * output.entropies[n, k, t].item()
    assert terms.loss.item() == pytest.approx(expected)
    assert terms.captions.tolist() == pytest.approx([log_p.sum().item(), 16, 5])


def test_an_image_with_the_mean_context_has_no_reward_but_its_entropy():
    decoder, (a, words) = decoder_with("hard"), batch()
    hard = HardConfig(baseline="none", lambda_e=0.1, expectation_probability=0.5)
    coins = set()
    for seed in range(8):
        output, terms = terms_of(decoder, a, words, hard, seed)
        drawn = (output.locations >= 0) & output.mask
        coins.add(tuple(drawn.flatten(1).any(dim=1).tolist()))
        log_p = by_word(-word_nll(output.logits, output.targets), output.mask)
        policy = -(REWARDS["to_go"](log_p) * output.log_probs)[drawn].sum()
        assert terms.loss.item() == pytest.approx((policy - 0.1 * output.entropies[output.mask].sum()).item())
    assert len(coins) > 1


def test_samples_of_a_caption_share_the_work_of_its_image():
    decoder, (a, words) = decoder_with("hard"), batch()
    seen = []
    keys = decoder.attention.alignment.keys
    decoder.attention.alignment.keys = lambda a: seen.append(a.shape) or keys(a)
    terms_of(decoder, a, words, HardConfig(baseline="leave_one_out", samples=4))
    assert seen == [torch.Size([2, 5, 6])]


# The oracle: L = 3, T = 3, all 27 paths


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return small_oracle()


def test_the_paths_of_the_oracle_have_probability_one(oracle):
    log_q, _ = paths(oracle)
    assert log_q.shape == (27,)
    assert log_q.exp().sum().item() == pytest.approx(1)


def test_the_oracle_is_not_trivial(oracle):
    # Else a test of bias could not fail: attention is neither flat nor one-hot, and words depend on where one looks.
    log_q, log_p = paths(oracle)
    assert 0.1 < -(log_q.exp() * log_q).sum().item() / math.log(27) < 0.9
    assert (log_p.max() - log_p.min()).item() > 1


def test_eq_10_the_bound_is_below_log_p_of_the_caption(oracle):
    assert exact_bound(oracle).item() < marginal(oracle).item() - 0.01


@pytest.mark.parametrize("hard", UNBIASED, ids=lambda hard: f"{hard.reward}-{hard.baseline}")
def test_every_estimator_without_relaxation_has_the_exact_gradient_as_its_mean(oracle, hard):
    exact, mean, error = many_estimates(oracle, hard)
    assert torch.cosine_similarity(mean, exact, dim=0) >= 0.999
    z = (mean - exact).abs() / error.clamp(min=1e-12)
    assert z.max() < 4.5  # two-sided 99.8 % for all 313 components together


def test_the_relaxation_has_not(oracle):
    hard = dataclasses.replace(EXACT, baseline="none", relaxation="gumbel_straight_through")
    exact, mean, error = many_estimates(oracle, hard)
    assert ((mean - exact).abs() / error.clamp(min=1e-12)).max() > 20


def test_nor_have_mean_contexts_mixed_in(oracle):
    exact, mean, error = many_estimates(oracle, dataclasses.replace(EXACT, expectation_probability=0.5))
    assert ((mean - exact).abs() / error.clamp(min=1e-12)).max() > 20


def many_estimates(oracle: Oracle, hard: HardConfig, batches: int = 40):
    """The exact gradient, the mean of many estimates (40 batches of about a thousand) and its standard error."""
    torch.manual_seed(0)
    baseline = new_baseline(oracle, hard)
    oracle = dataclasses.replace(oracle, a=oracle.a.expand(40, -1, -1), words=oracle.words.expand(40, -1, -1))
    found = [estimate(oracle, hard, baseline, copies=24 // hard.samples, seed=seed) for seed in range(batches)]
    estimates = torch.stack(found)
    return exact_gradient(small_oracle()) * 40, estimates.mean(dim=0), estimates.std(dim=0) / math.sqrt(batches)


def test_the_importance_weighted_bound_grows_with_the_samples_from_l_s_to_log_p(oracle):
    with torch.no_grad():
        log_q, log_p = paths(oracle)
        values = []
        for k in (1, 2, 3):  # the exact mean over all 27^k draws
            draws = torch.cartesian_prod(*[torch.arange(27)] * k).view(-1, k)
            values.append((log_q[draws].sum(dim=-1).exp() * importance_weighted_bound(log_p[draws])).sum().item())
        generator = torch.Generator().manual_seed(0)
        drawn = torch.multinomial(log_q.exp(), 200_000, replacement=True, generator=generator)
        top = marginal(oracle).item()
    assert values[0] == pytest.approx(exact_bound(oracle).item())
    assert values[0] < values[1] < values[2] < top
    spread = (log_p - top).exp()[drawn].std().item()  # of the weights around their mean, p(y|a) = 1 in these units
    assert importance_weighted_bound(log_p[drawn]).item() == pytest.approx(top, abs=4 * spread / math.sqrt(200_000))


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
    assert isinstance(baseline_of("moving_average"), MovingAverage)
