"""Every configuration key is read by the code it claims to steer."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from jmlr_jax.config import Config

PACKAGE = Path(__file__).resolve().parent.parent / "jmlr_jax"
NOT_READERS = ("config.py", "config_io.py")


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields (dotted key, attribute name), sections included."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _fields(kind, f"{prefix}{name}.")


@cache
def _read_names() -> set[str]:
    """Names read as an attribute of something other than ``self``, anywhere in the package but the schema."""
    names: set[str] = set()
    for file in PACKAGE.rglob("*.py"):
        if file.name in NOT_READERS:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                if not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                    names.add(node.attr)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
                names |= _computed(node.args[1])
    return names


def _computed(name: ast.expr) -> set[str]:
    """Fields that a getattr with a literal or an f-string can mean: ``getattr(data, f"{split}_path")``."""
    parts = name.values if isinstance(name, ast.JoinedStr) else [name]
    pattern = "".join(re.escape(str(p.value)) if isinstance(p, ast.Constant) else r"\w+" for p in parts)
    fields = {field for _, field in _fields(Config)}
    return {field for field in fields if pattern != r"\w+" and re.fullmatch(pattern, field)}


@pytest.mark.parametrize(("key", "name"), sorted(_fields(Config)))
def test_field_is_read(key: str, name: str) -> None:
    assert name in _read_names(), f"{key}: nothing in jmlr_jax reads it; use it or remove it"
