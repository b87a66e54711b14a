"""Caption a split and score it, or score anyone's captions.

python -m captioning.evaluate --checkpoint runs/x/best --data data.h5 --split val --beam-size 5 --output results.json
python -m captioning.evaluate --checkpoint runs/x/best --data data.h5 --diagnose
python -m captioning.evaluate --results results.json --references captions_val2017.json
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from captioning.extras import require

if __name__ == "__main__":
    require("captioning.evaluate")

from captioning.api import search_config
from captioning.checkpoint import Checkpoint, checkpoint_folder
from captioning.compatibility import check_fits, check_views
from captioning.config import Location, SearchConfig
from captioning.console import exit_code
from captioning.data import ANNOTATIONS, SPLITS, CaptionData, resizing
from captioning.decoding import Hypothesis
from captioning.devices import check_device, default_device
from captioning.diagnosis import check_enough, diagnose, signal_to_noise
from captioning.files import make_place
from captioning.findings import Diagnosis
from captioning.memory import keep_memory
from captioning.metrics import DEFAULT_METRICS, Scores, check_settings, score
from captioning.model_config import Resample, View
from captioning.models.attention import is_hard
from captioning.models.captioner import CaptioningModel
from captioning.options import add_search_options, given
from captioning.results import read_references, read_results, select_references, write_results
from captioning.tokenization import detokenize
from captioning.vocabulary import Vocabulary
from captioning.voices import Ensemble, caption_images, load_ensemble


@dataclass(frozen=True)
class SplitCaption:
    """An image's best caption, and the hypothesis behind it."""

    text: str
    hypothesis: Hypothesis


def caption_split(
    models: CaptioningModel | Sequence[CaptioningModel],
    data: CaptionData,
    indices: Sequence[int],
    vocabulary: Vocabulary,
    config: SearchConfig,
    *,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, SplitCaption]:
    """Caption images of a data file.

    Args:
        models: in evaluation mode, on one device; several speak with one voice.
        data: pixels of any size, or annotation vectors of these models' encoder.
        indices: which images.
        vocabulary: the model's words (not the file's).
        config: the search.
        batch_size: images at once.
        seed: of sampled words and locations, if the search samples.
        progress: show a bar.

    Returns:
        The best caption of each image, by its name.

    Raises:
        ValueError: the search looks at the images in a way of which the file has no annotation vectors.
    """
    models = [models] if isinstance(models, CaptioningModel) else models
    check_views(data, config, [model.encoder for model in models])
    generator = torch.Generator(models[0].device).manual_seed(seed)
    found: dict[str, SplitCaption] = {}
    for start in tqdm(range(0, len(indices), batch_size), unit="batch", disable=not progress, file=sys.stderr):
        part = [int(i) for i in indices[start : start + batch_size]]
        load = _loader(data, part)
        hypotheses = caption_images(models, load, config, generator=generator)
        for i, best in zip(part, hypotheses, strict=True):
            found[data.names[i]] = SplitCaption(detokenize(vocabulary.decode(best[0].ids)), best[0])
    return found


def _loader(data: CaptionData, indices: Sequence[int]) -> Callable[[CaptioningModel, View], Tensor]:
    """Images of a data file as a model wants them; pixels are read and resized once for all who want them alike."""

    @cache
    def pixels(side: int, resample: Resample) -> Tensor:
        resize = resizing(side, resample)
        return torch.stack([resize(data.image(i)) for i in indices])

    def load(model: CaptioningModel, view: View) -> Tensor:
        if data.kind == ANNOTATIONS:
            return torch.stack([data.image(i, view) for i in indices]).to(model.device)
        images = pixels(model.encoder.sides[view.scale], model.encoder.resample)
        return (images.flip(-1) if view.mirrored else images).to(model.device)

    return load


