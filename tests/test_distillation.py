"""Distillation: what teachers expect is learned in the right place, by the right amount, and to the same bits."""

import dataclasses
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from test_hard_training import first_batch, hard_settings
from tiny_runs import TINY, same_bits, saved_bits, tiny_settings, train_interrupted

from captioning import training
from captioning.checkpoint import load_checkpoint, save_checkpoint
from captioning.config import DistillationConfig, EncoderConfig, HardConfig, SelfCriticalConfig, Settings
from captioning.data import CaptionData, Sample, load_batches, resizing
from captioning.distillation import AnnotationCache, Photos, Teachers, _views, load_teachers
from captioning.losses import expected_nll, word_nll
from captioning.model_config import PLAIN, View
from captioning.models.captioner import CaptioningModel, build_model
from captioning.objective import teacher_forced
from captioning.plan import plan
from captioning.run import start, training_set

FROZEN = EncoderConfig(name="resnet18", layer="layer2", weights=None, image_size=32)


@pytest.fixture(scope="module")
def teachers(tiny_data, tmp_path_factory) -> list[str]:
    """Two trained models on frozen pixels."""
    folder = tmp_path_factory.mktemp("teachers")
    for seed in (1, 2):
        training.train(tiny_settings(tiny_data, folder / str(seed), encoder=FROZEN, epochs=1, seed=seed))
    return [str(folder / "1"), str(folder / "2" / "best")]


def taught(data: Path, output: Path, teachers: list[str], weight: float = 0.5, **changes: Any) -> Settings:
    changes = {"encoder": FROZEN, **changes}
    return tiny_settings(data, output, distillation=DistillationConfig(tuple(teachers), weight), **changes)


def models(paths: list[str]) -> list[CaptioningModel]:
    folders = [Path(path) if Path(path).name == "best" else Path(path) / "best" for path in paths]
    return [load_checkpoint(folder).model.eval() for folder in folders]


def test_the_nll_of_expected_words_by_hand():
    # p = (1/2, 1/4, 1/4), q = (1/2, 1/2, 0): -(log 1/2 + log 1/4) / 2 = 1.5 log 2
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log() + 3.0
    torch.testing.assert_close(expected_nll(logits, torch.tensor([[0.5, 0.5, 0.0]])), torch.tensor([1.5 * math.log(2)]))


def test_teachers_who_are_sure_of_the_caption_are_its_nll():
    logits, targets = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    sure = torch.eye(9)[targets]
    torch.testing.assert_close(expected_nll(logits, sure), word_nll(logits, targets))


def test_several_teachers_speak_with_their_mean(teachers, tiny_data, tmp_path):
    images, captions = first_batch(tiny_settings(tiny_data, tmp_path / "run"))
    found = Teachers(models(teachers))(images, captions)
    with torch.no_grad():
        outputs = [model(images, captions) for model in models(teachers)]
    expected = torch.stack([output.logits.softmax(dim=-1) for output in outputs]).mean(dim=0)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(len(found)))


def test_copies_of_a_caption_get_what_is_expected_of_each(teachers, tiny_data, tmp_path):
    images, captions = first_batch(tiny_settings(tiny_data, tmp_path / "run"))
    voice = Teachers(models(teachers))
    torch.testing.assert_close(voice(images, captions, samples=3), voice(images, captions.repeat_interleave(3, dim=1)))


def test_teachers_with_equal_encoders_look_once(teachers, tiny_data, tmp_path):
    images, captions = first_batch(tiny_settings(tiny_data, tmp_path / "run"))
    looks = []
    voice = Teachers(models([teachers[0], teachers[0], teachers[1]]))
    for model in voice.models:
        model.encoder.register_forward_hook(lambda encoder, *_: looks.append(encoder), always_call=True)
    first, again, other = (model.encoder for model in voice.models)
    assert first is again
    assert other is not first
    found = voice(images, captions)
    assert len({id(encoder) for encoder in looks}) == 2
    assert looks.count(first) == 2  # two hooks on the one encoder, which ran once
    thirds = [Teachers(models([path]))(images, captions) for path in (teachers[0], teachers[0], teachers[1])]
    torch.testing.assert_close(found, torch.stack(thirds).mean(dim=0))


