"""Configurations as nested dicts: laid over one another, and cut down to what was set."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from jmlr_jax.config import Config


def nest(parts: Sequence[str], value: Any) -> dict[str, Any]:
    """A value below these keys."""
    for part in reversed(parts):
        value = {part: value}
    nested: dict[str, Any] = value
    return nested


def merge(base: dict[str, Any], over: dict[str, Any]) -> None:
    """Lays ``over`` on ``base`` in place, mapping by mapping; anything else replaces."""
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = value


def given(tree: dict[str, Any], resolved: bool, prefix: str = "") -> set[str]:
    """Dotted keys that a file sets; of the record of a run, which has all, those that are not at their default."""
    found: set[str] = set()
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            found |= given(value, resolved, f"{key}.")
        elif not resolved or value != _default(key):
            found.add(key)
    return found


def _default(key: str) -> Any:
    value: Any = _defaults()
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def only_given(tree: dict[str, Any], keys: set[str], prefix: str) -> dict[str, Any]:
    """The part of a section that was set; sections within it are kept where any of their keys was."""
    kept: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        inside = isinstance(value, dict) and any(other.startswith(f"{key}.") for other in keys)
        if inside:
            kept[name] = only_given(value, keys, f"{key}.")
        elif key in keys:
            kept[name] = value
    return kept


@cache
def _defaults() -> dict[str, Any]:
    return Config().model_dump(mode="json")
