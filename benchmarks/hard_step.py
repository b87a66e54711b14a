"""What a training step with hard attention costs beside one with soft: `python -m benchmarks.hard_step`.

Whole steps of the training loop (forward, loss, backward, clipping, optimiser, the baseline's part) of recipes
flickr8k_soft and flickr8k_hard, in turns on the same batches of stored annotation vectors.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.epoch import make_data
from benchmarks.report import Line, best_of, options, present
from captioning.compare import in_turns
from captioning.data import load_batches
from captioning.run import plan, start, training_set
from captioning.settings import parse_settings
from captioning.training import train_step

STEPS = {
    "soft": (["--config", "flickr8k_soft"], None),
    "hard, K = 1, moving average": (
        ["--config", "flickr8k_hard", "--hard.samples", "1", "--hard.baseline", "moving_average"],
        1.1,
    ),
    "hard, K = 1, learned": (["--config", "flickr8k_hard", "--hard.samples", "1", "--hard.baseline", "learned"], 1.1),
    "hard, K = 5, leave-one-out": (["--config", "flickr8k_hard", "--hard.samples", "5"], 3.0),
}
"""Name -> its options of train.py, and how many soft steps it may cost."""


def stepper(words: Sequence[str], batches: int) -> tuple[Callable[[], None], int]:
    """Makes the first steps of a run, again and again; and how many they are."""
    run = start(parse_settings(words))
    if run.writer is not None:
        run.writer.close()
        run.writer = None
    planned = in_turns(plan(run.settings, run.data, epoch=0))[:batches]
    loader = load_batches(training_set(run), planned, captions_per_image=run.settings.captions_per_image)
    loaded = list(loader)
    run.wrapped.train()

    def steps() -> None:
        for batch in loaded:
            train_step(run, batch)

    return steps, len(loaded)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = options(str(__doc__).splitlines()[0], batches=4, repeats=5, count=200)
    parser.add_argument("--data", type=Path, help="file made by preprocess with an encoder; without it one is made")
    chosen, overrides = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        data = chosen.data or Path(name) / "made.h5"
        if not chosen.data:
            make_data(data, chosen.count)
        actions, made = [], 0
        for i, (words, _) in enumerate(STEPS.values()):
            output = stack.enter_context(tempfile.TemporaryDirectory()) + f"/{i}"
            given = ["--data", str(data), "--output", output, "--threads", str(chosen.threads)]
            action, made = stepper([*words, *given, *overrides], chosen.batches)
            actions.append(action)
        seconds = best_of(actions, chosen.repeats)
    lines = []
    for (what, (_, most)), took in zip(STEPS.items(), seconds, strict=True):
        goal = None if most is None else ("<=", most)
        lines.append(Line(what, f"{made / took:.2f} steps/s", took / seconds[0], "x the soft step", "-", goal))
    present(lines, markdown=chosen.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
