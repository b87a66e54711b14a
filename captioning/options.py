"""What the command lines share: the options of a search, and which of all options were given."""

import argparse
import dataclasses
from typing import Any

from captioning.config import LOCATIONS


def add_search_options(parser: argparse._ActionsContainer) -> None:
    """The options of a search for the best caption; what is not given is the checkpoint's own."""
    own, said = argparse.SUPPRESS, "default: the checkpoint's own"
    parser.add_argument("--beam-size", type=int, default=own, help=said)
    parser.add_argument("--max-length", type=int, default=own, help=said)
    parser.add_argument("--length-penalty", type=float, default=own, help=said)
    parser.add_argument("--no-repeat-ngram", type=int, default=own, help=said)
    parser.add_argument("--location", choices=LOCATIONS, default=own, help="where hard attention looks")
    parser.add_argument("--paths", type=int, default=own, help="of --location sample: the mean over so many")
    mirror = "look at the mirrored photo, too"
    parser.add_argument("--mirror", action=argparse.BooleanOptionalAction, default=own, help=mirror)
    sides = "look at the photo at each of the sizes that the model learned from (encoder.scales)"
    parser.add_argument("--multi-scale", action=argparse.BooleanOptionalAction, default=own, help=sides)


def add_sampling_options(parser: argparse._ActionsContainer) -> None:
    """The options of several captions of a photo, and of such as are drawn at random."""
    own = argparse.SUPPRESS
    parser.add_argument("--num-captions", type=int, default=own, help="print the N best, one per line")
    parser.add_argument("--sample", action="store_true", default=own, help="draw captions at random, do not search")
    parser.add_argument("--temperature", type=float, default=own, help="of --sample")
    parser.add_argument("--top-k", type=int, default=own, help="of --sample")
    parser.add_argument("--top-p", type=float, default=own, help="of --sample")


def given(options: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The fields of a config class that a command line was given; argparse leaves the others out (SUPPRESS)."""
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(kind) if hasattr(options, f.name)}
