"""Records -> vocabulary (of the train split alone) -> one HDF5 file, resumable and atomic."""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor
from tqdm import tqdm

from captioning.checks import at_most
from captioning.config import EncoderConfig, Precision, to_dict
from captioning.data import SPLITS
from captioning.files import read_text, write_text
from captioning.model_config import MAX_SIDE, Fit
from captioning.tokenization import tokenize
from captioning.vocabulary import Vocabulary
from preprocess.encode import Annotator, Pictures, decode
from preprocess.sources import Record
from preprocess.store import Captions, Network, Partial, write_file


@dataclass(frozen=True)
class BuildSettings:
    """What a data file holds; stored in it.

    Args:
        image_size: side of the square images in pixels.
        scales: further sides of which the annotation vectors are stored, too (`EncoderConfig.scales`).
        fit: how a photo becomes square: crop (shorter side, then the centre) or squash (both sides, aspect is lost).
        min_count: words that occur less often in the train split become `<unk>`.
        max_words: size of the vocabulary at most, the special words not counted.
        max_length: words of a caption that are trained on; the rest is cut off. Raw captions are kept whole.
        max_missing: share of the images that may be missing or broken.
        batch_size: images that are encoded at a time.
        precision: of the encoder's matrix products: fp32, bf16, or auto: bf16 on CPUs and CUDA devices made for it,
            else fp32; the file says which it was.
        mirror: store the annotation vectors of the mirrored images, too, so that training can draw one of both.
        seed: of everything random.
    """

    image_size: int = 224
    scales: tuple[int, ...] = ()
    fit: Fit = "crop"
    min_count: int = 5
    max_words: int = 10_000
    max_length: int = 50
    max_missing: float = 0.01
    batch_size: int = 32
    precision: Precision = "fp32"
    mirror: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("image_size", "min_count", "max_words", "max_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 (got {getattr(self, name)})")
        at_most(self, MAX_SIDE, "image_size")
        if not 0 <= self.max_missing <= 1:
            raise ValueError(f"max_missing must lie in [0, 1] (got {self.max_missing})")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative (got {self.seed})")


@dataclass(frozen=True)
class Dropped:
    """An image that is listed but not in the file."""

    name: str
    file: str
    reason: str


class Summary(NamedTuple):
    """What was built.

    Args:
        images: number per split.
        captions: their number.
        words: size of the vocabulary, special words included.
        dropped: the missing and the broken.
        read: images that this run read; fewer than all after an interruption.
        seconds: that reading and encoding them took.
    """

    images: dict[str, int]
    captions: int
    words: int
    dropped: list[Dropped]
    read: int
    seconds: float


def build(
    records: Sequence[Record],
    source: dict[str, Any],
    settings: BuildSettings,
    *,
    output: Path,
    encoder: EncoderConfig | None = None,
    encoder_state: dict[str, Tensor] | None = None,
    device: str = "auto",
    workers: int | None = None,
    overwrite: bool = False,
    companions: Mapping[Path, Callable[[], str]] | None = None,
    vocabulary: Vocabulary | None = None,
) -> Summary:
    """Make one data file. An interrupted build goes on where it stopped when it is called again with the same values.

    Args:
        records: what a source gave.
        source: where they come from; stored in the file.
        settings: stored too.
        output: the HDF5 file. Until it is whole there is only the folder `OUTPUT.partial`.
        encoder: store annotation vectors of this network instead of pixels; its image size and fit are the settings'.
        encoder_state: its weights, of a checkpoint's encoder; by default the config says where they are.
        device: of the encoder: auto, cpu, cuda, cuda:1, mps.
        workers: processes that decode photos; 0: this one, the default when the encoder is on the CPU.
        overwrite: replace an existing output, and what another unfinished run left.
        companions: text files that belong to the output; they are there before it is.
        vocabulary: the words to use; by default those of the train split.

    Raises:
        ValueError: too many photos are missing or broken; the output is there; a setting does not fit.
    """
    _check_free(output, report_path(output), companions or {}, overwrite=overwrite)
    limit = _Limit(len(records), settings.max_missing, output)
    records, dropped = _sort_out(records)
    limit.check(dropped)
    annotator = _annotator(encoder, encoder_state, settings, device)
    if annotator is not None:
        settings = dataclasses.replace(settings, precision=annotator.precision)
    workers = _workers(workers, annotator)
    partial = Partial(
        _partial(output),
        _fingerprint(records, source, settings, annotator),
        shape=annotator.shape if annotator else (settings.image_size, settings.image_size, 3),
        dtype=np.float16 if annotator else np.uint8,
        restart=overwrite,
    )
    _check_room(partial, len(records), output)
    before, began = partial.kept, time.monotonic()
    for _ in _read_images(partial, records, settings, annotator, workers):
        limit.check([*dropped, *_broken(partial, records)])
    read, seconds = partial.kept - before, time.monotonic() - began
    dropped += _broken(partial, records)
    broken = {i for i, _ in partial.broken}
    records = [record for i, record in enumerate(records) if i not in broken]
    captions, vocabulary = _captions(records, settings, vocabulary)
    whole = partial.folder / "whole.h5"
    write_file(
        whole,
        partial,
        records,
        captions=captions,
        vocabulary=vocabulary,
        attributes={"source": source, "settings": to_dict(settings)},
        network=Network(annotator.config, annotator.state, annotator.grids, annotator.mirror) if annotator else None,
    )
    for path, content in (companions or {}).items():
        write_text(path, content())
    limit.report(dropped)
    os.replace(whole, output)
    partial.remove()
    images = {split: sum(record.split == split for record in records) for split in SPLITS}
    return Summary(images, len(captions.raw), len(vocabulary), dropped, read, seconds)


