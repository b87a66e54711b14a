"""Training at several sizes: each scale's decoder learns from its own batches, to the same bits, and from teachers."""

import dataclasses

import pytest
import torch
from conftest import TINY_DECODER, TINY_ENCODER, build_shapes, make_talkative
from tiny_runs import TINY, same_bits, saved_bits, tiny_settings, train_interrupted
from torchvision.transforms.v2 import functional as resizing

from captioning import load_captioner, training
from captioning.checkpoint import load_checkpoint
from captioning.config import (
    DecoderConfig,
    DistillationConfig,
    EncoderConfig,
    LossConfig,
    RegionEncoderConfig,
    SearchConfig,
    SelfCriticalConfig,
)
from captioning.data import CaptionData
from captioning.distillation import Teachers
from captioning.evaluate import evaluate
from captioning.objective import teacher_forced
from captioning.run import start


def scaled(data, output, **changes):
    """Settings of a run that looks at 32 and at 48 pixels."""
    encoder = dataclasses.replace(TINY["encoder"], scales=(48,))
    validation = dataclasses.replace(
        TINY["validation"], search=SearchConfig(beam_size=2, max_length=8, multi_scale=True)
    )
    return tiny_settings(data, output, **{"encoder": encoder, "validation": validation, **changes})


def test_a_step_teaches_the_decoder_of_its_scale_alone(tiny_data, tmp_path):
    run = start(scaled(tiny_data, tmp_path / "run"))
    batches = training.plan(run.settings, run.data, epoch=0)
    batch = next(training.load_batches(training.training_set(run), batches, captions_per_image=5))
    scale = batches[0][0].scale
    assert batch.images.shape[-1] == (32, 48)[scale]
    before = [{n: x.clone() for n, x in d.state_dict().items()} for d in run.model.decoders]
    encoder = {name: x.clone() for name, x in run.model.encoder.state_dict().items()}
    training.train_step(run, batch)
    changed = [
        not same_bits(old, dict(decoder.state_dict())) for old, decoder in zip(before, run.model.decoders, strict=True)
    ]
    assert changed == [scale == 0, scale == 1]
    assert not same_bits(encoder, dict(run.model.encoder.state_dict()))


@pytest.mark.parametrize("stop_after", [1, 4, 6])
def test_a_run_of_two_scales_interrupted_and_resumed_ends_with_the_same_bits(stop_after, tiny_data, tmp_path):
    training.train(scaled(tiny_data, tmp_path / "whole"))
    settings = scaled(tiny_data, tmp_path / "run")
    train_interrupted(settings, stop_after)
    training.train(dataclasses.replace(settings, resume=True))
    assert same_bits(saved_bits(tmp_path / "run"), saved_bits(tmp_path / "whole"))
    best = load_checkpoint(tmp_path / "whole" / "best")
    assert (best.encoder.sides, best.search.multi_scale) == ((32, 48), True)
    assert best.model.encoder.grids == ((4, 4), (6, 6))


def test_stored_vectors_of_two_scales_train_two_decoders(tiny_scales, tmp_path):
    encoder = EncoderConfig(name="resnet18", image_size=32, scales=(48,))
    settings = scaled(tiny_scales, tmp_path / "run", encoder=encoder, augment="flip")
    critical = SelfCriticalConfig(epochs=1, samples=2, max_length=4)
    training.train(dataclasses.replace(settings, self_critical=critical, batch_size=2))
    trained = load_checkpoint(tmp_path / "run" / "last")
    assert trained.encoder.sides == (32, 48)
    torch.manual_seed(settings.seed)
    fresh = start(dataclasses.replace(settings, output=str(tmp_path / "fresh"))).model
    for decoder, new in zip(trained.model.decoders, fresh.decoders, strict=True):
        assert not torch.equal(decoder.L_o.weight, new.L_o.weight)


def test_scales_that_a_file_has_not_are_refused(tiny_annotations, tiny_scales, tmp_path):
    for path, scales, sides in ((tiny_annotations, (48,), r"\[32\]"), (tiny_scales, (64,), r"\[32, 48\]")):
        encoder = EncoderConfig(name="resnet18", image_size=32, scales=scales)
        settings = tiny_settings(path, tmp_path / "run", encoder=encoder, augment="none")
        with pytest.raises(ValueError, match=f"encoder.scales=.*, but {path} stores annotation vectors of {sides} pix"):
            training.train(settings)


