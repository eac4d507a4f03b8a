"""A notebook cell as the program of every rank.

`python -m biokit.launch.magics.cell_program RUN_DIR [--out NAMES] [-- ...]`.

The cell stands in the run folder below one blank line, the magic's own, so that its lines bear the numbers that they
have in the notebook. Beside it are the values that it is given; those with secret names come by the environment.
"""

from __future__ import annotations

import argparse
import os
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from biokit.errors import DataError
from biokit.launch.values import check_values, part_secrets, read_values, write_values
from biokit.runs import RunFolder, write_atomically

GIVEN = "BIOKIT_WITH_"  # begins the variables that carry secret values


def write_cell(folder: RunFolder, code: str, given: Mapping[str, Any]) -> dict[str, str]:
    """Leave a cell and the values that it is given in a run folder.

    Returns:
        Variables for the run's environment: values with secret names, which are written nowhere.

    Raises:
        DataError: a value that is not data, or that holds a secret; the folder is not made.
        RunError: the folder cannot be made.
    """
    secret, plain = part_secrets(given)
    check_values(plain, "--with", secret.values())
    folder.create()
    write_values(_given_file(folder), plain, "--with", secret.values())
    write_atomically(_cell_file(folder), f"\n{code}")
    return {f"{GIVEN}{name}": value for name, value in secret.items()}


def cell_words(folder: RunFolder, out: Sequence[str], arguments: Sequence[str]) -> tuple[str, ...]:
    """What each rank runs."""
    names = ("--out", ",".join(out)) if out else ()
    return ("-m", "biokit.launch.magics.cell_program", str(folder.path.absolute()), *names, "--", *arguments)


def run_cell(folder: RunFolder, out: Sequence[str], arguments: Sequence[str]) -> None:
    """Run the cell of a run folder as `__main__`; rank 0 leaves the wanted values there at the end.

    Raises:
        DataError: a wanted variable that there is not, or that is not data.
    """
    path = _cell_file(folder)
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=str(path), __builtins__=__builtins__)
    main.__dict__.update(read_values(_given_file(folder)))
    main.__dict__.update({n.removeprefix(GIVEN): value for n, value in os.environ.items() if n.startswith(GIVEN)})
    sys.modules["__main__"], sys.argv = main, [str(path), *arguments]
    try:
        exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), main.__dict__)
    except SystemExit as error:
        if error.code:
            raise
    if out and os.environ.get("RANK", "0") == "0":
        write_values(folder.result_file, {name: _find(main, name) for name in out}, "--out")


def _find(main: types.ModuleType, name: str) -> Any:
    if not hasattr(main, name):
        raise DataError(f"--out {name}", "rank 0 has no such variable at the end of the cell", "Assign it on rank 0")
    return getattr(main, name)


def _cell_file(folder: RunFolder) -> Path:
    return folder.path.absolute() / "cell.py"


def _given_file(folder: RunFolder) -> Path:
    return folder.path.absolute() / "given.safetensors"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="biokit.launch.magics.cell_program")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--out", default="")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:end])
    run_cell(RunFolder(options.run_dir), [name for name in options.out.split(",") if name], words[end + 1 :])


if __name__ == "__main__":
    main()