def _check_free(output: Path, report: Path, companions: Mapping[Path, object], *, overwrite: bool) -> None:
    """Refuse to replace what is there, unless asked to; and a report of missing images that we did not write."""
    if overwrite:
        return
    ours = _partial(output).is_dir()  # a run that was stopped may have written companions already
    taken = next((path for path in (output, *(() if ours else companions)) if path.exists()), None)
    if taken is None and report.is_file() and f" images listed for {output.name} " not in read_text(report)[:200]:
        taken = report
    if taken is not None:
        raise ValueError(f"--output {output}: {taken} is there already; give --overwrite to replace it")


def _partial(output: Path) -> Path:
    """The folder that a data file is until it is whole."""
    return output.with_name(f"{output.name}.partial")


def _check_room(partial: Partial, images: int, output: Path) -> None:
    """Whether the disk has room for the images twice: as they come, and in the file that is made of them.

    Raises:
        ValueError: it has not; nothing was read yet.
    """
    (partial.folder / "whole.h5").unlink(missing_ok=True)  # half of one, made by a run that was stopped
    needed = (2 * images - partial.kept) * partial.image_bytes
    free = shutil.disk_usage(partial.folder).free
    if needed > free:
        if not partial.kept:
            partial.remove()
        raise ValueError(
            f"--output {output}: {free / 1e9:.1f} GB are free there; to make a file of {images} images of "
            f"{partial.image_bytes / 1e6:.2f} MB takes {needed / 1e9:.1f} GB more"
        )


class _Limit:
    """How many images may be missing, and the file that names them."""

    def __init__(self, total: int, share: float, output: Path):
        self.total = total
        self.share = share
        self.output = output
        self.file = report_path(output)

    def check(self, dropped: Sequence[Dropped]) -> None:
        """Raise when there are too many."""
        if len(dropped) <= self.share * self.total and len(dropped) < self.total:
            return
        self.report(dropped)
        allowed = f"more than --max-missing {self.share:g} allows" if len(dropped) < self.total else "nothing is left"
        raise ValueError(
            f"{len(dropped)} of {self.total} images ({len(dropped) / self.total:.1%}) are missing or broken, "
            f"{allowed}; e.g. {dropped[0].file}: {dropped[0].reason}; {self.file} names them all"
        )

    def report(self, dropped: Sequence[Dropped]) -> None:
        """Write the file, or remove an older one when nothing is missing."""
        if not dropped:
            self.file.unlink(missing_ok=True)
            return
        lines = [f"# {len(dropped)} of {self.total} images listed for {self.output.name} are missing or broken"]
        lines += ["name\tfile\treason", *(f"{entry.name}\t{entry.file}\t{entry.reason}" for entry in dropped)]
        write_text(self.file, "\n".join(lines) + "\n")


def report_path(output: Path) -> Path:
    """The file that names the missing images of a data file."""
    return beside(output, "missing.txt")


def beside(output: Path, kind: str) -> Path:
    """The name of a file that belongs to a data file."""
    stem = output.stem if output.suffix in (".h5", ".hdf5") else output.name
    return output.with_name(f"{stem}.{kind}")


