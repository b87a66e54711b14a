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

from captioning.console import one_line, print_every_letter
from captioning.memory import keep_memory
from captioning.settings import parse_settings
from captioning.training import Interrupted, train


def main(arguments: Sequence[str] | None = None) -> int:
    """Settings -> training; 2 after a mistake of the user, 130 after an interruption."""
    keep_memory()
    print_every_letter()
    try:
        best = train(parse_settings(arguments))
    except (ValueError, OSError) as error:
        print(f"train: {one_line(error)}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"train: {stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:  # before the first step, or a second time
        print("train: interrupted", file=sys.stderr)
        return 130
    print(f"best checkpoint: {best}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
