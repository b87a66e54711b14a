"""Train and score several systems under one budget of time, and lay them side by side.

python -m captioning.compare --data features.h5 --recipes family_additive family_luong --budget 10 --output runs/family

The budget is minutes of training steps for each system and seed; validation and scoring come on top. A learning rate
that falls to zero needs the number of steps beforehand, so it is measured: the first steps of a throw-away run tell how
many fit, and that many are made (`max_steps`), with the whole schedule in them. Run nothing else beside it.

Every further option is a setting of train.py for all systems (--batch_size 16). Finished systems are skipped, and an
interrupted one goes on, when the same command is given again. The output's folder then holds table.csv, table.md,
plot.png and, for each system and seed, the run, its result.json and, where it looked at --picture, overlay.png.
"""

import argparse
import csv
import dataclasses
import importlib.util
import io
import itertools
import math
import shlex
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioning.extras import require

if __name__ == "__main__":
    require("captioning.compare")

from accelerate.utils import parse_flag_from_env

from captioning.api import load_captioner
from captioning.checkpoint import load_checkpoint
from captioning.config import SearchConfig, Settings, from_dict, to_dict
from captioning.console import exit_code
from captioning.data import SPLITS, Batch, CaptionData, Sample, load_batches
from captioning.devices import default_device
from captioning.diagnosis import diagnose
from captioning.evaluate import evaluate
from captioning.files import fresh_file, read_json, recover_folder, write_json, write_text
from captioning.images import open_image
from captioning.memory import keep_memory
from captioning.plan import plan
from captioning.run import Run, start, start_accelerator, training_set
from captioning.settings import parse_settings
from captioning.training import Interrupted, train, train_step

WARM, TIMED, ROUNDS = 5, 25, 4
"""Steps that are made before the clock runs, steps that are timed at a stretch, and stretches, the fastest of which
counts: whatever else a machine does only adds, and a data file that is read for the first time is slow at first."""

COLUMNS = {
    "parameters": "{:,.0f}",
    "steps": "{:,.0f}",
    "minutes": "{:.1f}",
    "words/s": "{:,.0f}",
    "BLEU-4": "{:.4f}",
    "METEOR": "{:.4f}",
    "CIDEr": "{:.4f}",
    "H/ln L": "{:.3f}",
}
"""The numbers of the table, and how each is written. parameters: trained ones."""


@dataclass(frozen=True)
class System:
    """One system with one seed.

    Args:
        name: of the recipe.
        folder: where its run and its result lie.
        settings: of the run, which may be longer than the budget allows.
    """

    name: str
    folder: Path
    settings: Settings


@dataclass(frozen=True)
class Row:
    """A line of the table: one system and seed, or the mean over the seeds. What there is not is None."""

    system: str
    seed: str
    values: dict[str, float | int | None]


def systems(
    recipes: Sequence[str], seeds: Sequence[int], data: str, output: Path, overrides: Sequence[str]
) -> list[System]:
    """Every recipe with every seed.

    Args:
        recipes: names or paths, as for train.py's --config.
        seeds: of the runs.
        data: the data file.
        output: the folder of the comparison.
        overrides: settings for all of them, as on train.py's command line.

    Raises:
        ValueError, FileNotFoundError: a recipe cannot be read, or two go by one name.
    """
    names = [Path(recipe).stem for recipe in recipes]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--recipes: two go by the name {name!r}; rename one of the files")
    found = []
    for name, recipe in zip(names, recipes, strict=True):
        for seed in seeds:
            folder = output / name / f"seed{seed}"
            own = ["--data", data, "--output", str(folder / "run"), "--seed", str(seed)]
            settings, _ = start_accelerator(parse_settings(["--config", recipe, *overrides, *own]))
            found.append(System(name, folder, settings))
    return found


