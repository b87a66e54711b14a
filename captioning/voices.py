"""Several checkpoints that caption with one voice: what an ensemble is, its folder, and how it looks at images."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from captioning.checkpoint import (
    FORMAT,
    Checkpoint,
    ensemble_members,
    load_checkpoint,
    save_checkpoint,
)
from captioning.config import EncoderConfig, SearchConfig, from_dict, to_dict
from captioning.decoding import Hypothesis, search
from captioning.files import fresh_folder, read_json, write_json
from captioning.model_config import View, all_views
from captioning.models.captioner import CaptioningModel
from captioning.models.encoder import Encoder
from captioning.vocabulary import Vocabulary


@dataclass(frozen=True)
class Ensemble:
    """Checkpoints that caption with one voice, the mean of their views' probabilities at every word; or one alone.

    On the disk it is a folder with one checkpoint folder per member and a config.json that names them.

    Args:
        members: at least one, all with the words and the fit of the first.
        search: how they caption unless told otherwise.
        names: one for each of several members, none for one alone.

    Raises:
        ValueError: members that cannot speak with one voice.
    """

    members: tuple[Checkpoint, ...]
    search: SearchConfig
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.members)
        if not count or (len(self.names) != count and (self.names or count > 1)):
            raise ValueError(f"several members need as many names, one alone none (got {count} and {len(self.names)})")
        first, *others = self.members
        for name, other in zip(self.names[1:], others, strict=True):
            if other.vocabulary != first.vocabulary:
                raise ValueError(f"{name}: its vocabulary is not that of {self.names[0]}")
            if other.encoder.fit != first.encoder.fit:
                raise ValueError(
                    f"{name}: made photos square with fit {other.encoder.fit}, {self.names[0]} with {first.encoder.fit}"
                )

    @classmethod
    def of(cls, found: "Checkpoint | Ensemble") -> "Ensemble":
        """The same, a checkpoint as an ensemble of one."""
        return cls((found,), found.search) if isinstance(found, Checkpoint) else found

    @property
    def vocabulary(self) -> Vocabulary:
        """Of all members."""
        return self.members[0].vocabulary

    @property
    def models(self) -> list[CaptioningModel]:
        """The networks."""
        return [member.model for member in self.members]


def save_ensemble(folder: Path, ensemble: Ensemble, *, half: bool = False) -> None:
    """Write an ensemble's folder, or replace an older one in one step; `half` as for `save_checkpoint`."""
    with fresh_folder(folder) as new:
        for name, member in zip(ensemble.names, ensemble.members, strict=True):
            save_checkpoint(new / name, member, half=half)
        config = {"format": FORMAT, "members": list(ensemble.names), "search": to_dict(ensemble.search)}
        write_json(new / "config.json", config)


def load_ensemble(folder: str | Path) -> Ensemble:
    """Read the folder of an ensemble, or of one checkpoint as an ensemble of one.

    Raises:
        FileNotFoundError, ValueError: as `load_checkpoint`; members that cannot speak with one voice.
    """
    folder = Path(folder)
    path, names = folder / "config.json", ensemble_members(folder)
    members = tuple(load_checkpoint(each) for each in [folder / name for name in names] or [folder])
    own = from_dict(SearchConfig, read_json(path).get("search", {}), f"{path}: search")
    try:
        check_scales([member.encoder for member in members], own)
        return Ensemble(members, own, names)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_scales(encoders: Sequence[Encoder | EncoderConfig], config: SearchConfig) -> None:
    """A search with `multi_scale` needs an encoder that learned from pictures of several sizes.

    Raises:
        ValueError: there is none.
    """
    if config.multi_scale and all(len(encoder.sides) == 1 for encoder in encoders):
        raise ValueError("multi_scale: no model learned from pictures of several sizes (it would have encoder.scales)")


def views(model: CaptioningModel, config: SearchConfig) -> list[View]:
    """How a model looks at an image in this search."""
    return all_views(len(model.encoder.sides) if config.multi_scale else 1, mirrored=config.mirror)


def caption_images(
    models: Sequence[CaptioningModel],
    load: Callable[[CaptioningModel, View], Tensor],
    config: SearchConfig,
    *,
    generator: torch.Generator | None = None,
) -> list[list[Hypothesis]]:
    """Caption N images with one model, or with several that speak with one voice.

    Args:
        models: in evaluation mode, with one vocabulary.
        load: the images as a model wants them (`CaptioningModel.annotate`), in one of its views.
        config: how; with `mirror` and `multi_scale`, each model has several views.
        generator: as for `search`.

    Returns:
        As `search`; where a mirrored image was looked at is told in places of the image itself.

    Raises:
        ValueError: `multi_scale`, and no model has a further scale.
    """
    check_scales([model.encoder for model in models], config)
    decoders, annotations = [], []
    with torch.no_grad():
        for model in models:
            for view in views(model, config):
                a = model.annotate(load(model, view))
                decoder = model.decoder_of(a)
                if view.mirrored and decoder.attends:  # whose alphas these will be
                    a = a.unflatten(1, (math.isqrt(a.shape[1]), -1)).flip(2).flatten(1, 2)
                decoders.append(decoder)
                annotations.append(a)
    return search(decoders, annotations, config, generator=generator)