def watched(paths: list[str], data: Path, **options: Any) -> tuple[Teachers, list[Any]]:
    """Teachers who look at whole photos, and a list that grows by the sizes of all pictures that they look at."""
    voice = Teachers(models(paths), CaptionData(data))
    looks: list[Any] = []
    for encoder in {model.encoder for model in voice.models}:
        encoder.register_forward_hook(lambda _, pictures, __: looks.append(tuple(pictures[0].shape)))
        voice.looks[encoder] = AnnotationCache(encoder, CaptionData(data), **options)
    return voice, looks


def photos_of(data: Path, numbers: list[int], mirrored: list[bool]) -> tuple[torch.Tensor, Photos]:
    """Pixels as a student of 32 pixels sees them, and which they are."""
    pixels = [CaptionData(data).image(i) for i in numbers]
    seen = [image.flip(-1) if mirror else image for image, mirror in zip(pixels, mirrored, strict=True)]
    return torch.stack(seen), (torch.tensor(numbers), torch.tensor(mirrored))


WORDS = torch.tensor([[[1, 5, 6, 2], [1, 6, 2, 0]], [[1, 7, 8, 2], [1, 9, 2, 0]], [[1, 5, 2, 0], [1, 2, 0, 0]]])


def test_teachers_look_at_every_photo_once(teachers, tiny_data):
    voice, looks = watched(teachers[:1], tiny_data)
    images, photos = photos_of(tiny_data, [3, 8, 5], [False, True, False])
    first = voice(images, WORDS, photos=photos)
    torch.testing.assert_close(first, Teachers(models(teachers[:1]))(images, WORDS))
    assert looks == [(1, 3, 32, 32)] * 3
    assert torch.equal(voice(images, WORDS, photos=photos), first)
    assert len(looks) == 3
    images, photos = photos_of(tiny_data, [5, 3, 1], [True, False, False])  # two that are new: one in the mirror
    again = voice(images, WORDS, photos=photos)
    assert len(looks) == 5
    alone, _ = watched(teachers[:1], tiny_data)  # as after a resume: what was seen before makes no difference
    assert torch.equal(alone(images, WORDS, photos=photos), again)


def test_what_there_is_no_room_for_is_looked_at_again(teachers, tiny_data):
    images, photos = photos_of(tiny_data, [3, 8, 5], [False, True, False])
    whole, _ = watched(teachers, tiny_data)
    expected = whole(images, WORDS, photos=photos)
    size = 4 * 4 * 128 * 4  # of one photo's vectors
    voice, looks = watched(teachers, tiny_data, room=2 * size)
    for _ in range(2):
        assert torch.equal(voice(images, WORDS, photos=photos), expected)
    assert len(looks) == 2 * (3 + 1)  # by each of two encoders: all three, and then one of them
    assert all(look.room == 0 for look in voice.looks.values())


def test_a_student_of_smaller_pictures_has_teachers_who_see_the_photo_as_it_is(two_scales, tiny_data):
    voice = Teachers([load_checkpoint(two_scales).model], CaptionData(tiny_data))
    images, photos = photos_of(tiny_data, [3, 8, 5], [False, True, False])
    small = resizing(16)(images)
    expected = Teachers([load_checkpoint(two_scales).model])(images, WORDS)
    torch.testing.assert_close(voice(small, WORDS, photos=photos), expected)
    assert not torch.allclose(voice(small, WORDS), expected, atol=1e-4)  # of which they would see less


