"""`-p NAME VALUE` on a command line; the value may be a negative number, some of which argparse takes for flags."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from biokit.errors import ConfigError

_NAME = re.compile(r"[A-Za-z_][\w.]*")
_NUMBER = re.compile(r"-(\d|\.\d|inf|nan)")


def add_parameters(parser: argparse.ArgumentParser, what: str) -> None:
    """Add `-p` to a parser whose words go through `join_parameters`; `read_parameters` reads what it finds."""
    parser.add_argument(
        "-p", dest="parameters", action="append", default=[], metavar="NAME VALUE", type=_split, help=what
    )


def join_parameters(words: Sequence[str]) -> list[str]:
    """`-p NAME VALUE`, or `-p NAME=VALUE`, as one word each.

    Raises:
        ConfigError: the value is missing, as what follows is a flag.
    """
    joined, rest = list[str](), list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*joined, word, *rest]
        if word == "-p" and rest:
            word = f"-p{rest.pop(0)}"
            if _NAME.fullmatch(word[2:]) and rest:
                word += f"={_check_value(word[2:], rest.pop(0))}"
        joined.append(word)
    return joined


def read_parameters(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Name -> value.

    Raises:
        ConfigError: a name is given twice.
    """
    if len(dict(pairs)) < len(pairs):
        raise ConfigError("-p", "a name is given twice", "Give each once")
    return dict(pairs)


def _check_value(name: str, value: str) -> str:
    if value.startswith("-") and not _NUMBER.match(value):
        do = f"Give one; where it does begin with a hyphen: -p {name}={value}"
        raise ConfigError(f"-p {name}", f"{value} follows in place of a value", do)
    return value


def _split(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not _NAME.fullmatch(name):
        raise argparse.ArgumentTypeError("give a name and a value: -p NAME VALUE")
    return name, value
