"""Nested frozen dataclasses of settings, read and changed by dotted names: `distillation.settings.rounds`."""

from __future__ import annotations

import ast
import re
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from typing import Any, get_args, get_origin, get_type_hints

from dinv.checks import near


def flat(settings: Any) -> dict[str, Any]:
    """Settings by dotted name, at any depth."""
    rows = {}
    for item in fields(settings):
        value = getattr(settings, item.name)
        parts = flat(value) if is_dataclass(value) else {"": value}
        rows |= {f"{item.name}.{name}".rstrip("."): inner for name, inner in parts.items()}
    return rows


def written(value: Any) -> str:
    """A setting as it is shown: no digit lost, a tuple's items after each other."""
    if isinstance(value, tuple):
        return ", ".join(f"({written(item)})" if isinstance(item, tuple) else written(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def override(settings: Any, key: str, value: Any) -> Any:
    """`settings` with one of them replaced. Text is read as a Python literal of the setting's type.

    Raises:
        ValueError: no such setting (the nearest is named, and all), or a value of a wrong type or range.
    """
    names = [name for name in flat(settings) if name != "name"]
    if key not in names:
        ends = re.compile(rf"{re.escape(key.partition('.')[0])}\..*\b{re.escape(key.rpartition('.')[2])}")
        hint = near(key, list(filter(ends.fullmatch, names)) or names)
        raise ValueError(f"unknown setting {key!r}{hint} The settings are {', '.join(names)}")
    return _replaced(settings, key, key.split("."), value)


def _replaced(part: Any, key: str, path: list[str], value: Any) -> Any:
    name, *rest = path
    old = getattr(part, name)
    if rest:
        return replace(part, **{name: _replaced(old, key, rest, value)})
    hint = get_type_hints(type(part))[name]
    if isinstance(value, str) and hint is not str:
        with suppress(ValueError, SyntaxError):  # else it stays text, which is of no other type
            value = ast.literal_eval({"true": "True", "false": "False"}.get(value.lower(), value))
    return replace(part, **{name: _converted(key, value, hint, old)})


def _converted(key: str, value: Any, hint: Any, old: Any) -> Any:
    kind = get_origin(hint) or hint
    if isinstance(value, str) and kind is tuple and get_args(hint)[0] is str:
        value = tuple(value.split(","))  # names need no quotes
    if kind is tuple and isinstance(value, (list, tuple)):
        items = get_args(hint)
        if items[-1] is Ellipsis:
            items = items[:1] * len(value)
        if len(items) == len(value):
            return tuple(_converted(key, *pair, old) for pair in zip(value, items, strict=True))
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or kind is tuple:
        raise ValueError(f"setting {key}={value!r} must be {kind.__name__}, like {old!r}")
    if kind in (int, float) and not 0 <= value < float("inf"):
        raise ValueError(f"setting {key}={value} must be finite and not negative")
    if value == 0 and key.rpartition(".")[2] == "seeds":
        raise ValueError(f"setting {key}=0: at least one seed is needed")
    return value
