"""Every setting once: frozen dataclasses that the command lines, the YAML recipes and the checkpoints all read.

A value is checked where it is read (`Settings.__post_init__` and friends), so that a wrong recipe fails in the first
second with the name of the field, and not after an epoch.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast, get_args, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from captioning.checks import at_most, finite, fraction, not_negative, positive, refuse_unread
from captioning.console import one_line
from captioning.model_config import DecoderConfig, EncoderConfig, RegionEncoderConfig

Location = Literal["argmax", "sample", "expected"]
LOCATIONS: tuple[Location, ...] = get_args(Location)
NumberFormat = Literal["fp32", "bf16"]
Precision = Literal["auto", NumberFormat]


@dataclass(frozen=True)
class LossConfig:
    """What is minimised, eq. 14. All terms are means: no weight changes its meaning with batch or caption size.

    Args:
        lambda_ds: weight of the doubly stochastic penalty.
        label_smoothing: share of the target's probability that is spread over the vocabulary.
    """

    lambda_ds: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        not_negative(self, "lambda_ds")
        fraction(self, "label_smoothing")


@dataclass(frozen=True)
class DistillationConfig:
    """Trained models that teach this one which words to expect, Hinton et al. (2015), in the likelihood epochs.

    Args:
        teachers: checkpoint folders or run folders; the mean of the probabilities of all their views is learned (of one
            that looks at two sizes there are two views). None: no distillation.
            Each looks at every whole photo once; what their encoders made of it is kept in memory, up to 4 GiB.
        weight: of their words in the loss; the rest, 1 - weight, is for those of the captions.
    """

    teachers: tuple[str, ...] = ()
    weight: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ValueError(f"weight must lie in (0, 1] (got {self.weight})")
        if not self.teachers:
            refuse_unread(self, "needs distillation.teachers", ["weight"], prefix="distillation.")


@dataclass(frozen=True)
class HardConfig:
    """How hard attention is trained: eq. 12 (the gradient of the hard objective), docs/hard_attention.md.

    Args:
        reward: what the location of a word is credited with: sentence (the paper: log p of the whole caption) or to_go
            (log p of this word and those after it; Sutton et al., 2000).
        baseline: b of eq. 12: none (eq. 11), moving_average (the paper: 0.9 b + 0.1 log p), leave_one_out (the mean of
            the caption's other samples; Kool et al., 2019) or learned (a small net of h_{t-1} with a squared loss of
            its own; Mnih and Gregor, 2014).
        lambda_r: weight of the reward's term in eq. 12; 1 is the gradient of the bound, eq. 10.
        lambda_e: weight of the entropy's term in eq. 12, which keeps the samples apart; below 0 it makes alpha sharper.
        samples: K, paths of locations per caption; they share the encoder's work and its keys.
        expectation_probability: that an image takes the mean context instead of samples, section 4.1; the paper: 0.5.
        relaxation: none, or gumbel_straight_through (Jang et al., 2017): no reward, a biased gradient through alpha.
    """

    reward: Literal["to_go", "sentence"] = "to_go"
    baseline: Literal["none", "moving_average", "leave_one_out", "learned"] = "moving_average"
    lambda_r: float = 1.0
    lambda_e: float = 0.01
    samples: int = 1
    expectation_probability: float = 0.5
    relaxation: Literal["none", "gumbel_straight_through"] = "none"

    def __post_init__(self) -> None:
        positive(self, "samples")
        not_negative(self, "lambda_r")
        finite(self, "lambda_e")
        fraction(self, "expectation_probability")
        if self.baseline == "leave_one_out" and self.samples < 2:
            raise ValueError(f"baseline='leave_one_out' needs samples of at least 2 (got {self.samples})")
        if self.relaxation != "none":
            why = f"relaxation={self.relaxation!r} uses no reward"
            if self.baseline != "none":
                raise ValueError(f"{why}: it needs baseline='none' (got {self.baseline!r})")
            refuse_unread(self, f"must be left out: {why}", ["reward", "lambda_r"])


@dataclass(frozen=True)
class OptimizerConfig:
    """How it is minimised.

    Args:
        name: adam, adamw or rmsprop (the paper: rmsprop for Flickr8k, adam for the others).
        learning_rate: of the decoder, at its highest.
        encoder_learning_rate: of the encoder's trained stages, at its highest.
        weight_decay: decoupled for adamw, L2 for the others.
        warmup_steps: steps of linear growth from zero.
        schedule: constant, or cosine or linear decay to zero over all epochs, after the warm-up.
        clip_norm: largest norm of the gradient of all the model; 0 clips nothing.
        average_decay: decay of an exponential moving average of the weights that is validated and saved; 0 keeps none.
    """

    name: Literal["adam", "adamw", "rmsprop"] = "adamw"
    learning_rate: float = 1e-3
    encoder_learning_rate: float = 1e-4
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    clip_norm: float = 5.0
    average_decay: float = 0.0

    def __post_init__(self) -> None:
        positive(self, "learning_rate", "encoder_learning_rate")
        not_negative(self, "weight_decay", "warmup_steps", "clip_norm")
        fraction(self, "average_decay")


@dataclass(frozen=True)
class SelfCriticalConfig:
    """A last phase of training that maximises the expected CIDEr-D of sampled captions, Rennie et al. (2017).

    An epoch of it is every train image once. The other settings go on to hold, but for the loss of the words.

    Args:
        epochs: how many of the run's last epochs; 0: none.
        samples: captions drawn per image; each is compared with the mean of the others (Luo, 2020).
        max_length: longest sampled caption in words, the end word not counted.
        learning_rate: of the decoder, at its highest; the encoder's keeps its proportion to it.
        schedule: constant, or cosine or linear decay to zero over the phase.
        nll_weight: weight of the NLL of the image's own captions beside it.
        dropout: in the forward pass whose gradient is taken; the decoder draws captions without it.
    """

    epochs: int = 0
    samples: int = 5
    max_length: int = 20
    learning_rate: float = 1e-4
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    nll_weight: float = 0.0
    dropout: bool = False

    def __post_init__(self) -> None:
        not_negative(self, "epochs", "nll_weight")
        positive(self, "max_length", "learning_rate")
        if self.samples < 2:
            raise ValueError(f"samples must be at least 2, to be compared with each other (got {self.samples})")


MAX_BEAM = 10_000
"""Most hypotheses, captions and paths of an image."""
MAX_WORDS = 1_000
"""Longest caption that is searched."""
MAX_LENGTH_PENALTY = 100


@dataclass(frozen=True)
class SearchConfig:
    """How a caption is searched.

    Args:
        beam_size: hypotheses per image; 1 is greedy where length_penalty is 0.
        max_length: longest caption in words, the end word not counted.
        length_penalty: hypotheses are ranked by log p / length ** length_penalty; 0 ranks by log p, 1 by its mean.
        no_repeat_ngram: no n-gram of this size comes twice in a caption; 0 blocks nothing.
        num_captions: how many captions per image, best first; at most beam_size, unless sampling.
        sample: draw words at random instead of searching.
        temperature: of the sampling; towards 0 it becomes greedy.
        top_k: sample from the k likeliest words only; 0 means all.
        top_p: sample from the smallest set of words with this probability; 1 means all.
        location: where hard attention looks: argmax (the likeliest location), sample (eq. 8), or expected (the mean
            context of soft attention, with which the original code decodes its hard models).
        paths: with location sample, how many paths of locations speak at once: the mean of their probabilities.
        mirror: look at the mirrored picture, too; again the mean of the probabilities.
        multi_scale: let the decoders of all of the encoder's scales look and speak (`EncoderConfig.scales`), not only
            the first; again the mean.
    """

    beam_size: int = 5
    max_length: int = 30
    length_penalty: float = 0.0
    no_repeat_ngram: int = 0
    num_captions: int = 1
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    location: Location = "argmax"
    paths: int = 1
    mirror: bool = False
    multi_scale: bool = False

    def __post_init__(self) -> None:
        positive(self, "beam_size", "max_length", "num_captions", "temperature", "paths")
        at_most(self, MAX_BEAM, "beam_size", "num_captions", "paths")
        at_most(self, MAX_WORDS, "max_length")
        at_most(self, MAX_LENGTH_PENALTY, "length_penalty")
        not_negative(self, "length_penalty", "no_repeat_ngram", "top_k")
        finite(self, "temperature")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1] (got {self.top_p})")
        if not self.sample and self.num_captions > self.beam_size:
            raise ValueError(f"num_captions={self.num_captions} needs beam_size of at least as many ({self.beam_size})")
        if self.paths > 1 and self.location != "sample":
            raise ValueError(f"paths={self.paths} needs location='sample': all others take the same path each time")


@dataclass(frozen=True)
class ValidationConfig:
    """When and on what the model is selected.

    Args:
        split: whose captions are compared.
        every: epochs between validations.
        images: how many images of the split, from its start; 0 means all.
        batch_size: images per search.
        patience: validations without a better CIDEr before training stops; 0 never stops early.
        diagnose_images: images of the split, from its start, on which attention is diagnosed (entropy, listening
            test and more, see docs/diagnostics.md); 0 diagnoses nothing.
        search: the search that is validated.
    """

    split: Literal["val", "test", "train"] = "val"
    every: int = 1
    images: int = 0
    batch_size: int = 32
    patience: int = 0
    diagnose_images: int = 64
    search: SearchConfig = field(default_factory=lambda: SearchConfig(beam_size=3))

    def __post_init__(self) -> None:
        positive(self, "every", "batch_size")
        not_negative(self, "images", "patience", "diagnose_images")
        if self.diagnose_images == 1:
            raise ValueError("diagnose_images must be 0, or at least 2 to exchange attention between images (got 1)")


@dataclass(frozen=True)
class Settings:
    """One training run.

    Args:
        data: HDF5 file made by `python -m preprocess`.
        output: folder of the run: best/ and last/ checkpoints, TensorBoard curves, settings.
        resume: go on where the run in `output` stopped, on a CPU bit for bit.
        init_from: checkpoint folder to start from, with the same words, as many scales, the same decoder and region
            encoder (dropout, soft against hard attention, its glimpses and window may differ); its encoder, too, unless
            the data file stores annotation vectors.
        encoder: the CNN; must agree with the data file when that stores annotation vectors.
        region_encoder: what lies between the two.
        decoder: the language model.
        loss: the objective.
        distillation: trained models that help to teach.
        hard: what more of it hard attention needs.
        optimizer: the optimiser and its schedule.
        self_critical: the last epochs, if they maximise CIDEr-D.
        validation: how the best checkpoint is chosen.
        epochs: passes over all captions of the train split.
        max_steps: the run ends after so many steps, if its epochs have more, and its schedule with it; 0 sets no limit.
        batch_size: images per step, over all processes.
        captions_per_image: captions of one image in one step; they share its encoder work and its keys.
        augment: none, flip, crop or crop_flip; needs pixels, or flip annotation vectors of `preprocess --mirror`.
        precision: of matrix products: fp32, bf16, or auto: bf16 on CPUs and CUDA devices made for it, else fp32.
        seed: of initial weights, order, dropout and augmentation.
        workers: processes that read data; 0 reads in the main one.
        save_every: steps between saved training states inside an epoch; 0 saves at the end of each epoch only.
        threads: CPU threads of torch; 0 leaves its default.
    """

    data: str
    output: str
    resume: bool = False
    init_from: str | None = None
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    region_encoder: RegionEncoderConfig = field(default_factory=RegionEncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    hard: HardConfig = field(default_factory=HardConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    self_critical: SelfCriticalConfig = field(default_factory=SelfCriticalConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    epochs: int = 10
    max_steps: int = 0
    batch_size: int = 32
    captions_per_image: int = 5
    augment: Literal["none", "flip", "crop", "crop_flip"] = "none"
    precision: Precision = "fp32"
    seed: int = 0
    workers: int = 1
    save_every: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        positive(self, "epochs", "batch_size", "captions_per_image")
        not_negative(self, "max_steps", "workers", "save_every", "threads", "seed")
        at_most(self, 2**63 - 1, "seed")
        if self.decoder.attention != "hard":
            refuse_unread(self.hard, f"needs decoder.attention='hard' (got {self.decoder.attention!r})", prefix="hard.")
        if self.decoder.glimpses > 1 and self.hard.relaxation != "none":
            raise ValueError(f"hard.relaxation={self.hard.relaxation!r} needs decoder.glimpses=1")
        if self.decoder.name == "lstm":
            self._check_lstm()
        self._check_phases()

    @property
    def likelihood_epochs(self) -> int:
        """How many epochs come before the self-critical ones."""
        return self.epochs - self.self_critical.epochs

    def _check_phases(self) -> None:
        asked = f"self_critical.epochs={self.self_critical.epochs}"
        if self.likelihood_epochs < 0:
            raise ValueError(f"{asked} must not exceed epochs (got {self.epochs})")
        if self.likelihood_epochs == 0 and self.init_from is None:
            raise ValueError(f"{asked} leaves no epoch to learn words in: ask for more epochs, or give init_from")
        if self.likelihood_epochs == 0 and self.distillation.teachers:
            raise ValueError(f"{asked} leaves no epoch for distillation.teachers to teach in: ask for more epochs")
        if self.self_critical.epochs and self.validation.patience:
            raise ValueError(f"{asked} might never come: set validation.patience to 0 (got {self.validation.patience})")
        if self.self_critical.epochs and self.likelihood_epochs and self.max_steps:
            raise ValueError(f"{asked} might never come: set max_steps to 0 (got {self.max_steps})")
        if self.self_critical.epochs and self.decoder.attention == "hard":
            raise ValueError(f"{asked} needs decoder.attention='soft': the reward does not teach locations yet")

    def _check_lstm(self) -> None:
        regions, context = self.region_encoder.name, self.decoder.context
        if context == "last" and regions != "lstm":
            raise ValueError(
                f"decoder.context='last' needs region_encoder.name='lstm', whose last state has read all regions "
                f"(got {regions!r}); use 'mean'"
            )
        if self.loss.lambda_ds:
            raise ValueError(
                f"loss.lambda_ds={self.loss.lambda_ds} needs attention, and decoder.name='lstm' has none; set it to 0"
            )
        chosen = dataclasses.replace(self.decoder, context=context or ("last" if regions == "lstm" else "mean"))
        object.__setattr__(self, "decoder", chosen)  # resolved here, so that a checkpoint holds it


T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return dataclasses.asdict(config)


def from_dict(kind: type[T], values: Any, where: str) -> T:
    """Read a config back, strictly: unknown fields and wrong types are refused.

    Args:
        kind: a dataclass of settings.
        values: what JSON gave.
        where: file and field, for the error.

    Raises:
        ValueError: in one line, naming `where` and the field.
    """
    check_fields(kind, values, where)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", type=kind)
    try:
        return parser.instantiate(parser.parse_object({"config": values})).config
    except (ArgumentError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{where}: {one_line(error)}") from error


def check_fields(kind: type, values: Any, where: str) -> None:
    """Refuse what is no field of a config, at any depth, before its parser sees it.

    jsonargparse takes `class_path` for a module to import, and text in the place of a mapping for a file to open,
    before it refuses either; a file that somebody sent must do neither.

    Raises:
        ValueError: naming `where` and the field.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a mapping of settings, got {type(values).__name__}")
    types = get_type_hints(kind)
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"{where}: no setting is called {name!r}; there are {', '.join(types)}")
        if value is None and type(None) not in get_args(types[name]):
            raise ValueError(f"{where}: {name} must not be null")
        if dataclasses.is_dataclass(types[name]):
            check_fields(cast(type, types[name]), value, f"{where}.{name}")
