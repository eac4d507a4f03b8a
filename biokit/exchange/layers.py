"""A checkpoint as one file a layer, for layer-wise loading (`biokit.parallel.layer_files` describes the folder)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from biokit.checkpoint import MANIFEST, MODEL, VOCABULARY, check_tensors, find_checkpoint, load_checkpoint
from biokit.config import config_from_dict
from biokit.data.publish import publish_folder
from biokit.errors import CheckpointError
from biokit.models import find_model
from biokit.parallel.layer_files import FORMAT, INDEX, describe_tensors, layer_file_name
from biokit.runs import describe_file
from biokit.tokenizers import SmilesTokenizer


def split_layers(checkpoint: Path, directory: Path) -> dict[str, Any]:
    """Write each layer of a checkpoint into a file of its own; returns the index that stands beside them.

    Memory holds one layer at a time. The folder appears whole or not at all.

    Args:
        checkpoint: a checkpoint, or a run folder (its newest one); every file of it is checked first.
        directory: a new or empty folder: files of another split that stay in it would be taken for this one's.

    Raises:
        CheckpointError: a damaged checkpoint, tensors that are not those of its model, or a folder that is not empty.
        DataError: the disk is full or not writable.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        do = "Give a new folder: files that stay in it would be taken for layers of this checkpoint"
        raise CheckpointError(f"split into {directory}", "it is there and not empty", do)
    source = find_checkpoint(checkpoint)
    saved = load_checkpoint(source)
    config = config_from_dict(saved.manifest["config"], where=str(source / MANIFEST))
    vocab_size = SmilesTokenizer.from_file(source / VOCABULARY).vocab_size
    spec = find_model(config.model.name)
    layers = spec.layers(config.model, vocab_size, config.data.max_length, config.seed)
    tied = spec.tied_parameters(config.model)
    with torch.device("meta"):
        expected = {name: dict(build().named_parameters()) for name, build in layers}
    names = {layer: [key for key in expected[layer] if f"{layer}.{key}" not in tied] for layer, _ in layers}
    whole = {f"{layer}.{key}": expected[layer][key] for layer, keys in names.items() for key in keys}
    check_tensors(source, saved.model, whole)
    index: dict[str, Any] = {
        "format": FORMAT,
        "source": {"checkpoint": source.name, "step": saved.manifest["step"], **saved.manifest["files"][MODEL]},
        "vocab_hash": saved.manifest.get("vocab_hash", ""),
        "config": saved.manifest["config"],
        "sizes": {"name": spec.name, **spec.resolve(config.model)},
        "tied": tied,
        "layers": [],
    }
    with publish_folder(directory) as partial:
        for position, (layer, keys) in enumerate(names.items()):
            tensors = {key: saved.model[f"{layer}.{key}"] for key in keys}
            file = partial / layer_file_name(position)
            _write_tensors(tensors, file)
            about = {"name": layer, "file": file.name, **describe_file(file), "tensors": describe_tensors(tensors)}
            index["layers"].append(about)
        (partial / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")
    return index


def _write_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    try:
        save_file(tensors, file)
    except SafetensorError as error:  # how safetensors says that the disk is full
        raise OSError(str(error)) from error
