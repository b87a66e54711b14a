"""Settings: every recipe reads, the command line beats it, and a mistake is one line that names the field."""

import builtins
import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from captioning.config import (
    DecoderConfig,
    EncoderConfig,
    LossConfig,
    OptimizerConfig,
    RegionEncoderConfig,
    SearchConfig,
    Settings,
    ValidationConfig,
    from_dict,
    to_dict,
)
from captioning.models.alignment import ALIGNMENTS
from captioning.models.attention import build_gate
from captioning.models.blocks import NORMS
from captioning.models.transformer import POSITIONS
from captioning.optimization import OPTIMIZERS, learning_rate_factor
from captioning.run import Progress
from captioning.settings import parse_settings, read_recipe, recipe_path, recipes, settings_parser

REQUIRED = ["--data", "d.h5", "--output", "runs/x"]
CONFIGS = (
    EncoderConfig,
    RegionEncoderConfig,
    DecoderConfig,
    LossConfig,
    OptimizerConfig,
    SearchConfig,
    ValidationConfig,
)


def words_of(config: type, field: str) -> tuple[str, ...]:
    kind = get_type_hints(config)[field]
    assert get_origin(kind) is Literal
    return get_args(kind)


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_reads_and_is_not_the_default(name):
    settings = parse_settings(["--config", name, *REQUIRED])
    assert (settings.data, settings.output) == ("d.h5", "runs/x")
    assert dataclasses.replace(settings) != Settings(data="d.h5", output="runs/x")


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """A recipe in a file, with nested settings."""
    path = tmp_path / "mine.yaml"
    path.write_text(
        "encoder: {name: resnet18, weights: null, image_size: 64}\n"
        "decoder: {embedding_dim: 128, hidden_dim: 256}\n"
        "validation: {images: 200, search: {beam_size: 4, max_length: 9}}\n"
        "epochs: 3\n"
    )
    return str(path)


def test_a_recipe_sets_what_it_says_and_nothing_else(recipe):
    assert parse_settings(["--config", recipe, *REQUIRED]) == Settings(
        data="d.h5",
        output="runs/x",
        encoder=EncoderConfig(name="resnet18", weights=None, image_size=64),
        decoder=DecoderConfig(embedding_dim=128, hidden_dim=256),
        validation=ValidationConfig(images=200, search=SearchConfig(beam_size=4, max_length=9)),
        epochs=3,
    )


@pytest.mark.parametrize(
    "words", [["--config", "?", "--decoder.hidden_dim", "7"], ["--decoder.hidden_dim=7", "--config=?"]]
)
def test_the_command_line_beats_the_recipe_in_any_order(words, recipe):
    settings = parse_settings([*(word.replace("?", recipe) for word in words), *REQUIRED])
    assert settings.decoder == DecoderConfig(embedding_dim=128, hidden_dim=7)  # the rest of the group stays


def test_nested_settings_can_be_overridden(recipe):
    words = ["--validation.search.beam_size", "1", "--encoder.weights", "file.pth", "--resume", "true"]
    settings = parse_settings([*words, "--config", recipe, *REQUIRED])
    assert settings.validation == ValidationConfig(images=200, search=SearchConfig(beam_size=1, max_length=9))
    assert settings.encoder.weights == "file.pth"
    assert settings.resume is True


def test_a_null_on_the_command_line_is_none():
    assert parse_settings([*REQUIRED, "--encoder.weights", "null"]).encoder.weights is None


def test_resolved_settings_can_be_written_and_read_back():
    settings = parse_settings(["--config", "flickr8k_soft", *REQUIRED])
    assert from_dict(Settings, json.loads(json.dumps(to_dict(settings))), "settings.json") == settings


