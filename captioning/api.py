"""The public API: a trained captioner, from image files to sentences and where each word looked."""

import dataclasses
import io
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captioning.checkpoint import Checkpoint, checkpoint_folder
from captioning.config import LOCATIONS, SearchConfig
from captioning.decoding import Hypothesis
from captioning.devices import check_device
from captioning.files import fresh_file
from captioning.images import Box, batches, read_image, to_array, to_square, visible_box, whole_image
from captioning.model_config import Fit, Resample, View
from captioning.models.attention import window_size
from captioning.models.captioner import CaptioningModel
from captioning.models.multihead import show_head
from captioning.tokenization import detokenize
from captioning.vocabulary import END
from captioning.voices import Ensemble, caption_images, load_ensemble


@dataclass(frozen=True, eq=False)  # an array equals another in no single way
class Caption:
    """A sentence, with what the model thought and where it looked at each of its T words (the end word is left out).

    Args:
        text: the sentence.
        words: its T words.
        log_probs: log p of each word, given those before it and the image.
        alphas: (T, h, w) float32 attention over the grid, each (h, w) sums to 1; None for a model without attention.
        betas: (T,) float32, the gate at each word; None for a model without.
        locations: (T, G) int64, the cells that hard attention looked at, counted row by row: `divmod(location, w)` is
            one's row and column. G is the decoder's glimpses, 1 in the paper; with `mirror`, `multi_scale`, `paths` and
            in ensembles those of all that looked. None for a model without hard attention, and where it was asked for
            the mean context.
        window: how many cells across each look took in, its location in their middle; 1 in the paper. Where several
            models look, or grids of several sizes are looked at, the widest model's on the finest grid.
        size: the photo's width and height, upright.
        box: the part of the photo, in its pixels, that the grid covers.
        finished: the model ended the sentence itself; otherwise it was cut at `max_length`.
        score: what alternatives are ranked by.
        alternatives: further captions of the same image, best first, if asked for.
    """

    text: str
    words: tuple[str, ...]
    log_probs: tuple[float, ...]
    alphas: np.ndarray | None
    betas: np.ndarray | None
    locations: np.ndarray | None
    window: int
    size: tuple[int, int]
    box: Box
    finished: bool
    score: float
    alternatives: tuple["Caption", ...] = field(default=(), repr=False)

    def overlay(self, image: "ImageLike", file: str | Path) -> None:
        """Draw where each word looked on the photo that was captioned.

        Args:
            image: the photo.
            file: .png for one tile per word, .gif for one after the other, .html for a page on which words are pointed
                at. It is written whole or not at all.

        Raises:
            ValueError: the caption has no alphas, or no words; `file` ends otherwise; or the photo has another size
                than the one that was captioned.
            FileNotFoundError: there is no such photo.
            ModuleNotFoundError: .png and .gif are drawn by matplotlib, which is not there.
        """
        file = Path(file)
        if file.suffix not in OVERLAYS:
            raise ValueError(f"{file}: an overlay ends with {', '.join(OVERLAYS)}")
        if self.alphas is None:
            raise ValueError("this caption has no attention to draw: its model attends to nothing")
        if not self.words:
            raise ValueError("this caption has no words to draw")
        photo = _read(image)
        if photo.size != self.size:
            raise ValueError(f"the photo has {_pixels(photo.size)} pixels, the captioned one had {_pixels(self.size)}")
        seen = (to_array(photo), self.words, self.alphas)
        looked = {name: getattr(self, name) for name in ("box", "betas", "log_probs", "locations", "window")}
        with fresh_file(file) as partial:
            OVERLAYS[file.suffix](partial, self.text, *seen, **looked)

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON has it: lists for arrays, weights and gates rounded to five digits."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("alphas", "betas"):
            values[name] = None if values[name] is None else values[name].astype(float).round(5).tolist()
        values["locations"] = None if self.locations is None else self.locations.tolist()
        lists = {name: list(values[name]) for name in ("words", "log_probs", "size")}
        return {**values, **lists, "box": self.box._asdict(), "alternatives": [c.as_dict() for c in self.alternatives]}


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _tiles(file: Path, title: str, *seen: Any, **looked: Any) -> None:
    from captioning import visualize  # needs matplotlib, which captioning alone does without

    visualize.overlay(*seen, title=title, **looked)[0].savefig(file, format="png")


def _animation(file: Path, _: str, *seen: Any, **looked: Any) -> None:
    from captioning import visualize

    visualize.save_gif(visualize.animation(*seen, **looked), file)


