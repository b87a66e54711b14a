"""Several checkpoints as one captioner, whose probabilities are the mean of theirs.

What that is worth grows with how differently they see: fine and coarse grids, other encoders (docs/results.md).
Captioning costs as much as with each in turn.

    python -m captioning.ensemble fine=runs/a coarse=runs/b --output runs/both
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from captioning.checkpoint import MAX_MEMBERS, checkpoint_folder, load_checkpoint, member_names
from captioning.console import exit_code
from captioning.voices import Ensemble, save_ensemble


def build_ensemble(members: Sequence[str], *, mirror: bool = False) -> Ensemble:
    """An ensemble of checkpoints; it searches as the first one does.

    Args:
        members: NAME=CHECKPOINT, or CHECKPOINT alone, whose name is then its number.
        mirror: it looks at mirrored photos, too.

    Raises:
        FileNotFoundError, ValueError: one of them is not there or malformed, or does not go with the first.
    """
    if not 2 <= len(members) <= MAX_MEMBERS:
        raise ValueError(f"an ensemble has 2 to {MAX_MEMBERS} members (got {len(members)})")
    pairs = [
        (str(i), member) if "=" not in member or Path(member).exists() else member.split("=", 1)
        for i, member in enumerate(members, 1)
    ]
    names = member_names([name for name, _ in pairs])
    found = tuple(load_checkpoint(checkpoint_folder(path)) for _, path in pairs)
    own, several = found[0].search, any(member.search.multi_scale for member in found)
    return Ensemble(found, dataclasses.replace(own, mirror=mirror or own.mirror, multi_scale=several), names)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 after a mistake, which it says in one line."""
    parser = argparse.ArgumentParser(
        prog="python -m captioning.ensemble", description="Checkpoints that caption with one voice, as one folder."
    )
    parser.add_argument(
        "members", nargs="+", metavar="[NAME=]CHECKPOINT", help="folder, run, or name of a pretrained one"
    )
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--mirror", action="store_true", help="look at mirrored photos, too, unless told otherwise")
    parser.add_argument("--half", action="store_true", help="store the weights as float16")
    options = parser.parse_args(arguments)

    def command() -> int:
        if options.output.exists():
            raise ValueError(f"--output {options.output}: is there already")
        save_ensemble(options.output, build_ensemble(options.members, mirror=options.mirror), half=options.half)
        print(f"{options.output}: an ensemble of {len(options.members)}")
        return 0

    return exit_code("ensemble", command)


if __name__ == "__main__":
    sys.exit(main())