def seconds_per_step(settings: Settings) -> float:
    """How long a step of training takes, by making some in a run that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        run = start(dataclasses.replace(settings, output=str(Path(folder) / "run"), resume=False))
        batches = in_turns(plan(settings, run.data, epoch=0))[: WARM + ROUNDS * TIMED]
        dataset = training_set(run)
        options = {"captions_per_image": settings.captions_per_image, "workers": min(settings.workers, len(batches))}
        loader = load_batches(dataset, batches, **options)
        warm = min(WARM, len(batches) // 2)
        run.wrapped.train()
        _seconds(run, itertools.islice(loader, warm))
        rounds = [seconds for _ in range(ROUNDS) if (seconds := _seconds(run, itertools.islice(loader, TIMED)))]
        run.close()
    return min(rounds)


def in_turns(batches: Sequence[list[Sample]]) -> list[list[Sample]]:
    """Batches of several scales, whose steps cost differently, one of each scale after the other."""
    scales = sorted({batch[0].scale for batch in batches})
    turns = itertools.zip_longest(*([batch for batch in batches if batch[0].scale == scale] for scale in scales))
    return [batch for turn in turns for batch in turn if batch is not None]


def _seconds(run: Run, batches: Iterator[Batch]) -> float | None:
    """How long each of some steps took, reading included; None if there were none."""
    began, number = time.perf_counter(), 0
    for number, batch in enumerate(batches, 1):  # noqa: B007  counted
        train_step(run, batch)
    return (time.perf_counter() - began) / number if number else None


def within_budget(system: System, minutes: float) -> Settings:
    """The system's settings with as many steps as fit; measured once, then read from its folder.

    Raises:
        ValueError: its folder holds it with other settings or another budget.
    """
    asked = {"budget": minutes, "settings": to_dict(system.settings)}
    path = system.folder / "plan.json"
    if not path.is_file():
        seconds = seconds_per_step(system.settings)
        system.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {**asked, "seconds_per_step": seconds, "steps": max(int(60 * minutes / seconds), 1)})
    planned = read_json(path)
    planned["settings"] = to_dict(from_dict(Settings, planned.get("settings"), f"{path}: settings"))
    for name, value in asked.items():
        if planned.get(name) != value:
            raise ValueError(f"{path}: was made with other {name}; choose another --output, or delete that folder")
    if not isinstance(planned.get("steps"), int) or planned["steps"] < 1:
        raise ValueError(f"{path}: steps must be a number of at least 1 (got {planned.get('steps')!r}); delete it")
    data = CaptionData(system.settings.data)
    unlimited = dataclasses.replace(system.settings, max_steps=0)
    epochs = math.ceil(planned["steps"] / len(plan(unlimited, data, epoch=0)))
    return dataclasses.replace(system.settings, max_steps=planned["steps"], epochs=epochs)


def run_system(system: System, *, minutes: float, split: str, search: SearchConfig, limit: int) -> Row:
    """Train a system within its budget and score its best checkpoint; what is done already is not done again.

    Args:
        system: which.
        minutes: the budget.
        split: what it captions.
        search: how.
        limit: the first so many images of the split; 0: all.
    """
    result = system.folder / "result.json"
    settings = within_budget(system, minutes)
    asked = {"split": split, "search": to_dict(search), "limit": limit}
    if result.is_file():
        known = read_result(result)
        if known["asked"] == asked:
            return Row(system.name, str(settings.seed), known["values"])
    run = Path(settings.output)
    recover_folder(run / "last")
    resume = (run / "last").exists()
    best = train(dataclasses.replace(settings, resume=resume))
    checkpoint, data = load_checkpoint(best), CaptionData(settings.data)
    device = "cpu" if parse_flag_from_env("ACCELERATE_USE_CPU") else default_device()
    _, scores = evaluate(checkpoint, data, split, search, limit=limit, device=device)
    indices = data.indices(split).tolist()[: limit or None]
    attention = diagnose(checkpoint.model, data, indices, checkpoint.vocabulary)
    progress = load_checkpoint(run / "last").about["progress"]
    values: dict[str, float | int | None] = {
        "parameters": sum(p.numel() for p in checkpoint.model.parameters() if p.requires_grad),
        "steps": progress["step"],
        "minutes": progress["seconds"] / 60,
        "words/s": progress["words"] / progress["seconds"],
        **{name: scores.values.get(name) for name in ("BLEU-4", "METEOR", "CIDEr")},
        "H/ln L": attention.entropy,
    }
    about = {"tokenisation": scores.tokenisation, "images": scores.images, "omitted": list(scores.omitted)}
    write_json(result, {"asked": asked, "values": values, **about, "attention": attention.as_dict()})
    return Row(system.name, str(settings.seed), values)


def read_result(path: Path) -> dict[str, Any]:
    """What `run_system` wrote.

    Raises:
        ValueError: it is something else.
    """
    known = read_json(path)
    types = {"asked": dict, "values": dict, "images": int, "tokenisation": str, "omitted": list}
    ours = all(isinstance(known.get(name), kind) for name, kind in types.items())
    if not ours or not set(COLUMNS) <= known["values"].keys():
        raise ValueError(f"{path}: is no result of ours; delete it")
    asked = known["asked"]
    asked["search"] = to_dict(from_dict(SearchConfig, asked.get("search"), f"{path}: search"))
    return known


def draw_look(system: System, picture: str, search: SearchConfig) -> str:
    """Caption a picture with the system's best checkpoint; where it attends, draw where it looked in its folder.

    Returns:
        The caption.
    """
    asked = {"beam_size": search.beam_size, "multi_scale": search.multi_scale}
    caption = load_captioner(system.settings.output).caption(picture, **asked)[0]
    if caption.alphas is not None and caption.words:
        caption.overlay(picture, system.folder / "overlay.png")
    return caption.text


def with_means(rows: Iterable[Row]) -> list[Row]:
    """The rows, and after those of a system with several seeds their mean."""
    by_system: dict[str, list[Row]] = {}
    for row in rows:
        by_system.setdefault(row.system, []).append(row)
    table = []
    for name, own in by_system.items():
        table += own
        if len(own) > 1:
            table.append(Row(name, "mean", {column: _mean(row.values[column] for row in own) for column in COLUMNS}))
    return table


def _mean(values: Iterable[float | int | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None


def as_csv(rows: Sequence[Row]) -> str:
    """The table for programs: numbers in full, nothing where there is none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["system", "seed", *COLUMNS])
    writer.writerows([row.system, row.seed, *(row.values[name] for name in COLUMNS)] for row in rows)
    return text.getvalue()


