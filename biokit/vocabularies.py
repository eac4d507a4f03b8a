"""Vocabulary files of SMILES models: MolBART's text form, Chemformer's JSON, their layout and what is wrong with them.

The layout (MolecularAI/MolBART `bart_vocab.txt`): six special tokens, property tokens, unused ones, then chemistry.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from biokit.errors import DataError
from biokit.kernels.smiles_scanner import CHEMISTRY_REGEX, smiles_regex

SPECIAL_TOKENS = ("<PAD>", "?", "^", "&", "<MASK>", "<SEP>")
SPECIAL_NAMES = ("pad", "unknown", "start", "end", "mask", "sep")  # Chemformer's, in the order of the ids
CHEM_START = 272
VOCAB_SIZE = 523
MAX_VOCAB_SIZE = 65_535  # ids are stored as uint16

CHEMISTRY = re.compile(CHEMISTRY_REGEX)
UNUSED = re.compile(r"<UNUSED_\d+>")


def property_tokens() -> list[str]:
    """MolBART's property tokens: 60 bins of a change of LogD, then changes of solubility and clearance."""
    up = [f"({step / 10:.1f}, {(step + 2) / 10:.1f}]" for step in range(-1, 59, 2)] + ["(5.9, inf]"]
    down = [f"({(step - 2) / 10:.1f}, {step / 10:.1f}]" for step in range(-1, -57, -2)] + ["(-inf, -5.7]"]
    changes = ("low->high", "high->low", "no_change")
    named = [f"{name}_{change}" for name in ("Solubility", "Clint") for change in changes]
    return [f"LogD_change_{bin}" for bin in up + down] + named


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"vocabulary {path}", f"it cannot be read ({error.strerror})", "Check the path") from error
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} line {line}", "it is not UTF-8", "Save the file as UTF-8") from error


def read_lines(path: Path) -> list[str]:
    """The lines of a `.txt` vocabulary.

    Raises:
        DataError: a byte order mark, an empty file; the message names the line.
    """
    text = _read_text(path)
    if text.startswith("\ufeff"):
        raise DataError(f"{path} line 1", "it begins with a byte order mark", "Save the file as UTF-8 without BOM")
    if not text:
        raise DataError(f"vocabulary {path}", "it is empty", "Give a file with one token a line")
    return text.removesuffix("\n").split("\n")


def read_json(path: Path) -> tuple[tuple[str, ...], int, tuple[str, ...]]:
    """Vocabulary, start of chemistry and special tokens of Chemformer's JSON.

    Raises:
        DataError: not JSON, keys that are missing or of another type, another regular expression.
    """
    try:
        tree = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {error.lineno}", f"it is not JSON ({error.msg})", "Mend the file") from error
    except RecursionError as error:
        raise DataError(f"vocabulary {path}", "its JSON is nested too deeply", "Mend the file") from error
    properties = _take(tree, "properties", dict, path)
    special = _take(properties, "special_tokens", dict, path)
    tokens = _take(tree, "vocabulary", list, path)
    chem_start = _take(properties, "chem_start_idx", int, path)
    names = tuple(_take(special, name, str, path) for name in SPECIAL_NAMES)
    check_vocabulary(tokens, chem_start, names, f"{path} vocabulary entry")
    written = _take(properties, "regex", str, path)
    derived = smiles_regex(tokens[len(names) : chem_start])
    if written.replace("\\", "") != derived.replace("\\", ""):  # published files escape some tokens, not all
        pairs = enumerate(zip(written, derived, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(written), len(derived)))
        raise DataError(
            f"{path} properties.regex",
            f"it is not the expression of this vocabulary: {written[at : at + 30]!r} stands for "
            f"{derived[at : at + 30]!r} at character {at}",
            "Use a file whose tokens and expression belong together",
        )
    return tuple(tokens), chem_start, names


