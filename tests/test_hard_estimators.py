"""Rewards, baselines and estimators of hard attention, against an exact oracle."""

import dataclasses
import itertools
import math

import pytest
import torch
from test_decoder import batch
from test_hard import decoder_with
from torch.nn.utils import parameters_to_vector, vector_to_parameters

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
from captioning.config import HardConfig
from captioning.diagnostics import importance_weighted_bound
from captioning.hard_objective import hard_terms, training_look
from captioning.losses import REWARDS, by_word, reinforce, word_nll
from captioning.models.attention import Look, looking
from captioning.models.decoder import Decoder
from captioning.reward_baselines import BASELINES, Learned, build_baseline

EXACT = HardConfig(lambda_e=0.0, expectation_probability=0.0)
"""Eq. 12 as the gradient of the bound: lambda_r is 1, no entropy, no mean contexts."""
UNBIASED = [
    dataclasses.replace(EXACT, reward=reward, baseline=baseline, samples=3 if baseline == "leave_one_out" else 1)
    for reward, baseline in itertools.product(REWARDS, BASELINES)
]


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
    return build_baseline(HardConfig(baseline=name, reward=reward, samples=samples), hidden_dim=4)


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
        baseline.observe(*torch.tensor([-40.0, 20.0, 2.0]))
        baseline.observe(*torch.tensor([-90.0, 30.0, 3.0]))
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
    baseline = build_baseline(hard, hidden_dim=6).double()
    log_p = -word_nll(output.logits, output.targets)
    return output, hard_terms(output, log_p.detach(), hard, baseline)


@pytest.mark.parametrize("lambda_e", [0.25, 0.0, -0.1])
def test_eq_12_by_hand_over_real_words_only(lambda_e):
    decoder, (a, words) = decoder_with("hard"), batch()
    hard = HardConfig(baseline="none", reward="to_go", lambda_r=0.5, lambda_e=lambda_e, expectation_probability=0.0)
    output, terms = terms_of(decoder, a, words, hard)
    log_p = by_word(-word_nll(output.logits, output.targets), output.mask)
    expected = 0.0
    for n, k, t in output.mask.nonzero().tolist():
        expected -= 0.5 * log_p[n, k, t:].sum().item() * output.log_probs[n, k, t].item()
        expected -= lambda_e * output.entropies[n, k, t].item()
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


@pytest.mark.parametrize("glimpses", [1, 2])
def test_the_exact_gradient_is_the_slope_of_the_bound(glimpses):
    oracle = small_oracle(glimpses=glimpses)
    exact, start = exact_gradient(oracle), parameters_to_vector(oracle.parameters).detach()
    direction = torch.randn(len(exact), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bounds = []
    for shift in (1e-5, -1e-5):
        vector_to_parameters(start + shift * direction, oracle.parameters)
        bounds.append(exact_bound(oracle).item())
    assert (exact @ direction).item() == pytest.approx((bounds[0] - bounds[1]) / 2e-5, rel=1e-6)


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


@pytest.mark.parametrize("glimpses", [1, 2])
def test_mean_contexts_in_half_of_the_images_are_half_of_the_objective_and_the_bound_is_the_other(glimpses):
    oracle = small_oracle(glimpses=glimpses)
    with looking(oracle.decoder, Look("expected")):
        output = oracle.decoder(oracle.a, oracle.words)
    gradients = torch.autograd.grad(-word_nll(output.logits, output.targets).sum(), oracle.parameters)
    soft = torch.cat([x.flatten() for x in gradients])
    hard = dataclasses.replace(EXACT, baseline="leave_one_out", samples=3, expectation_probability=0.5)
    exact, mean, error = many_estimates(oracle, hard)
    half = (exact + 40 * soft) / 2
    assert ((mean - half).abs() / error.clamp(min=1e-12)).max() < 4.5
    assert ((mean - exact).abs() / error.clamp(min=1e-12)).max() > 20


def many_estimates(oracle: Oracle, hard: HardConfig, batches: int = 40):
    """The exact gradient, the mean of many estimates (40 batches of about a thousand) and its standard error."""
    torch.manual_seed(0)
    baseline, exact = new_baseline(oracle, hard), exact_gradient(oracle) * 40
    oracle = dataclasses.replace(oracle, a=oracle.a.expand(40, -1, -1), words=oracle.words.expand(40, -1, -1))
    found = [estimate(oracle, hard, baseline, copies=24 // hard.samples, seed=seed) for seed in range(batches)]
    estimates = torch.stack(found)
    return exact, estimates.mean(dim=0), estimates.std(dim=0) / math.sqrt(batches)


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


def test_the_relaxation_is_the_gradient_through_the_sample_and_no_reward(oracle):
    hard = dataclasses.replace(EXACT, baseline="none", relaxation="gumbel_straight_through")
    found = estimate(oracle, hard, new_baseline(oracle, hard), seed=3)
    with looking(oracle.decoder, Look("gumbel_straight_through", generator=torch.Generator().manual_seed(3))):
        output = oracle.decoder(oracle.a, oracle.words)
    total = -word_nll(output.logits, output.targets).sum()
    wanted = torch.autograd.grad(total, oracle.parameters, materialize_grads=True)
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in wanted]))
    v = oracle.decoder.attention.alignment.v.weight
    assert next(g for g, p in zip(wanted, oracle.parameters, strict=True) if p is v).abs().sum() > 0
