"""One model from several: the mean of their weights, a model soup. Wortsman et al. (2022), "uniform soup".

It works for models that were trained onwards from one and the same: their weights lie in one valley of the loss, whose
middle is often better than its slopes, and captioning costs no more than with one of them. Whether it is better must be
measured (docs/results.md); the mean of models that were never one says nothing sensible.

    python -m captioning.soup runs/a runs/b --output runs/soup
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captioning.checkpoint import Checkpoint, checkpoint_folder, load_checkpoint, load_state, save_checkpoint
from captioning.console import exit_code
from captioning.files import short_name


def soup(folders: Sequence[str | Path]) -> Checkpoint:
    """The mean of checkpoints' weights; what else a checkpoint has is the first one's, its `about` tells of all.

    Args:
        folders: checkpoint folders, runs, or names of pretrained ones; two at least.

    Raises:
        FileNotFoundError, ValueError: one of them is not there, or is another model than the first; names it.
    """
    if len(folders) < 2:
        raise ValueError(f"a soup needs two checkpoints at least (got {len(folders)})")
    first, *others = (load_checkpoint(checkpoint_folder(folder)) for folder in folders)
    total = {name: x.double() for name, x in first.model.state_dict().items()}
    for folder, other in zip(folders[1:], others, strict=True):
        for name, value in _kind(first).items():
            if _kind(other)[name] != value:
                raise ValueError(f"{folder}: its {name} is not that of {folders[0]}; a soup needs models of one kind")
        for name, x in other.model.state_dict().items():
            total[name] += x.double()
    state = first.model.state_dict()
    load_state(first.model, {name: (x / len(folders)).to(state[name].dtype) for name, x in total.items()})
    about = [{"name": short_name(folder), **each.about} for folder, each in zip(folders, [first, *others], strict=True)]
    return dataclasses.replace(first, about={"soup": about})


def _kind(checkpoint: Checkpoint) -> dict[str, Any]:
    """What all models of a soup have in common; where an encoder's weights came from is told in `about`."""
    encoder = dataclasses.replace(checkpoint.encoder, weights=None)
    alike = {name: getattr(checkpoint, name) for name in ("region_encoder", "decoder", "vocabulary")}
    return {"encoder": encoder, **alike}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 after a mistake, which it says in one line."""
    parser = argparse.ArgumentParser(
        prog="python -m captioning.soup", description="The mean of the weights of models that had one start."
    )
    parser.add_argument("checkpoints", nargs="+", help="checkpoint folders, runs, or names of pretrained ones")
    parser.add_argument("--output", type=Path, required=True, help="a new checkpoint folder")
    parser.add_argument("--half", action="store_true", help="store the weights as float16")
    options = parser.parse_args(arguments)

    def command() -> int:
        if options.output.exists():
            raise ValueError(f"--output {options.output}: is there already")
        save_checkpoint(options.output, soup(options.checkpoints), half=options.half)
        print(f"{options.output}: the mean of {len(options.checkpoints)} checkpoints")
        return 0

    return exit_code("soup", command)


if __name__ == "__main__":
    sys.exit(main())
