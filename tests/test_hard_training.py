"""Training with hard attention: it resumes to the same bits, starts from a soft model, and says what it minimises."""

import copy
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from tiny_runs import TINY, same_bits, saved_bits, tiny_settings, train_interrupted
from torch import Tensor, nn

from benchmarks.hard_oracle import Oracle, estimate
from captioning import caption as caption_command
from captioning import evaluate, training
from captioning.api import load_captioner
from captioning.checkpoint import load_checkpoint, read_tensors
from captioning.config import DistillationConfig, EncoderConfig, HardConfig, LossConfig, Settings
from captioning.data import CaptionData, CaptionDataset, load_batches
from captioning.hard_objective import HardTerms, hard_terms, training_look
from captioning.losses import REWARDS, by_word, word_nll
from captioning.models.attention import looking
from captioning.models.decoder import Output
from captioning.objective import teacher_forced, update_baseline
from captioning.plan import plan
from captioning.reward_baselines import Baseline, Learned
from captioning.run import Run, start
from captioning.vocabulary import PAD

HARD = dataclasses.replace(TINY["decoder"], attention="hard")
ESTIMATORS = [
    HardConfig(),
    HardConfig(baseline="learned"),
    HardConfig(baseline="leave_one_out", samples=2, expectation_probability=0.0),
    HardConfig(baseline="none", relaxation="gumbel_straight_through"),
]


def hard_settings(data: Path, output: Path, hard: HardConfig = ESTIMATORS[0], **changes: Any) -> Settings:
    return tiny_settings(data, output, **{"decoder": HARD, "hard": hard, "epochs": 1, **changes})


def first_batch(settings: Settings):
    data = CaptionData(settings.data)
    dataset = CaptionDataset(data, sides=(32,))
    return next(load_batches(dataset, plan(settings, data, epoch=0), captions_per_image=5))[:2]


@pytest.mark.parametrize("hard", ESTIMATORS, ids=lambda hard: f"{hard.baseline}-{hard.relaxation}")
def test_a_hard_run_interrupted_and_resumed_ends_with_the_same_bits(hard, tiny_data, tmp_path):
    training.train(hard_settings(tiny_data, tmp_path / "whole", hard))
    settings = hard_settings(tiny_data, tmp_path / "run", hard)
    train_interrupted(settings, 2)
    training.train(dataclasses.replace(settings, resume=True))
    whole = saved_bits(tmp_path / "whole")
    assert same_bits(saved_bits(tmp_path / "run"), whole)
    if hard.baseline == "moving_average":
        assert whole["baseline/b"] < -0.1
    if hard.baseline == "learned":
        assert "baseline/net.0.weight" in whole


def squared_error(run: Run) -> float:
    """Of the baseline, per word of a batch, with the same locations each time."""
    run.model.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        return teacher_forced(run, *first_batch(run.settings)).means["squared_advantage"].item()


def test_the_learned_baseline_is_trained(tiny_data, tmp_path):
    hard = HardConfig(baseline="learned", expectation_probability=0.0)
    run = start(hard_settings(tiny_data, tmp_path / "run", hard, encoder=frozen()))
    run.model.requires_grad_(False)  # so that the rewards stay what they are
    before = {name: x.clone() for name, x in run.baseline.state_dict().items()}
    error = squared_error(run)
    training.train_epoch(run, {"now": False})
    assert all(not torch.equal(x, before[name]) for name, x in run.baseline.state_dict().items())
    assert squared_error(run) < 0.8 * error


