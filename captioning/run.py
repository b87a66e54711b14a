"""One training run: its objects, how it starts or resumes, and how its state is saved."""

import dataclasses
import importlib.metadata
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from captioning.checkpoint import (
    Checkpoint,
    TrainingState,
    save_checkpoint,
)
from captioning.checks import not_negative
from captioning.compatibility import fingerprint
from captioning.config import EncoderConfig, SearchConfig, Settings, from_dict, to_dict
from captioning.console import go_on_unheard, one_line
from captioning.data import CaptionData, CaptionDataset
from captioning.distillation import Teachers, load_teachers
from captioning.files import clear_folder, hold, make_folder, recover_folder, short_name, write_json
from captioning.models.captioner import CaptioningModel
from captioning.optimization import (
    build_optimizer,
    learning_rate_factor,
    load_optimizer_tensors,
    moving_average,
    optimizer_tensors,
)
from captioning.plan import Length, plan_length
from captioning.precision import number_format, slow_choice
from captioning.reward_baselines import Baseline
from captioning.rewards import CiderD, references_with_end
from captioning.start import load_last, start_baseline, start_model


@dataclass
class Progress:
    """Where a run stands: the next batch is number `batch` of epoch `epoch`."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best: float = -1.0
    best_epoch: int = 0
    without_gain: int = 0
    seconds: float = 0.0
    words: int = 0
    history: list[dict[str, int | float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        not_negative(self, "epoch", "batch", "step", "best_epoch", "without_gain", "seconds", "words")

    def count(self, words: int, *, seconds: float) -> None:
        """One more step is done."""
        self.batch += 1
        self.step += 1
        self.words += words
        self.seconds += seconds


@dataclass
class Run:
    """The objects of one training run, which everything that trains shares.

    Args:
        settings: with what `precision: auto` came to.
        accelerator: devices and processes.
        data: what is learned from.
        fingerprint: of that.
        encoder: its config, completed by the data.
        model: what learns.
        wrapped: the same, made ready for several processes.
        optimizer: of the model and the learned baseline.
        average: the moving average of the weights, if one is kept.
        baseline: of eq. 12, if attention is hard.
        teachers: whose expected words are learned too, if there are any.
        progress: how far it is.
        writer: of the curves; in the main process.
        lock: the file that keeps others out of the run's folder; in the main process.
        length: its steps and epochs.
        reward: of self-critical training, if there is any.
    """

    settings: Settings
    accelerator: Accelerator
    data: CaptionData
    fingerprint: str
    encoder: EncoderConfig
    model: CaptioningModel
    wrapped: Any
    optimizer: Optimizer
    average: AveragedModel | None
    baseline: Baseline | None
    teachers: Teachers | None
    progress: Progress
    writer: SummaryWriter | None
    lock: TextIO | None
    length: Length
    reward: CiderD | None

    @property
    def complete(self) -> bool:
        """Whether the last step was made, and its epoch closed."""
        return self.progress.step >= self.length.steps and self.progress.batch == 0

    @property
    def evaluated(self) -> CaptioningModel:
        """The model that is validated and kept: the moving average if there is one."""
        return cast(CaptioningModel, self.average.module) if self.average is not None else self.model

    @property
    def self_critical(self) -> bool:
        """Whether the likelihood phase is over."""
        return self.progress.epoch >= self.settings.likelihood_epochs

    def mean_over_processes(self, *counts: Tensor) -> list[Tensor]:
        """Counts of this process as what to divide by: gradients are averaged over processes, so counts are too."""
        if self.accelerator.num_processes == 1:
            return list(counts)
        return list(self.accelerator.reduce(torch.stack(counts).float()) / self.accelerator.num_processes)

    def close(self) -> None:
        """Let go of the files that the run has open; its curves end here."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None
        if self.lock is not None:
            self.lock.close()

    def rate_factor(self) -> float:
        """This step's learning rate as a fraction of the optimiser's peak."""
        options, phase, step = self.settings.optimizer, self.settings.self_critical, self.progress.step
        if not self.self_critical:
            return learning_rate_factor(step, self.length.likelihood_steps, options)
        schedule = dataclasses.replace(options, warmup_steps=0, schedule=phase.schedule)
        done, steps = step - self.length.likelihood_steps, self.length.steps - self.length.likelihood_steps
        factor = learning_rate_factor(done, steps, schedule)
        return factor * phase.learning_rate / options.learning_rate