def evaluate(
    captioner: Checkpoint | Ensemble,
    data: CaptionData,
    split: str,
    config: SearchConfig,
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    tokenizer: str = "auto",
    limit: int = 0,
    batch_size: int = 32,
    device: str = "cpu",
    output: Path | None = None,
) -> tuple[dict[str, SplitCaption], Scores]:
    """Caption a split and score it.

    Args:
        captioner: whose captions.
        data: pixels, or annotation vectors of its encoder.
        split: which images.
        config: the search.
        metrics: which scores, see `score`.
        tokenizer: auto, ptb or python, see `score`.
        limit: only the first so many images of the split; 0: all.
        batch_size: images at once.
        device: where it runs.
        output: write the captions to this file, in COCO's results format, before they are scored.

    Raises:
        ValueError: what does not fit together, or needs Java where there is none; before anything is captioned.
    """
    check_settings(tokenizer, metrics)
    ensemble = Ensemble.of(captioner)
    for member in ensemble.members:
        check_fits(member, data)
    indices = data.indices(split).tolist()[: limit or None]
    found = caption_split(
        [model.to(device).eval() for model in ensemble.models],
        data,
        indices,
        ensemble.vocabulary,
        config,
        batch_size=batch_size,
        progress=sys.stderr.isatty(),
    )
    references = {data.names[i]: data.references(i) for i in indices}
    captions = {name: caption.text for name, caption in found.items()}
    if output is not None:
        write_results(output, captions)
    return found, score(captions, references, tokenizer=tokenizer, metrics=tuple(metrics))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m captioning.evaluate", description="Caption a split and score it, or score anyone's captions."
    )
    ours = parser.add_argument_group("a checkpoint on a data file")
    ours.add_argument("--checkpoint", help="checkpoint folder, run folder, or name of a pretrained one")
    ours.add_argument("--data", help="HDF5 file made by python -m preprocess")
    ours.add_argument("--split", choices=SPLITS, help="default: val")
    add_search_options(ours)
    ours.add_argument("--limit", type=int, default=0, help="only the first so many images; 0: all")
    ours.add_argument("--batch-size", type=int, default=32)
    ours.add_argument("--device", default=default_device())
    ours.add_argument(
        "--diagnose",
        type=int,
        nargs="?",
        const=200,
        metavar="IMAGES",
        help="also say what the attention does on the first so many images (200; 0: all), see docs/diagnostics.md",
    )
    ours.add_argument("--output", help="write the captions here, in COCO's results format")
    theirs = parser.add_argument_group("anyone's captions")
    theirs.add_argument("--results", help="captions in COCO's results format")
    theirs.add_argument(
        "--references",
        help="JSON of COCO, of Karpathy or {id: [captions]}; a token file, results.csv or captions.txt of Flickr8k or "
        "Flickr30k; or an HDF5 file of preprocess",
    )
    parser.add_argument("--tokenizer", choices=("auto", "ptb", "python"), default="auto")
    parser.add_argument("--spice", action="store_true", help="SPICE too (Java; downloads its models when first used)")
    return parser


def _run(options: argparse.Namespace) -> tuple[Scores, dict[str, object], dict[int, Diagnosis]]:
    """The scores, what to say about how they came about, and what the attention does if that was asked."""
    metrics = (*DEFAULT_METRICS, "SPICE") if options.spice else DEFAULT_METRICS
    if options.results or options.references:
        return _run_theirs(options, metrics), {"results": options.results}, {}
    options.split = options.split or "val"
    if not (options.checkpoint and options.data):
        raise ValueError("give --checkpoint and --data, or --results and --references")
    if options.batch_size < 1 or options.limit < 0:
        raise ValueError(
            f"--batch-size must be at least 1 and --limit not negative (got {options.batch_size} and {options.limit})"
        )
    if options.diagnose is not None and (options.diagnose < 0 or options.diagnose == 1):
        raise ValueError(f"--diagnose must be 0 for all images, or at least 2 (got {options.diagnose})")
    options.device = str(check_device(options.device))
    ensemble, data = load_ensemble(checkpoint_folder(options.checkpoint)), CaptionData(options.data)
    if options.diagnose is not None and ensemble.names:
        raise ValueError(f"--diagnose: {options.checkpoint} is an ensemble; diagnose its members one by one")
    if options.diagnose is not None:
        check_enough(_diagnosed(options, data))
    config = search_config(ensemble.search, **given(options, SearchConfig))
    if options.output:
        make_place(Path(options.output), "--output")
        if Path(options.output).exists() and Path(options.output).samefile(options.data):
            raise ValueError(f"--output {options.output}: is the data file; give another file to write")
    began = time.perf_counter()
    found, scores = evaluate(
        ensemble,
        data,
        options.split,
        config,
        metrics=metrics,
        tokenizer=options.tokenizer,
        limit=options.limit,
        batch_size=options.batch_size,
        device=options.device,
        output=Path(options.output) if options.output else None,
    )
    look = {"location": config.location} if any(is_hard(model) for model in ensemble.models) else {}
    about: dict[str, object] = {
        "checkpoint": options.checkpoint,
        "data": options.data,
        "split": options.split,
        "beam_size": config.beam_size,
        **look,
        "looks": _looks(config),
        "search": {name: value for name, value in dataclasses.asdict(config).items() if name != "location"},
        "unfinished": sum(not caption.hypothesis.finished for caption in found.values()),
        "seconds": round(time.perf_counter() - began, 1),
    }
    return scores, about, _diagnose(options, ensemble.members[0], data, config.location)


