"""A process's variables in words, for somebody who looks on from another process."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from biokit.secrets import MASK, looks_secret, mask

MAX_TEXT = 120  # characters of a value
FEW = 6  # numbers that are shown one by one

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = MAX_TEXT


def describe_variables(scope: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, str]]:
    """`type`, `about` and `text` of each variable by name; names without one are left out."""
    return {name: describe_value(name, scope[name]) for name in names if name in scope}


def describe_value(name: str, value: Any) -> dict[str, str]:
    """What a value is: its type, what there is to say of its form (shape, dtype, device; length), and a short text."""
    kind = type(value)
    try:
        about, text = _describe_array(value) if _is_array(value) else (_describe_length(value), _SHORT.repr(value))
    except Exception as error:  # a repr may do anything
        about, text = "", f"(its repr failed: {type(error).__name__})"
    text = MASK if looks_secret(name) else mask(" ".join(text.split()))
    return {"type": kind.__name__, "about": about, "text": text[:MAX_TEXT] + " ..." * (len(text) > MAX_TEXT)}


def _is_array(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("shape", "dtype", "tolist", "mean"))


def _describe_array(value: Any) -> tuple[str, str]:
    """Of a tensor or an array: (shape, dtype and device; its few numbers, or their range and mean)."""
    device = f" {value.device}" if hasattr(value, "device") and not isinstance(value.device, str) else ""
    about = f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}{device}"
    numbers = value.detach().cpu() if hasattr(value, "detach") else value
    size = numbers.numel() if hasattr(numbers, "numel") else numbers.size
    if size <= FEW:
        return about, str(_rounded(numbers.tolist()))
    numbers = numbers.double() if hasattr(numbers, "double") else numbers.astype(float)
    lowest, mean, highest = (float(numbers.min()), float(numbers.mean()), float(numbers.max()))
    return about, f"{lowest:.4g} to {highest:.4g}, mean {mean:.6g}"


def _rounded(numbers: Any) -> Any:
    if isinstance(numbers, list):
        return [_rounded(number) for number in numbers]
    return float(f"{numbers:.6g}") if isinstance(numbers, float) else numbers


def _describe_length(value: Any) -> str:
    return f"length {len(value)}" if isinstance(value, (list, tuple, dict, set, frozenset)) else ""
