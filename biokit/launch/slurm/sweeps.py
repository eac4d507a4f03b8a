"""Values given as words: one, or a list of them; and all combinations of several lists, one run each.

>>> read_values("1e-4,3e-4"), read_values('"a,b"'), read_values("[1, 2]")
([0.0001, 0.0003], ['a,b'], [[1, 2]])
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from biokit import secrets
from biokit.config import parse_override
from biokit.errors import ConfigError

MAX_RUNS = 1000  # of one submission: Slurm's own limit is 1001 unless a site raises it
TASK_DIGITS = 3
_CLOSING = {"[": "]", "{": "}"}


def read_values(text: str) -> list[Any]:
    """The values of a comma-separated list; a comma inside quotes, brackets or braces parts nothing."""
    return [read_value(part) for part in split_commas(text)]


def read_value(text: str) -> Any:
    """A value as JSON writes it (`1e-4`, `true`, `"a,b"`, `[1, 2]`), else as YAML does, else the text itself."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except ValueError:
        value = parse_override(f"value={text}")[1]
    return value if _is_plain(value) and not _is_misread(text.strip(), value) else text.strip()


def split_commas(text: str) -> list[str]:
    """Parts between commas that stand in no quotes, brackets or braces; one part where those are not closed."""
    parts, start, expected, quote = [], 0, [], ""
    for i, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote and text[i - 1] != "\\" else quote
        elif sign in "\"'" and not text[start:i].strip(" [{,:"):
            quote = sign
        elif sign in _CLOSING:
            expected.append(_CLOSING[sign])
        elif expected and sign == expected[-1]:
            expected.pop()
        elif sign == "," and not expected:
            parts.append(text[start:i])
            start = i + 1
    return [text] if quote or expected else [*parts, text[start:]]


def combine(lists: Mapping[str, Sequence[Any]]) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """All combinations, the last name varying fastest; and the names that have several values.

    Raises:
        ConfigError: too many runs, or a list that names a value twice.
    """
    varied = tuple(name for name, values in lists.items() if len(values) > 1)
    for name in varied:
        texts = [json.dumps(value) for value in lists[name]]
        if len(set(texts)) < len(texts):
            raise ConfigError(f"{name} {', '.join(texts)}", "a value stands there twice", "Give each value once")
    count = math.prod(len(values) for values in lists.values())
    if count > MAX_RUNS:
        found = f"they make {count} runs, more than {MAX_RUNS}"
        raise ConfigError(f"lists of values for {', '.join(varied)}", found, "Give fewer values, or submit in parts")
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())], varied


def refuse_secrets(values: Mapping[str, Any]) -> None:
    """Nothing, where no value is to be kept out of files.

    Raises:
        ConfigError: a name looks secret, or a value holds a secret of the environment.
    """
    for name, value in values.items():
        if secrets.mask_values({name: value})[name] != value:
            found = "it looks like a secret, and parameters are written into files"
            do = "Set it in the environment where you submit: Slurm passes that on, and the job reads os.environ"
            raise ConfigError(f"parameter {name}", found, do)


def task_name(index: int) -> str:
    """Name of the run folder of an array's task."""
    return f"{index:0{TASK_DIGITS}d}"


def _is_plain(value: Any) -> bool:
    """Whether JSON can hold a value: YAML also knows dates, and numbers that are not finite."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _is_misread(text: str, value: Any) -> bool:
    """Whether YAML takes for a number what nobody means as one: 010 is 8 to it, 1:30 is 90."""
    return isinstance(value, (int, float)) and (":" in text or re.match(r"[-+]?0[\d_]", text) is not None)


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)