def drawn_by_hand() -> tuple[Output, Tensor]:
    """An image with captions of three words and of one, at drawn locations, and one of two words, at the mean context.

    And log p of its words; their rewards to go are -7, -6, -4; -3; and -6, -1.
    """
    mask = torch.tensor([[[1, 1, 1], [1, 0, 0]], [[1, 1, 0], [0, 0, 0]]], dtype=torch.bool)
    alphas = torch.full((2, 2, 3, 4), 0.25)
    locations = torch.tensor([[[0, 3, 1], [2, 0, 0]], [[-1] * 3, [-1] * 3]])
    entropies = torch.tensor([[[0.1, 0.2, 0.3], [0.4, 9, 9]], [[0.5, 0.6, 9], [9, 9, 9]]])
    looks = (locations, torch.zeros(2, 2, 3), entropies, torch.zeros(2, 2, 3, 5))
    output = Output(torch.zeros(6, 2), torch.zeros(6, dtype=torch.long), mask, alphas, None, *looks)
    return output, torch.tensor([-1.0, -2.0, -4.0, -3.0, -5.0, -1.0])


def test_the_learned_baseline_minimises_its_squared_error_by_hand():
    baseline = Learned(hidden_dim=5, samples=1, to_go=True)
    for parameter in baseline.parameters():
        nn.init.zeros_(parameter)
    nn.init.constant_(baseline.net[2].bias, -1.0)  # so that b = -3, -2, -1; -1: minus the words to go
    terms = hard_terms(*drawn_by_hand(), HardConfig(baseline="learned", lambda_r=0.0, lambda_e=0.0), baseline)
    squares = (-7 + 3) ** 2 + (-6 + 2) ** 2 + (-4 + 1) ** 2 + (-3 + 1) ** 2
    assert terms.loss.item() == pytest.approx(squares)
    assert terms.squared_advantage.item() == pytest.approx(squares)
    assert terms.entropy.item() == pytest.approx(0.1 + 0.2 + 0.3 + 0.4 + 0.5 + 0.6)


def test_captions_are_counted_where_locations_were_drawn_for_them():
    baseline = Baseline(hidden_dim=5, samples=1, to_go=True)
    terms = hard_terms(*drawn_by_hand(), HardConfig(baseline="none"), baseline)
    assert terms.captions.tolist() == [-1 - 2 - 4 - 3, 4, 2]


def test_the_curves_of_hard_attention_are_means_over_words(tiny_data, tmp_path):
    hard = HardConfig(baseline="none", samples=2, expectation_probability=0.0)
    run = start(hard_settings(tiny_data, tmp_path / "run", hard))
    decoder = run.model.decoder
    for parameter in (decoder.attention.alignment.v.weight, decoder.L_o.weight, decoder.L_o.bias):
        nn.init.zeros_(parameter)  # all 16 locations and all words are equally likely
    images, words = first_batch(run.settings)
    means = teacher_forced(run, images, words).means
    lengths = (words[..., 1:] != PAD).sum(dim=-1).flatten().tolist()
    log_v = math.log(len(run.data.vocabulary))  # a reward to go of n words is -n ln V
    squares = sum((n * log_v) ** 2 for length in lengths for n in range(1, length + 1))
    assert means["entropy"].item() == pytest.approx(math.log(16))
    assert means["squared_advantage"].item() == pytest.approx(squares / sum(lengths), rel=1e-5)


ASSEMBLED = [
    *ESTIMATORS,
    HardConfig(reward="sentence", baseline="moving_average", lambda_e=0.3, expectation_probability=0.0),
    HardConfig(baseline="leave_one_out", samples=3, lambda_r=0.5, lambda_e=0.1, expectation_probability=0.5),
]