def start(settings: Settings) -> Run:
    """Everything up to the first step; with `resume`, everything as it was."""
    output = Path(settings.output)
    for name in ("last", "best"):
        recover_folder(output / name)
    state = TrainingState.load(output / "last") if settings.resume else None
    if not settings.resume and any((output / name).exists() for name in ("last", "best", "config.json")):
        raise FileExistsError(
            f"output={output} holds a run or a checkpoint already: resume a run with --resume true, or choose another"
        )
    if not settings.resume and (output / "settings.json").exists() and not (output / ".lock").exists():
        raise FileExistsError(f"output={output} holds a settings.json that no run has made: choose another")
    data = CaptionData(settings.data)
    settings, accelerator = start_accelerator(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)  # the accelerator may have set them, too
    torch.manual_seed(settings.seed)
    last = load_last(settings, state, data)
    model, encoder = start_model(settings, data, last)
    baseline = start_baseline(settings)
    if baseline is not None:
        baseline.to(accelerator.device)  # before the optimiser's state is loaded, which goes where the weights are
    whole = "crop" not in settings.augment
    teachers = load_teachers(settings.distillation.teachers, data, encoder, whole=whole, device=accelerator.device)
    optimizer = build_optimizer(model, settings.optimizer, baseline)
    average = moving_average(model, settings.optimizer.average_decay) if settings.optimizer.average_decay else None
    progress = Progress()
    if state is not None:
        progress = go_on(state, output / "last", optimizer, {"average": average, "baseline": baseline})
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if average is not None:
        average.to(accelerator.device)
    writer, lock = open_output(settings, progress) if accelerator.is_main_process else (None, None)
    run = Run(
        settings=settings,
        accelerator=accelerator,
        data=data,
        fingerprint=fingerprint(data),
        encoder=encoder,
        model=model,
        wrapped=wrapped,
        optimizer=optimizer,
        average=average,
        baseline=baseline,
        teachers=teachers,
        progress=progress,
        writer=writer,
        lock=lock,
        length=plan_length(settings, data),
        reward=CiderD(references_with_end(data, "train")) if settings.self_critical.epochs else None,
    )
    say_what_starts(run)
    if state is not None:
        say_if_elsewhere(run, state)
    return run


def go_on(state: TrainingState, folder: Path, optimizer: Optimizer, others: Mapping[str, nn.Module | None]) -> Progress:
    """Put the optimiser and what else changed in training back to where a run stood, and say where that was.

    Raises:
        ValueError: the state is not of such a run; names the file.
    """
    progress = from_dict(Progress, state.progress["progress"], f"{folder / 'training.json'}: progress")
    tensors = state.group("optimizer")
    try:
        if progress.step and not tensors:
            raise ValueError("the optimiser's state is missing")
        load_optimizer_tensors(optimizer, tensors)
        for name, module in others.items():
            if module is not None:
                module.load_state_dict(state.group(name))
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{folder / 'training.safetensors'}: {one_line(error)[:300]}") from error
    return progress


def start_accelerator(settings: Settings) -> tuple[Settings, Accelerator]:
    """Devices and processes as they are here; and the settings, with what `precision: auto` comes to on them.

    Raises:
        ValueError: there are more processes than GPUs.
    """
    AcceleratorState._reset_state()  # it is global, and an earlier run of this process may have had another precision
    # torchrun's processes find each other on CPUs only when told
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and torch.backends.mps.is_available():
        on_cpu = True  # an Apple GPU takes one process
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.accelerator.device_count()
    if here > gpus and not on_cpu:
        raise ValueError(f"{here} processes need as many GPUs (found {gpus}); ACCELERATE_USE_CPU=true takes CPUs")
    precision = number_format(settings.precision, PartialState(cpu=on_cpu).device.type)
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        cpu=on_cpu,
        # the decoders of several scales have turns
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=bool(settings.encoder.scales))],
    )
    return dataclasses.replace(settings, precision=precision), accelerator


def open_output(settings: Settings, progress: Progress) -> tuple[SummaryWriter, TextIO]:
    """Make the run's folder, hold it, save its settings there, and go on with its curves.

    Raises:
        FileExistsError: another process is training there.
    """
    output = Path(settings.output)
    make_folder(output, f"output={output}")
    try:
        lock = hold(output / ".lock")
    except BlockingIOError as error:
        raise FileExistsError(f"output={output}: another process is training there now") from error
    for name in ("last", "best"):
        clear_folder(output / name)
    write_json(output / "settings.json", to_dict(settings))
    again = progress.step + (progress.batch == 0)  # what an epoch's end has written of its last step, it wrote for good
    return SummaryWriter(str(output / "tensorboard"), purge_step=again if progress.step else None), lock


def training_set(run: Run) -> CaptionDataset:
    """The images and captions of a run, as its encoder sees them."""
    encoder = run.encoder
    return CaptionDataset(run.data, sides=encoder.sides, resample=encoder.resample, augment=run.settings.augment)


