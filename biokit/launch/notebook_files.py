"""Executed notebooks, written by papermill without the secrets in them: at the end, and after each cell before it."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from biokit.runs import write_atomically
from biokit.secrets import mask, mask_values, secret_values

SCHEME = "biokit-masked:"
INJECTED = "injected-parameters"  # papermill's tag of the cell that sets the parameters


class MaskedFiles:
    """What papermill reads and writes notebooks through, for paths that begin with `SCHEME`."""

    def __init__(self) -> None:
        self.parameters: dict[str, Mapping[str, Any]] = {}  # by path

    def read(self, path: str) -> str:
        return Path(self.pretty_path(path)).read_text(encoding="utf-8")

    def listdir(self, path: str) -> list[str]:
        return [str(entry) for entry in Path(self.pretty_path(path)).iterdir()]

    def write(self, text: str, path: str) -> None:
        """Write a notebook, given as JSON, with `***` in the place of each secret."""
        notebook = mask_notebook(json.loads(text), self.parameters.get(path, {}))
        notebook["metadata"]["papermill"]["output_path"] = self.pretty_path(path)
        write_atomically(Path(self.pretty_path(path)), json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")

    def pretty_path(self, path: str) -> str:
        return path.removeprefix(SCHEME)


_files = MaskedFiles()


@contextlib.contextmanager
def masked_output(path: Path, parameters: Mapping[str, Any]) -> Iterator[str]:
    """The path to give to papermill, for as long as it runs, so that what it writes there is masked.

    Args:
        parameters: of the notebook; those with secret names, and the environment's, are masked wherever they stand.
    """
    _register()
    asked = f"{SCHEME}{path.resolve()}"
    _files.parameters[asked] = parameters
    try:
        yield literal_path(asked)
    finally:
        _files.parameters.pop(asked, None)


@functools.cache
def _register() -> None:
    from papermill.iorw import papermill_io

    papermill_io.register(SCHEME, _files)


def literal_path(path: Path | str) -> str:
    """A path as papermill takes it, which would replace what stands in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def mask_notebook(notebook: dict[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A notebook without the secrets in it: sources, outputs, tracebacks and metadata."""
    from papermill.translators import translate_parameters

    secrets = secret_values(parameters)
    if secrets:  # of any length: found by the place where they stand
        notebook["metadata"]["papermill"]["parameters"] = mask_values(parameters)
        for cell in notebook["cells"]:
            if INJECTED in cell["metadata"].get("tags", []):
                cell["source"] = translate_parameters("python3", "python", mask_values(parameters), "Parameters")
    return _mask_texts(notebook, secrets)


def _mask_texts(node: Any, secrets: set[str]) -> Any:
    if isinstance(node, str):
        return mask(node, secrets)
    if isinstance(node, list):
        return [_mask_texts(part, secrets) for part in node]
    if isinstance(node, dict):
        return {key: _mask_texts(part, secrets) for key, part in node.items()}
    return node
