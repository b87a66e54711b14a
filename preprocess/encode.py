"""Images -> pixels -> annotation vectors.

Worker processes decode while a GPU encodes. An encoder on the CPU takes all cores by itself, and a process beside it
holds it up at the end of every layer; so the same cores decode a batch, and then encode it.
"""

import contextlib
import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from captioning.config import EncoderConfig, Precision
from captioning.console import one_line
from captioning.devices import check_device, default_device
from captioning.files import short_name
from captioning.images import read_image, to_array, to_square
from captioning.model_config import Fit, Resample
from captioning.models.encoder import build_encoder
from captioning.precision import number_format
from captioning.workers import read_ahead
from preprocess.sources import Record


class Decoded(NamedTuple):
    """A batch of images: pixels (n, S, S, 3) uint8 of the whole ones for each side S, and why others are missing."""

    pixels: list[np.ndarray]
    broken: list[tuple[int, str]]


class Pictures(Dataset[Decoded]):
    """Reads the records of a range as squares, one of each side (in pixels)."""

    def __init__(self, records: Sequence[Record], *, sides: Sequence[int], fit: Fit, resample: Resample = "bicubic"):
        self.records = records
        self.sides = sides
        self.fit = fit
        self.resample: Resample = resample

    def __getitem__(self, numbers: range) -> Decoded:
        return self.collect(numbers, map)

    def collect(self, numbers: range, each: Callable[..., Iterable[list[np.ndarray] | str]]) -> Decoded:
        """The pictures of a batch; `each` is `map`, or that of a pool of threads."""
        with warnings.catch_warnings():  # here, and not for each picture: it changes the whole process
            warnings.simplefilter("ignore")
            found = list(each(self._squares, numbers))
        whole = [squares for squares in found if not isinstance(squares, str)]
        broken = [(i, why) for i, why in zip(numbers, found, strict=True) if isinstance(why, str)]
        empty = [np.zeros((0, side, side, 3), np.uint8) for side in self.sides]
        return Decoded([np.stack(arrays) for arrays in zip(*whole, strict=True)] or empty, broken)

    def _squares(self, number: int) -> list[np.ndarray] | str:
        """One picture's pixels for each side, or why it has none."""
        image = self.records[number].image
        try:
            whole = read_image(image) if isinstance(image, Path) else image.render(self.sides[0])
            return [to_array(to_square(whole, side, self.fit, self.resample)) for side in self.sides]
        except (ValueError, OSError) as error:
            return one_line(error).removeprefix(f"{image}: ")


def decode(pictures: Pictures, batches: Sequence[range], *, workers: int) -> Iterator[Decoded]:
    """The batches in order: read ahead by `workers` processes, or with 0 each when it is wanted, by threads.

    From processes batches travel as numpy arrays through pipes: shared memory is scarce in containers.
    """
    if workers == 0:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            yield from (pictures.collect(batch, pool.map) for batch in batches)
        return
    yield from read_ahead(pictures, workers=workers, sampler=batches, batch_size=None, collate_fn=_unchanged)


def _unchanged(batch: Any) -> Any:
    return batch


class Annotator:
    """A frozen encoder that turns pixels into float16 annotation vectors.

    Args:
        config: the encoder; what it leaves open is filled in.
        precision: of matrix products: fp32, bf16, or auto: bf16 on CPUs and CUDA devices made for it, else fp32.
        device: auto, cpu, cuda or another of torch's.
        seed: of the weights, when the config wants random ones.
        state: weights of the cut network, as a checkpoint has them, to take instead of the config's.
        mirror: annotate the mirrored pictures, too.

    Attributes:
        config: as the data file stores it: everything resolved, of a weights file the name alone.
        shape: of one image's annotation vectors: (L, D), or with the mirrored ones (2, L, D); of several scales L is
            the number of all their locations.
        grids: (h, w) of each scale.
        precision: what auto came to.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        precision: Precision,
        device: str,
        seed: int,
        state: dict[str, Tensor] | None = None,
        mirror: bool = False,
    ):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder, resolved = build_encoder(dataclasses.replace(config, train_from=None), state=state)
        self.state: dict[str, Tensor] = {k: v.detach().cpu() for k, v in encoder.network.state_dict().items()}
        self.config = dataclasses.replace(resolved, weights=config.weights and short_name(config.weights))
        self.grids = encoder.grids
        self.mirror = mirror
        self.shape = (*([2] if mirror else []), sum(h * w for h, w in encoder.grids), encoder.dim)
        self.device = torch_device(device)
        self.encoder = encoder.to(self.device)
        self.precision = number_format(precision, self.device.type)

    def digest(self) -> str:
        """SHA-256 of the weights."""
        sha = hashlib.sha256()
        for name, values in self.state.items():
            sha.update(name.encode())
            sha.update(values.contiguous().numpy().tobytes())
        return sha.hexdigest()

    def __call__(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Annotation vectors (n, *shape) float16 of pixels (n, S, S, 3) uint8 for each side S of the encoder.

        Raises:
            ValueError: a value is too large for float16, or none at all.
        """
        views = [pixels, *([[images[:, :, ::-1].copy() for images in pixels]] if self.mirror else [])]
        vectors = [np.concatenate([self._annotate(images) for images in view], axis=1) for view in views]
        return np.stack(vectors, axis=1) if self.mirror else vectors[0]

    def _annotate(self, pixels: np.ndarray) -> np.ndarray:
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.device)
        bf16 = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
        with torch.inference_mode(), self._exact(), bf16:
            a = self.encoder(images)
        values = a.half()
        if not values.isfinite().all():
            raise ValueError(
                f"encoder {self.config.name}, layer {self.config.layer}: its annotation vectors do not fit into "
                f"float16 (largest {a.abs().max().item():.3g}, allowed 65504); take another layer or other weights"
            )
        return values.cpu().numpy()

    def _exact(self) -> contextlib.AbstractContextManager[None]:
        """On a GPU: the same input gives the same bits, and fp32 means fp32."""
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def torch_device(name: str) -> torch.device:
    """The device of a name: auto, cpu, cuda or another of torch's.

    Raises:
        ValueError: it is none, or not there.
    """
    if name == "auto":
        return torch.device(default_device())
    try:
        return check_device(name)
    except ValueError as error:
        raise ValueError(f"--{error}") from error
