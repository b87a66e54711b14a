"""The HDF5 file between preprocessing and training: its schema, its reader, and the batches made from it.

docs/data_formats.md shows the layout. `preprocess.store` writes it with the names below and nothing else does.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import h5py
import numpy as np
import torch
from jaxtyping import Bool, Integer, Shaped
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from captioning.config import EncoderConfig, from_dict
from captioning.hdf5 import (
    check_images,
    grid_attribute,
    item_within,
    json_attribute,
    own_dataset,
    own_tensors,
    reading,
    texts,
    whole_numbers,
)
from captioning.model_config import MAX_SIDE, PLAIN, Fit, Resample, View, all_views
from captioning.vocabulary import END, PAD, START, UNK, Vocabulary
from captioning.workers import read_ahead

SCHEMA = "show-attend-tell/1"
SPLITS = ("train", "val", "test")
MOST_WORDS = 10_000
"""Of a caption that is read."""

PIXELS = "image/pixels"
"""(N, S, S, 3) uint8, RGB; one chunk per image. Either this or ANNOTATIONS is there."""
ANNOTATIONS = "image/annotations"
"""(N, L, D) float16, L locations row by row; one chunk per image. Attribute `grid`: (h, w)."""
MIRRORED = "image/mirrored"
"""As ANNOTATIONS, of the mirrored images; there if they were asked for. Of further scales (`EncoderConfig.scales`) both
are there once more, with the side in pixels behind the name: image/annotations_224."""
NAMES = "image/name"
"""(N,) text, unique: what a results file calls the image."""
IMAGE_SPLIT = "image/split"
"""(N,) uint8, index into SPLITS."""
FIRST_CAPTION = "image/first_caption"
"""(N + 1,) int64: image i has the captions first[i] to first[i + 1]."""
RAW = "caption/raw"
"""(C,) text as the source gave it, for scoring. Every image has some."""
FIRST_WORD = "caption/first_word"
"""(C + 1,) int64: caption j has the words first[j] to first[j + 1]."""
WORDS = "caption/words"
"""(W,) int32 ids, without START and END."""
VOCABULARY = "vocabulary"
"""(V,) text, the special words first."""
ENCODER = "encoder"
"""Group with the state dict of the network that made the annotations; attribute `config`: JSON of EncoderConfig."""


def annotations_name(encoder: EncoderConfig, view: View) -> str:
    """The dataset of the annotation vectors of one view."""
    name = MIRRORED if view.mirrored else ANNOTATIONS
    return f"{name}_{encoder.sides[view.scale]}" if view.scale else name


class CaptionData:
    """One preprocessed file. Small tables are read at once, images when asked for; the open file is never pickled.

    Args:
        path: the HDF5 file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of this schema; names the file and what is wrong with which of its tables.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: no such data file; `python -m preprocess` makes one")
        self._file: h5py.File | None = None
        try:
            with h5py.File(self.path, "r") as file, reading(path):
                self._read_tables(file)
        except OSError as error:
            raise ValueError(f"{path}: not an HDF5 file: {error}") from error

    def _read_tables(self, file: h5py.File) -> None:
        schema = file.attrs.get("schema")
        if not isinstance(schema, str) or schema != SCHEMA:
            raise ValueError(f"{self.path}: schema is {schema!r}, this version reads {SCHEMA!r}; preprocess it again")
        self.source = json_attribute(file, "source")
        self.settings = json_attribute(file, "settings")
        if self.settings.get("fit") not in (None, *get_args(Fit)):
            allowed = " or ".join(get_args(Fit))
            raise ValueError(f"{self.path}: settings: fit must be {allowed} (got {self.settings['fit']!r})")
        words = texts(file, VOCABULARY)
        try:
            self.vocabulary = Vocabulary(words)
        except ValueError as error:
            raise ValueError(f"{self.path}: {VOCABULARY}: {error}") from error
        self.names = texts(file, NAMES)
        self.split_of = whole_numbers(file, IMAGE_SPLIT)
        self._first_caption = whole_numbers(file, FIRST_CAPTION)
        self._first_word = whole_numbers(file, FIRST_WORD)
        self._words = whole_numbers(file, WORDS)
        self._raw = texts(file, RAW)
        self._check_tables()
        self.kind = PIXELS if PIXELS in file else ANNOTATIONS
        images = own_dataset(file, self.kind)
        self.image_shape: tuple[int, ...] = tuple(images.shape[1:])
        self.mirrored = MIRRORED in file
        self.grids: tuple[tuple[int, int], ...] = ()
        self.encoder: EncoderConfig | None = None
        if self.kind == PIXELS:
            side = min([*self.image_shape[:1], MAX_SIDE])
            what = f"{len(self.names)} square RGB images of at most {MAX_SIDE} pixels a side"
            check_images(images, ("uint8",), (len(self.names), side, side, 3), what)
        else:
            config = json_attribute(item_within(file, ENCODER), "config")
            self.encoder = from_dict(EncoderConfig, config, f"{self.path}: encoder")
            self._check_views(file, self.encoder)

    def _check_views(self, file: h5py.File, encoder: EncoderConfig) -> None:
        """The vectors of every view must be there, as many as its grid has places, and no two scales have one grid."""
        grids = set()
        size, dim = len(self.names), self.image_shape[-1] if self.image_shape else 0
        for view in all_views(len(encoder.sides), mirrored=self.mirrored):
            vectors = own_dataset(file, annotations_name(encoder, view))
            grid = grid_attribute(vectors)
            what = f"{size} images with vectors of {dim} numbers on a grid of {grid}"
            check_images(vectors, ("float16", "float32"), (size, math.prod(grid), dim), what)
            grids.add((view.scale, grid))
        if not len(grids) == len({grid for _, grid in grids}) == len(encoder.sides):
            raise ValueError(f"{self.path}: {ENCODER}: each scale must have a grid of its own")
        self.grids = tuple(grid for _, grid in sorted(grids))

    def _check_tables(self) -> None:
        """Every index must point at something."""
        tables = (  # whose numbers lead from one table into the next
            (FIRST_CAPTION, self._first_caption, len(self.names), len(self._raw)),
            (FIRST_WORD, self._first_word, len(self._raw), len(self._words)),
        )
        for name, first, rows, end in tables:
            if len(first) != rows + 1 or first[0] != 0 or first[-1] != end or (first[1:] < first[:-1]).any():
                raise ValueError(f"{self.path}: {name}: must be {rows + 1} numbers that rise from 0 to {end}")
        silent = np.flatnonzero(self._first_caption[1:] == self._first_caption[:-1])
        if len(silent):
            raise ValueError(f"{self.path}: {FIRST_CAPTION}: image {silent[0]} has no caption")
        twice = next((name for name, count in Counter(self.names).items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"{self.path}: {NAMES}: must be unique ({twice!r} comes twice)")
        size = len(self.vocabulary)
        if len(self._words) and not UNK <= self._words.min() <= self._words.max() < size:
            raise ValueError(f"{self.path}: {WORDS}: numbers of words must lie in [{UNK}, {size})")
        if self.longest_caption() > MOST_WORDS:
            raise ValueError(f"{self.path}: {FIRST_WORD}: a caption may have at most {MOST_WORDS:,} words")
        known = (self.split_of >= 0) & (self.split_of < len(SPLITS))
        if len(self.split_of) != len(self.names) or not known.all():
            raise ValueError(f"{self.path}: {IMAGE_SPLIT}: must be {len(self.names)} numbers below {len(SPLITS)}")

    def __len__(self) -> int:
        return len(self.names)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}  # an open HDF5 file cannot travel to a worker

    def indices(self, split: str) -> np.ndarray:
        """Images of a split, in file order.

        Raises:
            ValueError: the split is unknown or empty; names those that are there.
        """
        found = np.flatnonzero(self.split_of == SPLITS.index(split)) if split in SPLITS else np.array([], dtype=int)
        if not len(found):
            there = [name for i, name in enumerate(SPLITS) if (self.split_of == i).any()]
            raise ValueError(f"{self.path}: no images of split {split!r}; there are {', '.join(there)}")
        return found

    def check_vectors(self, grids: Mapping[int, tuple[int, int]], dim: int) -> None:
        """Stored annotation vectors must have the form that their encoder gives them; pixels have none yet.

        Args:
            grids: by the sides of the pictures, in pixels; those of sides that are not stored are passed over.
            dim: D.

        Raises:
            ValueError: they have not.
        """
        if self.encoder is None:
            return
        stored = dict(zip(self.encoder.sides, self.grids, strict=True))
        made = {side: grids.get(side, grid) for side, grid in stored.items()}
        if stored != made or self.image_shape[-1] != dim:
            raise ValueError(
                f"{self.path}: holds vectors of {self.image_shape[-1]} numbers on grids of {(*stored.values(),)}, and "
                f"the encoder stored beside them makes {dim} on {(*made.values(),)}"
            )

    def captions_of(self, image: int) -> range:
        """The numbers of an image's captions."""
        return range(int(self._first_caption[image]), int(self._first_caption[image + 1]))

    def words(self, caption: int) -> np.ndarray:
        """Ids of a caption's words, without START and END."""
        return self._words[self._first_word[caption] : self._first_word[caption + 1]]

    def longest_caption(self) -> int:
        """Words of the longest caption, START and END not counted."""
        return int(np.diff(self._first_word).max())

    def references(self, image: int) -> list[str]:
        """An image's captions as the source gave them."""
        return [self._raw[caption] for caption in self.captions_of(image)]

    def image(self, image: int, view: View = PLAIN) -> Shaped[Tensor, "..."]:
        """Pixels (3, S, S) uint8, of one size at every scale, or the view's annotation vectors (L, D) float16.

        Raises:
            ValueError: it cannot be read, or the vectors are not finite; names file, dataset and image.
        """
        name = PIXELS if self.encoder is None else annotations_name(self.encoder, view)
        where = f"{self.path}: {name}: image {image} ({self.names[image]!r})"
        with reading(where):
            if self._file is None:
                self._file = h5py.File(self.path, "r")
            values = torch.from_numpy(self._file[name][image])
        if self.encoder is None:
            pixels = values.permute(2, 0, 1)
            return pixels.flip(-1) if view.mirrored else pixels
        if not values.isfinite().all():
            raise ValueError(f"{where} has values that are not finite")
        return values

    def encoder_state(self) -> dict[str, Tensor]:
        """State dict of the network that made the annotation vectors.

        Raises:
            ValueError: it does not lie in the file, is far too large, or is not finite; names file and tensor.
        """
        with reading(f"{self.path}: {ENCODER}"), h5py.File(self.path, "r") as file:
            tensors = own_tensors(file, ENCODER)
            return {name: torch.from_numpy(x) for name, x in tensors.items()}