def test_the_first_of_a_files_scales_may_be_trained_alone(tiny_scales, tmp_path):
    encoder = EncoderConfig(name="resnet18", image_size=32)
    settings = tiny_settings(tiny_scales, tmp_path / "run", encoder=encoder, augment="flip")
    training.train(settings)
    alone = load_checkpoint(tmp_path / "run" / "best")
    assert (alone.encoder.sides, len(alone.model.further)) == ((32,), 0)
    evaluate(alone, CaptionData(tiny_scales), "train", SearchConfig(mirror=True), tokenizer="python")


def test_a_run_goes_on_with_vectors_of_its_own_sizes_only(tiny_scales, tmp_path):
    encoder = EncoderConfig(name="resnet18", image_size=32, scales=(48,))
    settings = scaled(tiny_scales, tmp_path / "run", encoder=encoder, augment="flip", batch_size=2)
    train_interrupted(settings, 3)
    for scales, said in (((64,), r"\[32, 64\]"), ((), r"\[32\]")):
        other = build_shapes(tmp_path / f"other{len(scales)}.h5", TINY_ENCODER, scales=scales, mirror=True)
        with pytest.raises(ValueError, match=rf"encoder.scales=\[48\], but .* stores annotation vectors of {said} pix"):
            training.train(dataclasses.replace(settings, data=str(other), resume=True))
    training.train(dataclasses.replace(settings, resume=True))


def test_the_decoders_of_a_start_keep_their_sizes(two_scales, tiny_data, tmp_path):
    encoder = dataclasses.replace(TINY["encoder"], image_size=48, scales=(32,))
    decoder = dataclasses.replace(TINY_DECODER, dropout=0.3)
    settings = scaled(tiny_data, tmp_path / "run", encoder=encoder, decoder=decoder, init_from=str(two_scales))
    with pytest.raises(ValueError, match=r"has decoders for pictures of \(32, 48\) pixels, .* asks for \(48, 32\)"):
        training.train(settings)


def test_a_start_needs_as_many_decoders(two_scales, tiny_checkpoint, tiny_data, tmp_path):
    encoder = dataclasses.replace(TINY["encoder"], train_from=None, batch_norm="frozen")
    for start_from, scales, said in ((tiny_checkpoint, (48,), r"\(32,\)"), (two_scales, (), r"\(32, 48\)")):
        settings = scaled(
            tiny_data,
            tmp_path / "run",
            encoder=dataclasses.replace(encoder, scales=scales),
            decoder=dataclasses.replace(TINY_DECODER, dropout=0.3),
            validation=TINY["validation"],
            init_from=str(start_from),
        )
        with pytest.raises(ValueError, match=f"init_from=.*: it has decoders for pictures of {said} pixels, and"):
            training.train(settings)


def test_training_says_which_size_has_a_dead_attention(tiny_data, tmp_path, capsys, monkeypatch):
    run = start(scaled(tiny_data, tmp_path / "run", epochs=3))
    (coarse,) = run.evaluated.further
    with torch.no_grad():
        run.evaluated.decoder.attention.alignment.v.weight.mul_(1000)  # one place
        coarse.attention.alignment.v.weight.zero_()  # it can see nothing: uniform for ever
    for epoch in range(3):
        run.progress.epoch = epoch
        training.validate(run)
    said = capsys.readouterr().out.splitlines()
    (warning,) = [line for line in said if line.startswith("warning") and "H/ln L above" in line]
    assert warning.startswith("warning at 48 pixels: the attention has collapsed")
    assert [line.split(": ")[0] for line in said if ": attention: H/ln L" in line][:2] == [
        "epoch 1 at 32 pixels",
        "epoch 1 at 48 pixels",
    ]
    last = run.progress.history[-1]
    assert last["entropy_48"] == pytest.approx(1)
    assert last["entropy"] < 1
    assert {name for name in last if name.endswith("_48")} >= {"gradient_snr_48", "listening_gap_48"}
    monkeypatch.setattr(training, "signal_to_noise", lambda *_, scale=0, **__: 10.0 + scale)
    training.validate(run)
    last = run.progress.history[-1]
    assert (last["gradient_snr"], last["gradient_snr_48"]) == (10.0, 11.0)


