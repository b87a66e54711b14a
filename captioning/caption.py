"""Caption photos and show where each word looked.

    python -m captioning.caption photo.jpg --overlay overlays/
    python -m captioning.caption photos/ 'more/*.png' --checkpoint runs/x/best --beam-size 5 --json captions.json

Standard output has one line per photo: its path, a tab, the caption.
"""

import argparse
import contextlib
import glob
import importlib.util
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from captioning import Caption, Captioner, load_captioner
from captioning.api import OVERLAYS
from captioning.config import SearchConfig
from captioning.console import exit_code, go_on_unheard, one_line
from captioning.devices import default_device
from captioning.files import make_folder, make_place, write_text
from captioning.images import EXTENSIONS, batches, open_image
from captioning.memory import keep_memory
from captioning.options import add_sampling_options, add_search_options, given


def image_files(arguments: Sequence[str]) -> list[Path]:
    """Files, the image files of folders, and what globs match; each once, in the order given.

    Raises:
        FileNotFoundError: an argument names nothing.
        ValueError: it is empty.
    """
    found: dict[Path, None] = {}
    for argument in arguments:
        if not argument:  # of a shell's variable that is not set; as a path it would be the folder that one is in
            raise ValueError("an image must have a name (got '')")
        path = Path(argument)
        if path.is_dir():
            shown = (p for p in path.iterdir() if not p.name.startswith("."))  # macOS leaves ._a.jpg beside a.jpg
            files = sorted(p for p in shown if p.suffix.lower() in EXTENSIONS and p.is_file())
            if not files:
                raise FileNotFoundError(f"{argument}: no image files in this folder ({' '.join(sorted(EXTENSIONS))})")
        elif path.exists():
            files = [path]
        else:
            files = [Path(p) for p in sorted(glob.glob(argument, recursive=True)) if Path(p).is_file()]
            if not files:
                raise FileNotFoundError(f"{argument}: no such file, folder or match")
        found.update(dict.fromkeys(files))
    return list(found)


def opened(files: Sequence[Path], batch_size: int) -> Iterator[list[tuple[Path, Any]]]:
    """Photos in batches, with the reason in the place of one that cannot be read; large ones make small batches."""

    def photo(path: Path) -> tuple[Path, Any]:
        try:
            return path, open_image(path)
        except (ValueError, OSError) as error:
            return path, error

    yield from batches(map(photo, files), batch_size, lambda found: math.prod(getattr(found[1], "size", ())))


def captions_of(
    captioner: Captioner, files: Sequence[Path], batch_size: int, options: dict[str, Any]
) -> Iterator[tuple[Path, Caption | Exception]]:
    """The caption of every file; for a file that cannot be read, the reason instead."""
    if batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1 (got {batch_size})")
    start = 0
    for batch in opened(files, batch_size):
        photos = [photo for _, photo in batch if not isinstance(photo, Exception)]
        own = {**options, "seed": options.get("seed", 0) + start}  # or every batch would draw the same
        captions = iter(captioner.caption(photos, batch_size=batch_size, **own))
        for path, photo in batch:
            yield path, photo if isinstance(photo, Exception) else next(captions)
        start += len(batch)


def as_json(path: Path, caption: Caption) -> dict[str, Any]:
    """A photo's caption as JSON values; of alternatives the sentence and its score."""
    alternatives = [{"text": c.text, "score": c.score} for c in caption.alternatives]
    return {"image": str(path), **caption.as_dict(), "alternatives": alternatives}


def draw_overlay(path: Path, caption: Caption, options: argparse.Namespace, taken: set[str]) -> bool:
    """Draw the per-word attention and say where; whether that went well: other photos are not lost if it did not."""
    try:
        said = write_overlay(path, caption, options, taken) if caption.words else "no words to overlay"
    except (ValueError, OSError) as error:
        print(f"caption: {one_line(path)}: no overlay: {one_line(error)}", file=sys.stderr)
        return False
    print(one_line(f"{path}: {said}"), file=sys.stderr)
    return True


def not_to_be_replaced(files: Sequence[Path], folder: Path) -> set[str]:
    """The names of all files in a folder if photos to be captioned lie there; else none. Case tells no names apart.

    In a folder of overlays a new one replaces the old; beside the photos themselves it takes a name that is free.
    """
    places = {place for path in files for place in (path.parent, path.resolve().parent)}  # a photo may be a link
    photos_there = any(folder.samefile(place) for place in places)
    return {path.name.casefold() for path in folder.iterdir()} if photos_there else set()


def write_overlay(path: Path, caption: Caption, options: argparse.Namespace, taken: set[str]) -> Path:
    """Draw the per-word attention on the photo; two photos of one name get two files."""
    numbers = itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
    names = (f"{path.stem}{number}.{options.overlay_format}" for number in numbers)
    name = next(name for name in names if name.casefold() not in taken)
    taken.add(name.casefold())
    file = Path(options.overlay) / name
    caption.overlay(path, file)
    return file


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(
        prog="python -m captioning.caption",
        description="Caption photos and show where each word looked. Standard output has a line per photo: path, tab, "
        "caption; ' ...' ends one that was cut off at --max-length.",
    )
    parse.add_argument("images", nargs="+", help="image files, folders, globs")
    parse.add_argument("--checkpoint", default="flickr8k-soft", help="folder, run, or name of a pretrained one")
    add_search_options(parse)
    add_sampling_options(parse)
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument(
        "--overlay",
        metavar="DIR",
        help="draw each photo's per-word attention here, over what has its name; among the photos, under free names",
    )
    parse.add_argument(
        "--overlay-format",
        choices=[ending.removeprefix(".") for ending in OVERLAYS],
        default="png",
        help="one tile per word, an animation, or a page on which words are pointed at",
    )
    parse.add_argument("--head", type=int, help="whose attention is shown, from 0; by default the mean of all heads")
    parse.add_argument("--json", metavar="FILE", help="write everything, attention included; - is standard output")
    parse.add_argument("--words", action="store_true", help="also print each word's log-probability, gate and place")
    parse.add_argument("--batch-size", type=int, default=16)
    parse.add_argument("--device", default=default_device())
    return parse


