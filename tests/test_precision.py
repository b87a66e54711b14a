"""What products are made of: bf16 where the processor has instructions for it, or where it is asked for, else fp32."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import TINY_ENCODER
from photo_folders import ENCODER, command, photos
from test_decoder import ONE_OF_EACH, batch, build, different
from tiny_runs import tiny_settings

from captioning import training
from captioning.checkpoint import load_checkpoint
from captioning.compare import systems
from captioning.config import Settings
from captioning.data import CaptionData, CaptionDataset, load_batches
from captioning.losses import expected_nll, word_nll
from captioning.objective import teacher_forced
from captioning.plan import plan
from captioning.precision import number_format, slow_choice
from captioning.run import start, start_accelerator
from preprocess.__main__ import main
from preprocess.encode import Annotator

SLOW = "precision=bf16: this processor has no instructions for it"


@pytest.fixture
def capable(monkeypatch):
    """Tells torch what the processor can do, and hides GPUs."""

    def of(**capabilities: bool) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the device of earlier tests
    yield of
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", ["amx_bf16", "avx512_bf16", "bf16", "sve_bf16"])
def test_auto_is_bf16_where_the_processor_has_it(name, capable):
    capable(avx2=True, **{name: True})
    assert number_format("auto", "cpu") == "bf16"
    assert slow_choice("bf16", "cpu") is None


def test_auto_is_fp32_where_the_processor_lacks_it(capable):
    capable(avx2=True, avx512_f=True, avx512_bf16=False)
    assert number_format("auto", "cpu") == "fp32"
    assert slow_choice("auto", "cpu") is None


def test_instructions_that_the_library_cannot_use_do_not_count(capable, monkeypatch):
    capable(avx512_bf16=True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert number_format("auto", "cpu") == "fp32"


@pytest.mark.parametrize(("has_it", "made_in"), [(True, "bf16"), (False, "fp32")])
def test_on_a_gpu_the_gpu_decides(has_it, made_in, capable, monkeypatch):
    capable(avx512_bf16=not has_it)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_it or including_emulation)
    assert number_format("auto", "cuda") == made_in
    assert slow_choice("bf16", "cuda") is None


@pytest.mark.parametrize("asked", ["fp32", "bf16"])
def test_what_is_asked_for_is_done(asked, capable):
    capable()
    assert number_format(asked, "cpu") == asked


@pytest.mark.parametrize(("has_it", "made_in"), [(True, "bf16"), (False, "fp32")])
def test_a_run_says_and_stores_what_auto_came_to(has_it, made_in, capable, tiny_data, tmp_path, capsys):
    capable(avx512_bf16=has_it)
    best = training.train(tiny_settings(tiny_data, tmp_path / "run", precision="auto", epochs=1))
    printed = capsys.readouterr().out
    assert f"1 process(es) on cpu, {made_in}\n" in printed
    assert SLOW not in printed
    assert load_checkpoint(best).about["settings"]["precision"] == made_in
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["precision"] == made_in


def test_a_run_goes_on_in_the_numbers_that_it_began_with(capable, tiny_data, tmp_path):
    capable(avx512_bf16=True)
    settings = tiny_settings(tiny_data, tmp_path / "run", precision="bf16", epochs=1)
    training.train(settings)
    again = dataclasses.replace(settings, precision="auto", resume=True)
    assert start(again).settings.precision == "bf16"
    capable()
    with pytest.raises(ValueError, match="--resume: precision was 'bf16' and is now 'fp32'"):
        start(again)


@pytest.mark.parametrize(
    ("asked", "has_it", "made_in"),
    [
        ("bf16", False, torch.bfloat16),
        ("fp32", True, torch.float32),
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float32),
    ],
)
def test_the_products_of_a_run_are_made_of_its_precision(asked, has_it, made_in, capable):
    capable(avx512_bf16=has_it)
    _, accelerator = start_accelerator(Settings("d.h5", "runs/x", precision=asked))
    with accelerator.autocast():
        assert (torch.ones(2, 3) @ torch.ones(3, 2)).dtype == made_in


@pytest.mark.parametrize(("precision", "within"), [("bf16", True), ("fp32", False)])
def test_the_likelihood_is_computed_in_the_precision_of_the_run(precision, within, tiny_data, tmp_path):
    seen = []
    run = start(tiny_settings(tiny_data, tmp_path / "run", precision=precision))
    run.model.decoder.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    plans = plan(run.settings, run.data, epoch=0)
    batch = next(load_batches(CaptionDataset(run.data, sides=(32,)), plans, captions_per_image=5))
    teacher_forced(run, batch.images, batch.words)
    assert seen == [within]


def test_the_products_of_an_annotator_are_made_of_its_precision():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    fp32, bf16 = (Annotator(TINY_ENCODER, precision=name, device="cpu", seed=0) for name in ("fp32", "bf16"))
    with torch.inference_mode():
        exact = fp32.encoder(torch.from_numpy(pixels).permute(0, 3, 1, 2)).half().numpy()
    assert np.array_equal(fp32([pixels]), exact)
    error = np.linalg.norm(bf16([pixels]) - exact.astype(np.float64)) / np.linalg.norm(exact.astype(np.float64))
    assert 2**-11 < error < 0.02  # more than float16 rounds; every layer rounds by up to 2**-9 in bf16


def test_a_comparison_is_planned_with_what_auto_comes_to(capable, tiny_data, tmp_path):
    capable(avx512_bf16=True)
    (system,) = systems(["family_luong"], [0], str(tiny_data), tmp_path, [])
    assert system.settings.precision == "bf16"


def test_a_slow_choice_is_called_one(capable, tiny_data, tmp_path, capsys):
    capable()
    start(tiny_settings(tiny_data, tmp_path / "run", precision="bf16"))
    assert SLOW in capsys.readouterr().out
    root = photos(tmp_path / "in", 3)
    assert main(command(root, tmp_path / "d.h5", *ENCODER, "--precision", "bf16", "--device", "cpu", size=64)) == 0
    assert SLOW in capsys.readouterr().err


@pytest.mark.parametrize(("has_it", "made_in"), [(True, "bf16"), (False, "fp32")])
def test_a_file_of_vectors_says_what_auto_came_to(has_it, made_in, capable, tmp_path):
    capable(avx512_bf16=has_it)
    root = photos(tmp_path / "in", 3)
    assert main(command(root, tmp_path / "d.h5", *ENCODER, "--precision", "auto", "--device", "cpu", size=64)) == 0
    assert CaptionData(tmp_path / "d.h5").settings["precision"] == made_in


@pytest.mark.parametrize("config", [c for c in ONE_OF_EACH if c.name != "transformer"], ids=different)
def test_under_bf16_the_state_stays_in_fp32(config):
    decoder, (a, words) = build(config).float().eval(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        memory = decoder.prepare(a.float())
        state = decoder.initial_state(memory, 3)
        for t in range(3):
            assert {x.dtype for x in state} == {torch.float32}
            state = decoder.step(words[..., t].flatten(), state, memory).state


def test_the_loss_of_bf16_logits_is_computed_in_fp32():
    logits = torch.randn(64, 500, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets, expected = torch.arange(64), torch.full((64, 500), 1 / 500)
    for loss, truth in ((word_nll, targets), (expected_nll, expected)):
        found = loss(logits, truth)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, loss(logits.float(), truth), rtol=0, atol=0)
