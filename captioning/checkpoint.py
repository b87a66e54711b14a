"""A checkpoint is a folder: model.safetensors, config.json, vocabulary.json. Nothing in it is ever unpickled.

While a run goes on, its training state lies beside them (training.safetensors, training.json) under the same rules.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from captioning.config import (
    DecoderConfig,
    EncoderConfig,
    RegionEncoderConfig,
    SearchConfig,
    from_dict,
    to_dict,
)
from captioning.console import one_line
from captioning.files import fresh_folder, read_json, write_json
from captioning.models.captioner import CaptioningModel, build_model
from captioning.vocabulary import Vocabulary

FORMAT = 1

PRETRAINED = Path(__file__).parent / "pretrained"
"""Checkpoints that come with the package; `load_captioner` takes their names."""


@dataclass(frozen=True)
class Checkpoint:
    """A model with all it needs to caption.

    Args:
        model: the network.
        encoder: its encoder's config, with the layer filled in.
        decoder: its decoder's config.
        vocabulary: its words.
        region_encoder: its region encoder's config.
        about: provenance: settings, data, versions, epoch, scores. Free-form JSON, never needed to load.
        search: how it captions unless told otherwise.
    """

    model: CaptioningModel
    encoder: EncoderConfig
    decoder: DecoderConfig
    vocabulary: Vocabulary
    region_encoder: RegionEncoderConfig = field(default_factory=RegionEncoderConfig)
    about: Mapping[str, Any] = field(default_factory=dict)
    search: SearchConfig = field(default_factory=SearchConfig)


MAX_MEMBERS = 16
"""Largest ensemble."""


@dataclass(frozen=True)
class TrainingState:
    """What a resumed run needs beside the weights.

    Args:
        tensors: the optimiser's state (`optimizer/3/exp_avg`) and the averaged weights (`average/decoder.E.weight`).
        progress: where the run stands, as JSON values.
    """

    tensors: dict[str, Tensor]
    progress: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> "TrainingState":
        """Read it from a checkpoint folder.

        Raises:
            FileNotFoundError: the folder holds no training state.
            ValueError: a file is malformed; names it.
        """
        path = folder / "training.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; there is no run to resume")
        progress = read_json(path)
        for name in ("progress", "settings"):
            if name not in progress:
                raise ValueError(f"{path}: {name} is missing")
        tensors = read_tensors(folder / "training.safetensors")
        _check_finite(tensors, folder / "training.safetensors")
        # copies: the file will be replaced, and Windows replaces none that is mapped into memory
        return cls({name: x.clone() for name, x in tensors.items()}, progress)

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name begins with `prefix/`, without it."""
        return {name[len(prefix) + 1 :]: x for name, x in self.tensors.items() if name.startswith(f"{prefix}/")}


def save_checkpoint(
    folder: Path, checkpoint: Checkpoint, *, half: bool = False, training: "TrainingState | None" = None
) -> None:
    """Write a checkpoint folder; an older one of that name is replaced in one step.

    Args:
        folder: where to.
        checkpoint: what.
        half: store the weights as float16 (half the size; loading gives float32 again).
        training: what a resumed run needs beside the weights.
    """
    state = _shared_once(checkpoint.model.state_dict())
    if half:
        state = {name: x.half() if x.is_floating_point() else x for name, x in state.items()}
        _check_finite(state, "as float16")
    config = {
        "format": FORMAT,
        "encoder": to_dict(checkpoint.encoder),
        "region_encoder": to_dict(checkpoint.region_encoder),
        "decoder": to_dict(checkpoint.decoder),
        "search": to_dict(checkpoint.search),
        "about": dict(checkpoint.about),
    }
    with fresh_folder(folder) as new:
        write_tensors(new / "model.safetensors", state)
        write_json(new / "config.json", config)
        checkpoint.vocabulary.save(new / "vocabulary.json")
        if training is not None:
            write_tensors(new / "training.safetensors", training.tensors)
            write_json(new / "training.json", training.progress)


def checkpoint_folder(path: str | Path) -> Path:
    """The folder that `path` means, see `load_captioner`."""
    for folder in (Path(path), Path(path) / "best", PRETRAINED / str(path)):
        if (folder / "config.json").is_file():
            return folder
    names = ", ".join(sorted(folder.name for folder in PRETRAINED.glob("*") if folder.is_dir()))
    raise FileNotFoundError(f"{path}: no checkpoint folder, nor one of the pretrained: {names}")


def member_names(names: Sequence[object]) -> tuple[str, ...]:
    """The names of an ensemble's members, each fit for a folder and unlike the others.

    Raises:
        ValueError: they are not.
    """
    for name in names:
        if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name)):
            raise ValueError(f"a member's name has letters, digits, - and _, at most 64 (got {str(name)[:80]!r})")
    found = tuple(map(str, names))
    if len({name.casefold() for name in found}) < len(found):  # which some file systems do not tell apart
        raise ValueError(f"each member needs a name of its own, in whatever case (got {', '.join(found)})")
    return found


