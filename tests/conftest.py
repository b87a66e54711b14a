"""Shared fixtures; shapes of tensors are checked in every test."""

from collections.abc import Callable
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

install_import_hook(["captioning", "preprocess"], "beartype.beartype")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Callable[..., Path]:
    """Path of a file or folder of the development data; skips when it is not there."""

    def find(*parts: str) -> Path:
        path = SHARED.joinpath(*parts)
        if not path.exists():
            pytest.skip(f"development data {'/'.join(parts)} is not beside the checkout")
        return path

    return find
