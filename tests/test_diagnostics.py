"""Numbers about attention, by hand."""

import math

import pytest
import torch

from captioning.diagnostics import (
    apart,
    as_many_at_random,
    collapse,
    gradient_signal_to_noise,
    histories,
    means_by,
    movement,
    mutual_information,
    normalised_entropy,
    share_off_argmax,
    shuffled_mutual_information,
)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_entropy_is_one_for_uniform_and_zero_for_a_single_location():
    alphas = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0, 1, 0, 0], [0.5, 0.5, 0, 0]])
    torch.testing.assert_close(normalised_entropy(alphas), torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64))


def test_entropy_of_one_location_is_zero():
    assert normalised_entropy(torch.ones(3, 1)).tolist() == [0, 0, 0]


def test_samples_off_the_argmax_are_counted_or_expected():
    alphas = torch.tensor([[0.7, 0.3], [0.4, 0.6]])
    assert share_off_argmax(alphas) == pytest.approx((0.3 + 0.4) / 2)


def test_means_by_group():
    means, sizes = means_by(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 2, 2]), 4)
    assert (means[0], means[2], sizes) == (1, 4, [1, 0, 2, 0])
    assert math.isnan(means[1])


def test_mutual_information_of_a_perfect_coupling_is_ln_2():
    # Words 7 and 9, half each; one always at location 0, the other at location 2: I = H(word) = ln 2.
    words = torch.tensor([7, 9, 9, 7])
    alphas = torch.nn.functional.one_hot((words == 9) * 2, 3).float()
    assert mutual_information(alphas, words) == pytest.approx(math.log(2))


def test_mutual_information_of_a_noisy_channel():
    # A binary symmetric channel with error 1/4: I = ln 2 - H(1/4).
    words = torch.tensor([3, 4])
    alphas = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
    expected = math.log(2) + 0.25 * math.log(0.25) + 0.75 * math.log(0.75)
    assert mutual_information(alphas, words) == pytest.approx(expected, abs=1e-6)


def test_mutual_information_is_zero_where_attention_does_not_depend_on_the_word():
    alphas = torch.tensor([[0.2, 0.5, 0.3]]).expand(6, 3)
    assert mutual_information(alphas, torch.tensor([1, 2, 3, 1, 2, 3])) == pytest.approx(0, abs=1e-7)


def test_shuffled_mutual_information_is_the_bias_of_the_estimate():
    # Hard locations among 3 and words among 4 that know nothing of each other: (3 - 1)(4 - 1) / 2W = 0.003 nats.
    words = torch.randint(4, (1000,), generator=generator())
    locations = torch.randint(3, (1000,), generator=generator().manual_seed(1))
    alphas = torch.nn.functional.one_hot(locations, 3).float()
    assert shuffled_mutual_information(alphas, words, generator(), shuffles=100) == pytest.approx(0.003, rel=0.2)
    coupled = torch.nn.functional.one_hot(words, 4).float()
    assert mutual_information(coupled, words) > 1.3 > 0.01 > shuffled_mutual_information(coupled, words, generator())


def test_shuffles_are_seeded():
    words, alphas = torch.arange(9) % 3, torch.rand(9, 2, generator=generator()).softmax(dim=-1)
    first, again = (shuffled_mutual_information(alphas, words, generator()) for _ in range(2))
    assert first == again


def test_movement_is_measured_between_successive_chosen_words_of_one_caption():
    alphas = torch.tensor([[1, 0], [0.5, 0.5], [0, 1], [1, 0], [0.75, 0.25]])
    captions = torch.tensor([0, 0, 0, 1, 1])
    chosen = torch.tensor([True, False, True, True, True])
    # 0 -> 2: total variation 1; 2 -> 3 are of two captions; 3 -> 4: 1/4.
    assert movement(alphas, captions, chosen) == pytest.approx((1 + 0.25) / 2)


def test_movement_without_a_pair_is_no_number():
    assert math.isnan(movement(torch.ones(2, 1), torch.tensor([0, 1]), torch.tensor([True, True])))


def test_words_are_compared_across_captions_of_one_image_and_of_neighbouring_ones():
    # Words 7 and 8 at positions 0 and 1, in two captions of image 0, in one of image 1 and one of image 2.
    ids, positions = torch.tensor([7, 8] * 4), torch.tensor([0, 1] * 4)
    captions, images = torch.arange(4).repeat_interleave(2), torch.tensor([0, 0, 1, 2]).repeat_interleave(2)
    first = torch.tensor([0.0, 1, 0.25, 0.75, 0.5, 1, 0.5, 0])
    alphas = torch.stack((first, 1 - first), dim=1)
    again, other, elsewhere = apart(alphas, ids, captions, images, positions, torch.arange(8))
    assert again == pytest.approx((0.25 + 0.25) / 2)
    assert other == pytest.approx((0.75 + 0.75) / 2)  # 0 to 0.75 and 1 to 0.25
    # 7: 0 and 0.25 to 0.5, 0.5 to 0.5; 8: 1 and 0.75 to 1, 1 to 0. Images 0 and 2 are no neighbours.
    assert elsewhere == pytest.approx((0.5 + 0.25 + 0 + 0 + 0.25 + 1) / 6)


