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
    about = tell_form(value)
    try:
        text = _tell_numbers(value) if _is_array(value) else _SHORT.repr(value)
    except Exception as error:  # anything: its own code is run
        text = f"(not to be told: {type(error).__name__})"
    text = MASK if looks_secret(name) else mask(" ".join(text.split()))
    text = text[:MAX_TEXT] + " ..." * (len(text) > MAX_TEXT)
    return {"type": type(value).__name__, "about": about, "text": text}


def tell_form(value: Any) -> str:
    """`[2, 3] float32 cpu` of a tensor or an array, the length of a container, else nothing."""
    if _is_array(value):
        device = f" {value.device}" if hasattr(value, "layout") else ""  # numpy's is always the CPU
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}{device}"
    return f"length {len(value)}" if isinstance(value, (list, tuple, dict, set, frozenset)) else ""


def _is_array(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("shape", "dtype", "tolist", "mean"))


def _tell_numbers(value: Any) -> str:
    """The few numbers of a tensor or an array, or their range and mean."""
    if hasattr(value, "to_local"):  # a DTensor: the whole of it would take all ranks
        value = value.to_local()
    numbers = value.detach().cpu() if hasattr(value, "detach") else value
    size = numbers.numel() if hasattr(numbers, "numel") else numbers.size
    if size <= FEW:
        return str(_rounded(numbers.tolist()))
    numbers = numbers.double() if hasattr(numbers, "double") else numbers.astype(float)
    return f"{float(numbers.min()):.4g} to {float(numbers.max()):.4g}, mean {float(numbers.mean()):.6g}"


def _rounded(numbers: Any) -> Any:
    if isinstance(numbers, list):
        return [_rounded(number) for number in numbers]
    return float(f"{numbers:.6g}") if isinstance(numbers, float) else numbers