def test_an_unknown_recipe_names_those_there_are():
    with pytest.raises(FileNotFoundError, match=r"--config nothing: .*flickr8k_soft, .*shapes_soft"):
        recipe_path("nothing")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--decoder.hiden_dim", "7"], "hiden_dim"),
        (["--decoder.hidden_dim", "many"], "hidden_dim"),
        (["--decoder.hidden_dim", "1.5"], "hidden_dim"),
        (["--decoder.hidden_dim", "0"], "hidden_dim must be positive"),
        (["--decoder.alignment", "cosine"], "alignment"),
        (["--decoder.dropout", "1"], r"dropout must lie in \[0, 1\)"),
        (["--loss.lambda_ds", "-1"], "lambda_ds must not be negative"),
        (["--validation.diagnose_images", "1"], "diagnose_images must be 0, or at least 2"),
        (["--loss.label_smoothing", "1.5"], "label_smoothing"),
        (["--optimizer.learning_rate", "0"], "learning_rate must be positive"),
        (["--optimizer.name", "sgd"], "name"),
        (["--optimizer.average_decay", "1"], "average_decay"),
        (["--validation.search.top_p", "0"], "top_p"),
        (["--validation.search.num_captions", "9"], "num_captions=9 needs beam_size"),
        (["--validation.split", "dev"], "split"),
        (["--encoder.fit", "stretch"], "fit"),
        (["--encoder.image_size", "-1"], "image_size must be positive"),
        (["--epochs", "0"], "epochs must be positive"),
        (["--self_critical.samples", "1"], "samples must be at least 2"),
        (["--self_critical.epochs", "-1"], "epochs must not be negative"),
        (["--self_critical.nll_weight", "-1"], "nll_weight must not be negative"),
        (["--self_critical.learning_rate", "0"], "learning_rate must be positive"),
        (["--epochs", "2", "--self_critical.epochs", "3"], r"self_critical.epochs=3 must not exceed epochs \(got 2\)"),
        (["--epochs", "2", "--self_critical.epochs", "2"], "self_critical.epochs=2 leaves no epoch to learn words in"),
        (["--self_critical.epochs", "1", "--max_steps", "9"], r"set max_steps to 0 \(got 9\)"),
        (["--self_critical.epochs", "1", "--decoder.attention", "hard"], r"needs decoder.attention='soft'"),
        (["--self_critical.epochs", "1", "--validation.patience", "2"], r"set validation.patience to 0 \(got 2\)"),
        (["--workers", "-1"], "workers must not be negative"),
        (["--augment", "rotate"], "augment"),
        (["--resume", "maybe"], "resume"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(words, named):
    with pytest.raises(ValueError, match=named) as error:
        parse_settings([*REQUIRED, *words])
    assert "\n" not in str(error.value)


def test_data_and_output_must_be_given():
    with pytest.raises(ValueError, match="data"):
        parse_settings(["--output", "runs/x"])


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("decoder:\n  hidden: 3\n", "hidden"),
        ("epochs: many\n", "epochs"),
        ("steps: 3\n", "steps"),
        ("a: [\n", "config"),
        ("seed: 2020-01-01\n", "seed"),
    ],
)
def test_a_wrong_recipe_is_one_line_that_names_the_setting(content, named, tmp_path):
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(ValueError, match=named) as error:
        parse_settings(["--config", str(tmp_path / "mine.yaml"), *REQUIRED])
    assert "\n" not in str(error.value)


def test_a_recipe_says_what_its_letters_and_numbers_say(tmp_path):
    numbers = "optimizer: {learning_rate: 1e-5, encoder_learning_rate: 0.000001, clip_norm: .inf}"
    (tmp_path / "mine.yaml").write_text(f"data: Bücher/ł.h5\noutput: x\n{numbers}\n", encoding="utf-8")
    found = parse_settings(["--config", str(tmp_path / "mine.yaml")])
    assert found.data == "Bücher/ł.h5"
    optimizer = found.optimizer
    assert (optimizer.learning_rate, optimizer.encoder_learning_rate, optimizer.clip_norm) == (1e-5, 1e-6, math.inf)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_survives_json(config):
    assert from_dict(config, json.loads(json.dumps(to_dict(config()))), "file") == config()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"hidden_dim": 8, "depth": 2}, "depth"),
        ({"hidden_dim": "wide"}, "hidden_dim"),
        ({"hidden_dim": None}, "hidden_dim"),
        ({"dropout": 2.0}, "dropout"),
        ({"gate": "open"}, "gate"),
        ([], "expected a mapping of settings, got list"),
        (None, "expected a mapping of settings, got NoneType"),
    ],
)
def test_a_stored_config_is_read_strictly(values, named):
    with pytest.raises(ValueError, match=rf"config\.json: decoder: .*{named}") as error:
        from_dict(DecoderConfig, values, "config.json: decoder")
    assert "\n" not in str(error.value)


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DecoderConfig().hidden_dim = 3  # type: ignore[misc]


