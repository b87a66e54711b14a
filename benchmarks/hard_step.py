"""What a training step with hard attention costs beside one with soft: `python -m benchmarks.hard_step`.

Whole steps (forward, loss, backward, clipping, optimiser, the baseline's part) in turns on the same captions: of a
decoder at the sizes of `benchmarks.train_step`, and of the training loop with recipes flickr8k_soft and flickr8k_hard
on stored annotation vectors, in the batches of the latter. The more of a step is the images' own work (keys, encoder),
the less do several paths cost.
"""

import dataclasses
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.epoch import make_data
from benchmarks.report import Line, best_of, options, present
from benchmarks.train_step import Sizes, make_batch, trainer
from captioning.compare import in_turns
from captioning.config import DecoderConfig, HardConfig
from captioning.data import load_batches
from captioning.hard_objective import hard_loss
from captioning.losses import word_nll
from captioning.memory import keep_memory
from captioning.models.decoder import Decoder
from captioning.models.registry import build_decoder
from captioning.plan import plan
from captioning.reward_baselines import Baseline, build_baseline
from captioning.run import start, training_set
from captioning.settings import parse_settings
from captioning.training import train_step

BATCH = ["--batch_size", "40", "--captions_per_image", "1"]
"""That of flickr8k_hard, for both recipes."""
ONE_PLACE = ["--decoder.glimpses", "1", "--decoder.window", "0", "--hard.lambda_e", "0"]
ONE_PLACE += ["--hard.expectation_probability", "0", "--optimizer.average_decay", "0"]
"""The paper's look in the place of that recipe's, and no average of the weights, which the soft recipe has not."""
BASE = HardConfig(lambda_e=0.0, expectation_probability=0.0)
STEPS = {
    "soft": (None, None),
    "hard, K = 1, moving average": (BASE, 1.1),
    "hard, K = 1, learned": (dataclasses.replace(BASE, baseline="learned"), 1.1),
    "hard, K = 5, leave-one-out": (dataclasses.replace(BASE, baseline="leave_one_out", samples=5), 3.0),
}
"""Name -> its estimator, and how many soft steps it may cost."""


def words_of(hard: HardConfig | None) -> list[str]:
    """Its options of train.py."""
    if hard is None:
        return ["--config", "flickr8k_soft", *BATCH]
    estimator = ["--hard.samples", str(hard.samples), "--hard.baseline", hard.baseline]
    return ["--config", "flickr8k_hard", *BATCH, *ONE_PLACE, *estimator]


def mean_nll(decoder: Decoder, a: Tensor, words: Tensor) -> Tensor:
    """The NLL, the mean over words."""
    output = decoder(a, words)
    return word_nll(output.logits, output.targets).mean()


def mean_loss(decoder: Decoder, a: Tensor, words: Tensor, hard: HardConfig, baseline: Baseline) -> Tensor:
    """Eq. 12, the mean over words."""
    total, count, _ = hard_loss(decoder, a, words, hard, baseline)
    return total / count


def decoder_step(sizes: Sizes, hard: HardConfig | None) -> Callable[[], None]:
    """A step of a decoder alone, in fp32, on given annotation vectors."""
    torch.manual_seed(0)
    config = DecoderConfig(
        attention="soft" if hard is None else "hard",
        embedding_dim=sizes.dim,
        hidden_dim=sizes.dim,
        attention_dim=sizes.attention_dim,
    )
    decoder = build_decoder(config, vocabulary_size=sizes.vocabulary, annotation_dim=sizes.annotation_dim)
    a, words = make_batch(sizes)
    if hard is None:
        return trainer(decoder, lambda: mean_nll(decoder, a, words), torch.float32)
    baseline = build_baseline(hard, hidden_dim=sizes.dim)
    module = nn.ModuleList([decoder, baseline])
    return trainer(module, lambda: mean_loss(decoder, a, words, hard, baseline), torch.float32)


def stepper(words: Sequence[str], batches: int) -> tuple[Callable[[], None], int]:
    """Makes the first steps of a run, again and again; and how many they are."""
    run = start(parse_settings(words))
    run.close()
    planned = in_turns(plan(run.settings, run.data, epoch=0))[:batches]
    loader = load_batches(training_set(run), planned, captions_per_image=run.settings.captions_per_image)
    loaded = list(loader)
    run.wrapped.train()

    def steps() -> None:
        for batch in loaded:
            train_step(run, batch)

    return steps, len(loaded)


def compared(title: str, seconds: Sequence[float], steps: int) -> list[Line]:
    """A line for each of STEPS, which took so long for so many steps."""
    lines = []
    for (what, (_, most)), took in zip(STEPS.items(), seconds, strict=True):
        goal = None if most is None else ("<=", most)
        figure = f"{steps / took:.2f} steps/s"
        lines.append(Line(f"{title}, {what}", figure, took / seconds[0], "x the soft step", "-", goal))
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    sizes = {"images": 32, "locations": 196, "annotation_dim": 2048, "dim": 512, "vocabulary": 9000}
    parser = options(str(__doc__).splitlines()[0], batches=4, repeats=3, count=200, **sizes)
    parser.add_argument("--data", type=Path, help="file made by preprocess with an encoder; without it one is made")
    chosen, overrides = parser.parse_known_args(arguments)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    keep_memory()  # as training does
    shared = (chosen.locations, chosen.annotation_dim, chosen.dim, chosen.dim, chosen.vocabulary)
    title = f"{chosen.locations}x{chosen.annotation_dim}"
    actions = [decoder_step(Sizes(chosen.images, 1, *shared), hard) for hard, _ in STEPS.values()]
    lines = compared(title, best_of(actions, chosen.repeats), 1)
    with tempfile.TemporaryDirectory() as name:
        data = chosen.data or Path(name) / "made.h5"
        if not chosen.data:
            make_data(data, chosen.count)
        actions, made = [], 0
        for i, (hard, _) in enumerate(STEPS.values()):
            given = ["--data", str(data), "--output", f"{name}/{i}", "--threads", str(chosen.threads)]
            action, made = stepper([*words_of(hard), *given, *overrides], chosen.batches)
            actions.append(action)
        lines += compared("flickr8k_soft", best_of(actions, chosen.repeats), made)
    present(lines, markdown=chosen.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