class Sample(NamedTuple):
    """One image with some of its captions, the seed of its augmentation, and at which of the sides it is looked at."""

    image: int
    captions: tuple[int, ...]
    seed: int
    scale: int = 0


class Batch(NamedTuple):
    """What a step sees: N images, which they are and if mirrored, with K captions each (absent ones are all PAD)."""

    images: Shaped[Tensor, "N ..."]
    words: Integer[Tensor, "N K T"]
    indices: Integer[Tensor, " N"]
    mirrored: Bool[Tensor, " N"]


def plan_epoch(
    data: CaptionData,
    split: str,
    *,
    captions_per_image: int,
    batch_size: int,
    seed: int,
    epoch: int,
    every_caption: bool = True,
    scales: int = 1,
) -> list[list[Sample]]:
    """The batches of one epoch: every caption once, in an order that depends on (seed, epoch) alone.

    Without `every_caption` it is every image once, with `captions_per_image` of its captions. Of several `scales` each
    has as many batches as the others, one more or less.

    An image's captions are shuffled and dealt in groups of `captions_per_image`; the groups are shuffled and dealt in
    batches. So a run that stops in the middle continues at the same batch.
    """
    rng = np.random.default_rng([seed, epoch])
    samples = []
    for image in data.indices(split):
        captions = rng.permutation(np.asarray(data.captions_of(int(image))))
        for start in range(0, len(captions) if every_caption else 1, captions_per_image):
            group = tuple(int(c) for c in captions[start : start + captions_per_image])
            samples.append(Sample(int(image), group, int(rng.integers(2**62))))
    order = rng.permutation(len(samples))
    ordered = [samples[i] for i in order]
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    if scales == 1:
        return batches
    turn = epoch if len(batches) < scales else 0  # so that each scale has its turn at last
    at = (rng.permutation(len(batches)) + turn) % scales
    return [[sample._replace(scale=int(k)) for sample in batch] for k, batch in zip(at, batches, strict=True)]