@pytest.mark.parametrize("hard", ASSEMBLED, ids=lambda hard: f"{hard.baseline}-{hard.reward}-{hard.samples}")
def test_a_step_of_training_has_the_gradient_that_the_oracle_has_proved(hard, tiny_annotations, tmp_path):
    # test_hard_estimators holds `estimate` against all paths; it sums over captions, and training averages over words.
    options = {"encoder": EncoderConfig(name="resnet18", image_size=32), "augment": "none", "loss": LossConfig(0.0)}
    decoder = dataclasses.replace(HARD, dropout=0.0)
    settings = hard_settings(tiny_annotations, tmp_path / "run", hard, decoder=decoder, **options)
    run = start(settings)
    images, words = first_batch(settings)
    lengths = (words[..., 1:] != PAD).sum(dim=-1)
    assert len(lengths.unique()) > 1
    baseline = copy.deepcopy(run.baseline)
    torch.manual_seed(5)
    teacher_forced(run, images, words).loss.backward()
    torch.manual_seed(5)
    with torch.no_grad():
        a = run.model.annotate(images)
    oracle = Oracle(run.model.decoder, a, words)
    found = torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in oracle.parameters]
    )
    wanted = -estimate(oracle, hard, baseline) / lengths.sum()
    assert wanted.norm() > 0
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_the_learned_baselines_gradients_are_averaged_over_processes(tiny_data, tmp_path):
    run = start(hard_settings(tiny_data, tmp_path / "run", HardConfig(baseline="learned")))
    for parameter in run.baseline.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)

    class OfTwo:
        num_processes = 2

        def reduce(self, values, how):
            assert how == "mean"
            return (values + 4.0) / 2  # the other process has 4 everywhere

    run.accelerator = OfTwo()
    training.average_gradients(run)
    assert all((parameter.grad == 3.0).all() for parameter in run.baseline.parameters())


@pytest.fixture(scope="module")
def hard_checkpoint(tiny_checkpoint, tmp_path_factory) -> Path:
    """The talkative tiny checkpoint, told that its attention is hard."""
    folder = tmp_path_factory.mktemp("checkpoint") / "hard"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["decoder"]["attention"] = "hard"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_caption_of_a_hard_model_says_where_each_word_looked(hard_checkpoint, tiny_data):
    captioner = load_captioner(hard_checkpoint)
    photo = CaptionData(tiny_data).image(0).permute(1, 2, 0).numpy()
    caption = captioner.caption(photo, max_length=6)[0]
    assert len(caption.words) > 1
    assert caption.locations.tolist() == [[int(alpha.argmax())] for alpha in caption.alphas]
    assert captioner.caption(photo, location="expected")[0].locations is None
    drawn = [captioner.caption(photo, location="sample", seed=seed)[0] for seed in (3, 3, 4)]
    assert np.array_equal(drawn[0].locations, drawn[1].locations)
    assert not np.array_equal(drawn[0].locations, drawn[2].locations)
    with pytest.raises(ValueError, match=r"location must be one of argmax, sample, expected \(got 'expcted'\)"):
        captioner.caption(photo, location="expcted")


