"""Secret words of a command line: not in the order, nor in the list of processes, but in the environment of the run.

`python -m biokit.launch.magics.hidden_words program...` puts them back and runs the program.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

from biokit.errors import RunError
from biokit.secrets import MASK, mask_words

_NAME = re.compile(r"\*\*\*(BIOKIT_WORD_\d+_SECRET)\*\*\*")


def hide_words(program: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """A program in which no word shows a secret, and the variables that its environment needs for it."""
    words, variables = [], {}
    for i, (word, masked) in enumerate(zip(program, mask_words(program), strict=True)):
        if word == masked:
            words.append(word)
            continue
        before, after = masked.partition(MASK)[0], masked.rpartition(MASK)[2]
        name = f"BIOKIT_WORD_{i}_SECRET"
        variables[name] = word[len(before) : len(word) - len(after)]
        words.append(f"{before}***{name}***{after}")
    return (tuple(words), {}) if not variables else (("-m", "biokit.launch.magics.hidden_words", *words), variables)


def show_words(words: Sequence[str]) -> list[str]:
    """The words as they were.

    Raises:
        RunError: the environment does not have them.
    """
    return [_NAME.sub(lambda match: _find(match[1]), word) for word in words]


def _find(name: str) -> str:
    if name not in os.environ:
        found = "a secret word of its command line was not written down"
        raise RunError("start this run again", found, "Start it as the first time, with the secret")
    return os.environ[name]


if __name__ == "__main__":
    from biokit.launch.supervision.rank import run_program

    run_program(show_words(sys.argv[1:]))
