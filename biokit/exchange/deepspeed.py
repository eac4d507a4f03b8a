"""DeepSpeed's checkpoint folder, read without DeepSpeed and without running anything of it.

    latest                                            the newest tag
    global_step80/mp_rank_00_model_states.pt          weights of tensor rank 0 (ZeRO stages 0 to 2)
    global_step80/layer_03-model_00-model_states.pt   weights of layer 3 (pipelines)
    global_step80/[bf16_]zero_pp_rank_0_mp_rank_00_optim_states.pt   data rank 0's share of the fp32 copy and moments

ZeRO-1 and 2 cut one flat vector of all parameters between the data ranks and write where each parameter lies
(`param_slice_mappings`); ZeRO-3 cuts every parameter into equal shares, the last one padded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from biokit.config import RunConfig
from biokit.errors import CheckpointError, list_faults
from biokit.exchange.names import OWN_VERSION, check_version, find_names
from biokit.exchange.safe_load import load_safely
from biokit.exchange.source import (
    MOMENTS,
    WEIGHT,
    Blueprint,
    Piece,
    Pieces,
    Source,
    check_number,
    check_values,
    match_names,
    one_value,
    raise_faults,
)
from biokit.exchange.zero_shares import WEIGHTS_ONLY, read_shares

LATEST = "latest"
MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
LAYER_FILE = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")
OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


@dataclass
class Listing:
    """The files of a tag: (data rank, model rank) or (layer, tensor rank) -> path. Stages 0 to 2 have data rank 0."""

    folder: Path
    models: dict[tuple[int, int], Path] = field(default_factory=dict)
    layers: dict[tuple[int, int], Path] = field(default_factory=dict)
    optimizers: dict[tuple[int, int], Path] = field(default_factory=dict)
    partitioned: bool = False  # ZeRO-3


def is_deepspeed(path: Path) -> bool:
    """Whether a folder looks like a DeepSpeed checkpoint, or like one of its tags."""
    return (path / LATEST).is_file() or any(MODEL_FILE.fullmatch(child.name) for child in path.glob("*_states.pt"))


def open_deepspeed(path: Path, config: RunConfig, vocab_size: int, optimizer: bool) -> Source:
    """Open a DeepSpeed folder, or one tag of it.

    Args:
        config, vocab_size: of the model; the folder does not hold them.
        optimizer: read the moments too.

    Raises:
        CheckpointError: a missing, foreign or torn file, tensors that do not fit, an optimizer that cannot be read.
    """
    blueprint = Blueprint(config, vocab_size)
    listing = _list_files(_find_tag(path))
    states = {key: load_safely(file) for key, file in listing.models.items()}
    tensor, step = _check_states(listing, states)
    notes: list[str] = []
    weights = {} if listing.partitioned else _read_weights(listing, states, blueprint, tensor)
    half = any(piece.read().dtype != torch.float32 for pieces in weights.values() for piece in pieces)
    found: dict[str, Pieces] = {}
    if listing.optimizers and (optimizer or half or listing.partitioned):
        kinds = (WEIGHT, *MOMENTS) if optimizer else (WEIGHT,)
        found = _read_optimizers(listing, states, blueprint, kinds)
    elif optimizer and any(state.get("optimizer") for state in states.values()):
        reason = "without ZeRO its optimizer numbers the parameters and does not name them"
        raise CheckpointError(f"checkpoint {listing.folder}", reason, WEIGHTS_ONLY)
    else:
        notes.append("no optimizer: weights only" + (", of half precision" if half else ""))
    masters = found.get(WEIGHT, {}) if half or listing.partitioned else {}
    pieces = {**found, WEIGHT: weights | masters}
    form = "DeepSpeed pipeline" if listing.layers else f"DeepSpeed ZeRO-{3 if listing.partitioned else '0 to 2'}"
    source = Source(listing.folder, f"{form}, tp{tensor}", blueprint, step, tensor, pieces, {"step": step}, notes=notes)
    source.check()
    return source


def _find_tag(path: Path) -> Path:
    """The tag folder that a path means."""
    latest = path / LATEST
    if not latest.is_file():
        return path
    tag = latest.read_text(errors="replace").strip()
    folder = path / tag
    if not tag or Path(tag).name != tag or not folder.is_dir():
        there = sorted(child.name for child in path.iterdir() if child.is_dir())
        found = f'it names "{tag[:40]}", which is not a folder beside it'
        raise CheckpointError(f"file {latest}", found, f"Folders that are: {', '.join(there) or 'none'}")
    return folder


def _list_files(folder: Path) -> Listing:
    """Sort the files of a tag.

    Raises:
        CheckpointError: files of experts, of both ZeRO-3 and another stage, or none.
    """
    listing, ranks = Listing(folder), set()
    for path in sorted(folder.glob("*.pt")):
        if "expert" in path.name or path.name.startswith("expp_"):
            raise CheckpointError(f"file {path}", "mixtures of experts are not read", "Give a dense model's checkpoint")
        if match := MODEL_FILE.fullmatch(path.name):
            ranks.add(match[1] is not None)
            listing.models[int(match[1] or 0), int(match[2])] = path
        elif match := LAYER_FILE.fullmatch(path.name):
            listing.layers[int(match[1]), int(match[2] or 0)] = path
        elif match := OPTIMIZER_FILE.fullmatch(path.name):
            key = int(match[1]), int(match[2])
            if key in listing.optimizers:
                other = listing.optimizers[key].name
                raise CheckpointError(f"file {path}", f"{other} is of the same rank", "Move one of them away")
            listing.optimizers[key] = path
    if len(ranks) != 1:
        found = "it has files of ZeRO-3 and of another stage" if ranks else "it has no model states"
        raise CheckpointError(f"checkpoint {folder}", found, "Give a tag folder of DeepSpeed, e.g. global_step80")
    listing.partitioned = ranks == {True}
    return listing


def _check_states(listing: Listing, states: Mapping[tuple[int, int], Mapping[str, Any]]) -> tuple[int, int]:
    """(tensor ranks, step), after checking that the model files are those of one whole layout."""
    folder = listing.folder
    names = {listing.models[key].name: state for key, state in states.items()}

    def agreed(key: str) -> Any:
        return one_value({name: state.get(key) for name, state in names.items()}, key, folder)

    num_data = agreed("dp_world_size") if listing.partitioned else 1
    num_models, step = agreed("mp_world_size"), agreed("global_steps")
    tensor = num_models
    if listing.layers:
        tensor = 1 + max(rank for _, rank in listing.layers)
    if not all(isinstance(number, int) and number > 0 for number in (num_data, num_models)) or num_models % tensor:
        found = f"it says dp_world_size={num_data}, mp_world_size={num_models} and has {tensor} tensor ranks"
        raise CheckpointError(f"checkpoint {folder}", found, "Restore it from a copy")
    _check_complete(folder, listing.models, num_data, num_models, "model states of data rank {} and model rank {}")
    return tensor, step if isinstance(step, int) else 0


def _check_complete(
    folder: Path, files: Mapping[tuple[int, int], Path], num_first: int, num_second: int, what: str
) -> None:
    said = f"{num_first} x {num_second} of {what.format('i', 'j')}"
    check_number(folder, len(files), num_first * num_second, said)
    wanted = {(first, second) for first in range(num_first) for second in range(num_second)}
    faults = [f"missing {what.format(*key)}" for key in sorted(wanted - set(files))]
    faults += [f"foreign {files[key].name}" for key in sorted(set(files) - wanted)]
    if faults:
        do = "Restore the missing files, and move those of another layout away"
        raise CheckpointError(f"checkpoint {folder}", list_faults(faults), do)


def _read_weights(
    listing: Listing, states: Mapping[tuple[int, int], Mapping[str, Any]], blueprint: Blueprint, tensor: int
) -> Pieces:
    """Weights from layer files, or from the `module` of every tensor rank."""
    layers = list(blueprint.layers)
    if listing.layers:
        _check_complete(listing.folder, listing.layers, len(layers), tensor, "layer {} of tensor rank {}")
        files = sorted(listing.layers.items())
        parts: list[tuple[Path, Any, str]] = [(path, load_safely(path), f"{layer}.") for (layer, _), path in files]
    else:
        parts = [(listing.models[key], states[key].get("module"), "") for key in sorted(states)]
    version = _fused_version(listing, states)
    pieces: Pieces = {}
    for path, module, prefix in parts:
        if not isinstance(module, Mapping):
            raise CheckpointError(f"file {path}", "it has no mapping `module`", "Restore it from a copy")
        tensors = {key: value for key, value in module.items() if isinstance(value, torch.Tensor)}
        own = _own_names((f"{prefix}{key}" for key in tensors), blueprint, bool(prefix), str(path))
        for key, value in tensors.items():
            if name := own.get(f"{prefix}{key}"):
                check_values(path, key, value)
                read = partial(_own_order, blueprint, name, version, value.detach)
                piece = Piece(path.name.removesuffix("_states.pt"), tuple(value.shape), read)
                pieces.setdefault(name, []).append(piece)
    return pieces


def _read_optimizers(
    listing: Listing,
    states: Mapping[tuple[int, int], Mapping[str, Any]],
    blueprint: Blueprint,
    kinds: Sequence[str],
) -> dict[str, Pieces]:
    """fp32 weights and moments of all model ranks, which count tensor ranks first, then stages."""
    pieces: dict[str, Pieces] = {kind: {} for kind in kinds}
    version = _fused_version(listing, states)
    for model_rank in sorted({rank for _, rank in states}):
        paths = {data: path for (data, rank), path in listing.optimizers.items() if rank == model_rank}
        shapes = states[0, model_rank].get("param_shapes")
        if not paths or not isinstance(shapes, list):
            found = f"model rank {model_rank} has no optimizer states, or no param_shapes"
            raise CheckpointError(f"checkpoint {listing.folder}", found, WEIGHTS_ONLY)
        shares = read_shares(listing.folder, paths, shapes, kinds)
        own = _own_names(shares[kinds[0]], blueprint, bool(listing.layers), str(listing.folder))
        for kind, by_name in shares.items():
            for key, piece in by_name.items():
                if name := own.get(key):
                    if kind != "step":
                        piece = replace(piece, read=partial(_own_order, blueprint, name, version, piece.read))
                    pieces[kind].setdefault(name, []).append(piece)
    return pieces


def _own_names(found: Iterable[str], blueprint: Blueprint, by_layer: bool, where: str) -> dict[str, str]:
    """Names as found -> the model's; those tied to an earlier parameter, and what is no parameter, are left out.

    Args:
        by_layer: a pipeline's names: the position of the layer, then the name inside it.
    """
    tied = blueprint.parts.tied
    names = [name for name in found if not name.endswith("_extra_state")]
    if not by_layer:
        matched = match_names(names, [*blueprint.template, *tied], where)
    else:
        matched, layers = {}, list(blueprint.layers)
        for position in dict.fromkeys(name.partition(".")[0] for name in names):
            if not position.isdigit() or int(position) >= len(layers):
                raise_faults(where, [f"extra {name}" for name in names if name.startswith(position)])
            layer = layers[int(position)]
            inside = [
                name.removeprefix(f"{layer}.") for name in (*blueprint.template, *tied) if name.startswith(f"{layer}.")
            ]
            part = {name.removeprefix(f"{position}."): name for name in names if name.startswith(f"{position}.")}
            matched |= {part[key]: f"{layer}.{own}" for key, own in match_names(part, inside, where).items()}
    return {name: own for name, own in matched.items() if own not in tied}


def _fused_version(listing: Listing, states: Mapping[tuple[int, int], Mapping[str, Any]]) -> int:
    """The order of fused rows: Megatron's training scripts note it, biokit's is the newest."""
    said = {listing.models[key].name: state.get("checkpoint_version", OWN_VERSION) for key, state in states.items()}
    version = one_value(said, "checkpoint_version", listing.folder)
    return check_version(version, f"checkpoint {listing.folder}")


def _own_order(blueprint: Blueprint, name: str, version: int, read: Callable[[], torch.Tensor]) -> torch.Tensor:
    names = find_names(blueprint.config.model.name)
    return names.reorder(name, read(), blueprint.head_size, version, OWN_VERSION)