@pytest.mark.parametrize(("augment", "whole"), [("flip", True), ("crop_flip", False)])
def test_teachers_see_no_more_of_a_photo_than_the_student(augment, whole, teachers, tiny_data, tmp_path):
    run = start(taught(tiny_data, tmp_path / "run", teachers[:1], augment=augment))
    assert bool(run.teachers.looks) == whole
    looks = []
    (model,) = run.teachers.models
    model.encoder.register_forward_hook(lambda _, pictures, __: looks.append(pictures[0]))
    training.train_epoch(run, {"now": False})
    data = CaptionData(tiny_data)
    stored = {
        (data.image(i, view)).numpy().tobytes() for i in range(len(data)) for view in (PLAIN, View(0, mirrored=True))
    }
    seen = [picture.numpy().tobytes() in stored for pictures in looks for picture in pictures]
    assert seen
    assert all(seen) if whole else not any(seen)


def test_teachers_are_told_which_photos_they_are_and_which_are_mirrored(teachers, tiny_data, tmp_path):
    run = start(taught(tiny_data, tmp_path / "run", teachers[:1], augment="flip"))
    batch = next(load_batches(training_set(run), plan(run.settings, run.data, epoch=0), captions_per_image=5))
    asked, real = [], run.teachers

    def ask(*photos_and_words, photos, **options):
        asked.append(photos)
        return real(*photos_and_words, photos=photos, **options)

    run.teachers = cast(Any, ask)
    run.wrapped.train()
    training.train_step(run, batch)
    assert set(batch.mirrored.tolist()) == {True, False}
    assert all(torch.equal(told, own) for told, own in zip(asked[0], (batch.indices, batch.mirrored), strict=True))


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_pictures_are_resized_by_the_encoders_own_filter(resample, tiny_data, tmp_path):
    encoder = EncoderConfig(name="resnet18", layer="layer2", weights=None, image_size=48, resample=resample)
    run = start(tiny_settings(tiny_data, tmp_path / "run", encoder=encoder, augment="none"))
    image = run.data.image(3)
    right = resizing(48, resample)(image)
    assert torch.equal(training_set(run)[Sample(3, (), 0)][0], right)
    run.model.eval()
    torch.testing.assert_close(_views(image[None], run.model.encoder)[0], run.model.encoder(right[None]))
    (looked,) = AnnotationCache(run.model.encoder, run.data)((torch.tensor([3]), torch.tensor([False])))
    torch.testing.assert_close(looked, run.model.encoder(right[None]))


def test_a_student_who_expects_what_its_teacher_does_has_nothing_to_learn(teachers, tiny_data, tmp_path):
    # The gradient of -sum q log p is p - q at the logits: none where p = q; and the loss is then the entropy of q.
    no_dropout = dataclasses.replace(TINY["decoder"], dropout=0.0)
    settings = taught(tiny_data, tmp_path / "run", teachers[:1], 1.0, init_from=teachers[0], decoder=no_dropout)
    settings = dataclasses.replace(settings, loss=dataclasses.replace(settings.loss, lambda_ds=0.0))
    run = start(settings)
    images, captions = first_batch(settings)
    objective = teacher_forced(run, images, captions)
    objective.loss.backward()
    gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
    assert len(gradients) > 10
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-6
    q = Teachers(models(teachers[:1]))(images, captions)
    torch.testing.assert_close(objective.loss.detach(), torch.distributions.Categorical(probs=q).entropy().mean())


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_the_weight_shares_the_loss_out(weight, teachers, tiny_data, tmp_path):
    settings = taught(tiny_data, tmp_path / "run", teachers, weight)
    settings = dataclasses.replace(settings, loss=dataclasses.replace(settings.loss, lambda_ds=0.0))
    run = start(settings)
    images, captions = first_batch(settings)
    run.model.eval()
    objective = teacher_forced(run, images, captions)
    output = run.model(images, captions)
    q = Teachers(models(teachers))(images, captions)
    nll, expected = word_nll(output.logits, output.targets).mean(), expected_nll(output.logits, q).mean()
    torch.testing.assert_close(objective.loss, (1 - weight) * nll + weight * expected)
    torch.testing.assert_close(objective.means["nll"], nll)


