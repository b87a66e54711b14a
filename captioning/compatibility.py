"""Whether a checkpoint, a data file and a search fit together; what does not is said in one line."""

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from captioning.checkpoint import Checkpoint
from captioning.config import EncoderConfig, SearchConfig
from captioning.data import ANNOTATIONS, CaptionData
from captioning.models.encoder import Encoder
from captioning.voices import check_scales

_CUT = ("layer", "image_size", "resample")
"""What annotation vectors depend on beside the encoder's weights and the fit."""


def check_views(data: CaptionData, config: SearchConfig, encoders: Sequence[Encoder | EncoderConfig]) -> None:
    """What a search looks at must be in the file.

    Args:
        data: pixels, of which every view can be made, or annotation vectors.
        config: the search.
        encoders: which look.

    Raises:
        ValueError: it looks at mirrored images or further scales, and the file has annotation vectors, but none of
            those; or it looks at further scales, and no encoder has any.
    """
    check_scales(encoders, config)
    if config.mirror and data.kind == ANNOTATIONS and not data.mirrored:
        raise ValueError(
            f"{data.path}: holds no annotation vectors of mirrored images; make it with preprocess --mirror, or do "
            "not look at them (--no-mirror; in training --validation.search.mirror false)"
        )
    stored = None if data.encoder is None else data.encoder.sides
    wanted = {encoder.sides for encoder in encoders if len(encoder.sides) > 1}
    if config.multi_scale and stored is not None and wanted != {stored}:
        raise ValueError(
            f"{data.path}: holds annotation vectors of pictures of {stored} pixels, and the model learned from "
            f"{', '.join(map(str, wanted))}; make it with preprocess --scales, or take --no-multi-scale"
        )


def check_fits(checkpoint: Checkpoint, data: CaptionData) -> None:
    """Pixels must have been made square as the checkpoint's were; annotation vectors must come from its own encoder.

    Raises:
        ValueError: they do not; says what to do.
    """
    fit, wanted = data.settings.get("fit", checkpoint.encoder.fit), checkpoint.encoder.fit
    if fit != wanted and data.source.get("name") != "shapes":  # which are square
        raise ValueError(
            f"{data.path} was made with --fit {fit}, and the checkpoint learned from pictures made with "
            f"--fit {wanted}; preprocess the photos so"
        )
    if data.encoder is None:
        return
    own = checkpoint.model.encoder.network.state_dict()
    stored: Mapping[str, Tensor] = data.encoder_state()
    same = own.keys() == stored.keys() and all(  # a checkpoint may be stored in float16
        own[name].shape == x.shape and torch.allclose(own[name].cpu().float(), x.float(), 1e-2, 1e-3)
        for name, x in stored.items()
    )
    if not same or any(getattr(checkpoint.encoder, name) != getattr(data.encoder, name) for name in _CUT):
        raise ValueError(
            f"{data.path} stores annotation vectors of another encoder than the checkpoint's "
            f"({data.encoder.name}); preprocess the photos with --fit {wanted} and without --encoder, and evaluate on "
            "those pixels"
        )
    data.check_vectors(checkpoint.model.encoder.grid_of, checkpoint.model.encoder.dim)


def check_same_task(checkpoint: Checkpoint, data: CaptionData, who: str, *, images: bool = True) -> None:
    """A checkpoint that has a part in training on this data must have its words, and its images.

    Args:
        checkpoint: whose.
        data: what is learned from.
        who: the setting that brought the checkpoint.
        images: whether it must have been made for images like the data's; an encoder that learns gets used to others.

    Raises:
        ValueError: it does not; says who, and why.
    """
    if checkpoint.vocabulary != data.vocabulary:
        words = "`python -m preprocess --vocabulary CHECKPOINT` makes data with its words"
        raise ValueError(f"{who}: its vocabulary is not that of {data.path}; {words}")
    try:
        if images:
            check_fits(checkpoint, data)
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from error


def fingerprint(data: CaptionData) -> str:
    """SHA-256 of the images' names, splits and captions, and of how both were read: what training depends on."""
    read = {name: data.settings.get(name) for name in ("image_size", "fit", "max_length")}
    digest = hashlib.sha256(json.dumps(read).encode())
    for i, (name, split) in enumerate(zip(data.names, data.split_of.tolist(), strict=True)):
        digest.update(json.dumps([name, split, data.references(i)]).encode())
    return digest.hexdigest()