def _looks(config: SearchConfig) -> str:
    """How often a search looks at a photo, in words."""
    further = [(config.multi_scale, "at every size"), (config.mirror, "mirrored, too")]
    further += [(config.paths > 1, f"along {config.paths} paths of locations")]
    return ", ".join(["the photo", *(words for is_so, words in further if is_so)])


def _run_theirs(options: argparse.Namespace, metrics: Sequence[str]) -> Scores:
    """The scores of captions that are there already."""
    if not (options.results and options.references) or options.checkpoint or options.data:
        raise ValueError("--results and --references go together, and without --checkpoint and --data")
    if options.diagnose is not None:
        raise ValueError("--diagnose needs --checkpoint and --data: captions alone have no attention")
    ours = [name for name in ("output", "limit", "split") if getattr(options, name)]
    ours += given(options, SearchConfig)
    if ours:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in ours)
        raise ValueError(f"{names}: has no meaning for captions that are there already (--results)")
    results = read_results(Path(options.results))
    references = select_references(results, _references(Path(options.references)))
    return score(results, references, tokenizer=options.tokenizer, metrics=metrics)


def _references(path: Path) -> Mapping[str, Sequence[str]]:
    """References by image, of a file of captions or of a data file."""
    if path.suffix not in (".h5", ".hdf5"):
        return read_references(path)
    data = CaptionData(path)
    return {name: data.references(i) for i, name in enumerate(data.names)}


def _diagnose(
    options: argparse.Namespace, checkpoint: Checkpoint, data: CaptionData, location: Location
) -> dict[int, Diagnosis]:
    """What was asked for, by the side of the pictures that the model looked at."""
    if options.diagnose is None:
        return {}
    subject = (checkpoint.model, data, _diagnosed(options, data), checkpoint.vocabulary)
    found = {}
    stored = (checkpoint.encoder if data.encoder is None else data.encoder).sides
    for scale, side in enumerate(checkpoint.encoder.sides):
        if side not in stored[scale : scale + 1]:  # there are no vectors of that size
            continue
        diagnosis = diagnose(*subject, batch_size=options.batch_size, location=location, scale=scale)
        signal = signal_to_noise(*subject, scale=scale)
        found[side] = dataclasses.replace(diagnosis, gradient_snr=signal)
    return found


def _diagnosed(options: argparse.Namespace, data: CaptionData) -> list[int]:
    """The images on which attention is diagnosed."""
    return data.indices(options.split).tolist()[: options.limit or None][: options.diagnose or None]


def _report(options: argparse.Namespace) -> int:
    """Score and print: the tables, and one line of JSON at last."""
    scores, about, diagnoses = _run(options)
    print(scores.table())
    for name in ("split", "beam_size", "location", "looks", "unfinished"):
        if name in about:
            print(f"{name.replace('_', ' ')}: {about[name]}")
    for i, (side, diagnosis) in enumerate(diagnoses.items()):
        heading = f"pictures of {side} pixels:\n" if len(diagnoses) > 1 else ""
        print(f"\n{heading}{diagnosis.table()}")
        about[f"diagnosis_{side}" if i else "diagnosis"] = diagnosis.as_dict()
    print(json.dumps({**scores.as_dict(), **about}))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 after a mistake, which it says in one line."""
    keep_memory()
    mistakes = (ValueError, OSError, RuntimeError)
    return exit_code("evaluate", lambda: _report(_parser().parse_args(arguments)), mistakes=mistakes)


if __name__ == "__main__":
    sys.exit(main())
