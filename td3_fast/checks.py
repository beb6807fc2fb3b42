"""Checks of the fields of configurations, whose messages name class and field."""

from __future__ import annotations

import math
import types
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_choices(config: Any) -> None:
    """ValueError unless each field that is annotated as some literals, or None, is one of them."""
    hints = get_type_hints(type(config))
    for field in fields(config):
        hint = hints[field.name]
        options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        known = [value for option in options if get_origin(option) is Literal for value in get_args(option)]
        value = getattr(config, field.name)
        if known and value not in known and not (value is None and types.NoneType in options):
            raise ValueError(
                f"{type(config).__name__}.{field.name} must be one of "
                f"{', '.join(repr(option) for option in known)}, got {value!r}"
            )


def check_sizes(config: Any, *names: str, least: int = 1) -> None:
    """ValueError unless the named fields of a configuration are at least `least`."""
    for name in names:
        if not getattr(config, name) >= least:
            raise ValueError(
                f"{type(config).__name__}.{name} must be at least {least}, got {getattr(config, name)}"
            )


def check_rates(config: Any, *names: str) -> None:
    """ValueError unless the named fields of a configuration lie in [0, 1)."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(
                f"{type(config).__name__}.{name} must lie in [0, 1), got {getattr(config, name)}"
            )


def check_positive(config: Any, *names: str) -> None:
    """ValueError unless the named fields of a configuration are finite and above 0."""
    for name in names:
        value = getattr(config, name)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{type(config).__name__}.{name} must be finite and above 0, got {value}")


def check_not_negative(config: Any, *names: str) -> None:
    """ValueError unless the named fields of a configuration are finite and at least 0."""
    for name in names:
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{type(config).__name__}.{name} must be finite and at least 0, got {value}")
