"""Checkpoints: a folder of safetensors and a manifest, written beside, fsynced, renamed; never pickle.

    checkpoints/step_NNNNNNNN/  model.safetensors  optimizer.safetensors  state.json  vocab.txt  manifest.json

A folder of that name is always whole. The manifest holds the sha256 of every file, and all are checked before a
tensor is used. Tensors are those of the whole model, whatever the layout that wrote them, so any layout loads them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from biokit.config import config_from_dict
from biokit.errors import CheckpointError, list_faults
from biokit.models import build_model
from biokit.parallel.cuts import describe_form
from biokit.runs import RunFolder, describe_file, flush_to_disk
from biokit.tokenizers import SmilesTokenizer

FORMAT, SEAL = "biokit-checkpoint-2", "manifest_sha256"
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
STATE, VOCABULARY, MANIFEST = "state.json", "vocab.txt", "manifest.json"
FILES = (MODEL, OPTIMIZER, STATE, VOCABULARY)
PARTIAL = ".partial-"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


@dataclass
class Checkpoint:
    """What a run needs to go on.

    Attributes:
        model, optimizer: tensors by name, on the CPU, read when they are looked up.
        state: plain values (step, loader position, loss scale, best loss, ...).
        manifest: config, vocabulary hash, layout, file hashes.
        check_s: seconds that checking every file took.
    """

    model: TensorFile
    optimizer: TensorFile
    state: dict[str, Any]
    manifest: dict[str, Any]
    check_s: float = 0.0


class TensorFile(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors file, each read when it is looked up: memory holds one at a time.

    Args:
        dtype: of what is given; None: as in the file.
    """

    def __init__(self, path: Path, dtype: torch.dtype | None = None) -> None:
        self._dtype = dtype
        try:
            self._file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"tensors of {path}", f"they cannot be read ({error})", "Restore the file from a copy"
            ) from error
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor = self._file.get_tensor(name)
        return tensor if self._dtype is None else tensor.to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def forms(self) -> dict[str, torch.Tensor]:
        """Shape and type of every tensor, without its data."""
        forms = {}
        for name in self._names:
            part = self._file.get_slice(name)
            dtype = self._dtype or DTYPES.get(part.get_dtype(), torch.uint8)
            forms[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
        return forms


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
        read_manifest(final)  # one that is there is this step's, whole
        return final
    partial = final.with_name(f"{PARTIAL}{final.name}-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        for name, tensors in ((MODEL, model), (OPTIMIZER, optimizer)):
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, partial / name)
        (partial / STATE).write_text(json.dumps(dict(state), sort_keys=True))
        (partial / VOCABULARY).write_text(vocabulary, encoding="utf-8")
        with ThreadPoolExecutor() as pool:
            entries = pool.map(describe_file, [partial / name for name in FILES])
            files = dict(zip(FILES, entries, strict=True))
        manifest = {"format": FORMAT, "step": step, "files": files, **about}
        (partial / MANIFEST).write_text(seal_manifest(manifest))
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


class CheckpointWriter:
    """Writes the checkpoints of a run, and removes those that it need not keep; where asked for, in a thread.

    A checkpoint that is being written bears another name; the one before it is kept until it is whole.
    """

    def __init__(self, folder: RunFolder, beside: bool, keep_last: int, keep_best: int, best_metric: str) -> None:
        self.folder = folder
        self.keep_last, self.keep_best, self.best_metric = keep_last, keep_best, best_metric
        self._thread = ThreadPoolExecutor(1, "checkpoint") if beside else None
        self._writing: Future[None] | None = None

    def write(
        self,
        step: int,
        model: Mapping[str, torch.Tensor],
        optimizer: Mapping[str, torch.Tensor],
        state: Mapping[str, Any],
        about: Mapping[str, Any],
        vocabulary: str,
    ) -> None:
        """Write one checkpoint, see `save_checkpoint`; nobody may change its tensors any more.

        Raises:
            CheckpointError: this one, or the one that was being written, cannot be written.
        """
        self.wait()
        write = partial(save_checkpoint, self.folder, step, model, optimizer, state, about, vocabulary)
        if self._thread is None:
            self._write(write)
        else:
            self._writing = self._thread.submit(self._write, write)

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            CheckpointError: what was being written cannot be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()

    def _write(self, write: Callable[[], Path]) -> None:
        write()
        remove_surplus(self.folder, self.keep_last, self.keep_best, self.best_metric)


def remove_surplus(folder: RunFolder, keep_last: int, keep_best: int, metric: str) -> list[int]:
    """Remove all but the newest `keep_last` and the best `keep_best` checkpoints; returns the steps removed.

    With both 0 all are kept; the newest is always kept. Losses are best when low, other metrics when high.
    """
    steps = folder.checkpoint_steps()
    if not (keep_last or keep_best):
        return []
    kept = set(steps[-max(1, keep_last) :])
    if keep_best:
        values = {step: _noted_metric(folder.checkpoint_dir(step), metric) for step in steps}
        sign = 1 if metric.endswith("loss") else -1
        known = [(sign * value, -step) for step, value in values.items() if value is not None]
        kept |= {-step for _, step in sorted(known)[:keep_best]}
    surplus = [step for step in steps if step not in kept]
    for step in surplus:
        path = folder.checkpoint_dir(step)
        doomed = path.with_name(f"{PARTIAL}{path.name}-{os.getpid()}")
        path.rename(doomed)  # under its own name a checkpoint is whole or not there
        with contextlib.suppress(OSError):  # what is left of it goes when the run is started again
            _remove(doomed)
    return surplus


def _remove(path: Path) -> None:
    """A folder with all in it, or a link or file (what a link points at stays)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _noted_metric(path: Path, metric: str) -> float | None:
    """A checkpoint's value of a metric; None where it has none, or cannot be read."""
    with contextlib.suppress(CheckpointError):
        return read_manifest(path).get("metrics", {}).get(metric)
    return None


def load_checkpoint(path: Path, check: bool = True) -> Checkpoint:
    """Read a checkpoint after checking every file against the manifest, in parallel.

    Args:
        check: False where another process of the run has just checked the same folder.

    Raises:
        CheckpointError: a missing or altered file, or a folder that is no checkpoint.
    """
    manifest, started = read_manifest(path), time.perf_counter()
    if check:
        check_files(path, manifest["files"])
    state = json.loads((path / STATE).read_text())
    check_s = time.perf_counter() - started
    return Checkpoint(TensorFile(path / MODEL), TensorFile(path / OPTIMIZER), state, manifest, check_s)


def check_files(path: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare the files of a folder with what its manifest says of each.

    Raises:
        CheckpointError: a missing or altered file.
    """
    with ThreadPoolExecutor() as pool:
        found = dict(zip(entries, pool.map(lambda name: _entry_or_none(path / name), entries), strict=True))
    bad = [name for name, entry in entries.items() if found[name] != entry]
    if bad:
        raise CheckpointError(
            f"checkpoint {path}",
            f"{', '.join(bad)} {'is' if len(bad) == 1 else 'are'} missing or altered (size or sha256 differs)",
            "Restore the folder from a copy, or move it away to go on from the checkpoint before it",
        )


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder; the other files are not looked at.

    Raises:
        CheckpointError: there is none, or it is altered or of another kind.
    """
    try:
        text = (path / MANIFEST).read_text()
        manifest = json.loads(text)
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
    name = re.fullmatch(r"step_(\d+)", path.resolve().name if path.is_symlink() else path.name)
    if name and int(name.group(1)) != manifest.get("step"):
        found = f"it was made at step {manifest.get('step')}"
        raise CheckpointError(f"checkpoint {path}", found, "Give the folder its own name again, or move it away")
    unsealed = unseal_manifest(manifest, text)
    if unsealed is None:
        raise CheckpointError(f"checkpoint {path}", "its manifest is altered", "Restore the folder from a copy")
    return unsealed


def unseal_manifest(manifest: Mapping[str, Any], text: str) -> dict[str, Any] | None:
    """The entries of a manifest that was read from a text; None where that is not what `seal_manifest` wrote."""
    unsealed = {key: value for key, value in manifest.items() if key != SEAL}
    return unsealed if SEAL in manifest and seal_manifest(unsealed) == text else None


def seal_manifest(manifest: Mapping[str, Any]) -> str:
    """The text of a manifest with the sha256 of its entries; any other text is noticed when it is read."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, SEAL: digest}, indent=1, sort_keys=True)


def load_model(path: Path) -> tuple[nn.Module, SmilesTokenizer]:
    """The model of a checkpoint (weights, evaluation mode, on the CPU) and its tokenizer.

    Raises:
        CheckpointError: an altered file, or tensors that do not fit.
    """
    saved = load_checkpoint(path)
    config = config_from_dict(saved.manifest["config"], where=str(path / MANIFEST))
    tokenizer = SmilesTokenizer.from_file(path / VOCABULARY)
    model = build_model(config, tokenizer.vocab_size)
    parameters = dict(model.named_parameters())
    check_tensors(path, saved.model.forms(), parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved.model[name])
    return model.eval(), tokenizer


def newest_checkpoint(folder: RunFolder) -> Path | None:
    """The newest whole checkpoint of a run; None where the run has none yet."""
    steps = folder.checkpoint_steps()
    return folder.checkpoint_dir(steps[-1]) if steps else None


def remove_partial(folder: RunFolder) -> None:
    """Remove what killed saves left behind."""
    for path in folder.checkpoints.glob(f"{PARTIAL}*"):
        _remove(path)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest one of a run folder.

    Raises:
        CheckpointError: neither.
    """
    if (path / MANIFEST).is_file() and (path / MODEL).is_file():
        return path
    newest = newest_checkpoint(RunFolder(path))
    if newest is None:
        found, do = "it is neither a checkpoint nor a run with one", "Give a step_NNNNNNNN folder, or its run folder"
        raise CheckpointError(f"checkpoint {path}", found, do)
    return newest


def check_tensors(path: Path, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Compare names, shapes and types.

    Raises:
        CheckpointError: a missing, extra or misshapen tensor; names up to five.
    """
    faults = [f"missing {name}" for name in expected if name not in found]
    faults += [f"extra {name}" for name in found if name not in expected]
    faults += [
        f"{name} is {describe_form(found[name])} instead of {describe_form(tensor)}"
        for name, tensor in expected.items()
        if name in found and describe_form(found[name]) != describe_form(tensor)
    ]
    if faults:
        raise CheckpointError(
            f"checkpoint {path}",
            f"its tensors do not fit the model: {list_faults(faults)}",
            "Use the configuration that the checkpoint was made with (its manifest holds it)",
        )


def _entry_or_none(path: Path) -> dict[str, Any] | None:
    return describe_file(path) if path.is_file() else None
