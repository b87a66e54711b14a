"""A model under diagnosis: what is reported, and that nothing of it is left behind."""

import dataclasses
import json
import math
from collections.abc import Iterable

import pytest
import torch
from conftest import TINY_DECODER

from captioning import diagnosis
from captioning.checkpoint import Checkpoint, load_checkpoint
from captioning.config import DecoderConfig, HardConfig
from captioning.data import Batch, CaptionData
from captioning.diagnosis import attention_gradients, caption_batches, diagnose, nll_loss, signal_to_noise
from captioning.diagnostics import gradient_signal_to_noise
from captioning.findings import Diagnosis
from captioning.hard_objective import hard_terms, training_look
from captioning.listening import forced
from captioning.losses import word_nll
from captioning.models.attention import HardAttention, looking
from captioning.models.captioner import CaptioningModel, build_model
from captioning.models.decoder import Output
from captioning.models.registry import build_decoder
from captioning.reward_baselines import LeaveOneOut
from captioning.vocabulary import END, SPECIAL, Vocabulary


@pytest.fixture
def data(tiny_annotations) -> CaptionData:
    return CaptionData(tiny_annotations)


@pytest.fixture
def checkpoint(tiny_checkpoint) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint)


def run(checkpoint: Checkpoint, data: CaptionData, **options: int | str) -> Diagnosis:
    return diagnose(checkpoint.model, data, data.indices("train").tolist()[:6], checkpoint.vocabulary, **options)


def nll(output: Output) -> torch.Tensor:
    return word_nll(output.logits, output.targets).mean()


def gradients_of(model: CaptioningModel, batches: Iterable[Batch]) -> torch.Tensor | None:
    return attention_gradients(model, batches, lambda a, words: nll(model(a, words)))


def test_every_number_is_there_and_plausible(checkpoint, data):
    found = run(checkpoint, data)
    assert (found.images, found.locations) == (6, 16)
    images = data.indices("train").tolist()[:6]
    assert found.words == sum(len(data.words(c)) + 1 for i in images for c in data.captions_of(i))  # and <end>
    assert 0 < found.entropy < 1
    assert 1 / 16 < found.largest < 1
    assert found.mutual_information > found.mutual_information_null > 0
    assert set(found.listening) == {"exchanged", "random", "uniform", "centre"}
    assert set(found.entropy_by_class) >= {"article", "noun", "quality"}
    assert sum(found.share_of_class.values()) == pytest.approx(1)
    mean = sum(found.entropy_by_class[name] * share for name, share in found.share_of_class.items())
    assert mean == pytest.approx(found.entropy)
    assert json.loads(json.dumps(found.as_dict()))["entropy"] == pytest.approx(found.entropy, abs=1e-4)


def test_the_numbers_of_words_by_hand():
    # Two captions of "a dog near a cat <end>" and "dog <end>" on two places; alpha is sharp at articles, even at nouns.
    vocabulary = Vocabulary([*SPECIAL, "a", "dog", "near", "cat"])
    ids = torch.tensor([4, 5, 6, 4, 7, END, 5, END])
    alphas = torch.tensor([[1, 0], [0.5, 0.5], [0, 1], [1, 0], [0.25, 0.75], [0, 1], [0.5, 0.5], [0, 1.0]])
    captions, positions = torch.tensor([0] * 6 + [1] * 2), torch.tensor([0, 1, 2, 3, 4, 5, 0, 1])
    words = diagnosis._Words(alphas, ids, captions, torch.zeros_like(ids), positions)
    found = diagnosis._numbers(words, vocabulary, torch.Generator().manual_seed(0), places=True)
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)
    assert found["entropy"] == pytest.approx((2 + quarter) / 8)
    assert found["entropy_by_class"] == pytest.approx(
        {"article": 0.0, "noun": (2 + quarter) / 3, "place": 0.0, "other": 0.0}
    )
    assert found["share_of_class"] == {"article": 2 / 8, "noun": 3 / 8, "place": 1 / 8, "other": 2 / 8}
    assert found["entropy_by_position"] == pytest.approx([0.5, 0.5, 0, 0, quarter, 0])
    assert found["largest"] == pytest.approx((5 + 0.5 + 0.75 + 0.5) / 8)
    assert found["off_argmax"] == pytest.approx(1 - found["largest"])
    assert found["movement_nouns"] == pytest.approx(0.25)  # from dog to cat; the second caption has one noun
    assert found["apart_one_noun"] == 0  # the dogs; the cat is three words further than the second of them
    assert math.isnan(found["apart_two_nouns"])
    assert math.isnan(found["apart_two_images"])


