"""A model by itself: weights, vocabulary and configuration in one folder, without the state of a training.

    model.safetensors  vocab.txt  model.json        and README.md, its card, where somebody has written one

`model.json` holds the configuration that the model was trained with and the sha256 of the other two. The models that
come with biokit stand in `data/models`; their names are as good as a path everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from biokit.checkpoint import (
    MODEL,
    VOCABULARY,
    TensorFile,
    check_files,
    check_tensors,
    find_checkpoint,
    load_checkpoint,
    seal_manifest,
    unseal_manifest,
)
from biokit.config import RunConfig, config_from_dict, config_to_dict
from biokit.data.publish import publish_folder
from biokit.errors import CheckpointError, ConfigError
from biokit.models import build_model
from biokit.runs import describe_file
from biokit.tokenizers import SmilesTokenizer

FORMAT, INDEX, CARD = "biokit-model-1", "model.json", "README.md"
PACKAGED = Path(__file__).parent / "assets" / "models"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class SavedModel:
    """What a model folder, or a checkpoint's part of it, holds.

    Attributes:
        tensors: by name, in fp32, read when they are looked up.
        about: the index: config, vocabulary hash, step, number of parameters, dtype.
    """

    folder: Path
    config: RunConfig
    tokenizer: SmilesTokenizer
    tensors: TensorFile
    about: Mapping[str, Any]


def list_models() -> list[str]:
    """The names of the models that come with biokit."""
    return sorted(path.parent.name for path in PACKAGED.glob(f"*/{INDEX}"))


def find_model_folder(source: str | Path) -> Path:
    """The folder that holds a model: of a name in `list_models`, a model folder, a checkpoint, or a run's newest one.

    Raises:
        CheckpointError: none of them.
    """
    path = Path(source)
    if path.is_dir():
        return path if is_model_folder(path) else find_checkpoint(path)
    if str(source) in list_models():
        return PACKAGED / str(source)
    known = f"Give a folder with a model, a checkpoint or a run, or one of: {', '.join(list_models())}"
    raise CheckpointError(f"model {source}", "there is no such folder or ready model", known)


def is_model_folder(path: Path) -> bool:
    """Whether a folder holds a model by itself."""
    return (path / INDEX).is_file()


def open_model(source: str | Path) -> SavedModel:
    """Check every file of a model and open its tensors.

    Raises:
        CheckpointError: there is no model, or a file is missing, altered or of another kind.
    """
    folder = find_model_folder(source)
    if is_model_folder(folder):
        about = _read_index(folder)
        check_files(folder, about["files"])
        tensors = TensorFile(folder / MODEL, torch.float32)
    else:
        saved = load_checkpoint(folder)
        about, tensors = saved.manifest, saved.model
    config = config_from_dict(about["config"], where=str(folder))
    return SavedModel(folder, config, SmilesTokenizer.from_file(folder / VOCABULARY), tensors, about)


def load_model(source: str | Path) -> tuple[nn.Module, SmilesTokenizer]:
    """A model (fp32, evaluation mode, on the CPU) and its tokenizer; `source` as in `find_model_folder`.

    Raises:
        CheckpointError: there is no model, a file is missing or altered, or tensors do not fit.
    """
    saved = open_model(source)
    model = build_model(saved.config, saved.tokenizer.vocab_size)
    parameters = dict(model.named_parameters())
    check_tensors(saved.folder, saved.tensors.forms(), parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved.tensors[name])
    return model.eval(), saved.tokenizer


def export_model(source: str | Path, folder: Path, dtype: str = "bf16") -> SavedModel:
    """Write the model of a checkpoint or a run into a folder of its own, whole or not at all.

    Paths of the machine that trained it are left out of its configuration.

    Args:
        dtype: of the tensors: bf16 (half the size, 8 bits of precision) or fp32.

    Raises:
        ConfigError: another dtype. CheckpointError: no model, or an altered one.
        DataError: the folder is there and not empty, or the disk is full or not writable.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype}", "a model cannot be written in it", f"Valid: {', '.join(DTYPES)}")
    saved = open_model(source)
    tensors = {name: saved.tensors[name].to(DTYPES[dtype]).contiguous() for name in saved.tensors}
    with publish_folder(folder) as partial:
        try:
            save_file(tensors, partial / MODEL)
        except SafetensorError as error:  # safetensors' own form of a full disk
            raise OSError(f"{MODEL}: {error}") from error
        (partial / VOCABULARY).write_bytes((saved.folder / VOCABULARY).read_bytes())
        index = {
            "format": FORMAT,
            "files": {name: describe_file(partial / name) for name in (MODEL, VOCABULARY)},
            "config": _without_paths(saved.config),
            "vocab_hash": saved.tokenizer.hash,
            "step": saved.about["step"],
            "dtype": dtype,
            "num_parameters": sum(tensor.numel() for tensor in tensors.values()),
        }
        (partial / INDEX).write_text(seal_manifest(index), encoding="utf-8")
    return open_model(folder)


def _without_paths(config: RunConfig) -> dict[str, Any]:
    empty = RunConfig()
    paths: dict[str, Any] = {"dataset_path": "", "dataset": empty.data.dataset, "store_dir": "", "vocab_file": ""}
    parallel = replace(config.parallel, offload_dir="", deepspeed_config="")
    return config_to_dict(
        replace(config, run_dir=empty.run_dir, load="", data=replace(config.data, **paths), parallel=parallel)
    )


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        text = (folder / INDEX).read_text(encoding="utf-8")
        index = json.loads(text)
    except (OSError, ValueError) as error:
        found = f"{INDEX} cannot be read ({error})"
        raise CheckpointError(f"model {folder}", found, "Restore the folder from a copy") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise CheckpointError(f"model {folder}", f"{INDEX} is not of format {FORMAT}", "Give a biokit model")
    unsealed = unseal_manifest(index, text)
    if unsealed is None or set(unsealed.get("files", ())) != {MODEL, VOCABULARY}:
        raise CheckpointError(f"model {folder}", f"{INDEX} is altered", "Restore the folder from a copy")
    return unsealed