def shard(batches: Sequence[list[Sample]], rank: int, world: int) -> list[list[Sample]]:
    """One process's part of every batch; short parts are filled with samples without captions, which weigh nothing."""
    parts = []
    for batch in batches:
        size = -(-len(batch) // world)
        part = batch[rank::world]
        parts.append(part + [batch[0]._replace(captions=(), seed=0)] * (size - len(part)))
    return parts


Item = tuple[Tensor, list[np.ndarray], int, bool]
"""An image, the word ids of some of its captions, its number in the file, and whether it is mirrored."""


class CaptionDataset(Dataset[Item]):
    """The Item of a Sample; augmentation depends on the sample's own seed, so on no worker's history.

    Args:
        data: pixels, or annotation vectors.
        sides: of the squares that pixels become, one for each scale.
        resample: the filter by which they do.
        augment: none, flip, crop or crop_flip; of annotation vectors none, and flip where mirrored ones are stored.

    Raises:
        ValueError: the data cannot be augmented so.
    """

    def __init__(
        self, data: CaptionData, *, sides: Sequence[int] = (), resample: Resample = "bicubic", augment: str = "none"
    ):
        check_augment(data, augment)
        self.data = data
        self.flip, crop = "flip" in augment, "crop" in augment
        self.transforms = [
            resizing(side, resample, crop=crop) if crop or data.image_shape[0] != side else None for side in sides
        ]

    def __getitem__(self, sample: Sample) -> Item:
        view = View(sample.scale, mirrored=self.flip and sample.seed % 2 == 1)
        image = self.data.image(sample.image, view)
        transform = self.transforms[sample.scale] if self.data.kind == PIXELS else None
        if transform is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(sample.seed)
                image = transform(image)
        return image, [self.data.words(caption) for caption in sample.captions], sample.image, view.mirrored


def check_augment(data: CaptionData, augment: str) -> None:
    """Whether the images of a data file can be augmented so.

    Raises:
        ValueError: they cannot; says what is allowed.
    """
    if data.kind == ANNOTATIONS and augment not in ("none", *(["flip"] if data.mirrored else [])):
        stored = "none, flip" if data.mirrored else "none; with preprocess --mirror flip, too"
        raise ValueError(f"augment={augment!r}: {data.path} stores annotation vectors; allowed: {stored}")


def resizing(image_size: int, resample: Resample = "bicubic", *, crop: bool = False) -> v2.Transform:
    """The transform of uint8 (..., 3, S, S), or of a random half of it or more, to (..., 3, image_size, image_size)."""
    how: Any = {"interpolation": v2.InterpolationMode(resample), "antialias": True}
    if crop:
        return v2.RandomResizedCrop(image_size, scale=(0.5, 1.0), **how)
    return v2.Resize((image_size, image_size), **how)


class Collate:
    """Stack samples to a Batch, captions framed by START and END and padded to the longest.

    An image's captions come longest first, and so do the images: decoders can drop what has ended from the batch. There
    is a word to say even where no sample has a caption.
    """

    def __init__(self, captions_per_image: int):
        self.captions_per_image = captions_per_image

    def __call__(self, items: Sequence[Item]) -> Batch:
        lengths = [max((len(ids) for ids in captions), default=-1) for _, captions, *_ in items]
        items = [items[i] for i in sorted(range(len(items)), key=lambda i: -lengths[i])]
        words = torch.full((len(items), self.captions_per_image, max(*lengths, 0) + 2), PAD, dtype=torch.long)
        for n, (_, captions, *_) in enumerate(items):
            for k, ids in enumerate(sorted(captions, key=len, reverse=True)):
                words[n, k, : len(ids) + 2] = torch.tensor([START, *ids.tolist(), END])
        images, _, indices, mirrored = zip(*items, strict=True)
        return Batch(torch.stack(images), words, torch.tensor(indices), torch.tensor(mirrored))


def load_batches(
    dataset: CaptionDataset, batches: Sequence[list[Sample]], *, captions_per_image: int, workers: int = 0
) -> Iterator[Batch]:
    """Read planned batches in order, ahead of time when there are workers."""
    return read_ahead(dataset, workers=workers, batch_sampler=batches, collate_fn=Collate(captions_per_image))
