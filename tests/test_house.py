"""The habits of this code: who may import whom, how long a module is, and what lies in the repository."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

MODULES = sorted(path for room in ("captioning", "preprocess") for path in (ROOT / room).rglob("*.py"))
MODELS = [path for path in MODULES if path.parent.name == "models" and path.stem != "__init__"]
SCRIPTS = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "benchmarks").glob("*.py"))]

# The order of import: a module may import those of earlier rows, and of its own row those that stand before it.
ORDER = (
    (
        "memory",
        "files",
        "workers",
        "checks",
        "tokenization",
        "caption_files",
        "console",
        "extras",
        "devices",
        "model_config",
        "config",
        "options",
        "precision",
        "diagnostics",
        "word_classes",
        "findings",
    ),
    ("vocabulary", "images", "results", "settings"),
    ("hdf5", "data"),
    (
        "models.multihead",
        "models.blocks",
        "models.layout",
        "models.late",
        "models.additive",
        "models.alignment",
        "models.attention",
        "models.decoder",
        "models.ensemble",
    ),
    ("models.baselines", "models.luong", "models.transformer", "models.registry"),
    ("models.depthwise", "models.encoder", "models.regions", "models.captioner", "models"),
    (
        "losses",
        "reward_baselines",
        "hard_objective",
        "decoding",
        "checkpoint",
        "voices",
        "compatibility",
        "optimization",
        "metrics",
        "listening",
        "diagnosis",
    ),
    ("rewards", "visualize_scene", "visualize_html", "visualize"),
    (
        "api",
        "soup",
        "ensemble",
        "evaluate",
        "distillation",
        "plan",
        "start",
        "run",
        "objective",
        "self_critical",
        "training",
        "compare",
        "caption",
        "train",
    ),
)
# These take arrays and strings: all that they may import of the package.
LEAVES = {
    "metrics": {"tokenization"},
    "diagnostics": set[str](),
    "word_classes": set[str](),
    "visualize_scene": set[str](),
    "visualize_html": {"visualize_scene"},
    "visualize": {"visualize_scene", "visualize_html"},
}
# Rooms that must not know of each other, whatever the order allows.
APART = {
    "data": {"images"},
    "losses": {"data", "config", "checkpoint"},
    "rewards": {"config", "checkpoint", "decoding", "losses"},
    "decoding": {"data", "images", "checkpoint", "models.encoder", "models.captioner"},
    **{f"models.{path.stem}": {"data", "images", "results"} for path in MODELS},
}


def name_of(path: Path) -> str:
    """captioning/models/encoder.py -> captioning.models.encoder."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def imports(path: Path) -> frozenset[str]:
    """All modules that a file imports, also inside functions and for types only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports by a relative path"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            known = {name_of(module) for module in MODULES}
            found |= (inner & known) or {str(node.module)}
    return frozenset(found)


def own(path: Path) -> set[str]:
    """Which modules of `captioning` a file imports, without that prefix."""
    return {name.removeprefix("captioning.") for name in imports(path) if name.startswith("captioning.")}


def parts_of_captioning() -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / "captioning").rglob("*.py")):
        name = name_of(path).removeprefix("captioning.")
        if name != "captioning":
            yield name, path


def test_captioning_never_imports_preprocess():
    for path in (ROOT / "captioning").rglob("*.py"):
        assert not [name for name in imports(path) if name.split(".")[0] == "preprocess"], path.name


def test_modules_import_only_earlier_ones():
    ranks = {name: rank for rank, name in enumerate(name for row in ORDER for name in row)}
    for name, path in parts_of_captioning():
        if name in LEAVES:
            continue
        assert name in ranks, f"{name} has no place in the order of imports"
        later = {other for other in own(path) if ranks.get(other, len(ranks)) >= ranks[name]}
        assert not later, f"{name} imports {', '.join(sorted(later))}"


def test_the_documented_order_of_import_is_the_tested_one():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", page, flags=re.MULTILINE)
    assert [tuple(re.findall(r"`([\w.]+)`", row)) for _, row in rows] == list(ORDER)


@pytest.mark.parametrize("name", LEAVES)
def test_what_takes_arrays_imports_no_other_room(name):
    path = ROOT / "captioning" / f"{name}.py"
    if path.exists():
        assert own(path) <= LEAVES[name]


@pytest.mark.parametrize("name", APART)
def test_rooms_stay_apart(name):
    assert not own(ROOT / "captioning" / Path(*name.split(".")).with_suffix(".py")) & APART[name]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_is_longer_than_a_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_is_a_drawer_for_odds_and_ends(path):
    assert path.stem not in ("utils", "util", "helpers", "misc", "common")


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=name_of)
def test_nothing_needs_a_display_or_unpickles(path):
    assert not {"matplotlib.pyplot", "pylab", "matplotlib.pylab", "pickle5", "dill", "joblib"} & imports(path)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        ):
            call = f"{node.func.value.id}.{node.func.attr}"
            assert call not in ("pickle.load", "pickle.loads")
            if call == "torch.load":
                assert "weights_only=True" in [ast.unparse(keyword) for keyword in node.keywords]


@cache
def tracked() -> list[Path]:
    """The files that git knows, of those that are there."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    done = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"git ls-files: {done.stderr.strip()}")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_photo_weights_or_data_are_in_the_repository():
    photos = {".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
    weights = {".pth", ".pt", ".safetensors", ".ckpt", ".bin", ".h5", ".hdf5", ".pkl", ".npz", ".npy", ".zip", ".tar"}
    for path in tracked():
        inside = path.relative_to(ROOT)
        assert path.suffix.lower() not in photos, inside
        if path.suffix.lower() in weights:
            assert inside.parts[:2] == ("captioning", "pretrained"), inside


def test_large_files_are_pretrained_checkpoints_only():
    for path in tracked():
        inside = path.relative_to(ROOT)
        assert path.stat().st_size < 1_000_000 or inside.parts[:2] == ("captioning", "pretrained"), inside


def text_of(path: Path) -> str:
    """A file's text; empty for what is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def test_no_path_of_one_machine_is_written_down():
    homes = re.compile(r"(?<![\w.~}/-])/(?:work|home|Users|root|mnt|workspace)/\w")
    found = [(path.name, line) for path in tracked() for line in text_of(path).splitlines() if homes.search(line)]
    assert found == []


def test_every_relative_link_leads_to_a_file():
    broken = []
    for path in tracked():
        if path.suffix != ".md":
            continue
        text = re.sub(r"```.*?```", "", text_of(path), flags=re.DOTALL)
        for target in re.findall(r"\]\(<?([^)\s>]+)", text):
            place = target.split("#")[0]
            if place and not re.match(r"[a-z]+:", place) and not (path.parent / place).exists():
                broken.append(f"{path.relative_to(ROOT)}: {target}")
    assert broken == []


def test_requirements_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    named = {re.split(r"[\[<>=~! ;]", requirement)[0] for group in groups for requirement in group}
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0] for line in lines if line and not line.startswith("#")}
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!]+", line) for line in lines if line and not line.startswith("#"))
    assert named - {project["name"]} == pinned


def test_no_exception_is_caught_without_a_name():
    for path in [*MODULES, *SCRIPTS]:
        handlers = [
            n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.ExceptHandler)
        ]
        assert all(handler.type is not None for handler in handlers), f"{path.name} has a bare except"


def test_the_lines_that_the_story_of_the_family_shows_are_those_of_the_code():
    pieces = re.split(r"```python\n(.*?)```", text_of(ROOT / "docs" / "family.md"), flags=re.DOTALL)
    texts, shown = pieces[::2], pieces[1::2]
    assert len(shown) > 8
    for text, lines in zip(texts, shown, strict=False):
        file = re.findall(r"`(captioning/[\w/]+\.py)`", text)[-1]
        code = "\n".join(line.strip() for line in text_of(ROOT / file).splitlines())
        for part in lines.strip().split("\n\n"):  # what stands between two methods may be left out
            assert "\n".join(line.strip() for line in part.splitlines()) in code, f"{file} has not {part!r}"


def test_captioning_a_photo_needs_no_package_of_training():
    """Who only captions may leave them out, as docs/architecture.md says."""
    absent = ("h5py", "nltk", "accelerate", "pycocoevalcap")
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent}))
import numpy as np
from captioning import load_captioner
print(load_captioner("flickr8k-soft/fine").caption(np.zeros((40, 50, 3), np.uint8), beam_size=1, max_length=2)[0].text)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
