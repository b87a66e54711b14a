"""Train a captioner.

One process, on the GPU if there is one:
    python -m captioning.train --config flickr8k_soft --data data.h5 --output runs/soft
Several GPUs, or several CPU processes:
    torchrun --nproc-per-node 2 -m captioning.train --config flickr8k_soft --data data.h5 --output runs/soft
Every setting can be overridden (`--loss.lambda_ds 0.5`; `--help` lists them), and an interrupted run goes on where it
stopped with the same command and `--resume true`.
"""

import sys
from collections.abc import Sequence

from captioning.extras import require

if __name__ == "__main__":
    require("captioning.train")

from captioning.console import exit_code
from captioning.memory import keep_memory
from captioning.settings import parse_settings


def run(arguments: Sequence[str] | None) -> int:
    """Settings -> training; where an interrupted run stopped, its KeyboardInterrupt says."""
    settings = parse_settings(arguments)
    from captioning.training import Interrupted, train  # torch takes seconds: --help and mistakes do not wait for it

    try:
        best = train(settings)
    except Interrupted as stop:
        raise KeyboardInterrupt(str(stop)) from stop
    print(f"best checkpoint: {best}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 after a mistake of the user, 130 after an interruption."""
    keep_memory()
    return exit_code("train", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
