"""What a command needs beyond captioning a photo, said before an import fails."""

import importlib.util
import sys


def require(command: str, *modules: str) -> None:
    """End the process with 2 and a line if the package's extra `train` is not installed; call it before the imports.

    A program that imports a command's module has the ModuleNotFoundError instead.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{command}: needs {', '.join(missing)} (this package's extra `train`)", file=sys.stderr)
        sys.exit(2)
