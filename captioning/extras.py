"""What a command needs beyond captioning a photo, said before an import fails."""

import importlib.util
import sys

TRAIN = ("h5py", "nltk", "accelerate", "tensorboard", "pycocotools", "pycocoevalcap")
"""The modules of this package's extra `train`."""


def require(command: str) -> None:
    """End the process with 2 and a line if `TRAIN` is not there; a command calls it before the imports that need it.

    A program that imports a command's module has the ModuleNotFoundError instead.
    """
    missing = [name for name in TRAIN if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{command}: needs {', '.join(missing)} (this package's extra `train`)", file=sys.stderr)
        sys.exit(2)