def machine(accelerator: Accelerator) -> dict[str, Any]:
    """What the last bits of a sum depend on, beside the settings."""
    device = accelerator.device
    found = {"threads": torch.get_num_threads(), "processes": accelerator.num_processes, "device": device.type}
    return found | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def say_what_starts(run: Run) -> None:
    """How much of what, on what; and if the precision that was asked for is a poor choice there."""
    images = len(run.data.indices("train"))
    parameters = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    here = machine(run.accelerator)
    say(
        run,
        f"{images:,} images, {run.length.epoch_steps:,} steps an epoch, {parameters:,} trained parameters, "
        f"{here['processes']} process(es) on {here['device']}, {run.settings.precision}",
    )
    if slow := slow_choice(run.settings.precision, here["device"]):
        say(run, slow)
    warmup, likelihood = run.settings.optimizer.warmup_steps, run.length.likelihood_steps
    if 0 < likelihood <= warmup:
        say(run, f"the run has {likelihood} steps and optimizer.warmup_steps={warmup}: its rate never reaches its peak")


def say_if_elsewhere(run: Run, state: TrainingState) -> None:
    """A run may go on elsewhere; that it will not be to the same bits, it says."""
    now = machine(run.accelerator)
    before = state.progress.get("machine", now)
    if isinstance(before, dict) and before != now:
        was, is_now = (", ".join(f"{name} {value}" for name, value in x.items()) for x in (before, now))
        say(run, f"resumed elsewhere ({was}; now {is_now}): it goes on, but not to the same bits")


def as_checkpoint(run: Run, model: CaptioningModel) -> Checkpoint:
    """The model with its provenance."""
    packages = ("torch", "torchvision", "accelerate", "show-attend-tell")
    settings = to_dict(run.settings)
    for owner, name in (*((settings, x) for x in ("data", "output", "init_from")), (settings["encoder"], "weights")):
        owner[name] = owner[name] and short_name(owner[name])  # a checkpoint travels: folders of this machine stay here
    taught = settings["distillation"]
    taught["teachers"] = [short_name(teacher) for teacher in taught["teachers"]]
    about = {
        "settings": settings,
        "data": {"source": run.data.source, "settings": run.data.settings},
        "progress": dataclasses.asdict(run.progress),
        "versions": {name: version(name) for name in packages},
    }
    encoder = dataclasses.replace(run.encoder, weights=run.encoder.weights and short_name(run.encoder.weights))
    search = run.settings.validation.search  # its beam may be small, to be quick; and nobody gets a draw unasked
    beam = max(search.beam_size, SearchConfig.beam_size)
    search = dataclasses.replace(search, beam_size=beam, num_captions=1, sample=False)
    decoder, regions = run.settings.decoder, run.settings.region_encoder
    return Checkpoint(model, encoder, decoder, run.data.vocabulary, regions, about, search)


def version(package: str) -> str | None:
    """A package's version; none of what was not installed, but lies beside its command."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def save_last(run: Run) -> None:
    """Save the model and all that a resumed run needs, in one step."""
    meet(run)
    if not run.accelerator.is_main_process:
        return
    tensors = {f"optimizer/{name}": x for name, x in optimizer_tensors(run.optimizer).items()}
    if run.average is not None:
        averages = {name: x.detach().cpu().clone() for name, x in run.average.state_dict().items()}
        tensors |= {f"average/{name}": x for name, x in averages.items()}
    if run.baseline is not None:
        tensors |= {f"baseline/{name}": x.detach().cpu().clone() for name, x in run.baseline.state_dict().items()}
    progress, settings = dataclasses.asdict(run.progress), to_dict(run.settings)
    about = {"machine": machine(run.accelerator), "data": run.fingerprint}
    state = {"progress": progress, "settings": settings, **about}
    folder = Path(run.settings.output) / "last"
    save_checkpoint(folder, as_checkpoint(run, run.model), training=TrainingState(tensors, state))


def meet(run: Run) -> None:
    """All processes come to this point: a sum over them, for torch's own barrier takes to a GPU even a run on CPUs."""
    if run.accelerator.num_processes > 1:
        run.accelerator.reduce(torch.zeros((), device=run.accelerator.device)).item()


def say(run: Run, text: str) -> None:
    """A line of the log, from the main process."""
    if run.accelerator.is_main_process:
        try:
            tqdm.write(text)
            sys.stdout.flush()
        except OSError:  # nobody reads standard output any more, or its disk is full; the run goes on
            go_on_unheard(sys.stdout)


def curve(run: Run, name: str, value: float) -> None:
    """A point of a TensorBoard curve, from the main process."""
    if run.writer is not None:
        run.writer.add_scalar(name, value, run.progress.step)