def test_among_nouns_alone_all_words_move_as_nouns_do():
    alphas = torch.tensor([[1, 0], [0.5, 0.5], [0, 1.0]])
    words = diagnosis._Words(alphas, torch.tensor([4, 4, 4]), *torch.zeros(2, 3, dtype=torch.long), torch.arange(3))
    vocabulary = Vocabulary([*SPECIAL, "dog"])
    found = diagnosis._numbers(words, vocabulary, torch.Generator().manual_seed(0), places=False)
    assert (found["movement_nouns"], found["movement_words"]) == (0.5, 0.5)


def test_padding_and_absent_captions_are_no_words():
    mask = torch.tensor([[[True, True, False], [True, False, False]], [[True, True, True], [False, False, False]]])
    alphas = torch.arange(12.0).view(2, 2, 3, 1)
    output = Output(torch.zeros(6, 9), torch.tensor([4, 2, 2, 5, 6, 2]), mask, alphas, None)
    before = diagnosis._Words(torch.ones(1, 1), *torch.tensor([[2], [6], [4], [0]]))
    words = diagnosis._words_of(output, alphas, before)
    assert words.alphas.flatten().tolist() == [0, 1, 3, 6, 7, 8]
    assert words.ids.tolist() == [4, 2, 2, 5, 6, 2]
    assert words.captions.tolist() == [7, 7, 8, 9, 9, 9]
    assert words.images.tolist() == [5, 5, 5, 6, 6, 6]
    assert diagnosis._words_of(output, alphas, None).images.tolist() == [0, 0, 0, 1, 1, 1]
    assert words.positions.tolist() == [0, 1, 0, 0, 1, 2]


def test_a_decoder_that_ignores_its_context_loses_nothing(checkpoint, data):
    decoder = checkpoint.model.decoder
    with torch.no_grad():
        decoder.L_z.weight.zero_()
        decoder.lstm_state.weight[:, decoder.L_h.in_features :] = 0  # the columns of z
    found = run(checkpoint, data)
    assert list(found.listening.values()) == pytest.approx([0] * 4, abs=1e-6)


def test_attention_that_cannot_see_is_flat(checkpoint, data):
    with torch.no_grad():
        checkpoint.model.decoder.attention.alignment.v.weight.zero_()
    found = run(checkpoint, data)
    assert found.entropy == pytest.approx(1)
    assert found.mutual_information == pytest.approx(0, abs=1e-6)
    assert [found.listening[name] for name in ("exchanged", "random", "uniform")] == pytest.approx([0] * 3, abs=1e-5)
    assert found.movement_nouns == pytest.approx(0, abs=1e-6)


def test_a_hard_model_is_diagnosed_where_it_is_told_to_look(checkpoint, data):
    decoder = dataclasses.replace(checkpoint.decoder, attention="hard")
    model, encoder = build_model(checkpoint.encoder, decoder, len(checkpoint.vocabulary))
    model.load_state_dict(checkpoint.model.state_dict())
    hard = dataclasses.replace(checkpoint, model=model, encoder=encoder, decoder=decoder)
    found = {location: run(hard, data, location=location) for location in ("argmax", "sample", "expected")}
    assert found["expected"].nll == pytest.approx(run(checkpoint, data).nll)
    assert found["expected"].off_argmax is None  # the mean context is no place
    assert all(diagnosis.hard for diagnosis in found.values())
    assert found["sample"].nll != found["argmax"].nll
    assert found["sample"] == run(hard, data, location="sample")