def _page(file: Path, title: str, *seen: Any, **looked: Any) -> None:
    from captioning.visualize_html import html

    file.write_text(html(*seen, title=title, **looked), encoding="utf-8")


OVERLAYS: dict[str, Callable[..., None]] = {".png": _tiles, ".gif": _animation, ".html": _page}
"""What `Caption.overlay` draws, by the ending of its file."""

ImageLike = str | Path | bytes | bytearray | memoryview | io.IOBase | BinaryIO | Image.Image | np.ndarray
"""A file, what is in one, one that is open, a Pillow image, or an array: uint8, RGB, HWC, 0-255."""
_BYTES = (bytes, bytearray, memoryview)


class Captioner:
    """A trained captioner. Make one with `load_captioner`. Threads may share it: their searches take turns.

    Args:
        checkpoint: the model with its vocabulary and configs; or several, which speak with one voice.
        device: where it runs, e.g. "cpu" or "cuda".
        head: whose attention is returned, where there are several heads; None for their mean.

    Raises:
        ValueError: there is no such head.
    """

    def __init__(
        self, checkpoint: Checkpoint | Ensemble, *, device: str | torch.device = "cpu", head: int | None = None
    ):
        self.ensemble = Ensemble.of(checkpoint)
        self.device = check_device(device)
        self._turn = threading.Lock()  # hard attention is told where to look
        show_head(torch.nn.ModuleList(part for model in self.ensemble.models for part in model.decoders), head)
        for model in self.ensemble.models:
            model.to(self.device).eval()

    @property
    def attends(self) -> bool:
        """Whether its captions come with alphas."""
        return any(model.decoder.attends for model in self.ensemble.models)

    def caption(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        batch_size: int = 16,
        seed: int = 0,
        **options: int | float | bool | str,
    ) -> list[Caption]:
        """Caption images.

        Args:
            images: image files, their bytes, open files, Pillow images or arrays (uint8, RGB, HWC, 0-255); one or
                several.
            batch_size: images at once.
            seed: of sampled words (`sample=True`) and sampled locations (`location="sample"`).
            options: fields of `SearchConfig`: beam_size=5, num_captions=1, max_length=30, sample=True,
                location="argmax" (or "sample", "expected": where hard attention looks), mirror=True, ... What is not
                given is as the checkpoint has it (`ensemble.search`).

        Returns:
            One Caption per image, in order; further ones of an image in its `alternatives`.

        Raises:
            FileNotFoundError, ValueError: an image cannot be read, or an option is wrong. Of several images the error
                says which it was, unless its file's name does.
        """
        return list(self.stream(images, batch_size=batch_size, seed=seed, **options))

    def stream(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        batch_size: int = 16,
        seed: int = 0,
        **options: int | float | bool | str,
    ) -> Iterator[Caption]:
        """As `caption`, but yielding each batch when it is done: for more images than memory holds."""
        _of_kinds({"batch_size": batch_size, "seed": seed}, {"batch_size": 16, "seed": 0})
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 (got {batch_size})")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1 (got {seed})")
        config = search_config(self.ensemble.search, **options)
        return self._batches(_several(images), batch_size, seed, config)

    def _batches(
        self, images: Iterable[ImageLike], batch_size: int, seed: int, config: SearchConfig
    ) -> Iterator[Caption]:
        generator = torch.Generator(self.device).manual_seed(seed)
        photos = (_read(image, f"image {i}") for i, image in enumerate(images))
        for batch in batches(photos, batch_size, lambda photo: math.prod(photo.size)):
            yield from self._batch(batch, config, generator)

    def _batch(self, photos: list[Image.Image], config: SearchConfig, generator: torch.Generator) -> list[Caption]:
        fit = self.ensemble.members[0].encoder.fit

        @cache
        def pixels(side: int, resample: Resample) -> Tensor:
            squares = [to_array(to_square(photo, side, fit, resample)) for photo in photos]
            return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)

        def load(model: CaptioningModel, view: View) -> Tensor:
            images = pixels(model.encoder.sides[view.scale], model.encoder.resample)
            return (images.flip(-1) if view.mirrored else images).to(self.device)

        with self._turn:
            found = caption_images(self.ensemble.models, load, config, generator=generator)
        captions = []
        for photo, hypotheses in zip(photos, found, strict=True):
            best, *others = (self._read_back(hypothesis, photo.size, fit) for hypothesis in hypotheses)
            captions.append(dataclasses.replace(best, alternatives=tuple(others)))
        return captions

    def _read_back(self, hypothesis: Hypothesis, size: tuple[int, int], fit: Fit) -> Caption:
        length = len([i for i in hypothesis.ids if i != END])
        words = self.ensemble.vocabulary.decode(hypothesis.ids)
        alphas, window = hypothesis.alphas, 1
        if alphas is not None:  # on the finest of the grids, which are square
            side = math.isqrt(alphas.shape[1])
            alphas = alphas[:length].unflatten(1, (side, -1)).float()
            if hypothesis.locations is not None:
                window = window_size(max(member.decoder.window for member in self.ensemble.members), side)
        return Caption(
            text=detokenize(words),
            words=tuple(words),
            log_probs=hypothesis.log_probs[:length],
            alphas=None if alphas is None else alphas.numpy(),
            betas=None if hypothesis.betas is None else hypothesis.betas[:length].float().numpy(),
            locations=None if hypothesis.locations is None else hypothesis.locations[:length].numpy(),
            window=window,
            size=size,
            box=visible_box(*size, fit),
            finished=hypothesis.finished,
            score=hypothesis.score,
        )


