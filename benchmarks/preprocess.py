"""Photos per second of `preprocess` with an encoder, against the encoder alone: `python -m benchmarks.preprocess`.

Both encode in batches of the same size on the same threads; the encoder's batches are already in memory. The weights
are random, which takes the same time.
"""

import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.report import Line, best_of, formats, options, present
from captioning.config import EncoderConfig
from captioning.images import EXTENSIONS
from captioning.memory import keep_memory
from preprocess.build import BuildSettings, build
from preprocess.encode import Annotator
from preprocess.sources import Record


def make_photos(folder: Path, count: int, seed: int = 0) -> None:
    """JPEG files of 500x375 pixels with detail at every scale, of about the size of Flickr8k's (75 kB)."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        total = np.zeros((375, 500, 3))
        for cells in (4, 16, 64, 256):
            small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            total += np.asarray(small.resize((500, 375), Image.Resampling.BICUBIC)) * 0.25
        buffer = io.BytesIO()
        Image.fromarray(total.astype(np.uint8)).save(buffer, "JPEG", quality=90)
        (folder / f"{i}.jpg").write_bytes(buffer.getvalue())


def records_of(folder: Path, count: int) -> list[Record]:
    """The photos of a folder, each with a caption that nobody reads."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS)[:count]
    if not files:
        raise FileNotFoundError(f"--images {folder}: no photos there")
    return [Record(path.name, "train", ("a photo",), path) for path in files]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = options(str(__doc__).splitlines()[0], count=1024, image_size=224, batch_size=32, repeats=3)
    parser.add_argument("--images", type=Path, help="folder of photos; without it some are made")
    parser.add_argument("--encoder", default="mobilenet_v2", help="a torchvision network")
    parser.add_argument("--workers", type=int, help="processes that decode (default: the command's)")
    chosen = parser.parse_args(arguments)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    keep_memory()  # as the command does
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = chosen.images or Path(name)
        if not chosen.images:
            make_photos(folder, chosen.count)
        records = records_of(folder, chosen.count)
        for precision in formats():
            config = EncoderConfig(name=chosen.encoder, weights=None, image_size=chosen.image_size)
            annotator = Annotator(config, precision=precision, device="cpu", seed=0)
            shape = (chosen.batch_size, chosen.image_size, chosen.image_size, 3)
            pixels = [np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)]
            settings = BuildSettings(
                image_size=chosen.image_size, batch_size=chosen.batch_size, min_count=1, precision=precision
            )
            output = Path(name) / f"{precision}.h5"
            rates = []
            for _ in range(chosen.repeats):  # in turns, so that both see the same machine
                alone = chosen.batch_size / best_of([lambda: annotator(pixels)], 2)[0]  # noqa: B023  called at once
                summary = build(
                    records,
                    {"name": "benchmark"},
                    settings,
                    output=output,
                    encoder=config,
                    device="cpu",
                    workers=chosen.workers,
                    overwrite=True,
                )
                rates.append((summary.read / summary.seconds, alone))
            whole, alone = (max(values) for values in zip(*rates, strict=True))
            figure, limit = f"{whole:.1f} photos/s", f"{alone:.1f} photos/s"
            share = whole / alone
            lines.append(Line(f"{precision}, {chosen.encoder}", figure, share, "of the encoder", limit, (">=", 0.75)))
    present(lines, markdown=chosen.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