def test_hard_attention_is_diagnosed_by_its_weights_and_forced_by_its_locations(checkpoint, data):
    decoder = checkpoint.model.decoder
    soft = run(checkpoint, data)
    decoder.attention = HardAttention(decoder.attention.alignment).eval()
    hard = run(checkpoint, data)
    assert (soft.hard, soft.off_argmax) == (False, None)
    assert hard.hard
    assert hard.off_argmax == pytest.approx(1 - hard.largest)
    assert "samples off the argmax" in hard.table()
    assert "samples off the argmax" not in soft.table()
    assert hard.nll != soft.nll  # it looks at one location
    assert all(change != 0 for change in hard.listening.values())


def test_the_batch_size_changes_neither_weights_nor_words(checkpoint, data):
    one, other = (run(checkpoint, data, batch_size=size) for size in (2, 32))
    assert (one.words, one.locations) == (other.words, other.locations)
    for name in ("nll", "entropy", "largest", "mutual_information"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-4)
    for name in ("uniform", "centre"):
        assert one.listening[name] == pytest.approx(other.listening[name], abs=1e-4)


@pytest.mark.parametrize(("count", "batch_size", "sizes"), [(5, 2, [3, 2]), (5, 4, [3, 2]), (3, 1, [3]), (4, 9, [4])])
def test_no_image_is_left_alone_in_a_batch(checkpoint, data, count, batch_size, sizes):
    indices = data.indices("train").tolist()[:count]
    batches = caption_batches(checkpoint.model, data, indices, checkpoint.vocabulary, batch_size=batch_size)
    assert [len(batch.images) for batch in batches] == sizes


def test_pixels_and_annotation_vectors_are_diagnosed_alike(checkpoint, data, tiny_data):
    one, other = run(checkpoint, data), run(checkpoint, CaptionData(tiny_data))
    assert one.nll == pytest.approx(other.nll, rel=1e-2)  # the stored vectors are float16
    assert one.entropy == pytest.approx(other.entropy, rel=1e-2)


def test_the_decoder_of_a_further_scale_is_asked_at_its_size(two_scales, tiny_scales, tiny_data):
    both, stored = load_checkpoint(two_scales), CaptionData(tiny_scales)
    encoder = dataclasses.replace(both.encoder, image_size=48, grid=None, scales=())
    alone, _ = build_model(
        encoder, TINY_DECODER, len(both.vocabulary), encoder_state=both.model.encoder.network.state_dict()
    )
    alone.decoder.load_state_dict(both.model.further[0].state_dict())
    lone = dataclasses.replace(both, model=alone)
    pixels = CaptionData(tiny_data)
    assert run(both, pixels, scale=1) == run(lone, pixels)
    assert run(both, pixels, scale=1).locations == 36
    subject = (pixels, pixels.indices("train").tolist()[:6], both.vocabulary)
    assert signal_to_noise(both.model, *subject, scale=1) == pytest.approx(signal_to_noise(alone, *subject), rel=1e-5)
    assert signal_to_noise(both.model, *subject, scale=1) != signal_to_noise(both.model, *subject)
    both.model.encoder.network.load_state_dict(stored.encoder_state())
    for scale in (0, 1):
        one, other = run(both, stored, scale=scale), run(both, pixels, scale=scale)
        assert one.nll == pytest.approx(other.nll, rel=1e-2)  # the stored vectors are float16
        assert one.entropy == pytest.approx(other.entropy, rel=1e-2)


def test_a_model_without_attention_says_so(checkpoint, data):
    config = DecoderConfig(name="lstm", embedding_dim=4, hidden_dim=6)
    checkpoint.model.decoder = build_decoder(
        config, vocabulary_size=len(checkpoint.vocabulary), annotation_dim=checkpoint.model.encoder.dim
    )
    found = run(checkpoint, data)
    assert (found.entropy, found.listening, found.listening_gap) == (None, None, None)
    assert found.nll > 0
    assert "none in this model" in found.line()
    assert "none in this model" in found.table()
    assert found.main_numbers() == {}
    assert signal_to_noise(checkpoint.model, data, data.indices("train").tolist(), checkpoint.vocabulary) is None