def test_teachers_are_not_trained_and_see_what_the_student_sees(teachers, tiny_data, tmp_path):
    run = start(taught(tiny_data, tmp_path / "run", teachers))
    before = [{name: x.clone() for name, x in model.state_dict().items()} for model in run.teachers.models]
    training.train_epoch(run, {"now": False})
    for model, old in zip(run.teachers.models, before, strict=True):
        assert not model.training
        assert all(torch.equal(x, old[name]) for name, x in model.state_dict().items())


HARD_STUDENT = HardConfig(baseline="leave_one_out", samples=2)


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_a_taught_run_interrupted_and_resumed_ends_with_the_same_bits(hard, teachers, tiny_data, tmp_path):
    changes = vars(hard_settings(tiny_data, tmp_path, HARD_STUDENT)) if hard else {}
    changes = {name: changes[name] for name in ("decoder", "hard") if name in changes}
    training.train(taught(tiny_data, tmp_path / "whole", teachers, epochs=1, **changes))
    settings = taught(tiny_data, tmp_path / "run", teachers, epochs=1, **changes)
    train_interrupted(settings, 3)
    training.train(dataclasses.replace(settings, resume=True))
    whole = saved_bits(tmp_path / "whole")
    assert same_bits(saved_bits(tmp_path / "run"), whole)
    training.train(taught(tiny_data, tmp_path / "other", teachers[:1], epochs=1, **changes))
    assert not same_bits(saved_bits(tmp_path / "other"), whole)


def test_a_checkpoint_names_its_teachers_without_their_folders(teachers, tiny_data, tmp_path):
    best = training.train(taught(tiny_data, tmp_path / "run", teachers, epochs=1))
    about = load_checkpoint(best).about
    assert about["settings"]["distillation"]["teachers"] == ["1", "2/best"]


def test_teachers_that_do_not_fit_are_refused(teachers, tiny_data, tiny_annotations, tmp_path):
    data = CaptionData(tiny_data)
    with pytest.raises(FileNotFoundError, match="nobody: no checkpoint folder"):
        load_teachers([str(tmp_path / "nobody")], data, FROZEN, whole=True, device="cpu")
    with pytest.raises(ValueError, match=r"distillation\.teachers: .*annotation vectors of another encoder"):
        load_teachers(teachers, CaptionData(tiny_annotations), FROZEN, whole=True, device="cpu")
    foreign = load_checkpoint(Path(teachers[1]))
    words = [*foreign.vocabulary.words[:-1], "zebra"]
    save_checkpoint(tmp_path / "foreign", dataclasses.replace(foreign, vocabulary=type(foreign.vocabulary)(words)))
    with pytest.raises(ValueError, match=r"foreign: its vocabulary is not that of .* --vocabulary"):
        load_teachers([str(tmp_path / "foreign")], data, FROZEN, whole=True, device="cpu")
    assert load_teachers([], data, FROZEN, whole=True, device="cpu") is None


def test_settings_without_a_meaning_are_refused(tiny_data, tmp_path):
    with pytest.raises(ValueError, match=r"weight must lie in \(0, 1\] \(got 0\.0\)"):
        DistillationConfig(("a",), 0.0)
    with pytest.raises(ValueError, match=r"distillation\.weight=0\.7 needs distillation\.teachers"):
        DistillationConfig(weight=0.7)
    with pytest.raises(ValueError, match=r"leaves no epoch for distillation\.teachers"):
        taught(
            tiny_data, tmp_path, ["a"], epochs=1, init_from="b", self_critical=SelfCriticalConfig(epochs=1, samples=2)
        )


def test_teachers_share_an_encoder_only_if_it_is_cut_at_the_same_node():
    layers = ("layer2.1.relu_1", "layer2.1.relu_1", "layer2.1.add")
    vocabulary, decoder = 9, TINY["decoder"]
    first = build_model(dataclasses.replace(FROZEN, layer=layers[0]), decoder, vocabulary)[0]
    state = first.encoder.network.state_dict()
    models = [
        build_model(dataclasses.replace(FROZEN, layer=layer), decoder, vocabulary, encoder_state=state)[0]
        for layer in layers
    ]
    same, alike, other = (model.encoder for model in Teachers(models).models)
    assert same is alike
    assert same is not other
