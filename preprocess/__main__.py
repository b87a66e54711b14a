"""`python -m preprocess SOURCE ... --output data.h5`: photos and captions -> one HDF5 file."""

import argparse
import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from captioning.extras import require

if __name__ == "__main__":
    require("preprocess")

from captioning.checkpoint import checkpoint_folder, load_checkpoint
from captioning.config import EncoderConfig, Precision
from captioning.console import exit_code, one_line
from captioning.data import SPLITS
from captioning.files import make_place, short_name
from captioning.memory import keep_memory
from captioning.options import given
from captioning.precision import slow_choice
from captioning.vocabulary import SPECIAL
from preprocess import sources
from preprocess.build import BuildSettings, Summary, beside, build, report_path
from preprocess.encode import torch_device
from preprocess.shapes import Scene, instances
from preprocess.sources import Record

_STORED = {"val_fraction", "test_fraction", "restval", "count"}
"""Options of sources, besides their files, on which the content of the data file depends."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0, 2 for a mistake of the user (one line on standard error), 130 when interrupted.
    """
    keep_memory()
    stopped = "interrupted; the same command goes on from here"
    return exit_code("preprocess", lambda: _preprocess(_parser().parse_args(arguments)), stopped=stopped)


def _preprocess(options: argparse.Namespace) -> int:
    try:
        print(_report(_run(options), options.output))
    except (ValueError, OSError) as error:
        raise ValueError(f"error: {_as_options(one_line(error))}") from error
    return 0


def _run(options: argparse.Namespace) -> Summary:
    encoder, encoder_state = _encoder(options)
    settings = _settings(options, encoder if encoder_state is not None else None)
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit must be at least 1 (got {options.limit})")
    vocabulary = load_checkpoint(checkpoint_folder(options.vocabulary)).vocabulary if options.vocabulary else None
    for path in _paths(options, "images"):
        if not path.is_dir():
            raise FileNotFoundError(f"--images {path}: no such folder")
    every = options.read(options)
    records = every[: options.limit]
    there, left = ({record.split for record in some} for some in (every, records))
    lost = [split for split in SPLITS if split in there - left]
    if lost:
        print(f"preprocess: --limit {options.limit} leaves no images of {' and '.join(lost)}", file=sys.stderr)
    make_place(options.output, "--output")
    for path in (path for name in ("captions", "json", "splits") for path in _paths(options, name)):
        if options.output.exists() and path.samefile(options.output):
            raise ValueError(f"--output {options.output}: is what --captions, --json or --splits reads")
    companions = {}
    if options.source == "shapes":
        records[0].image.render(settings.image_size)  # a picture too small to draw is refused now
        companions[beside(options.output, "instances.json")] = lambda: _instances(records, settings.image_size)
    slow = slow_choice(settings.precision, torch_device(options.device).type) if encoder else None
    if slow:
        print(f"preprocess: {slow}", file=sys.stderr)
    return build(
        records,
        _source(options),
        settings,
        output=options.output,
        encoder=encoder,
        encoder_state=encoder_state,
        device=options.device,
        workers=getattr(options, "workers", None),
        overwrite=options.overwrite,
        companions=companions,
        vocabulary=vocabulary,
    )


def _settings(options: argparse.Namespace, trained: EncoderConfig | None) -> BuildSettings:
    """The settings given; sizes and fit, when they are not, are those that a checkpoint's encoder was trained with."""
    values = given(options, BuildSettings)
    if trained is not None:
        sizes = {} if "image_size" in values else {"image_size": trained.image_size, "scales": trained.scales}
        values = {**sizes, "fit": trained.fit, **values}
    return BuildSettings(**{**values, "scales": tuple(values.get("scales", ()))})


def _encoder(options: argparse.Namespace) -> tuple[EncoderConfig | None, dict[str, Tensor] | None]:
    """The encoder that was asked for, and its weights if it is a checkpoint's."""
    if options.encoder is None:
        for name in ("weights", "layer", "grid"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} needs --encoder: without one the file holds pixels")
        return None, None
    try:
        folder = checkpoint_folder(options.encoder)
    except FileNotFoundError:
        weights = {None: "DEFAULT", "null": None}.get(options.weights, options.weights)
        return EncoderConfig(name=options.encoder, layer=options.layer, grid=options.grid, weights=weights), None
    for name in ("weights", "layer", "grid"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} does not go with --encoder {options.encoder}: that checkpoint brings its own")
    checkpoint = load_checkpoint(folder)
    encoder = dataclasses.replace(checkpoint.encoder, weights=str(folder), grid=None)  # the layer says it, at any size
    return encoder, checkpoint.model.encoder.network.state_dict()