def _sort_out(records: Sequence[Record]) -> tuple[list[Record], list[Dropped]]:
    """The records that have a file and a caption with a word in it, and the others. Opens no photo, so it is quick."""
    found, dropped = [], []
    for record in records:
        captions = tuple(caption for caption in record.captions if tokenize(caption))
        if isinstance(record.image, Path) and not record.image.is_file():
            dropped.append(Dropped(record.name, str(record.image), "no such file"))
        elif not captions:
            dropped.append(Dropped(record.name, str(record.image), "none of its captions has a word in it"))
        else:
            found.append(dataclasses.replace(record, captions=captions))
    return found, dropped


def _broken(partial: Partial, records: Sequence[Record]) -> list[Dropped]:
    return [Dropped(records[i].name, str(records[i].image), reason) for i, reason in partial.broken]


def _annotator(
    encoder: EncoderConfig | None, state: dict[str, Tensor] | None, settings: BuildSettings, device: str
) -> Annotator | None:
    if encoder is None:
        if settings.mirror:
            raise ValueError("mirror needs an encoder: pixels are mirrored when they are read")
        if settings.scales:
            raise ValueError("scales needs an encoder: pixels get their size when they are read")
        return None
    config = dataclasses.replace(encoder, image_size=settings.image_size, scales=settings.scales, fit=settings.fit)
    return Annotator(
        config,
        precision=settings.precision,
        device=device,
        seed=settings.seed,
        state=state,
        mirror=settings.mirror,
    )


def _fingerprint(
    records: Sequence[Record], source: dict[str, Any], settings: BuildSettings, annotator: Annotator | None
) -> str:
    """SHA-256 of everything that the bytes of the images depend on; the limit of missing ones may change."""
    network = [to_dict(annotator.config), annotator.digest(), str(annotator.device)] if annotator else None
    values = {**to_dict(settings), "max_missing": None}
    sha = hashlib.sha256(json.dumps([source, values, network, torch.__version__, PIL.__version__]).encode())
    for record in records:
        stat = record.image.stat() if isinstance(record.image, Path) else None
        state = (stat.st_size, stat.st_mtime_ns) if stat else ()
        sha.update(repr((record.name, record.split, record.captions, str(record.image), state)).encode())
    return sha.hexdigest()


def _read_images(
    partial: Partial, records: Sequence[Record], settings: BuildSettings, annotator: Annotator | None, workers: int
) -> Iterator[None]:
    """Fill the partial, batch by batch, from where it stands; yields before the first batch and after each.

    A batch always holds the same records: the encoder's last bits may depend on what is encoded together. It goes to
    the disk while the next one is encoded.
    """
    size = settings.batch_size
    batches = [range(i, min(i + size, len(records))) for i in range(0, len(records), size)]
    resample = annotator.config.resample if annotator else "bicubic"
    sides = (settings.image_size, *settings.scales)
    pictures = Pictures(records, sides=sides, fit=settings.fit, resample=resample)
    done = partial.kept + len(partial.broken)
    todo = batches[partial.batches :]
    yield
    with ThreadPoolExecutor(1) as disk, tqdm(total=len(records), initial=done, unit="image", disable=None) as bar:
        on_its_way: Future[None] | None = None
        for batch, (pixels, broken) in zip(todo, decode(pictures, todo, workers=workers), strict=True):
            images = annotator(pixels) if annotator and len(pixels[0]) else pixels[0]
            if on_its_way is not None:
                on_its_way.result()
                yield
            on_its_way = disk.submit(partial.append, images, broken)
            bar.update(len(batch))
        if on_its_way is not None:
            on_its_way.result()
            yield


def _workers(given: int | None, annotator: Annotator | None) -> int:
    if given is not None:
        if given < 0:
            raise ValueError(f"--workers {given}: must not be negative")
        return given
    if annotator is not None and annotator.device.type == "cpu":
        return 0
    return min(4, max(1, (os.cpu_count() or 1) - 1))


def _captions(
    records: Sequence[Record], settings: BuildSettings, vocabulary: Vocabulary | None
) -> tuple[Captions, Vocabulary]:
    """The captions of all images, in a vocabulary that is given, or of the train split's words."""
    tokens = [[tokenize(caption)[: settings.max_length] for caption in record.captions] for record in records]
    train = (words for record, group in zip(records, tokens, strict=True) if record.split == "train" for words in group)
    vocabulary = vocabulary or Vocabulary.build(train, min_count=settings.min_count, max_size=settings.max_words)
    ids = [vocabulary.encode(words) for group in tokens for words in group]
    captions = Captions(
        first_caption=[0, *accumulate(len(group) for group in tokens)],
        raw=[caption for record in records for caption in record.captions],
        first_word=[0, *accumulate(len(words) for words in ids)],
        words=[word for words in ids for word in words],
    )
    return captions, vocabulary