def test_one_image_is_too_few(checkpoint, data):
    with pytest.raises(ValueError, match=r"two images or more \(got 1\)"):
        diagnose(checkpoint.model, data, [0], checkpoint.vocabulary)


@pytest.mark.parametrize("training", [True, False])
def test_diagnosing_leaves_weights_modes_gradients_and_random_state_as_they_were(checkpoint, data, training):
    model = checkpoint.model.train(training)
    model.decoder.gate.train(not training)
    indices = data.indices("train").tolist()[:4]
    nll(model.decoder(torch.randn(1, 16, 128), torch.tensor([[[1, 4, 2]]]))).backward()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    gradients = {name: x.grad.clone() for name, x in model.decoder.named_parameters() if x.grad is not None}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    diagnose(model, data, indices, checkpoint.vocabulary)
    gradients_of(model, caption_batches(model, data, indices, checkpoint.vocabulary, batch_size=2))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], x) for name, x in before.items())
    assert gradients
    assert all(torch.equal(model.decoder.get_parameter(name).grad, x) for name, x in gradients.items())


def test_gradients_are_those_of_the_attention_alone_one_row_per_batch(checkpoint, data):
    model = checkpoint.model
    model.decoder.dropout.p = 0.0
    indices = data.indices("train").tolist()[:4]
    batches = list(caption_batches(model, data, indices, checkpoint.vocabulary, batch_size=2))
    found = gradients_of(model, batches)
    parameters = list(model.decoder.attention.parameters())
    assert found.shape == (2, sum(p.numel() for p in parameters))
    nll(model(batches[0].images, batches[0].words)).backward()
    torch.testing.assert_close(found[0], torch.cat([p.grad.flatten() for p in parameters]))


def test_frozen_attention_has_no_gradients(checkpoint, data):
    checkpoint.model.decoder.attention.requires_grad_(False)
    assert gradients_of(checkpoint.model, []) is None


