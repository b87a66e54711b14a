"""A folder of photos with captions, and the command that preprocesses it."""

from pathlib import Path

import numpy as np
from PIL import Image

ENCODER = ("--encoder", "resnet18", "--weights", "null", "--batch-size", "4", "--device", "cpu")


def photos(root: Path, count: int, *, size: tuple[int, int] = (40, 30)) -> Path:
    """A folder of noise and its captions.csv: 0.png is val, the others train; the words of i.png are "photo n<i>"."""
    root.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    rows = ["image,caption,split"]
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(root / f"{i}.png")
        rows += [f"{i}.png,Photo n{i} .,{'train' if i else 'val'}", f"{i}.png,A photo !,{'train' if i else 'val'}"]
    (root / "captions.csv").write_text("\n".join(rows))
    return root


def command(root: Path, output: Path, *options: str, size: int = 32) -> list[str]:
    words = ["folder", "--captions", root / "captions.csv", "--images", root, "--output", output]
    return [str(word) for word in (*words, "--image-size", size, "--min-count", 1, "--workers", 0, *options)]