def test_sampling_may_give_more_captions_than_beams():
    assert SearchConfig(beam_size=1, num_captions=4, sample=True).num_captions == 4


def test_every_word_of_the_transformers_settings_has_its_entry():
    assert set(words_of(DecoderConfig, "norm")) == set(NORMS)
    assert set(words_of(DecoderConfig, "positions")) == set(POSITIONS)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"input_feeding": True}, "input_feeding=True has no meaning with decoder.name='attention_lstm'"),
        ({"layers": 2}, "layers=2 has no meaning with decoder.name='attention_lstm'; leave it out"),
        ({"name": "luong", "norm": "post"}, "norm='post' has no meaning with decoder.name='luong'"),
        ({"name": "transformer", "alignment": "dot"}, "alignment='dot' has no meaning with decoder.name='transformer'"),
        ({"name": "transformer", "attention": "hard"}, "attention='hard' has no meaning with .*'transformer'"),
        ({"name": "transformer", "gate": "vector"}, "gate='vector' has no meaning with decoder.name='transformer'"),
        (
            {"name": "transformer", "embedding_dim": 8, "hidden_dim": 16},
            r"'transformer' needs embedding_dim == hidden_dim \(got 8 and 16\)",
        ),
        ({"name": "transformer", "heads": 7}, r"decoder.heads must divide decoder.hidden_dim \(got 7 and 512\)"),
        ({"name": "transformer", "heads": 0}, r"heads must be positive \(got 0\)"),
    ],
)
def test_combinations_without_a_meaning_are_refused_in_a_sentence(settings, named):
    with pytest.raises(ValueError, match=named) as error:
        DecoderConfig(**settings)
    assert "\n" not in str(error.value)


def test_each_alignment_is_built_by_its_name():
    assert {name: kind.__name__ for name, kind in ALIGNMENTS.items()} == {
        "additive": "AdditiveAlignment",
        "concat": "ConcatAlignment",
        "dot": "DotAlignment",
        "general": "GeneralAlignment",
        "scaled_dot": "ScaledDotAlignment",
    }


def test_every_gate_can_be_built():
    for name in words_of(DecoderConfig, "gate"):
        build_gate(name, hidden_dim=4, context_dim=3)


def test_every_optimizer_and_schedule_has_its_entry():
    assert set(words_of(OptimizerConfig, "name")) == set(OPTIMIZERS)
    for schedule in words_of(OptimizerConfig, "schedule"):
        assert learning_rate_factor(0, 10, OptimizerConfig(schedule=schedule)) == 1.0  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [*CONFIGS, Settings])
def test_every_setting_is_documented(config):
    documented = [line.split(":")[0].strip() for line in str(config.__doc__).splitlines()]
    assert [field.name for field in dataclasses.fields(config) if field.name not in documented] == []


@pytest.fixture
def intruder(tmp_path, monkeypatch):
    """A module that a file from elsewhere could name; what it did if it was imported."""
    (tmp_path / "intruder.py").write_text("import builtins\nbuiltins.intruded = True\nclass X: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delattr("builtins.intruded", raising=False)
    yield lambda: hasattr(builtins, "intruded")
    sys.modules.pop("intruder", None)
    vars(builtins).pop("intruded", None)


ATTACKS = [
    {"class_path": "intruder.X"},
    {"class_path": "intruder.X", "init_args": {}},
    {"encoder": {"class_path": "intruder.X"}},
    {"validation": {"search": {"class_path": "intruder.X"}}},
    {"encoder": "intruder.X"},
    {"validation": {"search": "recipe.yaml"}},
]


@pytest.mark.parametrize("values", ATTACKS, ids=json.dumps)
def test_a_config_from_elsewhere_imports_nothing_and_opens_nothing(values, intruder, tmp_path):
    with pytest.raises(ValueError, match=r"^theirs[\w.]*: (no setting is called|expected a mapping)"):
        from_dict(Settings, {"data": "d.h5", "output": "runs/x", **values}, "theirs")
    assert not intruder()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"--config .*recipe\.yaml[\w.]*: (no setting is called|expected a mapping)"):
        parse_settings(["--config", str(recipe), "--data", "d.h5", "--output", "runs/x"])
    assert not intruder()