def ensemble_members(folder: Path) -> tuple[str, ...]:
    """The names of an ensemble's members; none if the folder is not one of an ensemble.

    Raises:
        ValueError: they are malformed.
    """
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    if "members" not in config:
        return ()
    _check_format(config, path)
    names = config["members"]
    if not (isinstance(names, list) and 1 <= len(names) <= MAX_MEMBERS):
        raise ValueError(f"{path}: members must be a list of 1 to {MAX_MEMBERS} names")
    try:
        return member_names(names)
    except ValueError as error:
        raise ValueError(f"{path}: members: {error}") from error


def _check_format(config: Mapping[str, Any], path: Path) -> None:
    if config.get("format") != FORMAT:
        raise ValueError(f"{path}: format is {config.get('format')!r}, this version reads {FORMAT}")


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Read a checkpoint folder; the model comes in float32, on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is malformed or does not fit the others; names it. The folder is one of an ensemble.
    """
    folder = Path(folder)
    members = ensemble_members(folder)
    if members:
        raise ValueError(
            f"{folder}: an ensemble; here one model is wanted: {' or '.join(str(folder / name) for name in members)}"
        )
    for name in ("config.json", "vocabulary.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: no such file; a checkpoint is a folder like runs/x/best")
    config = read_json(folder / "config.json")
    _check_format(config, folder / "config.json")
    encoder = from_dict(EncoderConfig, config.get("encoder"), f"{folder / 'config.json'}: encoder")
    regions = config.get("region_encoder", {})  # older checkpoints have none
    region_encoder = from_dict(RegionEncoderConfig, regions, f"{folder / 'config.json'}: region_encoder")
    decoder = from_dict(DecoderConfig, config.get("decoder"), f"{folder / 'config.json'}: decoder")
    search = from_dict(SearchConfig, config.get("search", {}), f"{folder / 'config.json'}: search")  # likewise
    vocabulary = Vocabulary.load(folder / "vocabulary.json")
    state = read_tensors(folder / "model.safetensors")
    _check_finite(state, folder / "model.safetensors")
    prefix = "encoder.network."
    cnn_state = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    try:
        model, encoder = build_model(
            encoder,
            decoder,
            len(vocabulary),
            region_encoder=region_encoder,
            encoder_state=cnn_state,
            max_parameters=sum(x.numel() for name, x in state.items() if not name.startswith(prefix)),
        )
        load_state(model, state)
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:  # the last two of huge numbers
        message = one_line(error)[:300]
        raise ValueError(
            f"{folder / 'model.safetensors'}: does not fit its config and vocabulary: {message}"
        ) from error
    about = config.get("about", {})
    about = about if isinstance(about, dict) else {}
    return Checkpoint(model.eval(), encoder, decoder, vocabulary, region_encoder, about, search)


def _check_finite(tensors: Mapping[str, Tensor], where: object) -> None:
    """Refuse numbers that are not finite once they are float32."""
    broken = next(
        (name for name, x in tensors.items() if x.is_floating_point() and not x.float().isfinite().all()), None
    )
    if broken is not None:
        raise ValueError(f"{where}: {broken} holds values that are not finite")


def load_state(model: CaptioningModel, state: dict[str, Tensor]) -> None:
    """Copy saved weights into a model, whatever type they were stored in; tied ones were stored once.

    Raises:
        ValueError: they are not this model's.
    """
    full = model.state_dict()
    shared = {name: first for name, first in _aliases(full).items() if name not in state}
    try:
        model.load_state_dict({**state, **{name: state[first] for name, first in shared.items() if first in state}})
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit the model: {one_line(error)[:300]}") from error


def _aliases(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tied tensors -> the first name of the same memory."""
    first: dict[int, str] = {}
    return {name: first.setdefault(x.data_ptr(), name) for name, x in state.items() if x.numel()}


def _shared_once(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    aliases = _aliases(state)
    return {name: x.detach().cpu().contiguous() for name, x in state.items() if aliases.get(name, name) == name}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Named tensors of a safetensors file.

    Raises:
        ValueError: naming the file.
    """
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a safetensors file: {one_line(error)}") from error


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written, for instance to a full disk; names the file.
    """
    path.touch()
    mode = path.stat().st_mode  # safetensors lets nobody but the owner read what it writes
    try:
        safetensors.torch.save_file(tensors, path)
        path.chmod(mode)
    except SafetensorError as error:
        raise OSError(f"{path}: {one_line(error)}") from error
