"""One training run: its objects, how it starts or resumes, and how its state is saved."""

import dataclasses
import importlib.metadata
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from captioning.api import checkpoint_folder
from captioning.checkpoint import (
    Checkpoint,
    TrainingState,
    build_model,
    load_checkpoint,
    load_state,
    recover_folder,
    save_checkpoint,
    write_json,
)
from captioning.config import EncoderConfig, SearchConfig, Settings, from_dict, to_dict
from captioning.data import ANNOTATIONS, CaptionData, CaptionDataset, Sample, check_augment, plan_epoch
from captioning.distillation import Teachers, load_teachers
from captioning.evaluate import check_same_task
from captioning.files import hold, short_name
from captioning.models.captioner import CaptioningModel
from captioning.optimization import (
    build_optimizer,
    learning_rate_factor,
    load_optimizer_tensors,
    moving_average,
    optimizer_tensors,
)
from captioning.reward_baselines import BASELINES, Baseline
from captioning.rewards import CiderD, references_with_end


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
    history: list[dict[str, Any]] = field(default_factory=list)

    def count(self, words: int, *, seconds: float) -> None:
        """One more step is done."""
        self.batch += 1
        self.step += 1
        self.words += words
        self.seconds += seconds


@dataclass
class Run:
    """What the functions below share: the objects of one training run."""

    settings: Settings
    accelerator: Accelerator
    data: CaptionData
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
    likelihood_steps: int
    total_steps: int
    reward: CiderD | None

    @property
    def complete(self) -> bool:
        """Whether the last step was made, and its epoch closed."""
        return self.progress.step >= self.total_steps and self.progress.batch == 0

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

    def rate_factor(self) -> float:
        """This step's learning rate as a fraction of the optimiser's peak."""
        options, phase, step = self.settings.optimizer, self.settings.self_critical, self.progress.step
        if not self.self_critical:
            return learning_rate_factor(step, self.likelihood_steps, options)
        schedule = dataclasses.replace(options, warmup_steps=0, schedule=phase.schedule)
        done = step - self.likelihood_steps
        factor = learning_rate_factor(done, self.total_steps - self.likelihood_steps, schedule)
        return factor * phase.learning_rate / options.learning_rate