def load_captioner(path: str | Path, *, device: str | torch.device = "cpu", head: int | None = None) -> Captioner:
    """Load a captioner.

    Args:
        path: a checkpoint folder, a run's folder (its best checkpoint is taken), an ensemble's folder, or the name of
            one in PRETRAINED.
        device: where it runs.
        head: whose attention is returned, where there are several heads; None for their mean.

    Raises:
        FileNotFoundError: there is none; names the pretrained ones.
        ValueError: a file of it is malformed, or there is no such head.
    """
    with torch.random.fork_rng(devices=[]):  # modules are made with random weights, at nobody else's cost
        return Captioner(load_ensemble(checkpoint_folder(path)), device=device, head=head)


def search_config(own: SearchConfig, **options: int | float | bool | str) -> SearchConfig:
    """A checkpoint's own search with other values, and a kind word for a misspelt option.

    Captions that are drawn (`sample=True`) are drawn from what the model thinks: of its own search they take nothing.
    """
    allowed = dataclasses.asdict(SearchConfig())
    for name in options:
        if name not in allowed:
            raise ValueError(f"unknown option {name!r}; allowed: {', '.join(allowed)}")
    options = _of_kinds(options, allowed)
    if options.get("location", LOCATIONS[0]) not in LOCATIONS:
        raise ValueError(f"location must be one of {', '.join(LOCATIONS)} (got {options['location']!r})")
    drawn = ("temperature", "top_k", "top_p")
    strange = [name for name in drawn if options.get(name, getattr(SearchConfig, name)) != getattr(SearchConfig, name)]
    if strange and not options.get("sample", own.sample):
        raise ValueError(f"{', '.join(strange)}: only captions that are drawn have it; set sample too (--sample)")
    if options.get("location", own.location) != "sample":
        options = {"paths": 1, **options}  # others than samples take the same path each time
    return dataclasses.replace(SearchConfig() if options.get("sample") else own, **options)  # type: ignore[arg-type]


def _of_kinds(values: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Options may come from somebody's JSON: each must be of its default's type; a whole number is a number, too."""
    found = {}
    for name, value in values.items():
        kind = type(like[name])
        kinds = (float, int) if kind is float else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{name} must be {kind.__name__} (got {value!r})")
        found[name] = kind(value)
    return found


def _several(images: ImageLike | Iterable[ImageLike]) -> Iterable[ImageLike]:
    one = isinstance(images, (str, Path, *_BYTES, Image.Image, np.ndarray)) or hasattr(images, "read")
    if not one and not isinstance(images, Iterable):
        raise ValueError(f"images must be one or several (got {type(images).__name__})")
    return cast(Iterable[ImageLike], [images] if one else images)


def _read(image: ImageLike, name: str = "image") -> Image.Image:
    if isinstance(image, (str, Path)):
        return read_image(image)
    try:
        if isinstance(image, _BYTES):
            image = io.BytesIO(image)
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
                raise ValueError(f"an image array must be uint8 (H, W, 3), got {image.dtype} {image.shape}")
            image = Image.fromarray(image)
        if isinstance(image, Image.Image):
            return whole_image(image)
        if not hasattr(image, "read"):
            raise ValueError(f"must be a file, bytes, a Pillow image or an array, got {type(image).__name__}")
        return read_image(image)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