def test_teachers_look_at_the_sizes_that_they_know(two_scales, tiny_data):
    model = load_checkpoint(two_scales).model.eval()
    data = CaptionData(tiny_data)
    pictures = torch.stack([data.image(i) for i in (0, 1)])
    larger = resizing.resize(pictures, [48, 48], interpolation=resizing.InterpolationMode.BICUBIC, antialias=True)
    words = torch.tensor([[[1, 5, 6, 2]], [[1, 7, 8, 2]]])
    with torch.no_grad():
        fine, coarse = (model.decoder_of(a)(a, words) for a in (model.annotate(larger), model.annotate(pictures)))
    mean = (fine.logits.softmax(dim=-1) + coarse.logits.softmax(dim=-1)) / 2
    torch.testing.assert_close(Teachers([model])(pictures, words), mean)
    again = resizing.resize(larger, [32, 32], interpolation=resizing.InterpolationMode.BICUBIC, antialias=True)
    with torch.no_grad():
        seen = model(again, words).logits.softmax(dim=-1)  # a student at 48 pixels
    torch.testing.assert_close(Teachers([model])(larger, words), (fine.logits.softmax(dim=-1) + seen) / 2)


def test_teachers_of_stored_vectors_must_know_their_sizes(tiny_scales, tmp_path):
    encoder = EncoderConfig(name="resnet18", image_size=32)
    both = dataclasses.replace(encoder, scales=(48,))
    changes = {"augment": "flip", "max_steps": 1}
    one, two = (scaled(tiny_scales, tmp_path / n, encoder=e, **changes) for n, e in (("1", encoder), ("2", both)))
    one = dataclasses.replace(one, validation=TINY["validation"])
    for settings in (one, two):
        training.train(settings)
    taught = {name: DistillationConfig((str(tmp_path / name),), 0.5) for name in ("1", "2")}
    with pytest.raises(
        ValueError, match=r"distillation.teachers: .*1: learned from pictures of \(32,\) pixels, and enc"
    ):
        training.train(dataclasses.replace(two, distillation=taught["1"], output=str(tmp_path / "no")))
    assert not (tmp_path / "no").exists()
    training.train(dataclasses.replace(one, distillation=taught["2"], output=str(tmp_path / "yes")))
    assert load_checkpoint(tmp_path / "yes" / "best").encoder.sides == (32,)


def test_a_student_may_look_at_other_sizes_than_its_teachers(two_scales, tiny_data, tmp_path):
    encoder = dataclasses.replace(TINY["encoder"], image_size=40, scales=(64,))
    rewards = {}
    for weight in (0.5, 1.0):
        teachers = DistillationConfig((str(two_scales),), weight)
        run = start(scaled(tiny_data, tmp_path / str(weight), encoder=encoder, distillation=teachers))
        batches = training.plan(run.settings, run.data, epoch=0)
        batch = next(training.load_batches(training.training_set(run), batches, captions_per_image=5))
        assert batch.images.shape[-1] in (40, 64)
        torch.manual_seed(0)
        rewards[weight] = teacher_forced(run, batch.images, batch.words).loss.item()
    assert rewards[0.5] != pytest.approx(rewards[1.0], abs=1e-3)


@pytest.mark.parametrize(
    "decoder",
    [
        DecoderConfig(name="transformer", embedding_dim=8, hidden_dim=8, layers=1, heads=2),
        DecoderConfig(name="lstm", embedding_dim=8, hidden_dim=12),
        DecoderConfig(embedding_dim=8, hidden_dim=12, attention_dim=6, attention="hard"),
    ],
    ids=["transformer", "lstm", "hard"],
)
def test_every_decoder_learns_at_two_sizes(decoder, tiny_data, tmp_path):
    regions = RegionEncoderConfig(name="lstm", dim=8)
    changes = {"decoder": decoder, "region_encoder": regions, "loss": LossConfig(lambda_ds=0.0), "epochs": 1}
    settings = scaled(tiny_data, tmp_path / "run", **changes)
    training.train(settings)
    picture = CaptionData(tiny_data).image(1).permute(1, 2, 0).numpy()
    captioner = load_captioner(tmp_path / "run")
    captioner.caption([picture], max_length=3)
    if decoder.attention == "hard":
        for each in captioner.ensemble.models[0].decoders:
            make_talkative(each)
        caption = captioner.caption([picture], max_length=3)[0]
        assert caption.words
        assert caption.locations.shape == (len(caption.words), 2)
        assert caption.locations.max() < 36
