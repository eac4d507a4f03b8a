"""Dataclasses from nested mappings: unknown keys, wrong types and impossible values fail and name the key.

Knows nothing of any particular configuration: a field's metadata may hold `choices` or `bounds`.
"""

from __future__ import annotations

import difflib
import math
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, fields, is_dataclass
from typing import Any

from biokit.errors import ConfigError


def choice(default: str, *choices: str) -> Any:
    """A text field that takes one of a few values."""
    return field(default=default, metadata={"choices": choices})


def bounded(default: float, low: float, high: float = math.inf) -> Any:
    """A number field between two bounds, both allowed."""
    return field(default=default, metadata={"bounds": (low, high)})


def build(cls: type, tree: Mapping[str, Any], where: str, nearest: Callable[[str], str], prefix: str = "") -> Any:
    """An object of the dataclass `cls` from nested mappings.

    Args:
        where: what is read, for messages.
        nearest: unknown dotted key -> what to do instead.

    Raises:
        ConfigError: an unknown key, a wrong type, a value that is not among the choices or within the bounds.
    """
    known = {f.name: f for f in fields(cls)}
    for key in tree:
        if key not in known:
            raise ConfigError(where, f'unknown key "{prefix}{key}"', nearest(f"{prefix}{key}"))
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, value in tree.items():
        hint, dotted = hints[name], f"{prefix}{name}"
        if is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ConfigError(where, f"{dotted} is {value!r}", f"It is a group of keys: {_group(hint, dotted)}")
            values[name] = build(typing.cast(type, hint), value, where, nearest, dotted + ".")
        else:
            values[name] = _checked(value, hint, known[name].metadata, dotted, where)
    return cls(**values)


def _checked(value: Any, hint: type, metadata: Mapping[str, Any], dotted: str, where: str) -> Any:
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        value = _as_float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if hint is str and value is None:
        value = ""
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(
            where,
            f"{dotted} is {value!r} ({type(value).__name__})",
            f"Give {'an' if hint is int else 'a'} {hint.__name__}",
        )
    if "choices" in metadata and value not in metadata["choices"]:
        raise ConfigError(where, f"{dotted} is {value!r}", f"Valid: {', '.join(metadata['choices'])}")
    low, high = metadata.get("bounds", (None, None))
    finite = not isinstance(value, float) or math.isfinite(value)
    if low is not None and not (finite and low <= value <= high):
        raise ConfigError(
            where,
            f"{dotted} is {value!r}",
            f"Valid: {low:g} or more" if high == math.inf else f"Valid: {low:g} to {high:g}",
        )
    return value


def _as_float(value: int | str) -> float | str:
    try:
        return float(value)  # YAML 1.1 reads 1e-3 as text
    except ValueError:
        return str(value)


def leaf_types(cls: type, prefix: str = "") -> Iterable[tuple[str, type]]:
    """(dotted key, type) of every value of a dataclass, in order."""
    hints = typing.get_type_hints(cls)
    for f in fields(cls):
        hint = hints[f.name]
        if is_dataclass(hint):
            yield from leaf_types(typing.cast(type, hint), f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", hint


def _group(cls: Any, prefix: str) -> str:
    return ", ".join(f"{prefix}.{f.name}" for f in fields(cls))


def nearest_key(key: str, keys: list[str], other_names: Mapping[str, str]) -> str:
    """What to do about an unknown key: the likeliest one, else all.

    Args:
        other_names: what other systems call a key -> the key.
    """
    leaf = key.rsplit(".", 1)[-1]
    if leaf in other_names:
        return f'Did you mean "{other_names[leaf]}"?'
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    if not close:
        leaves = {k.rsplit(".", 1)[-1]: k for k in keys}
        close = [leaves[m] for m in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.5)]
    return f'Did you mean "{close[0]}"?' if close else f"Valid keys: {', '.join(keys)}"


def list_divisors(number: int) -> list[int]:
    """All divisors of a number above 0, ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