def start(settings: Settings) -> Run:
    """Everything up to the first step; with `resume`, everything as it was."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    output = Path(settings.output)
    for name in ("last", "best"):
        recover_folder(output / name)
    state = TrainingState.load(output / "last") if settings.resume else None
    if not settings.resume and (output / "last").exists():
        raise FileExistsError(f"output={output} holds a run already: resume it with --resume true, or choose another")
    AcceleratorState._reset_state()  # it is global, and an earlier run of this process may have had another precision
    accelerator = Accelerator(
        mixed_precision="bf16" if settings.precision == "bf16" else "no",
        cpu=not torch.accelerator.is_available(),  # torchrun's processes find each other on CPUs only when told
    )
    data = CaptionData(settings.data)
    torch.manual_seed(settings.seed)
    model, encoder = start_model(settings, data)
    baseline = start_baseline(settings)
    teachers = load_teachers(settings.distillation.teachers, data, device=accelerator.device)
    optimizer = build_optimizer(model, settings.optimizer, baseline)
    average = moving_average(model, settings.optimizer.average_decay) if settings.optimizer.average_decay else None
    progress = Progress()
    if state is not None:
        check_same_run(settings, state)
        last = load_checkpoint(output / "last")
        check_same_task(last, data, "--resume")
        load_state(model, last.model.state_dict())
        load_optimizer_tensors(optimizer, state.group("optimizer"))
        if average is not None:
            average.load_state_dict(state.group("average"))
        if baseline is not None:
            baseline.load_state_dict(state.group("baseline"))
        progress = Progress(**state.progress["progress"])
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    for part in (average, baseline):
        if part is not None:
            part.to(accelerator.device)
    writer, lock = open_output(settings, progress) if accelerator.is_main_process else (None, None)
    unlimited = dataclasses.replace(settings, max_steps=0)
    steps = [len(plan(unlimited, data, epoch=epoch)) for epoch in (0, settings.epochs - 1)]
    likelihood_steps = steps[0] * settings.likelihood_epochs
    total = likelihood_steps + steps[1] * settings.self_critical.epochs
    total = min(total, settings.max_steps or total)
    reward = CiderD(references_with_end(data, "train")) if settings.self_critical.epochs else None
    parts = (model, wrapped, optimizer, average, baseline, teachers)
    steps_of = (min(likelihood_steps, total), total)
    run = Run(settings, accelerator, data, encoder, *parts, progress, writer, lock, *steps_of, reward)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(
        run,
        f"{len(data.indices('train')):,} images, {steps[0]:,} steps an epoch, {parameters:,} trained parameters, "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}, {settings.precision}",
    )
    if state is not None:
        say_if_elsewhere(run, state)
    return run


def open_output(settings: Settings, progress: Progress) -> tuple[SummaryWriter, TextIO]:
    """Make the run's folder, hold it, save its settings there, and go on with its curves.

    Raises:
        FileExistsError: another process is training there.
    """
    output = Path(settings.output)
    output.mkdir(parents=True, exist_ok=True)
    try:
        lock = hold(output / ".lock")
    except BlockingIOError as error:
        raise FileExistsError(f"output={output}: another process is training there now") from error
    write_json(output / "settings.json", to_dict(settings))
    return SummaryWriter(str(output / "tensorboard"), purge_step=progress.step or None), lock


def start_model(settings: Settings, data: CaptionData) -> tuple[CaptioningModel, EncoderConfig]:
    """The model of the settings: new, or from the checkpoint `init_from`, with the encoder that the data demands."""
    check_positions(settings, data)
    check_augment(data, settings.augment)
    check_validation(settings, data)
    encoder, encoder_state = fit_encoder(settings.encoder, data), None
    build = partial(build_model, region_encoder=settings.region_encoder)
    if data.kind == ANNOTATIONS:
        encoder_state = data.encoder_state()
    if settings.init_from is None:
        return build(encoder, settings.decoder, len(data.vocabulary), encoder_state=encoder_state)
    first = load_checkpoint(checkpoint_folder(settings.init_from))
    if first.vocabulary != data.vocabulary:
        raise ValueError(f"init_from={settings.init_from}: its vocabulary is not that of {data.path}")
    free = [name for name in vars(first.decoder) if "dropout" in name]
    if {first.decoder.attention, settings.decoder.attention} == {"soft", "hard"}:  # they have the same parameters
        free.append("attention")
    if first.decoder != dataclasses.replace(settings.decoder, **{name: getattr(first.decoder, name) for name in free}):
        raise ValueError(f"init_from={settings.init_from}: its decoder is {first.decoder}; set --decoder alike")
    if first.region_encoder != settings.region_encoder:
        raise ValueError(
            f"init_from={settings.init_from}: its region encoder is {first.region_encoder}; set --region_encoder alike"
        )
    if encoder_state is None:
        encoder_state = first.model.encoder.network.state_dict()
    model, encoder = build(encoder, settings.decoder, len(data.vocabulary), encoder_state=encoder_state)
    load_state(model, {**first.model.state_dict(), **model.encoder.state_dict(prefix="encoder.")})
    return model, encoder


def start_baseline(settings: Settings) -> Baseline | None:
    """The baseline of eq. 12, if attention is hard."""
    if settings.decoder.attention != "hard":
        return None
    hard = settings.hard
    return BASELINES[hard.baseline](
        hidden_dim=settings.decoder.hidden_dim, samples=hard.samples, to_go=hard.reward == "to_go"
    )


def check_positions(settings: Settings, data: CaptionData) -> None:
    """Learned positions must suffice for every caption that is read or written, before an epoch is spent.

    Raises:
        ValueError: they do not; says how many are needed.
    """
    decoder = settings.decoder
    if decoder.name != "transformer" or decoder.positions != "learned":
        return
    sampled = settings.self_critical.max_length if settings.self_critical.epochs else 0
    needed = 1 + max(data.longest_caption(), settings.validation.search.max_length, sampled)
    if decoder.max_positions < needed:
        raise ValueError(
            f"decoder.max_positions={decoder.max_positions}: captions of {data.path} and those that the validation's "
            f"search and self-critical training make need {needed}; or use positions='sinusoidal'"
        )


def check_validation(settings: Settings, data: CaptionData) -> None:
    """What a validation needs must be there before an epoch is spent.

    Raises:
        ValueError: no images, or a search that the model cannot make.
    """
    data.indices(settings.validation.split)
    location = settings.validation.search.location
    if location != "argmax" and settings.decoder.attention != "hard":
        raise ValueError(f"validation.search.location={location!r} needs decoder.attention='hard'")


def fit_encoder(config: EncoderConfig, data: CaptionData) -> EncoderConfig:
    """The encoder's settings, completed by what the data file fixes.

    Raises:
        ValueError: they contradict what is in the file; names the field.
    """
    stored = data.encoder or dataclasses.replace(config, fit=data.settings.get("fit", config.fit))
    for name in ("fit", "resample"):
        wanted, there = getattr(config, name), getattr(stored, name)
        if wanted not in (there, getattr(EncoderConfig, name)):  # nobody asks for a default
            raise ValueError(f"encoder.{name}={wanted!r}, but {data.path} was made with {there!r}")
    if data.encoder is None:
        return stored
    for name in ("name", "layer", "grid", "image_size"):
        wanted, there = getattr(config, name), getattr(stored, name)
        if wanted is not None and wanted != there and not str(there).startswith(f"{wanted}."):
            raise ValueError(f"encoder.{name}={wanted!r}, but {data.path} stores annotation vectors of {there!r}")
    if config.train_from is not None:
        raise ValueError(
            f"encoder.train_from={config.train_from!r} needs pixels; {data.path} stores annotation vectors"
        )
    return stored


def training_set(run: Run) -> CaptionDataset:
    """The images and captions of a run, as its encoder sees them."""
    encoder = run.encoder
    return CaptionDataset(
        run.data, image_size=encoder.image_size, resample=encoder.resample, augment=run.settings.augment
    )


def machine(accelerator: Accelerator) -> dict[str, Any]:
    """What the last bits of a sum depend on, beside the settings."""
    threads = torch.get_num_threads()
    return {"threads": threads, "processes": accelerator.num_processes, "device": accelerator.device.type}


def say_if_elsewhere(run: Run, state: TrainingState) -> None:
    """A run may go on elsewhere; that it will not be to the same bits, it says."""
    now = machine(run.accelerator)
    before = state.progress.get("machine", now)
    if before != now:
        was, is_now = (", ".join(f"{name} {value}" for name, value in x.items()) for x in (before, now))
        say(run, f"resumed elsewhere ({was}; now {is_now}): it goes on, but not to the same bits")


def check_same_run(settings: Settings, state: TrainingState) -> None:
    """A resumed run may change where it reads and saves and how it validates, but not what the weights depend on."""
    free = {"resume", "output", "data", "workers", "save_every", "threads", "init_from", "validation"}
    stored = from_dict(Settings, state.progress["settings"], f"{settings.output}/last: its settings")
    before, now = to_dict(stored), to_dict(settings)  # what the run's version did not know yet, it had by default
    for name in now:
        if name not in free and before[name] != now[name]:
            raise ValueError(f"--resume: {name} was {before[name]!r} and is now {now[name]!r}")


def plan(settings: Settings, data: CaptionData, *, epoch: int) -> list[list[Sample]]:
    """The batches of an epoch, over all processes; fewer or none after `max_steps`."""
    batches = plan_epoch(
        data,
        "train",
        captions_per_image=settings.captions_per_image,
        batch_size=settings.batch_size,
        seed=settings.seed,
        epoch=epoch,
        every_caption=epoch < settings.likelihood_epochs,
    )
    return batches[: max(settings.max_steps - epoch * len(batches), 0)] if settings.max_steps else batches


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
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    encoder = dataclasses.replace(run.encoder, weights=run.encoder.weights and short_name(run.encoder.weights))
    search = run.settings.validation.search  # its beam may be small, to be quick; and nobody gets a draw unasked
    beam = max(search.beam_size, SearchConfig.beam_size)
    search = dataclasses.replace(search, beam_size=beam, num_captions=1, sample=False)
    decoder, regions = run.settings.decoder, run.settings.region_encoder
    return Checkpoint(model, encoder, decoder, run.data.vocabulary, regions, about, search)


def save_last(run: Run) -> None:
    """Save the model and all that a resumed run needs, in one step."""
    run.accelerator.wait_for_everyone()
    if not run.accelerator.is_main_process:
        return
    tensors = {f"optimizer/{name}": x for name, x in optimizer_tensors(run.optimizer).items()}
    if run.average is not None:
        averages = {name: x.detach().cpu().clone() for name, x in run.average.state_dict().items()}
        tensors |= {f"average/{name}": x for name, x in averages.items()}
    if run.baseline is not None:
        tensors |= {f"baseline/{name}": x.detach().cpu().clone() for name, x in run.baseline.state_dict().items()}
    progress, settings = dataclasses.asdict(run.progress), to_dict(run.settings)
    state = {"progress": progress, "settings": settings, "machine": machine(run.accelerator)}
    folder = Path(run.settings.output) / "last"
    save_checkpoint(folder, as_checkpoint(run, run.model), training=TrainingState(tensors, state))


def say(run: Run, text: str) -> None:
    """A line of the log, from the main process."""
    if run.accelerator.is_main_process:
        tqdm.write(text)
        sys.stdout.flush()


def curve(run: Run, name: str, value: float) -> None:
    """A point of a TensorBoard curve, from the main process."""
    if run.writer is not None:
        run.writer.add_scalar(name, value, run.progress.step)
