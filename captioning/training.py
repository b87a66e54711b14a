"""The visible loop: settings in, a folder with the best and the last checkpoint out.

Everything random in a step is seeded by (seed, step, process), and the order of an epoch by (seed, epoch): where a run
stands is two numbers, and on a CPU a run that was interrupted anywhere and resumed ends with the same bits.
"""

import copy
import dataclasses
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from captioning.checkpoint import save_checkpoint
from captioning.config import Settings
from captioning.console import one_line
from captioning.data import Batch, load_batches, shard
from captioning.diagnosis import diagnose, signal_to_noise
from captioning.diagnostics import PATIENCE, collapse
from captioning.evaluate import caption_split
from captioning.metrics import score
from captioning.models.attention import is_hard
from captioning.objective import teacher_forced
from captioning.optimization import set_learning_rate
from captioning.plan import plan
from captioning.run import Run, as_checkpoint, curve, meet, save_last, say, start, training_set
from captioning.self_critical import self_critical_sampled
from captioning.workers import STOPS


class Interrupted(Exception):  # noqa: N818  it is no error: the state was saved
    """The run was asked to stop and has saved where it stands."""


def train(settings: Settings) -> Path:
    """Train a captioner; the run's folder then holds best/, last/, settings.json and tensorboard/.

    Returns:
        The best checkpoint's folder.

    Raises:
        ValueError, FileNotFoundError: settings, data and checkpoints that do not fit together.
        Interrupted: on SIGINT, SIGTERM or SIGHUP, after the state was saved.
    """
    run = start(settings)
    output = Path(settings.output)
    with _stop_signals() as stop:
        for epoch in range(run.progress.epoch, settings.epochs):
            if run.complete:
                break
            if settings.validation.patience and run.progress.without_gain >= settings.validation.patience:
                say(run, f"no better CIDEr for {run.progress.without_gain} validations: stopping early")
                break
            train_epoch(run, stop)
            if (epoch + 1) % settings.validation.every == 0 or run.progress.step >= run.length.steps:
                save_last(run)  # whatever happens while captions are searched, the epoch is not lost
                validate(run)
            run.progress.epoch, run.progress.batch = epoch + 1, 0
            save_last(run)
    run.close()
    run.accelerator.end_training()
    return output / "best"


class Means:
    """What an epoch's steps report, averaged as it goes; over words, or over steps where captions are sampled."""

    def __init__(self, *, by_words: bool):
        self.by_words = by_words
        self.began = time.perf_counter()
        self.waited = 0.0
        self.words = 0
        self.weights = 0
        self.sums: dict[str, float] = {}

    def add(self, values: dict[str, float], words: int) -> None:
        weight = words if self.by_words else 1
        self.words += words
        self.weights += weight
        self.sums = {name: self.sums.get(name, 0.0) + value * weight for name, value in values.items()}

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def __str__(self) -> str:
        shown = [name for name in ("reward", "length", "nll") if name in self.sums]
        means = [f"{name} {self.sums[name] / max(self.weights, 1):.4f}" for name in shown]
        return ", ".join([*means, f"{self.words / self.seconds:,.0f} words/s"])


def train_epoch(run: Run, stop: dict[str, bool]) -> float:
    """The rest of the current epoch, step by step.

    Returns:
        The share of its time that was spent waiting for data.
    """
    settings, progress = run.settings, run.progress
    batches = plan(settings, run.data, epoch=progress.epoch)[progress.batch :]
    if not batches:  # resumed between the last step of an epoch and its validation
        return 0.0
    mine = shard(batches, run.accelerator.process_index, run.accelerator.num_processes)
    dataset = training_set(run)
    workers = min(settings.workers, len(mine))
    loader = load_batches(dataset, mine, captions_per_image=settings.captions_per_image, workers=workers)
    run.wrapped.train()
    means = Means(by_words=not run.self_critical)
    with _bar(run, len(mine)) as bar:
        for _ in range(len(mine)):
            clock = time.perf_counter()
            batch = next(loader)
            means.waited += time.perf_counter() - clock
            values, words = train_step(run, batch)
            progress.count(words, seconds=time.perf_counter() - clock)
            means.add(values, words)
            bar.set_postfix_str(str(means), refresh=False)
            bar.update()
            save_and_stop_if_asked(run, stop)
    share = means.waited / means.seconds
    curve(run, "train/words_per_second", means.words / means.seconds)
    curve(run, "train/share_waiting_for_data", share)
    say(run, f"epoch {progress.epoch + 1}: {means}, {means.seconds:.0f} s, {share:.1%} of it waiting for data")
    return share


