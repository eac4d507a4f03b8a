"""`-p NAME VALUE` on a command line, where the value may begin with a hyphen (argparse would take it for a flag)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from biokit.errors import ConfigError


def add_parameters(parser: argparse.ArgumentParser, what: str) -> None:
    """Add `-p` to a parser whose words go through `join_parameters`; `read_parameters` reads what it finds."""
    parser.add_argument(
        "-p", dest="parameters", action="append", default=[], metavar="NAME VALUE", type=_split, help=what
    )


def join_parameters(words: Sequence[str]) -> list[str]:
    """`-p NAME VALUE` as one word each."""
    joined, rest = list[str](), list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*joined, word, *rest]
        if word == "-p" and len(rest) > 1:
            word = f"-p{rest.pop(0)}={rest.pop(0)}"
        joined.append(word)
    return joined


def read_parameters(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Name -> value.

    Raises:
        ConfigError: a name is given twice.
    """
    if len(dict(pairs)) < len(pairs):
        raise ConfigError("-p", "a name is given twice", "Give each once, with its values by commas")
    return dict(pairs)


def _split(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError("give a name and a value: -p NAME VALUE")
    return name, value