def test_evaluate_says_how_a_hard_model_looked(hard_checkpoint, tiny_checkpoint, tiny_annotations, capsys):
    common = ["--data", str(tiny_annotations), "--tokenizer", "python", "--max-length", "6", "--device", "cpu"]
    for location in ("argmax", "expected"):
        assert evaluate.main(["--checkpoint", str(hard_checkpoint), "--location", location, *common]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert f"location: {location}" in lines
        assert "looks: the photo" in lines
        assert json.loads(lines[-1])["location"] == location
    assert evaluate.main(["--checkpoint", str(tiny_checkpoint), *common]) == 0
    assert "location" not in capsys.readouterr().out
    assert evaluate.main(["--checkpoint", str(tiny_checkpoint), "--location", "sample", *common]) == 2
    assert capsys.readouterr().err == "evaluate: location='sample' needs a model with hard attention\n"


def test_the_command_line_shows_the_location_and_marks_it(hard_checkpoint, tiny_data, tmp_path, capsys):
    photo = tmp_path / "photo.png"
    Image.fromarray(CaptionData(tiny_data).image(0).permute(1, 2, 0).numpy()).save(photo)
    command = [str(photo), "--checkpoint", str(hard_checkpoint), "--device", "cpu", "--max-length", "5", "--words"]
    output = ["--json", str(tmp_path / "x.json"), "--overlay", str(tmp_path / "overlays"), "--location", "sample"]
    assert caption_command.main([*command, *output]) == 0
    found = json.loads((tmp_path / "x.json").read_text())[0]
    ((cell,), *_) = found["locations"]
    row, column = divmod(cell, 4)
    assert f"looked at row {row + 1} of 4, column {column + 1} of 4" in capsys.readouterr().out
    assert (tmp_path / "overlays" / "photo.png").exists()


def test_an_overlay_marks_the_cells_that_were_looked_at(hard_checkpoint, tiny_data, tmp_path):
    photo = CaptionData(tiny_data).image(0).permute(1, 2, 0).numpy()
    caption = load_captioner(hard_checkpoint).caption(photo, max_length=4)[0]
    elsewhere = dataclasses.replace(caption, locations=(caption.locations + 5) % 16)
    pictures = []
    for name, shown in {"marked": caption, "again": caption, "elsewhere": elsewhere}.items():
        shown.overlay(photo, tmp_path / f"{name}.png")
        pictures.append(np.asarray(Image.open(tmp_path / f"{name}.png")))
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_a_soft_checkpoint_starts_a_hard_model(tiny_data, tmp_path):
    soft = tiny_settings(tiny_data, tmp_path / "soft", epochs=1)
    training.train(soft)
    run = start(hard_settings(tiny_data, tmp_path / "hard", init_from=str(tmp_path / "soft")))
    first = load_checkpoint(tmp_path / "soft" / "best").model.state_dict()
    assert all(torch.equal(x, first[name]) for name, x in run.model.state_dict().items())
    other = dataclasses.replace(HARD, alignment="general")
    with pytest.raises(ValueError, match="its decoder is"):
        start(hard_settings(tiny_data, tmp_path / "other", decoder=other, init_from=str(tmp_path / "soft")))


@pytest.mark.parametrize(
    "hard",
    [*ESTIMATORS, HardConfig(baseline="none", samples=2)],  # of equal samples leave-one-out would have no advantage
    ids=lambda hard: f"{hard.baseline}-{hard.relaxation}-{hard.samples}",
)
def test_doubling_the_batch_changes_no_weight(hard, tiny_data, tmp_path):
    # With the expectation in place of samples nothing is random: every term must be the same mean, so their sum too.
    hard = dataclasses.replace(hard, lambda_e=0.3)
    settings = hard_settings(tiny_data, tmp_path / "run", hard, encoder=frozen(), loss=LossConfig(lambda_ds=0.7))
    run = start(settings)
    run.model.eval()
    images, words = first_batch(settings)
    with torch.no_grad(), everywhere_argmax():
        once = teacher_forced(run, images, words)
        twice = teacher_forced(run, torch.cat([images, images]), torch.cat([words, words]))
    assert once.loss.item() == pytest.approx(twice.loss.item(), rel=1e-4)
    assert twice.words == 2 * once.words == 2 * int((words[..., 1:] != PAD).sum())


def frozen() -> EncoderConfig:
    return dataclasses.replace(TINY["encoder"], batch_norm="frozen")


class everywhere_argmax:  # noqa: N801  it reads as a block
    """Training looks at the likeliest location, so that it is not random; no baseline learns meanwhile."""

    def __enter__(self):
        from captioning import objective
        from captioning.models.attention import Look

        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(objective, "training_look", lambda hard, generator=None: Look("argmax"))
        self.patch.setattr(objective, "update_baseline", lambda *_: None)

    def __exit__(self, *_):
        self.patch.undo()


def test_the_doubly_stochastic_penalty_acts_on_the_alphas_of_hard_attention(tiny_data, tmp_path):
    settings = hard_settings(
        tiny_data, tmp_path / "run", HardConfig(lambda_r=0.0, lambda_e=0.0, expectation_probability=0.0)
    )
    run = start(settings)
    gradients = []
    for lambda_ds in (0.0, 5.0):
        run.settings = dataclasses.replace(settings, loss=LossConfig(lambda_ds=lambda_ds))
        run.model.zero_grad()
        torch.manual_seed(0)
        teacher_forced(run, *first_batch(settings)).loss.backward()
        gradients.append(run.model.decoder.attention.alignment.v.weight.grad.abs().sum().item())
    assert gradients[0] == 0  # the location is sampled and no term is left that asks for alpha
    assert gradients[1] > 0


def test_the_moving_average_learns_from_all_processes(tiny_data, tmp_path):
    run = start(hard_settings(tiny_data, tmp_path / "run"))

    class OfTwo:
        num_processes = 2

        def reduce(self, values):
            return values + torch.tensor([-50.0, 10.0, 2.0])  # what the other process sampled

    run.accelerator = OfTwo()
    terms = HardTerms(*torch.zeros(3), torch.tensor([-30.0, 10.0, 2.0]))
    update_baseline(run, run.baseline, terms)
    assert run.baseline.b.item() == pytest.approx(0.1 * -80 / 20)
    update_baseline(run, run.baseline, HardTerms(*torch.zeros(3), torch.tensor([50.0, -10.0, -2.0])))
    assert run.baseline.b.item() == pytest.approx(0.1 * -80 / 20)  # no caption was sampled anywhere: nothing is learnt


@pytest.mark.slow
def test_two_processes_train_hard_attention(tiny_data, tmp_path):
    settings = hard_settings(tiny_data, tmp_path / "run", HardConfig(baseline="learned"), encoder=frozen())
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(dataclasses.asdict(settings)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [*command, "--config", str(recipe)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr[-2000:]
    saved = read_tensors(tmp_path / "run" / "last" / "training.safetensors")
    assert all(saved[name].isfinite().all() for name in saved if name.startswith("baseline/"))


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_a_place_is_rewarded_for_what_is_learned_there(weight, tiny_data, tmp_path, monkeypatch):
    # the caption's words and the teacher's, as they are mixed in the loss; or attention would learn something else
    seen: dict[str, torch.Tensor] = {}

    def noted(output, log_p, hard, baseline):
        seen["log_p"], seen["output"] = log_p, output
        return hard_terms(output, log_p, hard, baseline)

    monkeypatch.setattr("captioning.objective.hard_terms", noted)
    settings = hard_settings(tiny_data, tmp_path / "run", loss=LossConfig(lambda_ds=0.0))
    run = start(settings)
    images, captions = first_batch(settings)

    def expected_of(images, captions, *, samples, photos):
        words = int((captions[..., 1:] != 0).sum()) * samples
        return torch.full((words, len(run.data.vocabulary)), 1 / len(run.data.vocabulary))

    run.teachers = expected_of
    run.settings = dataclasses.replace(settings, distillation=DistillationConfig(("a",), weight))
    found = teacher_forced(run, images, captions)
    log_p = seen["output"].logits.detach().log_softmax(dim=-1)
    own = log_p.gather(-1, seen["output"].targets.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(seen["log_p"], torch.lerp(own, log_p.mean(dim=-1), weight))
    assert found.means["nll"].item() == pytest.approx(-own.mean().item(), rel=1e-5)


def test_the_advantage_is_a_mean_over_the_places_that_were_sampled(tiny_data, tmp_path):
    settings = hard_settings(tiny_data, tmp_path / "run", HardConfig(baseline="none", expectation_probability=0.5))
    run = start(settings)
    torch.manual_seed(1)
    images, captions = first_batch(settings)
    with looking(run.model, training_look(settings.hard)):
        torch.manual_seed(4)
        output = run.model(images, captions)
    rewards = REWARDS["to_go"](-by_word(word_nll(output.logits, output.targets), output.mask))
    sampled = output.mask & (output.locations >= 0)
    assert 0 < sampled.sum() < output.mask.sum()
    torch.manual_seed(4)
    found = teacher_forced(run, images, captions).means["squared_advantage"]
    assert found.item() == pytest.approx(rewards[sampled].square().mean().item(), rel=1e-4)