def _instances(records: Sequence[Record], size: int) -> str:
    """The masks of all things in the drawn scenes, in COCO's format."""
    scenes = [record.image for record in records if isinstance(record.image, Scene)]
    return json.dumps(instances(scenes, size, file_names=[record.name for record in records]))


def _paths(options: argparse.Namespace, name: str) -> list[Path]:
    value = getattr(options, name, None) or []
    return [value] if isinstance(value, Path) else value


def _source(options: argparse.Namespace) -> dict[str, Any]:
    """Where the data come from: files by name and content, no folders, so that moved data give the same bytes."""
    source: dict[str, Any] = {"name": options.source}
    for name in ("captions", "json", "splits"):
        files = [path for path in _paths(options, name) if path.is_file()]
        if files:
            source[name] = [path.name.encode(errors="backslashreplace").decode() for path in files]
            source[f"{name}_sha256"] = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    if options.vocabulary:
        source["vocabulary"] = short_name(options.vocabulary)
    return source | {name: value for name, value in sorted(vars(options).items()) if name in _STORED}


def _report(summary: Summary, output: Path) -> str:
    images = ", ".join(f"{split} {number}" for split, number in summary.images.items())
    missing = f"{len(summary.dropped)} missing or broken"
    if summary.dropped:
        missing += f" (see {report_path(output)})"
    return (
        f"{output}: {sum(summary.images.values())} images ({images}), {summary.captions} captions, "
        f"vocabulary {summary.words} with {len(SPECIAL)} special ones, {missing}, "
        f"{output.stat().st_size / 2**20:.1f} MiB, "
        f"{summary.read} read in {summary.seconds:.0f} s ({summary.read / summary.seconds:.0f} images/s)"
    )


def _as_options(message: str) -> str:
    """An error of the encoder, in the words of this command line."""
    message = re.sub(r"(?:--)?encoder\.(weights|layer|grid|scales)", r"--\1", message)
    message = message.replace("encoder.name=", "--encoder ")
    return message.replace("torchvision classification model;", "checkpoint, nor a torchvision classification model;")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="preprocess", description="Photos and captions -> one HDF5 file.")
    commands = parser.add_subparsers(dest="source", metavar="SOURCE", required=True)
    for add in (_add_flickr, _add_karpathy, _add_coco, _add_folder, _add_shapes):
        add(commands)
    return parser


def _add_flickr(commands: Any) -> None:
    for name in ("flickr8k", "flickr30k"):
        command = commands.add_parser(name, parents=[_common()], help=f"{name}'s caption file, photos and splits")
        command.add_argument("--captions", type=Path, required=True, help="token file, results.csv or captions.txt")
        command.add_argument("--images", type=Path, required=True, help="folder of the photos")
        lists = "folder of split lists, or dataset_X.json of Karpathy, as where the packing (Kaggle's) brings no lists"
        command.add_argument("--splits", type=Path, required=True, help=lists)
        command.set_defaults(read=lambda o: sources.flickr(o.captions, o.images, o.splits))


def _add_karpathy(commands: Any) -> None:
    command = commands.add_parser("karpathy", parents=[_common()], help="dataset_{flickr8k,flickr30k,coco}.json")
    command.add_argument("--json", type=Path, required=True, help="the Karpathy JSON")
    command.add_argument("--images", type=Path, required=True, help="folder of the photos, or of val2014, train2014")
    command.add_argument(
        "--restval",
        choices=["train", "drop"],
        default="train",
        help="what the split restval becomes (default: %(default)s)",
    )
    command.set_defaults(read=lambda o: sources.karpathy(o.json, o.images, restval=o.restval))


def _add_coco(commands: Any) -> None:
    command = commands.add_parser("coco", parents=[_common()], help="COCO's captions_*.json, of one or several years")
    command.add_argument("--captions", type=Path, nargs="+", required=True, help="captions_*.json, one or several")
    command.add_argument("--images", type=Path, nargs="+", required=True, help="one folder, or one per --captions file")
    command.add_argument(
        "--splits", type=Path, help="split lists or a Karpathy JSON; default: the caption files' names"
    )
    command.add_argument(
        "--restval",
        choices=["train", "drop"],
        default="train",
        help="what the split restval becomes (default: %(default)s)",
    )
    command.set_defaults(read=lambda o: sources.coco(o.captions, o.images, o.splits, restval=o.restval))