def _take(tree: Any, key: str, kind: type, path: Path) -> Any:
    value = tree.get(key) if isinstance(tree, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(
            f"vocabulary {path}",
            f'"{key}" is {"missing" if value is None else f"a {type(value).__name__}"}',
            "Give a file with properties (regex, special_tokens, chem_start_idx) and vocabulary",
        )
    return value


def format_json(tokens: Sequence[str], chem_start: int, special: Sequence[str]) -> str:
    """The text of Chemformer's JSON, byte for byte as it is published."""
    names = dict(zip(SPECIAL_NAMES, special, strict=True))
    tree = {
        "properties": {
            "regex": smiles_regex(tokens[len(special) : chem_start]),
            "special_tokens": {name: names[name] for name in ("start", "end", "pad", "unknown", "mask", "sep")},
            "chem_start_idx": chem_start,
        },
        "vocabulary": list(tokens),
    }
    return json.dumps(tree, indent=4)


def find_chem_start(tokens: Sequence[str], path: Path) -> int:
    """Where chemistry begins in a `.txt`, which does not say it: after the last token that is not chemistry.

    Raises:
        DataError: chemistry and other tokens are mixed.
    """
    filled = len(tokens)
    while UNUSED.fullmatch(tokens[filled - 1]):
        filled -= 1
    start = filled
    while start > len(SPECIAL_TOKENS) and CHEMISTRY.fullmatch(tokens[start - 1]):
        start -= 1
    if start == filled:  # no chemistry
        start = len(tokens)
    for index in range(len(SPECIAL_TOKENS), start):
        if CHEMISTRY.fullmatch(tokens[index]) and tokens[index] != ">":  # the arrow of a reaction may be a property
            raise DataError(
                f"{path} line {start}",
                f"{quote(tokens[start - 1])} is no SMILES token, yet chemistry begins before it "
                f"({quote(tokens[index])}, line {index + 1})",
                "Use the .json form, which says where chemistry begins (chem_start_idx)",
            )
    return start


def check_vocabulary(tokens: Sequence[Any], chem_start: int, special: Sequence[str], where: str) -> None:
    """Refuse a vocabulary that cannot work; `where` and the place of the entry, from 1, name it."""
    seen: dict[str, int] = {}
    for place, token in enumerate(tokens, start=1):
        found = _find_fault(token) if not isinstance(token, str) or token not in seen else ""
        if isinstance(token, str) and token in seen:
            found = f"{quote(token)} stands already at {seen[token]}"
        if place <= len(special) and not found and token != special[place - 1]:
            found = f"it is {quote(token)}, but id {place - 1} must be {special[place - 1]}"
        if found:
            raise DataError(f"{where} {place}", found, "Give one token an entry, the six special ones first")
        seen[token] = place
    if len(tokens) < len(special):
        missing = " ".join(special[len(tokens) :])
        raise DataError(f"{where} {len(tokens) + 1}", f"the file ends before {missing}", "Give the six special tokens")
    if len(tokens) > MAX_VOCAB_SIZE:
        raise DataError(f"{where} {MAX_VOCAB_SIZE + 1}", "ids beyond 65,534 do not fit", "Give fewer tokens")
    if not len(special) <= chem_start <= len(tokens):
        raise DataError(
            f"chem_start {chem_start}",
            f"the vocabulary has {len(tokens)} tokens, {len(special)} of them special",
            f"Give {len(special)} to {len(tokens)}",
        )


def _find_fault(token: Any) -> str:
    if not isinstance(token, str):
        return f"{token!r} is not a string"
    if "\r" in token:
        return f"{token!r} has a carriage return (the line ends are Windows')"
    if "\n" in token:
        return f"{token!r} has a line end"
    if not token.strip():
        return "it is blank"
    try:
        token.encode()
    except UnicodeEncodeError:
        return f"{token!r} is not UTF-8 text"
    return ""


def quote(text: str, width: int = 60) -> str:
    """The text in quotes, cut to `width` characters, for a message."""
    return f'"{text if len(text) <= width else text[: width - 3] + "..."}"'
