"""The share of an epoch that waits for data: `python -m benchmarks.epoch --data features.h5`.

It is the training loop's own measure, of recipe flickr8k_soft on stored annotation vectors.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import Line, options, present
from captioning.run import start
from captioning.settings import parse_settings
from captioning.training import train_epoch
from preprocess.__main__ import main as preprocess


def make_data(path: Path, count: int) -> None:
    """Annotation vectors of drawn pictures and of their mirror images, by a random MobileNetV2, as the recipe wants."""
    encoder = "--encoder mobilenet_v2 --layer features.17 --weights null --mirror --scales 224"
    words = f"shapes --count {count} --image-size 320 {encoder} --output".split()
    if preprocess([*words, str(path)]):
        raise ValueError("the data could not be made")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = options(str(__doc__).splitlines()[0], steps=100, count=1000)
    parser.add_argument("--data", type=Path, help="file made by preprocess with an encoder; without it one is made")
    parser.add_argument("--config", default="flickr8k_soft", help="recipe")
    chosen, overrides = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        data = chosen.data or Path(name) / "made.h5"
        if not chosen.data:
            make_data(data, chosen.count)
        given = {"data": data, "output": Path(name) / "run", "threads": chosen.threads, "max_steps": chosen.steps}
        words = [part for key, value in given.items() for part in (f"--{key}", str(value))]
        run = start(parse_settings(["--config", chosen.config, *words, *overrides]))
        share = train_epoch(run, {"now": False})
        rate = run.progress.words / run.progress.seconds
        run.accelerator.end_training()
        run.close()
    what = f"{chosen.config}, {run.progress.step} steps, {run.settings.precision}"
    lines = [
        Line(what, f"{share:.2%} of the time waiting", share, "of the time", "-", ("<=", 0.03)),
        Line(what, f"{rate:,.0f} words/s"),
    ]
    present(lines, markdown=chosen.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
