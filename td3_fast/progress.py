"""How long work reports itself: the library calls back, the caller decides what to show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

# (stage, done, total, values): `done` of `total` units of `stage` are finished; `values` are the latest figures
Progress: TypeAlias = Callable[[str, int, int, Mapping[str, float]], None]


def silent(stage: str, done: int, total: int, values: Mapping[str, float]) -> None:
    """The default: report nothing."""