@pytest.mark.parametrize(("count", "size"), [(4, 2), (7, 2), (8, 2), (24, 3), (26, 3)])
def test_signal_to_noise_is_that_of_a_step_however_many_images_it_is_estimated_from(checkpoint, data, count, size):
    model, indices = checkpoint.model, data.indices("train").tolist()[:count]
    model.decoder.dropout.p = 0.0
    whole = indices[: len(indices) // size * size]
    rows = gradients_of(model, caption_batches(model, data, whole, checkpoint.vocabulary, batch_size=size))
    assert len(rows) == len(whole) // size
    found = signal_to_noise(model, data, indices, checkpoint.vocabulary)
    assert found == pytest.approx(gradient_signal_to_noise(rows) * 8 / size, rel=1e-4)


def test_signal_to_noise_needs_two_batches(checkpoint, data):
    assert signal_to_noise(checkpoint.model, data, data.indices("train").tolist()[:3], checkpoint.vocabulary) is None


def test_a_hard_model_is_judged_by_the_gradient_of_its_bound(checkpoint, data):
    model = checkpoint.model.eval()
    model.decoder.attention = HardAttention(model.decoder.attention.alignment)
    indices = data.indices("train").tolist()[:4]
    (batch,) = caption_batches(model, data, indices, checkpoint.vocabulary, batch_size=4)
    a = batch.images
    parameters = list(model.decoder.attention.parameters())
    torch.manual_seed(3)
    found = torch.autograd.grad(nll_loss(model, a, batch.words), parameters)
    hard = HardConfig(baseline="leave_one_out", samples=3, lambda_e=0.0, expectation_probability=0.0)
    torch.manual_seed(3)
    with looking(model, training_look(hard)):
        output = model(a, batch.words.repeat_interleave(3, dim=1))
    nlls = word_nll(output.logits, output.targets)
    terms = hard_terms(output, -nlls.detach(), hard, LeaveOneOut(hidden_dim=0, samples=3, to_go=True))
    wanted = torch.autograd.grad(nlls.mean() + terms.loss / len(nlls), parameters)
    assert any(x.abs().sum() > 0 for x in found)
    torch.testing.assert_close(found, wanted)


def test_line_and_table_show_the_numbers(checkpoint, data):
    found = run(checkpoint, data)
    assert f"H/ln L {found.entropy:.3f}" in found.line()
    assert "\n" not in found.line()
    assert f"listening gap {found.listening['exchanged']:.4f} nats/word" in found.line()
    table = found.table()
    for name in ("article", "noun", "by position", "mutual information", "a noun told again", "NLL, exchanged"):
        assert name in table
    assert f"{found.listening['exchanged']:+.4f}" in table
    assert "gradient" not in found.line() + table
    by_word = [f"{x:.2f}" for x in found.entropy_by_position]
    assert f"(by word {' '.join(by_word)})" in found.line()
    curves = found.curves()
    assert curves["entropy_of_word_2"] == pytest.approx(found.entropy_by_position[1], abs=1e-4)
    assert curves["nll_change_centre"] == pytest.approx(found.listening["centre"], abs=1e-4)
    assert found.main_numbers().items() <= curves.items()
    found = dataclasses.replace(found, gradient_snr=0.1234)
    assert "gradient signal/noise 0.12" in found.line()
    assert "gradient signal/noise" in found.table()


def test_the_nll_and_what_looking_elsewhere_changes_of_it(checkpoint, data):
    indices = data.indices("train").tolist()[:6]
    (batch,) = caption_batches(checkpoint.model, data, indices, checkpoint.vocabulary, batch_size=32)
    decoder = checkpoint.model.eval().decoder
    with torch.no_grad():
        a = checkpoint.model.annotate(batch.images)
        own = decoder(a, batch.words)
        with forced(decoder, torch.full_like(own.alphas, 1 / 16)):
            uniform = decoder(a, batch.words)
    found = run(checkpoint, data)
    assert found.nll == pytest.approx(nll(own).item(), rel=1e-4)
    assert found.listening["uniform"] == pytest.approx((nll(uniform) - nll(own)).item(), rel=1e-2, abs=1e-5)


def test_the_signal_has_the_noise_of_training_in_it(checkpoint, data):
    model = checkpoint.model.eval()
    (batch,) = caption_batches(model, data, data.indices("train").tolist()[:4], checkpoint.vocabulary, batch_size=4)
    for rate in (0.0, 0.5):
        model.decoder.dropout.p = rate
        one, same = gradients_of(model, [batch, batch])
        assert torch.equal(one, same) == (rate == 0.0)


def test_of_several_heads_the_mean_is_told_and_the_signal_heard(data):
    torch.manual_seed(0)
    config = DecoderConfig(attention="multi_head", heads=2, embedding_dim=8, hidden_dim=8, dropout=0.0)
    model, encoder = build_model(data.encoder, config, len(data.vocabulary), encoder_state=data.encoder_state())
    found = run(Checkpoint(model, encoder, config, data.vocabulary), data)
    assert (found.heads, found.listening) == (2, None)
    assert "; of the mean of 2 heads)" in found.line()
    assert "not possible: several heads" in found.table()
    assert signal_to_noise(model, data, data.indices("train").tolist(), data.vocabulary) is not None


def test_glimpses_are_forced_with_the_weights_that_the_decoder_gave_them():
    alphas = torch.tensor([[[[0.4, 0.3, 0.2, 0.1]]]])
    places, mask = torch.tensor([[[[0, 2]]]]), torch.ones(1, 1, 1, dtype=torch.bool)
    output = Output(torch.zeros(1, 9), torch.tensor([4]), mask, alphas, None, places)
    torch.testing.assert_close(diagnosis._looked(output, alphas).flatten(), torch.tensor([2 / 3, 0, 1 / 3, 0]))
