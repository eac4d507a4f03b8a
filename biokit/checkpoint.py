"""Checkpoints: a folder of safetensors and a manifest, written beside, fsynced, renamed; never pickle.

    checkpoints/step_NNNNNNNN/  model.safetensors  optimizer.safetensors  state.json  vocab.txt  manifest.json

A folder of that name is always whole. The manifest holds the sha256 of every file, and all are checked before a
tensor is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from biokit.config import config_from_dict
from biokit.errors import CheckpointError
from biokit.models import build_model
from biokit.runs import RunFolder, flush_to_disk
from biokit.tokenizers import SmilesTokenizer

FORMAT = "biokit-checkpoint-1"
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
STATE, VOCABULARY, MANIFEST = "state.json", "vocab.txt", "manifest.json"
FILES = (MODEL, OPTIMIZER, STATE, VOCABULARY)
PARTIAL = ".partial-"


@dataclass
class Checkpoint:
    """What a run needs to go on.

    Attributes:
        model, optimizer: tensors by name, on the CPU.
        state: plain values (step, loader position, loss scale, best loss, ...).
        manifest: config, vocabulary hash, layout, file hashes.
    """

    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any]
    manifest: dict[str, Any]


def save_checkpoint(
    folder: RunFolder,
    step: int,
    model: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    about: Mapping[str, Any],
    vocabulary: str,
) -> Path:
    """Write one checkpoint; under its final name it is whole or not there at all.

    Args:
        about: goes into the manifest (config, vocabulary hash, layout).
        vocabulary: text of `vocab.txt`, so that a checkpoint is usable alone.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    final = folder.checkpoint_dir(step)
    if final.exists():
        return final
    partial = final.with_name(f"{PARTIAL}{final.name}-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        for name, tensors in ((MODEL, model), (OPTIMIZER, optimizer)):
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, partial / name)
        (partial / STATE).write_text(json.dumps(dict(state), sort_keys=True))
        (partial / VOCABULARY).write_text(vocabulary, encoding="utf-8")
        files = {name: _file_entry(partial / name) for name in FILES}
        manifest = {"format": FORMAT, "step": step, "files": files, **about}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        for path in [*partial.iterdir(), partial]:
            flush_to_disk(path)
        partial.rename(final)
        flush_to_disk(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {final}", f"it cannot be written ({error})", "Free disk space and start again: the run resumes"
        ) from error
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint after checking every file against the manifest.

    Raises:
        CheckpointError: a missing or altered file, or a folder that is no checkpoint.
    """
    manifest = read_manifest(path)
    entries: dict[str, dict[str, Any]] = manifest["files"]
    with ThreadPoolExecutor() as pool:
        found = dict(zip(entries, pool.map(lambda name: _entry_or_none(path / name), entries), strict=True))
    bad = [name for name, entry in entries.items() if found[name] != entry]
    if bad:
        raise CheckpointError(
            f"checkpoint {path}",
            f"{', '.join(bad)} {'is' if len(bad) == 1 else 'are'} missing or altered (size or sha256 differs)",
            "Restore the folder from a copy, or move it away to go on from the checkpoint before it",
        )
    state = json.loads((path / STATE).read_text())
    return Checkpoint(load_file(path / MODEL), load_file(path / OPTIMIZER), state, manifest)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder, nothing else checked.

    Raises:
        CheckpointError: there is none, or it is of another kind.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {path}", f"its manifest cannot be read ({error})", "Give a step_NNNNNNNN folder of a run"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path}", f"it is not of format {FORMAT}", "Give a biokit checkpoint")
    if not isinstance(manifest.get("files"), dict) or set(manifest["files"]) != set(FILES):
        raise CheckpointError(
            f"checkpoint {path}", f"its manifest does not name {', '.join(FILES)}", "Restore the folder from a copy"
        )
    return manifest


def load_model(path: Path) -> tuple[nn.Module, SmilesTokenizer]:
    """The model of a checkpoint (weights, evaluation mode, on the CPU) and its tokenizer.

    Raises:
        CheckpointError: an altered file, or tensors that do not fit.
    """
    saved = load_checkpoint(path)
    config = config_from_dict(saved.manifest["config"], where=str(path / MANIFEST))
    tokenizer = SmilesTokenizer.from_file(path / VOCABULARY)
    model = build_model(config, tokenizer.vocab_size)
    check_tensors(path, saved.model, model.state_dict())
    model.load_state_dict(saved.model)
    return model.eval(), tokenizer


def newest_checkpoint(folder: RunFolder) -> Path | None:
    """The newest whole checkpoint of a run; None where the run has none yet."""
    steps = folder.checkpoint_steps()
    return folder.checkpoint_dir(steps[-1]) if steps else None


def remove_partial(folder: RunFolder) -> None:
    """Remove what killed saves left behind."""
    for path in folder.checkpoints.glob(f"{PARTIAL}*"):
        shutil.rmtree(path)


def check_tensors(path: Path, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Compare names, shapes and types.

    Raises:
        CheckpointError: a missing, extra or misshapen tensor; names up to five.
    """
    faults = [f"missing {name}" for name in expected if name not in found]
    faults += [f"extra {name}" for name in found if name not in expected]
    faults += [
        f"{name} is {_form(found[name])} instead of {_form(tensor)}"
        for name, tensor in expected.items()
        if name in found and _form(found[name]) != _form(tensor)
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(
            f"checkpoint {path}",
            f"its tensors do not fit the model: {'; '.join(faults[:5])}{more}",
            "Use the configuration that the checkpoint was made with (its manifest holds it)",
        )


def _form(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _file_entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _entry_or_none(path: Path) -> dict[str, Any] | None:
    return _file_entry(path) if path.is_file() else None