def test_the_state_of_a_run_from_elsewhere_imports_nothing_either(intruder):
    for point in ({"class_path": "intruder.X"}, {"CIDEr": {"class_path": "intruder.X"}}, {"epoch": "intruder.X"}):
        with pytest.raises(ValueError, match=r"^theirs: "):
            from_dict(Progress, {"history": [point]}, "theirs")
    assert not intruder()


def test_numbers_too_large_for_any_machine_are_refused():
    with pytest.raises(ValueError, match=r"^theirs: "):
        from_dict(SearchConfig, {"temperature": 10**400}, "theirs")


def test_a_recipe_in_which_little_text_stands_for_much_is_refused(tmp_path):
    (tmp_path / "bomb.yaml").write_text("encoder:\n  scales: &a [224]\n  grid: *a\n")
    with pytest.raises(ValueError, match=r"--config .*bomb\.yaml: has aliases"):
        parse_settings(["--config", str(tmp_path / "bomb.yaml")])


def test_a_recipe_that_is_no_yaml_is_named(tmp_path):
    (tmp_path / "recipe.yaml").write_text("epochs: [1\n")
    with pytest.raises(ValueError, match=r"--config .*recipe\.yaml: not YAML"):
        parse_settings(["--config", str(tmp_path / "recipe.yaml")])


@pytest.mark.parametrize("name", ["temperature", "length_penalty"])
def test_what_is_not_a_number_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must .*nan"):
        SearchConfig(sample=True, **{name: float("nan")})


@pytest.mark.parametrize("word", ["--encoder", "--validation.search"])
@pytest.mark.parametrize("form", [lambda word, value: [word, value], lambda word, value: [f"{word}={value}"]])
def test_a_group_of_settings_is_no_file(word, form, intruder, tmp_path):
    (tmp_path / "theirs.yaml").write_text("class_path: intruder.X\n")
    with pytest.raises(ValueError, match=rf"^{word}.*: is a group of settings; .* {word}\.NAME VALUE"):
        parse_settings([*REQUIRED, *form(word, str(tmp_path / "theirs.yaml"))])
    assert not intruder()


def test_the_help_says_what_every_setting_is_for():
    page = " ".join(settings_parser().format_help().split())

    def described(kind, prefix=""):
        for name, inner in get_type_hints(kind).items():
            if dataclasses.is_dataclass(inner):
                yield from described(inner, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    names = list(described(Settings))
    assert len(names) > 80
    for name in names:
        assert re.search(rf"--{re.escape(name)} (\S+ )?(?!\(|--)\w", page[page.index("Train a captioner.") :]), name


@pytest.mark.parametrize("second", [["--config", "theirs.yaml"], ["--config=theirs.yaml"]])
def test_there_is_one_recipe(second, intruder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.yaml").write_text("decoder: {class_path: intruder.X}\n")
    with pytest.raises(ValueError, match="--config: give one recipe"):
        parse_settings(["--config", "shapes_soft", *REQUIRED, *second])
    assert not intruder()


@pytest.mark.parametrize(
    "make",
    [
        lambda: DecoderConfig(name="transformer", layers=10**6),
        lambda: RegionEncoderConfig(name="self_attention", blocks=10**6),
    ],
)
def test_nobody_gets_a_million_layers(make):
    with pytest.raises(ValueError, match=r"(layers|blocks) must be at most 64 \(got 1000000\)"):
        make()


def test_a_recipe_without_bottom_is_one_line(tmp_path):
    (tmp_path / "deep.yaml").write_text("data: " + "[" * 3000 + "]" * 3000)
    with pytest.raises(ValueError, match=r"--config .*deep\.yaml: not YAML"):
        read_recipe(tmp_path / "deep.yaml")


def test_a_seed_fits_the_generator():
    with pytest.raises(ValueError, match="seed must be at most"):
        Settings(data="d", output="o", seed=2**63)
    with pytest.raises(ValueError, match="temperature must be finite"):
        SearchConfig(sample=True, temperature=math.inf)