def save_and_stop_if_asked(run: Run, stop: dict[str, bool]) -> None:
    """After a step: save where `save_every` or a signal says so, and end after a signal."""
    progress, save_every = run.progress, run.settings.save_every
    stopping = asked_to_stop(run, stop)  # at every step: all processes must take part in the question
    if stopping or (save_every and progress.step % save_every == 0):
        save_last(run)
    if stopping:
        meet(run)  # torchrun ends all processes when the first one does
        raise Interrupted(f"stopped at step {progress.step}; go on with the same command and --resume true")


def _bar(run: Run, steps: int) -> tqdm:
    return tqdm(
        total=steps,
        desc=f"epoch {run.progress.epoch + 1}/{run.settings.epochs}",
        unit="step",
        disable=not run.accelerator.is_main_process,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )


def train_step(run: Run, batch: Batch) -> tuple[dict[str, float], int]:
    """Forward, backward, update.

    Returns:
        What the objective reports, and the number of words.
    """
    settings, accelerator, step = run.settings, run.accelerator, run.progress.step
    torch.manual_seed(step_seed(settings.seed, step, accelerator.process_index))
    batch = Batch(*(x.to(accelerator.device) for x in batch))
    if run.self_critical:
        objective = self_critical_sampled(run, batch)
    else:
        objective = teacher_forced(run, batch.images, batch.words, (batch.indices, batch.mirrored))
    accelerator.backward(objective.loss)
    average_gradients(run)
    norm = accelerator.clip_grad_norm_(run.model.parameters(), settings.optimizer.clip_norm or float("inf"))
    refuse_what_is_not_finite(run, objective.loss, norm)
    factor = run.rate_factor()
    set_learning_rate(run.optimizer, factor)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if run.average is not None:
        run.average.update_parameters(run.model)
    values, words = over_processes(run, objective.numbers(), objective.words)
    if step % 10 == 0:
        for name, value in {**values, "gradient_norm": float(norm), "learning_rate_factor": factor}.items():
            curve(run, f"train/{name}", value)
    return values, words


def refuse_what_is_not_finite(run: Run, loss: Tensor, norm: Tensor) -> None:
    """A step would spoil weights, and saving them what was good. All processes end, whosever loss it was.

    Raises:
        ValueError: the loss or a gradient is NaN or infinite.
    """
    own = [] if run.baseline is None else [x.grad.norm() for x in run.baseline.parameters() if x.grad is not None]
    finite = torch.stack([x.detach().float() for x in (loss, norm, *own)]).isfinite().all().float()
    if run.accelerator.num_processes > 1:
        finite = run.accelerator.reduce(finite, "mean")  # one that went on alone would wait for ever
    if finite < 1:
        value, step = loss.item(), run.progress.step
        what = "the gradient is not finite" if math.isfinite(value) else f"the loss is {value}"
        raise ValueError(f"{what} at step {step}: lower optimizer.learning_rate or set optimizer.clip_norm")


def over_processes(run: Run, values: dict[str, float], words: int) -> tuple[dict[str, float], int]:
    """What a step reports, of all processes: each divided its sums by the mean count, so their mean is that of all."""
    count = run.accelerator.num_processes
    if count == 1:
        return values, words
    own = torch.tensor([*values.values(), float(words)], device=run.accelerator.device)
    *means, total = run.accelerator.reduce(own, "mean").tolist()
    return dict(zip(values, means, strict=True)), round(total * count)


def average_gradients(run: Run) -> None:
    """Of the baseline's own parameters, which are outside the wrapped model that does so by itself."""
    if run.baseline is not None and run.accelerator.num_processes > 1:
        for parameter in run.baseline.parameters():
            parameter.grad = run.accelerator.reduce(parameter.grad, "mean")


def step_seed(seed: int, step: int, process: int) -> int:
    """One seed for everything random in a step of a process: dropout, sampled locations."""
    mixed = torch.Generator().manual_seed((seed * 1_000_003 + step * 1_009 + process) % 2**63)
    return int(torch.randint(2**62, (1,), generator=mixed))