def one_line_name(path: Path) -> str:
    """A path that neither ends its line nor its field, and steers no terminal: as Python would write it."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], str(path))


def make_folders(options: argparse.Namespace, files: Sequence[Path]) -> None:
    """Make the folders that will be written to, before the work is done."""
    for option in ("overlay", "json"):
        if getattr(options, option) == "":
            raise ValueError(f"--{option} must name what to write (got '')")
    if options.overlay_format != parser().get_default("overlay_format") and not options.overlay:
        raise ValueError("--overlay-format: nothing is drawn; set --overlay too")
    if options.json and options.json == options.overlay != "-":
        raise ValueError(f"--json and --overlay: a file and a folder cannot both be {options.json}")
    if options.overlay:
        if options.overlay_format != "html" and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--overlay: needs matplotlib (this package's extra `demo`), or --overlay-format html")
        make_folder(Path(options.overlay), f"--overlay {options.overlay}")
    if options.json and options.json != "-":
        make_place(Path(options.json), "--json")
        if Path(options.json).exists() and any(path.samefile(options.json) for path in files):
            raise ValueError(f"--json {options.json}: is a photo to be captioned; give another file to write")


def run(options: argparse.Namespace) -> int:
    """Caption every file; 2 if one of them could not be read, or its overlay not be drawn."""
    files = image_files(options.images)
    captioner = load_captioner(options.checkpoint, device=options.device, head=options.head)
    if options.overlay and not captioner.attends:
        raise ValueError(f"--overlay: {options.checkpoint} has no attention to draw (its decoder attends to nothing)")
    make_folders(options, files)
    search = {**given(options, SearchConfig), "seed": options.seed}
    lines = sys.stderr if options.json == "-" else sys.stdout
    results, failed = [], 0
    taken = not_to_be_replaced(files, Path(options.overlay)) if options.overlay else set()
    try:
        for path, caption in captions_of(captioner, files, options.batch_size, search):
            if isinstance(caption, Exception):
                print(f"caption: {one_line(caption)}", file=sys.stderr)
                failed += 1
                continue
            if not print_caption(path, caption, options.words, lines) and not (options.overlay or options.json):
                break
            if options.json:
                results.append(as_json(path, caption))
            if options.overlay:
                failed += not draw_overlay(path, caption, options, taken)
    except BaseException:
        keep_captions(results, options.json)
        raise
    if options.json == "-":
        print_json(results)
    elif options.json:
        write_text(Path(options.json), json.dumps(results) + "\n")
    return 2 if failed else 0


def print_caption(path: Path, caption: Caption, words: bool, lines: Any) -> bool:
    """A line per caption, and perhaps one per word; whether anybody reads them."""
    try:
        for each in (caption, *caption.alternatives):
            print(f"{one_line_name(path)}\t{each.text}{'' if each.finished else ' ...'}", file=lines)
        if words:
            print_words(caption, lines)
    except BrokenPipeError:
        go_on_unheard(lines)
        return False
    return True


def keep_captions(results: Sequence[dict[str, Any]], file: str | None) -> None:
    """After Ctrl-C or a failure: what was to be written to a file is not lost, and an older file stays whole."""
    if not results or file in (None, "-"):
        return
    with contextlib.suppress(OSError):  # the failure may have been a full disk, and is what is to be told
        write_text(Path(f"{file}.partial"), json.dumps(results) + "\n")
        print(f"caption: {file}.partial has the captions of the first {len(results)} photos", file=sys.stderr)


def print_json(results: Sequence[dict[str, Any]]) -> None:
    """All results on standard output, as long as somebody reads them."""
    try:
        print(json.dumps(results), flush=True)
    except BrokenPipeError:
        go_on_unheard(sys.stdout)


def print_words(caption: Caption, lines: Any) -> None:
    """One line per word: log p, the gate, and the cell that it looked at (and how many around), or looked at most."""
    for t, word in enumerate(caption.words):
        line = f"  {word:<16} log p {caption.log_probs[t]:7.3f}"
        if caption.betas is not None:
            line += f"   beta {caption.betas[t]:.2f}"
        if caption.alphas is not None:
            _, rows, columns = caption.alphas.shape
            cells = [caption.alphas[t].argmax()] if caption.locations is None else caption.locations[t]
            for i, (row, column) in enumerate(divmod(int(cell), columns) for cell in dict.fromkeys(map(int, cells))):
                line += "   looked most" if caption.locations is None else " and" if i else "   looked"
                line += f" at row {row + 1} of {rows}, column {column + 1} of {columns}"
                line += f", {caption.window // 2} around it" if caption.window > 1 else ""
                line += f" ({caption.alphas[t, row, column]:.0%})"
        print(line, file=lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 after a mistake, which it says in one line."""
    keep_memory()
    mistakes = (ValueError, OSError, RuntimeError)
    return exit_code("caption", lambda: run(parser().parse_args(arguments)), mistakes=mistakes)


if __name__ == "__main__":
    sys.exit(main())
