"""What a setting may be: each check is one line that names the field, the value and what is allowed."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any


def positive(owner: object, *names: str) -> None:
    """Refuse numbers that are not above 0."""
    for name in names:
        if not getattr(owner, name) > 0:
            raise ValueError(f"{name} must be positive (got {getattr(owner, name)})")


def at_most(owner: object, limit: int, *names: str) -> None:
    """Refuse numbers above a limit."""
    for name in names:
        if getattr(owner, name) > limit:
            raise ValueError(f"{name} must be at most {limit} (got {getattr(owner, name)})")


def fraction(owner: object, *names: str) -> None:
    """Refuse numbers outside [0, 1)."""
    for name in names:
        if not 0 <= getattr(owner, name) < 1:
            raise ValueError(f"{name} must lie in [0, 1) (got {getattr(owner, name)})")


def finite(owner: object, *names: str) -> None:
    """Refuse infinities and what is no number."""
    for name in names:
        if not math.isfinite(getattr(owner, name)):
            raise ValueError(f"{name} must be finite (got {getattr(owner, name)})")


def not_negative(owner: object, *names: str) -> None:
    """Refuse numbers below 0."""
    for name in names:
        if not getattr(owner, name) >= 0:
            raise ValueError(f"{name} must not be negative (got {getattr(owner, name)})")


def refuse_unread(owner: Any, why: str, names: Sequence[str] | None = None, *, prefix: str = "") -> None:
    """Refuse fields (None: all of them) that someone changed and that nothing will read."""
    for each in dataclasses.fields(owner):
        if (names is None or each.name in names) and getattr(owner, each.name) != each.default:
            raise ValueError(f"{prefix}{each.name}={getattr(owner, each.name)!r} {why}")
