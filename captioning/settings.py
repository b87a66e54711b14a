"""From a command line to `config.Settings`: recipes by name or path, and every setting as an option."""

import importlib.resources
import sys
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, cast, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from captioning.config import Settings, check_fields
from captioning.console import one_line
from captioning.files import read_text


def recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(importlib.resources.files("captioning"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def recipe_path(name_or_path: str) -> str:
    """A recipe's file, from its name or from a path.

    Raises:
        FileNotFoundError: naming the recipes there are.
    """
    if name_or_path in recipes():
        return str(recipes()[name_or_path])
    if Path(name_or_path).is_file():
        return name_or_path
    raise FileNotFoundError(f"--config {name_or_path}: no such file or recipe; recipes are {', '.join(recipes())}")


def groups(kind: type = Settings, prefix: str = "") -> Iterator[str]:
    """Settings that hold settings. jsonargparse would take a file for one, and interpret what it says unchecked."""
    for name, inner in get_type_hints(kind).items():
        if is_dataclass(inner):
            yield f"{prefix}{name}"
            yield from groups(cast(type, inner), f"{prefix}{name}.")


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings of a recipe; what is none is refused before anything interprets it, see `check_fields`.

    Raises:
        ValueError: naming the file and the field.
    """
    text = read_text(path)
    try:
        aliases = any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text))
        values = None if aliases else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"--config {path}: not YAML: {one_line(error)}") from error
    if aliases:
        raise ValueError(f"--config {path}: has aliases (*NAME), in which little text can stand for very much")
    values = values or {}
    check_fields(Settings, values, f"--config {path}")
    return cast(dict[str, Any], values)


def settings_parser() -> ArgumentParser:
    """The parser of `train.py`: a recipe (--config) whose every setting can be overridden (--loss.lambda_ds 0.5)."""
    parser = ArgumentParser(
        prog="python -m captioning.train", description="Train a captioner.", exit_on_error=False, allow_abbrev=False
    )
    names = ", ".join(recipes())
    parser.add_argument("--config", action="config", help=f"recipe: a name ({names}) or a YAML file")
    parser.add_class_arguments(Settings, as_group=False)
    return parser


def parse_settings(arguments: Sequence[str] | None = None) -> Settings:
    """Settings from a command line.

    Raises:
        ValueError, FileNotFoundError: one line that names the setting.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if words.count("--config") > 1:
        raise ValueError("--config: give one recipe")
    if "--config" in words[:-1]:  # the recipe is read first, whatever its place, so that every other word overrides it
        i = words.index("--config")
        recipe = read_recipe(Path(recipe_path(words[i + 1])))
        # what was read and checked, in ASCII: on Windows the file would be read with other letters
        words = ["--config", yaml.safe_dump(recipe), *words[:i], *words[i + 2 :]]
    known = {f"--{name}" for name in groups()}
    for option in (word.split("=")[0] for word in words):
        if option in known:
            raise ValueError(f"{option}: is a group of settings; give them one by one, e.g. {option}.NAME VALUE")
    parser = settings_parser()
    try:
        values = parser.instantiate(parser.parse_args(words)).as_dict()
    except (ArgumentError, TypeError) as error:
        raise ValueError(one_line(error)) from error
    values.pop("config", None)
    return Settings(**values)