def _add_folder(commands: Any) -> None:
    command = commands.add_parser("folder", parents=[_common()], help="own photos with a CSV or JSONL file")
    command.add_argument("--captions", type=Path, required=True, help=".csv or .jsonl: image, caption[, split]")
    command.add_argument("--images", type=Path, required=True, help="folder below which the photos lie")
    command.add_argument(
        "--val-fraction",
        type=float,
        default=0.1,
        help="of the images, when the file has no splits (default: %(default)s)",
    )
    command.add_argument(
        "--test-fraction",
        type=float,
        default=0.1,
        help="of the images, when the file has no splits (default: %(default)s)",
    )
    command.set_defaults(read=_read_folder)


def _read_folder(options: argparse.Namespace) -> list[Record]:
    shares = {"val_fraction": options.val_fraction, "test_fraction": options.test_fraction}
    return sources.folder(options.captions, options.images, seed=options.seed, **shares)


def _add_shapes(commands: Any) -> None:
    command = commands.add_parser(
        "shapes", parents=[_common()], help="a synthetic world of coloured shapes, with masks"
    )
    command.add_argument("--count", type=int, required=True, help="number of pictures")
    command.set_defaults(read=lambda o: sources.shapes(o.count, seed=o.seed), image_size=64, min_count=1)


def _common() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--output", type=Path, required=True, help="the HDF5 file")
    parser.add_argument("--overwrite", action="store_true", help="replace the output, and others' unfinished leftovers")
    own = argparse.SUPPRESS  # when it is not given: shapes and a checkpoint have their own
    size = f"side of the square images, pixels (default: {BuildSettings.image_size}, or the checkpoint's; shapes: 64)"
    parser.add_argument("--image-size", type=int, default=own, help=size)
    fit = f"how a photo becomes square (default: {BuildSettings.fit}, or the checkpoint's)"
    parser.add_argument("--fit", choices=["crop", "squash"], default=own, help=fit)
    parser.add_argument(
        "--min-count",
        type=int,
        default=BuildSettings.min_count,
        help="rarer words of the train split become <unk> (default: %(default)s)",
    )
    words = "take its words, so that training can go on from it (--init_from); --min-count and --max-words mean nothing"
    parser.add_argument("--vocabulary", metavar="CHECKPOINT", help=words)
    largest = "largest vocabulary (default: %(default)s)"
    parser.add_argument("--max-words", type=int, default=BuildSettings.max_words, help=largest)
    length = "words of a caption that are trained on (default: %(default)s)"
    parser.add_argument("--max-length", type=int, default=BuildSettings.max_length, help=length)
    parser.add_argument(
        "--max-missing",
        type=float,
        default=BuildSettings.max_missing,
        help="share of missing or broken images allowed (default: %(default)s)",
    )
    parser.add_argument("--limit", type=int, help="take only so many images, the first of the source")
    parser.add_argument(
        "--seed", type=int, default=BuildSettings.seed, help="of everything random (default: %(default)s)"
    )
    decoders = "processes that decode photos, 0: this one (default: 0 with an encoder on the CPU, else up to 4)"
    parser.add_argument("--workers", type=int, default=own, help=decoders)
    group = parser.add_argument_group("annotation vectors instead of pixels")
    group.add_argument(
        "--encoder",
        metavar="NAME|CHECKPOINT",
        help="a torchvision network, e.g. mobilenet_v2; or a checkpoint's encoder",
    )
    group.add_argument("--weights", help="file, name of torchvision's weights (default: DEFAULT), or null (random)")
    group.add_argument("--layer", metavar="NODE", help="where the network is cut")
    group.add_argument("--grid", type=int, help="or: by the side of the feature map")
    group.add_argument(
        "--batch-size", type=int, default=32, help="images that are encoded at a time (default: %(default)s)"
    )
    precision = "of the encoder's products; auto: bf16 on CPUs and CUDA devices made for it (default: %(default)s)"
    group.add_argument("--precision", choices=get_args(Precision), default="fp32", help=precision)
    group.add_argument(
        "--mirror", action="store_true", help="store those of the mirrored images, too, for --augment flip"
    )
    scales = (
        "store those at these further sides, too (default: the checkpoint's, unless --image-size is given; or none)"
    )
    group.add_argument("--scales", type=int, nargs="*", default=own, help=scales)
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
