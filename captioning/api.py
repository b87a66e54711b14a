"""The public API: a trained captioner, from image files to sentences and where each word looked."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captioning.checkpoint import Checkpoint, checkpoint_folder
from captioning.config import LOCATIONS, SearchConfig
from captioning.decoding import Hypothesis
from captioning.devices import check_device
from captioning.files import fresh_file
from captioning.images import Box, open_image, to_array, to_rgb, to_square, visible_box
from captioning.model_config import Resample, View
from captioning.models.attention import window_size
from captioning.models.captioner import CaptioningModel
from captioning.models.multihead import show_head
from captioning.tokenization import detokenize
from captioning.vocabulary import END
from captioning.voices import Ensemble, caption_images, load_ensemble


@dataclass(frozen=True)
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
            ValueError: the caption has no alphas, or no words; or `file` ends otherwise.
            FileNotFoundError: there is no such photo.
        """
        file = Path(file)
        if file.suffix not in OVERLAYS:
            raise ValueError(f"{file}: an overlay ends with {', '.join(OVERLAYS)}")
        if self.alphas is None:
            raise ValueError("this caption has no attention to draw: its model attends to nothing")
        if not self.words:
            raise ValueError("this caption has no words to draw")
        seen = (to_array(_read(image)), self.words, self.alphas)
        looked = {name: getattr(self, name) for name in ("box", "betas", "log_probs", "locations", "window")}
        with fresh_file(file) as partial:
            OVERLAYS[file.suffix](partial, self.text, *seen, **looked)


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

ImageLike = str | Path | Image.Image | np.ndarray


class Captioner:
    """A trained captioner. Make one with `load_captioner`.

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
        show_head(torch.nn.ModuleList(part for model in self.ensemble.models for part in model.decoders), head)
        for model in self.ensemble.models:
            model.to(self.device).eval()

    @property
    def attends(self) -> bool:
        """Whether its captions come with alphas."""
        return any(model.decoder.attends for model in self.ensemble.models)

    def caption(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        batch_size: int = 16,
        seed: int = 0,
        **options: int | float | bool | str,
    ) -> list[Caption]:
        """Caption images.

        Args:
            images: image files, Pillow images or arrays (uint8, RGB, HWC, 0-255); one or several.
            batch_size: images at once.
            seed: of sampled words (`sample=True`) and sampled locations (`location="sample"`).
            options: fields of `SearchConfig`: beam_size=5, num_captions=1, max_length=30, sample=True,
                location="argmax" (or "sample", "expected": where hard attention looks), mirror=True, ... What is not
                given is as the checkpoint has it (`ensemble.search`).

        Returns:
            One Caption per image, in order; further ones of an image in its `alternatives`.

        Raises:
            FileNotFoundError, ValueError: an image cannot be read, or an option is wrong.
        """
        several = images if isinstance(images, Sequence) and not isinstance(images, str) else [images]
        return list(self.stream(several, batch_size=batch_size, seed=seed, **options))

    def stream(
        self, images: Sequence[ImageLike], *, batch_size: int = 16, seed: int = 0, **options: int | float | bool | str
    ) -> Iterator[Caption]:
        """As `caption`, but yielding each batch when it is done: for more images than memory holds."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 (got {batch_size})")
        config = search_config(self.ensemble.search, **options)
        generator = torch.Generator(self.device).manual_seed(seed)
        for start in range(0, len(images), batch_size):
            yield from self._batch([_read(image) for image in images[start : start + batch_size]], config, generator)

    def _batch(self, photos: list[Image.Image], config: SearchConfig, generator: torch.Generator) -> list[Caption]:
        fit = self.ensemble.members[0].encoder.fit

        @cache
        def pixels(side: int, resample: Resample) -> Tensor:
            squares = [to_array(to_square(photo, side, fit, resample)) for photo in photos]
            return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)

        def load(model: CaptioningModel, view: View) -> Tensor:
            images = pixels(model.encoder.sides[view.scale], model.encoder.resample)
            return (images.flip(-1) if view.mirrored else images).to(self.device)

        found = caption_images(self.ensemble.models, load, config, generator=generator)
        captions = []
        for photo, hypotheses in zip(photos, found, strict=True):
            box = visible_box(*photo.size, fit)
            best, *others = (self._read_back(hypothesis, box) for hypothesis in hypotheses)
            captions.append(dataclasses.replace(best, alternatives=tuple(others)))
        return captions

    def _read_back(self, hypothesis: Hypothesis, box: Box) -> Caption:
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
            box=box,
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
    return Captioner(load_ensemble(checkpoint_folder(path)), device=device, head=head)


def search_config(own: SearchConfig, **options: int | float | bool | str) -> SearchConfig:
    """A checkpoint's own search with other values, and a kind word for a misspelt option.

    Captions that are drawn (`sample=True`) are drawn from what the model thinks: of its own search they take nothing.
    """
    allowed = [f.name for f in dataclasses.fields(SearchConfig)]
    for name in options:
        if name not in allowed:
            raise ValueError(f"unknown option {name!r}; allowed: {', '.join(allowed)}")
    if options.get("location", LOCATIONS[0]) not in LOCATIONS:
        raise ValueError(f"location must be one of {', '.join(LOCATIONS)} (got {options['location']!r})")
    drawn = ("temperature", "top_k", "top_p")
    strange = [name for name in drawn if options.get(name, getattr(SearchConfig, name)) != getattr(SearchConfig, name)]
    if strange and not options.get("sample", own.sample):
        raise ValueError(f"{', '.join(strange)}: only captions that are drawn have it; set sample too (--sample)")
    if options.get("location", own.location) != "sample":
        options = {"paths": 1, **options}  # others than samples take the same path each time
    return dataclasses.replace(SearchConfig() if options.get("sample") else own, **options)  # type: ignore[arg-type]


def _read(image: ImageLike) -> Image.Image:
    if isinstance(image, (str, Path)):
        return open_image(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"an image array must be uint8 (H, W, 3), got {image.dtype} {image.shape}")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise ValueError(f"a photo is a file, a Pillow image or a uint8 array (H, W, 3), got {type(image).__name__}")
    if not all(image.size):
        raise ValueError(f"a photo has pixels, got {image.width}x{image.height}")
    return to_rgb(image)
