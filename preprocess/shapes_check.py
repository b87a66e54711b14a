"""Whether captions of the synthetic world are true of their pictures, and whether attention lies on what is named.

python -m preprocess.shapes_check --checkpoint runs/shapes/best --data shapes.h5 --split val [--location sample]
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from captioning.extras import require

if __name__ == "__main__":
    require("preprocess.shapes_check")

from pycocotools import mask as coco_mask

from captioning.checkpoint import checkpoint_folder, load_checkpoint
from captioning.compatibility import check_fits
from captioning.config import LOCATIONS, SearchConfig
from captioning.console import exit_code, one_line
from captioning.data import SPLITS, CaptionData
from captioning.devices import check_device, default_device
from captioning.evaluate import SplitCaption, caption_split
from captioning.files import read_json
from preprocess.build import beside
from preprocess.shapes import Scene, scene_from_dict
from preprocess.shapes_grammar import is_true, mentions, parse


@dataclass(frozen=True)
class Report:
    """What was found.

    Args:
        sentences: captions that were checked.
        parsed: of them, those that the grammar can read.
        true: of them, those that hold: every named object, colour, size, count, place and relation.
        nouns: words of true sentences that name things.
        mass: mean share of the attention at these words that lies on the named things' masks.
        area: mean share of the picture that those masks cover; what uniform attention would give.
        hits: share of these words at which the cell that was looked at touches the named things: the sampled or
            likeliest one of hard attention (the mean over several), the most attended one of soft.
        false: pictures and captions that are not true.
    """

    sentences: int
    parsed: int
    true: int
    nouns: int
    mass: float | None
    area: float | None
    hits: float | None
    false: tuple[tuple[str, str], ...] = ()

    @property
    def ratio(self) -> float | None:
        """How much more attention the named things get than their area would."""
        return self.mass / self.area if self.mass is not None and self.area else None


def check(captions: dict[str, SplitCaption], grid: tuple[int, int], instances: dict[str, Any]) -> Report:
    """Check captions against the scenes and masks of an `instances.json`.

    Args:
        captions: by the picture's name.
        grid: (h, w) of the attention.
        instances: as `shapes.instances` makes it.
    """
    images = {image["file_name"]: image for image in instances["images"]}
    masks: dict[int, list[NDArray[np.bool_]]] = {}
    for annotation in instances["annotations"]:
        mask = coco_mask.decode(annotation["segmentation"]).astype(bool)
        masks.setdefault(annotation["image_id"], []).append(mask)
    parsed = true = 0
    false: list[tuple[str, str]] = []
    looks: list[tuple[float, float, float]] = []
    for name, caption in captions.items():
        scene: Scene = scene_from_dict(images[name]["scene"])
        statement = parse(caption.text)
        parsed += statement is not None
        if statement is None or not is_true(statement, scene):
            false.append((name, caption.text))
            continue
        true += 1
        alphas = caption.hypothesis.alphas
        if alphas is None:
            continue
        for mention in mentions(statement, scene):
            mask = np.any([masks[images[name]["id"]][thing] for thing in mention.things], axis=0)
            alpha = alphas[mention.word].float().cpu().numpy().reshape(grid)
            places = caption.hypothesis.locations
            cells = [alpha.argmax()] if places is None else places[mention.word]
            hit = float(np.mean([_touches(int(cell), grid, mask) for cell in cells]))
            looks.append((*mass_and_area(alpha, mask), hit))
    mass, area, hits = np.mean(looks, axis=0).tolist() if looks else (None, None, None)
    return Report(len(captions), parsed, true, len(looks), mass, area, hits, tuple(false))


def mass_and_area(alpha: NDArray[np.floating], mask: NDArray[np.bool_]) -> tuple[float, float]:
    """The share of the attention (h, w) inside a mask (H, W), each cell's weight spread evenly over its pixels.

    Returns:
        That share, and the mask's share of the picture.
    """
    h, w = alpha.shape
    covered = mask.reshape(h, mask.shape[0] // h, w, mask.shape[1] // w).mean(axis=(1, 3))
    return float((alpha * covered).sum()), float(mask.mean())


def _touches(place: int, grid: tuple[int, int], mask: NDArray[np.bool_]) -> bool:
    peak = np.zeros(grid)
    peak.flat[place] = 1.0
    return mass_and_area(peak, mask)[0] > 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 after a mistake, which it says in one line."""
    parser = argparse.ArgumentParser(prog="python -m preprocess.shapes_check", description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True, type=Path, help="made by python -m preprocess shapes")
    parser.add_argument("--split", choices=SPLITS, default="val")
    parser.add_argument("--beam-size", type=int, default=3)
    parser.add_argument("--location", choices=LOCATIONS, default="argmax", help="where hard attention looks")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--show", type=int, default=3, help="false sentences to print")
    options = parser.parse_args(arguments)
    return exit_code("shapes_check", lambda: _report(options))


def _report(options: argparse.Namespace) -> int:
    """Caption, check and print: false sentences, shares, and one line of JSON at last."""
    device, masks = check_device(options.device), beside(options.data, "instances.json")
    checkpoint, data = load_checkpoint(checkpoint_folder(options.checkpoint)), CaptionData(options.data)
    check_fits(checkpoint, data)
    grid = max(checkpoint.model.encoder.grids)  # all scales speak, and are heard on the finest grid
    side = data.image_shape[0] if data.encoder is None else data.encoder.image_size
    if side % grid[0]:
        raise ValueError(f"{options.data}: its {side} pixels are no multiple of the attention's {grid[0]} places")
    instances = read_json(masks)
    several = len(checkpoint.encoder.sides) > 1
    search = SearchConfig(beam_size=options.beam_size, location=options.location, multi_scale=several)
    indices = data.indices(options.split).tolist()
    captions = caption_split(checkpoint.model.to(device), data, indices, checkpoint.vocabulary, search)
    try:
        report = check(captions, grid, instances)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{masks}: is not what preprocess shapes writes ({error!r})") from error
    for name, text in report.false[: options.show]:
        print(f"false: {one_line(name)}: {text}")
    print(f"{report.true} of {report.sentences} sentences are true ({report.true / report.sentences:.1%})")
    if report.ratio is not None:
        print(
            f"{report.nouns} nouns: {report.mass:.1%} of the attention on the named things, which cover "
            f"{report.area:.1%}: {report.ratio:.2f} times; the cell looked at touches them at {report.hits:.1%}"
        )
    asked = {name: getattr(options, name) for name in ("split", "beam_size", "location")}
    numbers = {name: value for name, value in asdict(report).items() if name != "false"}
    print(json.dumps({**numbers, "ratio": report.ratio, **asked}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