def validate(run: Run) -> None:
    """Caption the validation split freely and score it; keep the model if it is the best so far."""
    options = run.settings.validation
    indices = run.data.indices(options.split).tolist()[: options.images or None]
    mine = indices[run.accelerator.process_index :: run.accelerator.num_processes]
    began = time.perf_counter()
    model = run.evaluated.eval()
    share_statistics(run, model)
    found = caption_split(
        model,
        run.data,
        mine,
        run.data.vocabulary,
        options.search,
        batch_size=options.batch_size,
    )
    captions = {name: caption.text for name, caption in found.items()}
    if run.accelerator.num_processes > 1:
        captions = dict(gather_object(list(captions.items())))
    references = {run.data.names[i]: run.data.references(i) for i in indices}
    scores = score(captions, references, tokenizer="python", metrics=("BLEU", "ROUGE-L", "CIDEr"))
    progress = run.progress
    values = {name: round(value, 4) for name, value in scores.values.items()}
    progress.history.append({"epoch": progress.epoch + 1, "step": progress.step, **values})
    for name, value in values.items():
        curve(run, f"val/{name}", value)
    listing = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
    looked = f"location {options.search.location}, " if is_hard(model) else ""
    say(
        run,
        f"epoch {progress.epoch + 1}: {options.split} {listing} (beam {options.search.beam_size}, {looked}"
        f"{scores.tokenisation.split(',')[0]} tokens, {len(indices)} images, {time.perf_counter() - began:.0f} s)",
    )
    watch_attention(run, indices)
    for i in indices[:: max(len(indices) // 3, 1)][:3]:
        say(run, f"  {one_line(run.data.names[i])}: {captions[run.data.names[i]]}")
    if values["CIDEr"] > progress.best:
        progress.best, progress.best_epoch, progress.without_gain = values["CIDEr"], progress.epoch + 1, 0
        if run.accelerator.is_main_process:
            save_checkpoint(Path(run.settings.output) / "best", as_checkpoint(run, model))
    else:
        progress.without_gain += 1


def share_statistics(run: Run, model: nn.Module) -> None:
    """What the first process has seen of its batches (`encoder.batch_norm: train`) counts in all; it will be saved."""
    if run.accelerator.num_processes > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def watch_attention(run: Run, indices: Sequence[int]) -> None:
    """Diagnose the attention on some validation images; its numbers join the validation's. Says if it has collapsed."""
    indices = indices[: run.settings.validation.diagnose_images]
    if not indices:
        return
    sides = run.model.encoder.sides
    signals = [attention_signal(run, scale) for scale in range(len(sides))]  # all processes: they add their losses up
    if not run.accelerator.is_main_process:
        return
    for scale, (side, snr) in enumerate(zip(sides, signals, strict=True)):
        found = diagnose(
            run.evaluated,
            run.data,
            indices,
            run.data.vocabulary,
            batch_size=run.settings.validation.batch_size,
            scale=scale,
        )
        found = dataclasses.replace(found, gradient_snr=snr)
        at, where = f"_{side}" if scale else "", f" at {side} pixels" if len(sides) > 1 else ""
        for name, value in found.main_numbers().items():
            run.progress.history[-1][f"{name}{at}"] = value
        for name, value in found.curves().items():
            curve(run, f"attention{at}/{name}", value)
        say(run, f"epoch {run.progress.epoch + 1}{where}: {found.line()}")
        validations = -(-run.length.epochs // run.settings.validation.every)
        patience = min(PATIENCE, validations)  # a run may have fewer
        warning = collapse(run.progress.history, hard=found.hard, at=at, patience=patience)
        if warning is not None and found.heads == 1:  # the mean of several sharp heads can be flat
            say(run, f"warning{where}: {warning}")


def attention_signal(run: Run, scale: int = 0) -> float | None:
    """Signal to noise of the gradient that the run's likelihood objective gives a scale's attention, on train photos.

    The weights are those that learn, not their moving average; nothing of the run changes. Without its teachers, which
    look at pixels.
    """
    apart = dataclasses.replace(run, wrapped=run.model, baseline=copy.deepcopy(run.baseline), teachers=None)
    return signal_to_noise(
        run.model,
        run.data,
        run.data.indices("train").tolist()[: run.settings.validation.diagnose_images],
        run.data.vocabulary,
        lambda a, words: teacher_forced(apart, a, words).loss,
        scale=scale,
        seed=run.settings.seed,
    )


def asked_to_stop(run: Run, stop: dict[str, bool]) -> bool:
    """Whether any process got a signal; all of them then stop at the same step."""
    if run.accelerator.num_processes > 1:
        flag: Tensor = torch.tensor(float(stop["now"]), device=run.accelerator.device)
        return bool(run.accelerator.reduce(flag).item())
    return stop["now"]


@contextmanager
def _stop_signals() -> Iterator[dict[str, bool]]:
    """Ctrl-C, SIGTERM and a closed terminal ask the loop to stop after its step; a second one stops at once.

    But for one that comes with the first: job queues signal torchrun and its processes, and torchrun tells them again.
    What is ignored stays so: under nohup a closed terminal stops nothing.
    """
    stop, first = {"now": False}, 0.0
    handlers = {number: signal.getsignal(number) for number in STOPS}
    before = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}

    def ask(number: int, frame: Any) -> None:
        nonlocal first
        if stop["now"] and time.monotonic() > first + 1:
            raise KeyboardInterrupt
        if not stop["now"]:
            stop["now"], first = True, time.monotonic()

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