def as_markdown(rows: Sequence[Row], conditions: Sequence[str]) -> str:
    """The table for people, with - where there is no number, and under it the conditions."""
    lines = ["| system | seed | " + " | ".join(COLUMNS) + " |", "| --- | --- |" + " ---: |" * len(COLUMNS)]
    for row in rows:
        cells = ("-" if row.values[name] is None else form.format(row.values[name]) for name, form in COLUMNS.items())
        lines.append(f"| {row.system} | {row.seed} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *conditions]) + "\n"


def draw(rows: Sequence[Row], title: str) -> Any:
    """CIDEr of every system: a bar for its mean, a dot for each seed.

    Returns:
        A matplotlib Figure, which needs no display.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.system for row in rows))
    figure = Figure(figsize=(8, 1.2 + 0.35 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    for place, name in enumerate(names):
        scores = [row.values["CIDEr"] or 0.0 for row in rows if row.system == name and row.seed != "mean"]
        axes.barh(place, statistics.fmean(scores), color="tab:blue", alpha=0.4)
        axes.plot(scores, [place] * len(scores), "o", color="tab:blue", markersize=4)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("CIDEr")
    figure.suptitle("\n".join(textwrap.wrap(title, 110)), fontsize=9)
    return figure


def write(rows: Sequence[Row], output: Path, conditions: Sequence[str]) -> None:
    """Write table.csv, table.md and plot.png, each in one step."""
    table = with_means(rows)
    for name, text in (("table.csv", as_csv(table)), ("table.md", as_markdown(table, conditions))):
        write_text(output / name, text)
    with fresh_file(output / "plot.png") as partial:
        draw(table, conditions[0]).savefig(partial, format="png", dpi=150)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(
        prog="python -m captioning.compare",
        description="Train and score several systems under one budget of time. Further options are settings of "
        "train.py, for all of them.",
        allow_abbrev=False,
    )
    parse.add_argument("--data", required=True, help="HDF5 file made by python -m preprocess")
    parse.add_argument("--recipes", required=True, nargs="+", metavar="NAME|PATH", help="as for train.py's --config")
    parse.add_argument("--budget", required=True, type=float, metavar="MINUTES", help="of training, for each run")
    parse.add_argument("--seeds", type=int, nargs="+", default=[0])
    parse.add_argument("--output", required=True, metavar="DIR")
    parse.add_argument("--split", choices=SPLITS, default="val", help="what is captioned and scored")
    parse.add_argument("--beam-size", type=int, default=3)
    parse.add_argument("--picture", metavar="FILE", help="caption this picture, too, and draw where each system looked")
    parse.add_argument("--limit", type=int, default=0, help="score only the first so many images; 0: all")
    return parse


def compare(options: argparse.Namespace, overrides: Sequence[str], command: str) -> list[Row]:
    """Run all systems, one after the other; the table grows with each.

    Raises:
        ValueError, OSError: a setting, a recipe or the data; names it.
        Interrupted: asked to stop; the same command goes on.
    """
    for name, instead in (("--max_steps", "--budget"), ("--epochs", "--budget"), ("--seed", "--seeds")):
        if any(word.split("=")[0] == name for word in overrides):
            raise ValueError(f"{name}: {instead} decides that here")
    if not 0 < options.budget < math.inf or options.limit < 0 or options.limit == 1:
        raise ValueError(
            "--budget must be positive, and --limit 0 or at least 2 "
            f"(got --budget {options.budget:g} --limit {options.limit})"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("compare draws with matplotlib: install this package's extra `demo`")
    if options.picture:
        open_image(options.picture)  # so that a mistake is found before hours of training
    images = CaptionData(options.data).indices(options.split).tolist()
    if len(images) < 2:
        raise ValueError(f"--split {options.split}: {options.data} has one image of it; two or more are compared on")
    output = Path(options.output)
    todo = systems(options.recipes, list(dict.fromkeys(options.seeds)), options.data, output, overrides)
    rows: list[Row] = []
    for number, system in enumerate(todo, 1):
        print(f"{number} of {len(todo)}: {system.name}, seed {system.settings.seed}", flush=True)
        limits = {"minutes": options.budget, "split": options.split, "limit": options.limit}
        search = SearchConfig(beam_size=options.beam_size, multi_scale=bool(system.settings.encoder.scales))
        rows.append(run_system(system, search=search, **limits))
        if options.picture:
            print(f"{options.picture}\t{draw_look(system, options.picture, search)}", flush=True)
        known = read_result(system.folder / "result.json")
        conditions = [
            f"{known['images']} images of {options.split}, beam {search.beam_size}, {options.budget:g} minutes of "
            f"training each; tokenisation: {known['tokenisation']}.",
            *(f"Left out: {reason}." for reason in known["omitted"]),
            f"H/ln L: entropy of the attention, 1 is uniform; - without attention. `{command}`",
        ]
        write(rows, output, conditions)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 after a mistake, which it says in one line, 130 after an interruption."""
    keep_memory()
    words = list(sys.argv[1:] if arguments is None else arguments)
    options, overrides = parser().parse_known_args(words)

    def command() -> int:
        try:
            compare(options, overrides, shlex.join(["python", "-m", "captioning.compare", *words]))
        except Interrupted as stop:
            raise KeyboardInterrupt from stop
        print((Path(options.output) / "table.md").read_text(encoding="utf-8"), end="")
        return 0

    mistakes = (ValueError, OSError, RuntimeError)
    return exit_code("compare", command, mistakes=mistakes, stopped="stopped; go on with the same command")


if __name__ == "__main__":
    sys.exit(main())
