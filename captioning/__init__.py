"""Show, Attend and Tell: image captioning that says where it looked.

from captioning import load_captioner
captioner = load_captioner("flickr8k-soft")
caption = captioner.caption(["photo.jpg"], beam_size=5)[0]
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captioning.api import Caption, Captioner, load_captioner

__all__ = ["Caption", "Captioner", "load_captioner"]


def __getattr__(name: str) -> Any:
    """What `__all__` names, imported when it is asked for: torch takes seconds, and not every module here needs it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("captioning.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
