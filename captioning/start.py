"""What a run starts from: settings, data and checkpoints that fit together, which is known before a step is made."""

import dataclasses
from pathlib import Path, PurePath

from captioning.checkpoint import Checkpoint, TrainingState, checkpoint_folder, load_checkpoint, load_state
from captioning.checks import refuse_unread
from captioning.compatibility import check_same_task, check_views, fingerprint
from captioning.config import EncoderConfig, Settings, from_dict, to_dict
from captioning.data import ANNOTATIONS, CaptionData, check_augment
from captioning.model_config import HARD_ONLY
from captioning.models.captioner import CaptioningModel, build_model
from captioning.reward_baselines import Baseline, build_baseline


def start_model(
    settings: Settings, data: CaptionData, last: Checkpoint | None = None
) -> tuple[CaptioningModel, EncoderConfig]:
    """The model of the settings, with the encoder that the data demands: new, from `init_from`, or as it was left last.

    A run that goes on needs nothing of what it started from.
    """
    check_positions(settings, data)
    check_augment(data, settings.augment)
    encoder, encoder_state = fit_encoder(settings.encoder, data), None
    check_validation(settings, data, encoder)
    first = last
    if first is None and settings.init_from is not None:
        first = load_checkpoint(checkpoint_folder(settings.init_from))
        check_start(settings, data, first, encoder)
    if data.kind == ANNOTATIONS:
        encoder_state = data.encoder_state()
    elif first is not None:
        encoder_state = first.model.encoder.network.state_dict()
    model, encoder = build_model(
        encoder,
        settings.decoder,
        len(data.vocabulary),
        region_encoder=settings.region_encoder,
        encoder_state=encoder_state,
    )
    data.check_vectors(model.encoder.grid_of, model.encoder.dim)
    if first is not None:
        load_state(model, {**first.model.state_dict(), **model.encoder.state_dict(prefix="encoder.")})
    return model, encoder


def load_last(settings: Settings, state: TrainingState | None, data: CaptionData) -> Checkpoint | None:
    """The model of a run that goes on, which may neither have other settings now nor read other words and images.

    Raises:
        ValueError: it does; names what.
    """
    if state is None:
        return None
    check_same_run(settings, state)
    last = load_checkpoint(Path(settings.output) / "last")
    check_same_task(last, data, "--resume")
    if "data" in state.progress and state.progress["data"] != fingerprint(data):  # older states do not say
        raise ValueError(f"--resume: {data.path} holds other images, splits or captions than the run began with")
    return last


def check_same_run(settings: Settings, state: TrainingState) -> None:
    """A resumed run may change where it reads and saves and how it validates, but not what the weights depend on."""
    free = {"resume", "output", "data", "workers", "save_every", "threads", "init_from", "validation"}
    stored = from_dict(Settings, state.progress["settings"], f"{settings.output}/last: its settings")
    before, now = to_dict(stored), to_dict(settings)  # what the run's version did not know yet, it had by default
    for name in now:
        if name not in free and before[name] != now[name]:
            raise ValueError(f"--resume: {name} was {before[name]!r} and is now {now[name]!r}")


def check_start(settings: Settings, data: CaptionData, first: Checkpoint, encoder: EncoderConfig) -> None:
    """What `init_from` has learned must be of use here.

    Raises:
        ValueError: other words, another decoder, vectors of another encoder.
    """
    check_same_task(first, data, f"init_from={settings.init_from}", images=data.kind == ANNOTATIONS)
    theirs, ours = first.encoder.sides, encoder.sides
    if len(theirs) != len(ours) or (theirs != ours and set(theirs) == set(ours)):
        raise ValueError(
            f"init_from={settings.init_from}: it has decoders for pictures of {theirs} pixels, and encoder.image_size "
            f"with encoder.scales asks for {ours}"
        )
    free = [name for name in vars(first.decoder) if "dropout" in name]
    if {first.decoder.attention, settings.decoder.attention} <= {"soft", "hard"}:  # they have the same parameters
        free += ["attention", *HARD_ONLY]
    if first.decoder != dataclasses.replace(settings.decoder, **{name: getattr(first.decoder, name) for name in free}):
        raise ValueError(
            f"init_from={settings.init_from}: its decoder is {first.decoder}; set its fields alike (--decoder.NAME)"
        )
    if first.region_encoder != settings.region_encoder:
        raise ValueError(
            f"init_from={settings.init_from}: its region encoder is {first.region_encoder}; set its fields alike "
            "(--region_encoder.NAME)"
        )


def start_baseline(settings: Settings) -> Baseline | None:
    """The baseline of eq. 12, if attention is hard."""
    if settings.decoder.attention != "hard":
        return None
    return build_baseline(settings.hard, hidden_dim=settings.decoder.hidden_dim)


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


def check_validation(settings: Settings, data: CaptionData, encoder: EncoderConfig) -> None:
    """What a validation needs must be there before an epoch is spent.

    Raises:
        ValueError: fewer than two images, or a search that the model cannot make.
    """
    split, images = settings.validation.split, len(data.indices(settings.validation.split))
    if min(images, settings.validation.images or images) < 2:
        raise ValueError(
            f"validation: CIDEr, which chooses the best epoch, takes two images at least ({images} in split {split!r} "
            f"of {data.path}, validation.images={settings.validation.images})"
        )
    check_views(data, settings.validation.search, [encoder])
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
    if config.scales not in ((), stored.scales):
        raise ValueError(
            f"encoder.scales={list(config.scales)}, but {data.path} stores annotation vectors of {list(stored.sides)} "
            "pixels; make it with preprocess --scales, or leave the first size alone: --encoder.scales [], and of the "
            "validation's search multi_scale false"
        )
    for name in ("name", "layer", "grid", "image_size"):
        wanted, there = getattr(config, name), getattr(stored, name)
        if wanted is not None and wanted != there and not str(there).startswith(f"{wanted}."):
            raise ValueError(f"encoder.{name}={wanted!r}, but {data.path} stores annotation vectors of {there!r}")
    refuse_unread(config, f"needs pixels; {data.path} stores annotation vectors", ["batch_norm"], prefix="encoder.")
    weights = PurePath(config.weights or "")
    if weights.suffix in (".pth", ".pt", ".safetensors") and weights.name != PurePath(stored.weights or "").name:
        raise ValueError(f"encoder.weights={config.weights!r}, but {data.path} was made with {stored.weights!r}")
    if config.train_from is not None:
        raise ValueError(
            f"encoder.train_from={config.train_from!r} needs pixels; {data.path} stores annotation vectors"
        )
    return dataclasses.replace(stored, scales=config.scales)
