"""Systems under one budget: how many steps fit, what is not done twice, and the table."""

import csv
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from photo_folders import command, photos

from captioning import compare, load_captioner, training
from captioning.checkpoint import load_checkpoint
from captioning.compare import COLUMNS, Row, as_csv, as_markdown, in_turns, main, with_means
from captioning.data import CaptionData, Sample
from captioning.metrics import score
from captioning.models.regions import build_region_encoder
from captioning.models.registry import build_decoder
from captioning.settings import parse_settings, recipes
from captioning.vocabulary import START
from preprocess.__main__ import main as preprocess
from preprocess.shapes import make_scene

FAMILY = [name for name in recipes() if name.startswith("family_")]
COMMON = """
encoder: {name: resnet18, image_size: 32}
loss: {lambda_ds: 0.0}
validation: {diagnose_images: 0, search: {beam_size: 1, max_length: 6}}
batch_size: 8
workers: 0
"""
SIZES = "embedding_dim: 8, hidden_dim: 8"


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Two recipes of small systems, one without attention."""
    (tmp_path / "plain.yaml").write_text(f"decoder: {{name: lstm, inject: init, {SIZES}}}{COMMON}")
    (tmp_path / "looks.yaml").write_text(f"decoder: {{attention_dim: 4, {SIZES}}}{COMMON}")
    return [str(tmp_path / "plain.yaml"), str(tmp_path / "looks.yaml")]


@pytest.fixture
def steady(monkeypatch):
    """Every step takes half a second, so that 0.05 minutes are 6 steps, of which 4 are an epoch."""
    monkeypatch.setattr(compare, "seconds_per_step", lambda settings: 0.5)


@pytest.fixture
def call(tiny_annotations, paths, tmp_path, capsys):
    """Calls main; returns the exit code and what it says itself on standard error (training draws a bar there)."""

    def run(*words: object, seeds: tuple[int, ...] = (0, 1), budget: float = 0.05) -> tuple[int, list[str]]:
        given = ["--data", tiny_annotations, "--recipes", *paths, "--budget", budget, "--seeds", *seeds]
        code = main([*map(str, [*given, "--output", tmp_path / "out", *words])])
        return code, [line for line in capsys.readouterr().err.splitlines() if line.startswith("compare: ")]

    return run


def table(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "table.csv").open()))


def progress(folder: Path) -> dict:
    return load_checkpoint(folder / "run" / "last").about["progress"]


@pytest.mark.usefixtures("steady")
def test_every_system_and_seed_is_trained_for_its_steps_scored_and_tabled(call, tiny_annotations, tmp_path):
    assert call("--beam-size", 2)[0] == 0
    rows = table(tmp_path / "out")
    assert [(row["system"], row["seed"]) for row in rows] == [
        (system, seed) for system in ("plain", "looks") for seed in ("0", "1", "mean")
    ]
    for row in rows:
        assert float(row["steps"]) == 6
        assert float(row["parameters"]) > 0
        assert float(row["minutes"]) > 0
        assert float(row["words/s"]) > 0
        assert (row["H/ln L"] == "") == (row["system"] == "plain")
        assert row["METEOR"] == ""  # no Java here
    assert 0 < float(rows[3]["H/ln L"]) <= 1
    # Six steps are an epoch and a half: two validations, and a schedule that ends with the sixth.
    found = progress(tmp_path / "out" / "looks" / "seed1")
    assert (found["step"], len(found["history"])) == (6, 2)
    assert float(rows[4]["minutes"]) == pytest.approx(found["seconds"] / 60)
    assert float(rows[4]["words/s"]) == pytest.approx(found["words"] / found["seconds"])
    settings = json.loads((tmp_path / "out" / "looks" / "seed1" / "run" / "settings.json").read_text())
    assert (settings["max_steps"], settings["epochs"], settings["seed"]) == (6, 2, 1)
    data = CaptionData(tiny_annotations)
    checkpoint = load_checkpoint(tmp_path / "out" / "looks" / "seed1" / "run" / "best")
    decoder = sum(p.numel() for p in checkpoint.model.decoder.parameters())
    assert float(rows[4]["parameters"]) == decoder  # the encoder is frozen
    captions = compare.evaluate(checkpoint, data, "val", compare.SearchConfig(beam_size=2))[0]
    references = {name: data.references(data.names.index(name)) for name in captions}
    expected = score(
        {name: caption.text for name, caption in captions.items()}, references, tokenizer="python", metrics=("CIDEr",)
    ).values
    assert float(rows[4]["CIDEr"]) == pytest.approx(expected["CIDEr"])
    assert (tmp_path / "out" / "plot.png").stat().st_size > 1000
    assert "4 images of val, beam 2, 0.05 minutes of training each" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.usefixtures("steady")
def test_what_is_finished_is_not_done_again(call, tmp_path, monkeypatch):
    assert call(seeds=(0,))[0] == 0
    before = (tmp_path / "out" / "table.csv").read_bytes()
    monkeypatch.setattr(compare, "train", lambda settings: pytest.fail("it was trained again"))
    monkeypatch.setattr(compare, "seconds_per_step", lambda settings: pytest.fail("it was measured again"))
    assert call(seeds=(0,))[0] == 0
    assert (tmp_path / "out" / "table.csv").read_bytes() == before


@pytest.mark.usefixtures("steady")
def test_a_comparison_of_an_older_version_goes_on(call, tmp_path, monkeypatch):
    # which did not know of a setting that has its default
    assert call(seeds=(0,))[0] == 0
    for path in (tmp_path / "out").glob("*/seed0/plan.json"):
        known = json.loads(path.read_text())
        del known["settings"]["distillation"], known["settings"]["decoder"]["gate"]
        path.write_text(json.dumps(known))
    for path in (tmp_path / "out").glob("*/seed0/result.json"):
        known = json.loads(path.read_text())
        del known["asked"]["search"]["mirror"]
        path.write_text(json.dumps(known))
    monkeypatch.setattr(compare, "train", lambda settings: pytest.fail("it was trained again"))
    assert call(seeds=(0,))[0] == 0


@pytest.mark.usefixtures("steady")
def test_an_interrupted_comparison_goes_on_within_the_system(call, tmp_path, monkeypatch):
    real_step, steps = training.train_step, []

    def step_then_signal(run, batch):
        result = real_step(run, batch)
        steps.append(run.progress.step)
        if len(steps) == 9:  # the third step of the second system
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(training, "train_step", step_then_signal)
    assert call(seeds=(0,)) == (130, ["compare: stopped; go on with the same command"])
    assert [row["system"] for row in table(tmp_path / "out")] == ["plain"]
    assert progress(tmp_path / "out" / "looks" / "seed0")["step"] == 3
    assert call(seeds=(0,))[0] == 0
    assert steps == [*range(6), *range(6)]  # no step was made twice
    assert [row["system"] for row in table(tmp_path / "out")] == ["plain", "looks"]


@pytest.mark.usefixtures("steady")
def test_every_system_captions_the_same_picture_and_shows_where_it_looked_if_it_did(call, tmp_path):
    picture = tmp_path / "scene.png"
    make_scene(0, 0).render(64).save(picture)
    assert call("--picture", picture, seeds=(0,))[0] == 0
    assert not (tmp_path / "out" / "plain" / "seed0" / "overlay.png").exists()
    shown = tmp_path / "out" / "looks" / "seed0" / "overlay.png"
    caption = load_captioner(tmp_path / "out" / "looks" / "seed0" / "run").caption(picture, beam_size=3)[0]
    assert shown.is_file() == bool(caption.words)


def test_a_split_that_is_too_small_is_refused_before_any_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "train", lambda settings: pytest.fail("it was trained"))
    assert preprocess(command(photos(tmp_path / "in", 5), tmp_path / "d.h5")) == 0  # one image is val, none is test
    words = [
        "--data",
        str(tmp_path / "d.h5"),
        "--recipes",
        "shapes_soft",
        "--budget",
        "1",
        "--output",
        str(tmp_path / "c"),
    ]
    one = "has one image of it; two or more are compared on"
    for more, message in (([], one), (["--split", "test"], "no images of split 'test'")):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


@pytest.mark.usefixtures("steady")
def test_a_picture_that_cannot_be_read_is_refused_before_any_training(call, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "train", lambda settings: pytest.fail("it was trained"))
    (tmp_path / "scene.png").write_text("no picture")
    code, lines = call("--picture", tmp_path / "scene.png")
    assert code == 2
    assert "scene.png" in lines[0]


def test_the_time_of_a_step_is_measured_in_a_run_that_leaves_nothing_behind(paths, tiny_annotations, tmp_path):
    settings = parse_settings(["--config", paths[1], "--data", str(tiny_annotations), "--output", str(tmp_path / "x")])
    assert 0 < compare.seconds_per_step(settings) < 60
    assert not (tmp_path / "x").exists()


def test_the_time_of_a_step_is_that_of_all_scales():
    batches = [[Sample(i, (), 0, scale=scale)] for i, scale in enumerate((0, 0, 0, 1, 1, 2, 0))]
    assert [batch[0].scale for batch in in_turns(batches)] == [0, 1, 2, 0, 1, 0, 0]
    assert sorted(batch[0].image for batch in in_turns(batches)) == list(range(7))
    assert in_turns(batches[:3]) == batches[:3]


@pytest.mark.usefixtures("steady")
def test_a_system_of_two_scales_is_scored_with_both(paths, tiny_scales, tmp_path):
    recipe, output = Path(paths[1]), tmp_path / "c"
    recipe.write_text(recipe.read_text().replace("image_size: 32", "image_size: 32, scales: [48]"))
    words = ["--data", tiny_scales, "--recipes", recipe, "--budget", 0.05, "--beam-size", 2, "--output", output]
    assert main([str(word) for word in words]) == 0
    known = json.loads((output / "looks" / "seed0" / "result.json").read_text())
    assert known["asked"]["search"]["multi_scale"] is True


def test_a_budget_below_one_step_is_one_step(call, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "seconds_per_step", lambda settings: 100.0)
    assert call(seeds=(0,))[0] == 0
    assert {row["steps"] for row in table(tmp_path / "out")} == {"1"}


@pytest.mark.usefixtures("steady")
def test_further_options_are_settings_of_all_systems(call, tmp_path):
    assert call("--batch_size", 16, "--validation.search.max_length=3", seeds=(0,))[0] == 0
    for system in ("plain", "looks"):
        settings = json.loads((tmp_path / "out" / system / "seed0" / "run" / "settings.json").read_text())
        assert (settings["batch_size"], settings["validation"]["search"]["max_length"]) == (16, 3)


@pytest.mark.usefixtures("steady")
def test_another_budget_or_setting_wants_another_folder(call, tmp_path):
    assert call(seeds=(0,))[0] == 0
    code, (line,) = call(seeds=(0,), budget=0.1)
    assert code == 2
    assert line.startswith(f"compare: {tmp_path / 'out' / 'plain' / 'seed0' / 'plan.json'}: was made with other budget")
    code, (line,) = call("--batch_size", 16, seeds=(0,))
    assert code == 2
    assert "was made with other settings" in line


@pytest.mark.usefixtures("steady")
def test_another_split_or_search_scores_anew_but_trains_nothing(call, tmp_path, monkeypatch):
    assert call(seeds=(0,))[0] == 0
    monkeypatch.setattr(training, "train_step", lambda *_: pytest.fail("it was trained again"))
    assert call("--split", "test", "--beam-size", 1, seeds=(0,))[0] == 0
    assert "4 images of test, beam 1" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "0"], "--budget must be positive"),
        (["--limit", "1"], "--limit 0 or at least 2"),
        (["--recipes", "nothing"], "--config nothing: no such file or recipe; recipes are "),
        (["--recipes", "family_additive", "family_additive"], "two go by the name 'family_additive'"),
        (["--decoder.hiden_dim", "8"], "hiden_dim"),
        (["--beam-size", "0"], "beam_size must be positive"),
        (["--data", "nowhere.h5"], "nowhere.h5: no such data file"),
    ],
)
def test_a_mistake_is_one_line(words, said, call):
    code, (line,) = call(*words)
    assert code == 2
    assert said in line


def row(system: str, seed: str, cider: float, meteor: float | None, entropy: float | None) -> Row:
    values = dict.fromkeys(COLUMNS, 1234.0) | {"CIDEr": cider, "METEOR": meteor, "H/ln L": entropy}
    return Row(system, seed, values)


def test_means_are_over_the_seeds_of_a_system():
    rows = with_means([row("a", "0", 0.25, 0.5, None), row("b", "0", 9.0, None, 0.5), row("a", "1", 0.75, None, None)])
    assert [(r.system, r.seed) for r in rows] == [("a", "0"), ("a", "1"), ("a", "mean"), ("b", "0")]
    mean = rows[2].values
    assert (mean["CIDEr"], mean["METEOR"], mean["H/ln L"], mean["steps"]) == (0.5, 0.5, None, 1234.0)


def test_the_table_says_a_dash_or_nothing_where_there_is_no_number():
    rows = [row("a", "0", 0.25, None, 0.875)]
    assert as_csv(rows).splitlines() == [
        "system,seed,parameters,steps,minutes,words/s,BLEU-4,METEOR,CIDEr,H/ln L",
        "a,0,1234.0,1234.0,1234.0,1234.0,1234.0,,0.25,0.875",
    ]
    assert as_markdown(rows, ["So it was."]).splitlines()[2:] == [
        "| a | 0 | 1,234 | 1,234 | 1234.0 | 1,234 | 1234.0000 | - | 0.2500 | 0.875 |",
        "",
        "So it was.",
    ]


def test_the_plot_has_a_bar_per_system_and_a_dot_per_seed():
    rows = with_means(
        [row("a", "0", 0.25, None, None), row("a", "1", 0.75, None, None), row("b", "0", 0.5, None, None)]
    )
    (axes,) = compare.draw(rows, "title").axes
    assert [bar.get_width() for bar in axes.patches] == [0.5, 0.5]
    assert [list(line.get_xdata()) for line in axes.lines] == [[0.25, 0.75], [0.5]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


def test_the_family_differs_in_the_system_alone():
    assert len(FAMILY) == 13
    parsed = [parse_settings(["--config", name, "--data", "d.h5", "--output", "runs/x"]) for name in FAMILY]
    assert len({(s.region_encoder, s.decoder) for s in parsed}) == 13
    rates = {"family_transformer": 0.0015, "family_transformer_both": 0.0015}
    rates |= dict.fromkeys(("family_luong", "family_query_key_value", "family_multi_head"), 0.001)
    for name, settings in zip(FAMILY, parsed, strict=True):
        assert settings.optimizer.learning_rate == rates.get(name, 0.003)
        assert settings.decoder.dropout == (0.1 if settings.decoder.name == "transformer" else 0.4)
        same = {"region_encoder", "decoder", "optimizer"}
        assert {k: v for k, v in vars(settings).items() if k not in same} == {
            k: v for k, v in vars(parsed[0]).items() if k not in same
        }


@pytest.mark.parametrize("name", FAMILY)
def test_a_family_recipe_fits_the_stored_features(name):
    settings = parse_settings(["--config", name, "--data", "d.h5", "--output", "runs/x"])
    with torch.no_grad():
        regions = build_region_encoder(settings.region_encoder, annotation_dim=1280, grid=(7, 7))
        decoder = build_decoder(settings.decoder, vocabulary_size=2543, annotation_dim=regions.dim)
        memory = decoder.prepare(regions(torch.rand(2, 49, 1280)))
        step = decoder.step(torch.full((6,), START), decoder.initial_state(memory, 3), memory)
    assert step.logits.shape == (6, 2543)
    assert (step.alpha is not None) == decoder.attends


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "1", "--max_steps", "3"], "--max_steps: --budget decides that here"),
        (["--budget", "1", "--max_steps=3"], "--max_steps: --budget decides that here"),
        (["--budget", "1", "--epochs", "3"], "--epochs: --budget decides that here"),
        (["--budget", "1", "--seed", "3"], "--seed: --seeds decides that here"),
        (["--budget", "nan"], "--budget must be positive"),
        (["--budget", "inf"], "--budget must be positive"),
        (["--budget", "1", "--config", "theirs.yaml"], "--config: give one recipe"),
    ],
)
def test_what_the_budget_decides_is_not_decided_otherwise(words, message, tiny_data, tmp_path, capsys):
    words = ["--data", str(tiny_data), "--recipes", "shapes_soft", "--output", str(tmp_path / "c"), *words]
    assert main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("steady")
def test_what_is_asked_for_is_what_is_scored(call, monkeypatch):
    real, asked = compare.evaluate, set()

    def noted(checkpoint, data, split, search, *, limit, **options):
        asked.add((split, search.beam_size, limit))
        return real(checkpoint, data, split, search, limit=limit, **options)

    monkeypatch.setattr(compare, "evaluate", noted)
    assert call("--split", "test", "--beam-size", 1, "--limit", 3, seeds=(0,))[0] == 0
    assert asked == {("test", 1, 3)}


def test_a_step_is_timed_by_the_fastest_round(paths, tiny_annotations, tmp_path, monkeypatch):
    settings = parse_settings(["--config", paths[1], "--data", str(tiny_annotations), "--output", str(tmp_path / "x")])
    for name, value in (("WARM", 0), ("TIMED", 2), ("ROUNDS", 2)):
        monkeypatch.setattr(compare, name, value)
    took, now = iter([3.0, 5.0, 1.0, 2.0]), [0.0]
    monkeypatch.setattr(compare, "train_step", lambda *_: now.append(now[-1] + next(took)))
    monkeypatch.setattr(compare, "time", SimpleNamespace(perf_counter=lambda: now[-1]))
    assert compare.seconds_per_step(settings) == 1.5  # the faster of (3 + 5) / 2 and (1 + 2) / 2


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("result.json", {"values": {}}, "is no result of ours"),
        ("result.json", {"asked": 3}, "is no result of ours"),
        ("result.json", {"images": None, "omitted": 3}, "is no result of ours"),
        ("plan.json", {"steps": "5"}, "steps must be a number of at least 1 (got '5'); delete it"),
    ],
)
def test_what_a_comparison_finds_in_its_folder_must_be_its_own(name, change, said, call, tmp_path):
    assert call(seeds=(0,))[0] == 0
    path = tmp_path / "out" / "plain" / "seed0" / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    code, lines = call(seeds=(0,))
    assert code == 2
    assert f"{name}: {said}" in lines[0]
