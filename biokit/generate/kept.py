"""Folders in which a long computation is kept and gone on with: by one process at a time, with the same settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from biokit.errors import DataError
from biokit.runs import take_lock, write_atomically

if TYPE_CHECKING:
    from biokit.tokenizers import SmilesTokenizer

LOCK = ".lock"


@contextmanager
def hold_folder(folder: Path, asked: str) -> Iterator[None]:
    """Make a folder and hold it; the lock ends with the process, however that ends.

    Raises:
        DataError: it cannot be written, or another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = take_lock(folder / LOCK)
    except BlockingIOError as error:
        do = "Wait for it, or give another folder"
        raise DataError(asked, f"another process is at work in {folder}", do) from error
    except OSError as error:
        raise DataError(asked, f"{folder} cannot be used ({error.strerror})", "Give another folder") from error
    with lock:
        yield


def check_settings(path: Path, settings: Mapping[str, Any], asked: str) -> dict[str, Any]:
    """What a folder's file of settings says, which must agree; it is written where there is none.

    Returns:
        The file's object, which may hold more than the settings.

    Raises:
        DataError: another computation's folder, one with other files, one that cannot be written.
    """
    do = "Give a new folder, or what was given then"
    try:
        if not path.exists():
            if others := sorted(other.name for other in path.parent.iterdir() if other.name != LOCK):
                raise DataError(
                    asked, f"{path.parent} holds other files ({', '.join(others[:3])})", "Give a new folder"
                )
            write_atomically(path, json.dumps(settings, indent=1) + "\n")
        known = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(known, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        raise DataError(asked, f"{path} cannot be used ({error})", "Give a new folder") from error
    if differs := [name for name, value in settings.items() if known.get(name) != value]:
        raise DataError(asked, f"{path.parent} was made with another {' and '.join(differs)}", do)
    return known


def fingerprint(model: nn.Module, tokenizer: SmilesTokenizer) -> str:
    """sha256 of the weights and the vocabulary: what two models give does not mix."""
    digest = hashlib.sha256(tokenizer.hash.encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