@pytest.mark.parametrize(
    ("positions", "before", "compared"), [([3, 4], [1, 2], True), ([3, 5], [1, 2], False), ([3, 3], [1, 1], False)]
)
def test_words_are_compared_at_like_positions_after_other_words(positions, before, compared):
    words = torch.tensor([7, 7]), torch.tensor([0, 1]), torch.zeros(2, dtype=torch.long)
    found = apart(torch.eye(2), *words, torch.tensor(positions), torch.tensor(before))[0]
    assert found == 1 if compared else math.isnan(found)


def test_histories_are_equal_after_equal_words():
    # "a dog", "a cat", "the dog", "a dog runs": nothing, a; nothing, a; nothing, the; nothing, a, a dog
    ids, captions = torch.tensor([1, 2, 1, 3, 4, 2, 1, 2, 5]), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 3])
    assert histories(ids, captions).tolist() == [0, 1, 0, 1, 0, 2, 0, 1, 3]


def test_random_words_are_as_many_in_every_caption():
    captions = torch.arange(50).repeat_interleave(8)
    chosen = torch.arange(400) % 8 < captions % 4
    random = as_many_at_random(captions, chosen, generator())
    assert captions[random].bincount(minlength=50).tolist() == captions[chosen].bincount(minlength=50).tolist()
    assert not torch.equal(random, chosen)


def test_gradient_signal_to_noise_by_hand():
    # Mean (2, 0), variances 2 and 2: |G|^2 = 4 - 4/2 = 2, over 4.
    assert gradient_signal_to_noise(torch.tensor([[3.0, 1.0], [1.0, -1.0]])) == pytest.approx(0.5)


def test_gradient_signal_to_noise_is_unbiased_and_zero_for_pure_noise():
    # For 5 batches |mean|^2 alone would give 1/5 on average; with every mean shifted to 1, |G|^2 = tr(S) = 100.
    gradients = torch.randn(1000, 5, 100, generator=generator())
    for shift in (0, 1):
        signals = [gradient_signal_to_noise(batches + shift) for batches in gradients]
        assert sum(signals) / len(signals) == pytest.approx(shift, abs=0.01)


def test_gradient_signal_to_noise_needs_two_batches():
    with pytest.raises(ValueError, match=r"two batches or more \(got 1\)"):
        gradient_signal_to_noise(torch.ones(1, 3))


def history(*values: tuple[float, float]) -> list[dict[str, float]]:
    return [{"CIDEr": 0.1, "entropy": entropy, "listening_gap": gap} for entropy, gap in values]


@pytest.mark.parametrize(
    ("values", "sign"),
    [
        ([(0.99, 0.2)] * 3, "H/ln L above 0.98 for 3 validations"),
        ([(0.5, 0.009)] * 3, "a listening gap below 0.01 nats per word for 3 validations"),
        ([(0.5, 0.5), *[(0.981, -0.01)] * 3], "H/ln L above 0.98 and a listening gap below 0.01 nats per word"),
    ],
)
def test_three_dead_validations_are_a_collapse(values, sign):
    assert sign in collapse(history(*values))


@pytest.mark.parametrize(
    "values",
    [[], [(0.99, 0)] * 2, [(0.99, 0)] * 5 + [(0.9, 0.1)], [(0.99, 0.1), (0.9, 0.0), (0.99, 0.1)], [(0.98, 0.01)] * 3],
)
def test_anything_less_is_no_collapse(values):
    assert collapse(history(*values)) is None


def test_a_run_of_fewer_validations_is_judged_by_all_of_them():
    assert "for 1 validation)" in collapse(history((0.99, 0.2)), patience=1)
    assert collapse(history((0.99, 0.2), (0.9, 0.2)), patience=2) is None


def test_validations_that_were_not_diagnosed_do_not_count():
    assert collapse([{"CIDEr": 0.1}] * 5) is None
    assert collapse([*history((0.99, 0), (0.99, 0)), {"CIDEr": 0.1}, *history((0.99, 0))]) is not None


def test_the_advice_fits_the_attention():
    dead = history(*[(0.99, 0.0)] * 3)
    assert "loss.lambda_ds" in collapse(dead)
    assert "leave_one_out" in collapse(dead, hard=True)
