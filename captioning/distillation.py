"""Knowledge distillation: beside the words of the captions, a model learns which words trained models expect there.

Hinton et al. (2015), section 2, at temperature 1. Several teachers speak with one voice: the mean of their
probabilities, which is better than each of theirs (an ensemble), and here costs nothing when captions are made.
"""

import copy
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Integer, Shaped, UInt8
from torch import Tensor

from captioning.checkpoint import checkpoint_folder, load_checkpoint
from captioning.compatibility import check_same_task
from captioning.config import EncoderConfig
from captioning.data import PIXELS, CaptionData, resizing
from captioning.losses import by_word
from captioning.model_config import View
from captioning.models.captioner import CaptioningModel
from captioning.models.decoder import Output
from captioning.models.encoder import Encoder

ROOM = 4 << 30
"""Bytes that the teachers' encoders may keep of what they saw; 45,000 photos at 10x10x320 and 7x7x320 in bf16."""

Photos = tuple[Integer[Tensor, " N"], Bool[Tensor, " N"]]
"""Numbers of whole photos in a data file, and whether each is seen in a mirror."""


class AnnotationCache:
    """A frozen encoder and the photos of a data file: it looks at each once, for it will never see another thing in it.

    It looks at one photo at a time, so what it sees depends on nothing else, and a resumed run sees it too.

    Args:
        encoder: a teacher's.
        data: pixels.
        room: bytes of annotation vectors that are kept; of further photos they are made again each time.
    """

    def __init__(self, encoder: Encoder, data: CaptionData, room: int = ROOM):
        self.encoder, self.data, self.room = encoder, copy.copy(data), room  # a copy opens the file for itself
        self._kept: dict[tuple[int, bool], list[Tensor]] = {}

    def __call__(self, photos: Photos) -> list[Float[Tensor, "N _ D"]]:
        """The annotation vectors of photos, at each of the encoder's scales."""
        numbers, mirrored = (x.tolist() for x in photos)
        seen = [self._vectors(number, mirror) for number, mirror in zip(numbers, mirrored, strict=True)]
        return [torch.cat(scale).to(self.encoder.mean.device) for scale in zip(*seen, strict=True)]

    def _vectors(self, number: int, mirror: bool) -> list[Float[Tensor, "1 _ D"]]:
        if (number, mirror) not in self._kept:
            picture = self.data.image(number, View(0, mirrored=mirror)).to(self.encoder.mean.device)
            vectors = [a.cpu() for a in _views(picture.unsqueeze(0), self.encoder)]
            size = sum(a.nbytes for a in vectors)
            if size > self.room:
                return vectors
            self.room -= size
            self._kept[number, mirror] = vectors
        return self._kept[number, mirror]


class Teachers:
    """Trained models that say what they expect; nothing of them is trained. Those with equal encoders share one.

    Args:
        models: at least one, all with the student's vocabulary; hard attention looks at its argmax.
        data: if given, pixels whose whole photos they look at, whatever size the student sees them in.
    """

    def __init__(self, models: Sequence[CaptioningModel], data: CaptionData | None = None):
        self.models = [model.eval().requires_grad_(False) for model in models]
        for i, model in enumerate(self.models):
            encoders = (other.encoder for other in self.models[: i + 1])
            model.encoder = next(encoder for encoder in encoders if _alike(encoder, model.encoder))
        own = dict.fromkeys(model.encoder for model in self.models)
        self.looks = {}
        if data is not None:
            self.looks = {encoder: AnnotationCache(encoder, data, ROOM // len(own)) for encoder in own}

    @torch.no_grad()
    def __call__(
        self,
        images: Shaped[Tensor, "N ..."],
        captions: Integer[Tensor, "N K S"],
        *,
        samples: int = 1,
        photos: Photos | None = None,
    ) -> Float[Tensor, "W V"]:
        """Mean p(. | y_1..t-1, a) of the teachers at every word, in the student's order.

        Args:
            images: as for `CaptioningModel.forward`, and as the student sees them: pixels become the sizes that each
                teacher learned from, at all of which it looks.
            captions: framed by START and END.
            samples: how often the student has each caption, one copy beside the other (`hard.samples`).
            photos: which of the data's these are, if they are; the teachers then look at those.
        """
        if self.looks and photos is not None:
            views = {encoder: look(photos) for encoder, look in self.looks.items()}
        elif images.dim() == 4:
            views = {encoder: _views(images, encoder) for encoder in {model.encoder for model in self.models}}
        else:
            views = {model.encoder: [images] for model in self.models}
        outputs: Iterator[Output] = (model(a, captions) for model in self.models for a in views[model.encoder])
        first = next(outputs)
        mean, mask, count = first.logits.float().softmax(dim=-1), first.mask, 1
        del first
        for output in outputs:  # one after the other: of 9,000 words for 15,000 places each takes half a gigabyte
            mean += output.logits.float().softmax(dim=-1)
            count += 1
        mean /= count
        if samples == 1:
            return mean
        rows = by_word(torch.arange(len(mean), device=mask.device), mask)
        return mean[rows.repeat_interleave(samples, dim=1)[mask.repeat_interleave(samples, dim=1)]]


def _views(images: UInt8[Tensor, "N 3 S S"], encoder: Encoder) -> list[Float[Tensor, "N _ D"]]:
    """The annotation vectors of pictures, at each of the encoder's scales."""
    resized = (resizing(side, encoder.resample)(images) for side in encoder.sides)
    return [encoder(pictures) for pictures in resized]


def _alike(first: Encoder, second: Encoder) -> bool:
    """Whether two encoders make the same of a picture: the same tensors, in the same network, cut at the same node."""
    ours, theirs = first.state_dict(), second.state_dict()
    if any(getattr(first, name) != getattr(second, name) for name in ("grids", "dim", "sides", "resample")):
        return False
    if getattr(first.network, "code", None) != getattr(second.network, "code", None):
        return False
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def load_teachers(
    paths: Sequence[str], data: CaptionData, encoder: EncoderConfig, *, whole: bool, device: str | torch.device
) -> Teachers | None:
    """The teachers of a run; None if it has none.

    Args:
        paths: as for `load_captioner`.
        data: what the student learns from; annotation vectors must be of the teachers' encoder.
        encoder: of the student; to annotation vectors of each of its scales the teachers must have something to say.
        whole: the student sees whole photos, no part of them; so then do the teachers.
        device: of the run.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is malformed, or does not fit the data; names it.
    """
    models = []
    for path in paths:
        checkpoint = load_checkpoint(checkpoint_folder(path))
        check_same_task(checkpoint, data, f"distillation.teachers: {path}")
        if data.encoder is not None and not set(encoder.sides) <= set(checkpoint.encoder.sides):
            raise ValueError(
                f"distillation.teachers: {path}: learned from pictures of {checkpoint.encoder.sides} pixels, and "
                f"encoder.image_size with encoder.scales asks for {encoder.sides}"
            )
        models.append(checkpoint.model.to(device))
    return Teachers(models, data if whole and data.kind == PIXELS else None) if models else None
