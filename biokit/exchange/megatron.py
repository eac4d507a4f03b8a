"""Megatron-LM's checkpoint container, read and written.

    latest_checkpointed_iteration.txt            an iteration, or `release`
    iter_0000080/mp_rank_00/model_optim_rng.pt   tensor rank 0; with pipeline stages mp_rank_00_000, _001, ...

A file holds {args, checkpoint_version, iteration, model, optimizer, lr_scheduler, rng states} of one rank: its stage's
tensors, cut by the model's plan. `optimizer` is torch's form (`state` by index, `param_groups`), with `param_names`
beside the indices, so that every moment is matched by name. `biokit` holds what a biokit checkpoint has beyond these.
"""

from __future__ import annotations

import random
import re
from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from biokit.config import RunConfig, config_from_dict
from biokit.errors import CheckpointError, list_faults
from biokit.exchange.names import OWN_VERSION, MegatronNames, check_version, find_names
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
    count_entries,
    one_value,
    raise_faults,
)
from biokit.parallel.cuts import cut_tensor, padded_size
from biokit.runs import flush_to_disk, write_atomically

TRACKER, RANK_FILE, RELEASE = "latest_checkpointed_iteration.txt", "model_optim_rng.pt", "release"
RANK_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
SIZES = {  # args that must agree with the model
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "ffn_hidden_size",
}
ASKED_ARGS = (
    *SIZES, "max_position_embeddings", "padded_vocab_size", "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
)  # fmt: skip


def is_megatron(path: Path) -> bool:
    """Whether a folder looks like the container, or like one of its iterations."""
    return (path / TRACKER).is_file() or any(RANK_FOLDER.fullmatch(child.name) for child in _folders(path))


def rank_folder(tensor: int, pipeline: int, num_stages: int) -> str:
    """The folder of one rank."""
    return f"mp_rank_{tensor:02d}" + (f"_{pipeline:03d}" if num_stages > 1 else "")


def open_megatron(path: Path, config: RunConfig | None, vocab_size: int | None, optimizer: bool) -> Source:
    """Open the container, or one iteration folder of it.

    Args:
        config, vocab_size: of the model, where the container was not written by biokit.
        optimizer: read the moments too.

    Raises:
        CheckpointError: a missing, foreign or torn file, ranks that contradict one another, tensors that do not fit.
    """
    folder = _find_iteration(path)
    files = _read_ranks(folder)
    first, saved = next(iter(files.items()))
    step = _read_step(folder, files)
    extra = saved["biokit"] if isinstance(saved.get("biokit"), Mapping) else {}
    config, vocab_size = _find_config(folder, extra, config, vocab_size)
    blueprint = Blueprint(config, vocab_size)
    args = _check_args(folder, files, blueprint)
    source = Source(
        folder,
        f"Megatron container, tp{args['tensor_model_parallel_size']} x pp{args['pipeline_model_parallel_size']}",
        blueprint,
        step,
        args["tensor_model_parallel_size"],
        _collect_pieces(folder, files, blueprint, optimizer),
        **{key: extra[key] for key in ("state", "about", "vocabulary") if key in extra},
    )
    if optimizer and not source.has_optimizer:
        source.notes.append(f"{first}/{RANK_FILE} has no optimizer: weights only")
    source.check()
    padded = args["padded_vocab_size"]
    for name in (name for name in blueprint.template if blueprint.cut(WEIGHT, name).padded):
        rows = sum(piece.shape[0] for piece in source.pieces[WEIGHT][name])
        raise_faults(folder, [f"{name} has {rows} rows, args.padded_vocab_size is {padded}"] if rows != padded else [])
    return source


def write_megatron(source: Source, folder: Path, tensor: int, pipeline: int, version: float) -> None:
    """Write the container into an empty folder, a rank at a time; the tracker last.

    Raises:
        OSError: the disk is full.
    """
    names = find_names(source.blueprint.config.model.name)
    iteration = folder / _iteration_name(source.step)
    for stage, parameters in enumerate(source.blueprint.stages(pipeline)):
        for rank in range(tensor):
            path = iteration / rank_folder(rank, stage, pipeline) / RANK_FILE
            path.parent.mkdir(parents=True)
            saved = _rank_dict(source, names, parameters, (rank, tensor), version)
            saved["biokit"] |= {"tensor_rank": rank, "pipeline_rank": stage}
            saved["args"] = _args(source, tensor, pipeline)
            _save(saved, path)
            for written in (path, path.parent):
                flush_to_disk(written)
    flush_to_disk(iteration)
    write_atomically(folder / TRACKER, f"{source.step}")
    flush_to_disk(folder)


def _save(saved: dict[str, Any], path: Path) -> None:
    try:
        torch.save(saved, path)
    except RuntimeError as error:  # how torch says that the disk is full
        raise OSError(f"{path}: {error}") from error


def _rank_dict(
    source: Source, names: MegatronNames, parameters: list[str], rank: tuple[int, int], version: float
) -> dict[str, Any]:
    """What one rank's file holds, less `args` and its ranks. Copies: a view is saved with its whole storage."""
    blueprint, (part, num_parts) = source.blueprint, rank

    def piece(kind: str, name: str) -> torch.Tensor:
        own = cut_tensor(source.read(kind, name), blueprint.cut(kind, name), num_parts, part)
        ordered = own if kind == "step" else names.reorder(name, own, blueprint.head_size, OWN_VERSION, int(version))
        return ordered.clone(memory_format=torch.contiguous_format)

    train = blueprint.config.train
    saved: dict[str, Any] = {
        "checkpoint_version": float(version),
        "iteration": source.step,
        "model": {names.container_name(name): piece(WEIGHT, name) for name in parameters},
        "lr_scheduler": _schedule(source),
        **_rng_states(blueprint.config.seed),
        "biokit": {"state": source.state, "about": source.about, "vocabulary": source.vocabulary},
    }
    if source.has_optimizer:
        group = {
            "lr": train.lr,
            "betas": (train.adam_beta1, train.adam_beta2),
            "eps": train.adam_eps,
            "weight_decay": train.weight_decay,
            "params": list(range(len(parameters))),
            "param_names": [names.container_name(name) for name in parameters],
        }
        state = {i: {moment: piece(moment, name) for moment in MOMENTS} for i, name in enumerate(parameters)}
        saved["optimizer"] = {"state": state, "param_groups": [group]}
    return saved


def _args(source: Source, tensor: int, pipeline: int) -> Namespace:
    """Megatron's arguments, as far as they say what the tensors are."""
    blueprint, train = source.blueprint, source.blueprint.config.train
    return Namespace(
        **{arg: blueprint.sizes[size] for arg, size in SIZES.items()},
        max_position_embeddings=blueprint.config.data.max_length,
        seq_length=blueprint.config.data.max_length,
        padded_vocab_size=padded_size(blueprint.vocab_size, tensor),
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        micro_batch_size=train.micro_batch_size,
        global_batch_size=train.global_batch_size,
        consumed_train_samples=source.step * train.global_batch_size,
        train_iters=train.train_iters,
        lr=train.lr,
        min_lr=train.min_lr,
        seed=blueprint.config.seed,
        params_dtype=torch.float32,
        no_save_optim=not source.has_optimizer,
    )


def _schedule(source: Source) -> dict[str, Any]:
    """Megatron's scheduler counts samples; biokit's learning rate is a function of the step alone."""
    train = source.blueprint.config.train
    samples = train.train_iters * train.global_batch_size
    return {
        "max_lr": train.lr,
        "min_lr": train.min_lr,
        "warmup_steps": int(samples * train.lr_warmup_fraction),
        "num_steps": source.step * train.global_batch_size,
        "decay_style": train.lr_schedule,
        "decay_steps": samples,
    }


def _rng_states(seed: int) -> dict[str, Any]:
    """Fresh streams of the run's seed: biokit draws everything from (seed, step) and keeps no stream."""
    return {
        "random_rng_state": random.Random(seed).getstate(),
        "np_rng_state": np.random.RandomState(seed % 2**32).get_state(),
        "torch_rng_state": torch.Generator().manual_seed(seed).get_state(),
        "cuda_rng_state": torch.tensor([seed, 0]).view(torch.uint8),  # CUDA's form: seed, offset
        "rng_tracker_states": {},
    }


def _find_iteration(path: Path) -> Path:
    """The iteration folder that a path means."""
    if not (path / TRACKER).is_file():
        return path
    tracker = path / TRACKER
    text = tracker.read_text(errors="replace").strip()
    if text != RELEASE and not (text.isascii() and text.isdigit()):
        raise CheckpointError(
            f"file {tracker}", f'it says "{text[:40]}"', f"Write the number of an iteration, or {RELEASE}"
        )
    folder = path / (RELEASE if text == RELEASE else _iteration_name(int(text)))
    if not folder.is_dir():
        there = sorted(child.name for child in _folders(path) if child.name.startswith(("iter_", RELEASE)))
        found = f"it names {folder.name}, which is not there"
        raise CheckpointError(f"file {tracker}", found, f"Folders that are: {', '.join(there) or 'none'}")
    return folder


def _read_ranks(folder: Path) -> dict[str, dict[str, Any]]:
    """Every rank's file by folder name, stages outermost; the set is complete and nothing else is there."""
    asked = f"checkpoint {folder}"
    if (folder / "common.pt").exists() or (folder / ".metadata").exists():
        found = "it is of Megatron-core's distributed form (torch_dist), not mp_rank folders"
        raise CheckpointError(asked, found, "Save it with --ckpt-format torch")
    there = {child.name for child in _folders(folder) if RANK_FOLDER.fullmatch(child.name)}
    if not there:
        raise CheckpointError(asked, "it has no mp_rank folder", "Give an iter_NNNNNNN folder, or the one above it")
    first = load_safely(folder / min(there) / RANK_FILE)
    args = _plain_args(folder / min(there) / RANK_FILE, first)
    tensor, pipeline = (args[f"{kind}_model_parallel_size"] for kind in ("tensor", "pipeline"))
    check_number(folder, len(there), tensor * pipeline, f"tp{tensor} x pp{pipeline}")
    wanted = {rank_folder(rank, stage, pipeline): (rank, stage) for stage in range(pipeline) for rank in range(tensor)}
    missing = [name for name in wanted if not (folder / name / RANK_FILE).is_file()]
    foreign = sorted(there - set(wanted))
    if missing or foreign:
        faults = [f"missing {name}/{RANK_FILE}" for name in missing] + [f"foreign {name}" for name in foreign]
        found = f"its files say tp{tensor} x pp{pipeline}, but: {list_faults(faults)}"
        raise CheckpointError(asked, found, "Restore the missing ranks, and move those of another layout away")
    files = {name: first if name == min(there) else load_safely(folder / name / RANK_FILE) for name in wanted}
    for name, saved in files.items():
        _check_place(folder / name / RANK_FILE, saved.get("biokit"), wanted[name])
    return files


def _check_place(path: Path, extra: Any, place: tuple[int, int]) -> None:
    """Compare a file's own ranks with those of its folder's name; other programs do not write them."""
    for key, rank in zip(("tensor_rank", "pipeline_rank"), place, strict=True):
        if isinstance(extra, Mapping) and extra.get(key, rank) != rank:
            raise CheckpointError(f"file {path}", f"it is of {key} {extra[key]}", f"Restore the file of {key} {rank}")


def _read_step(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> int:
    """The iteration, the same in every file and that of the folder's name."""
    said = {f"{name}/{RANK_FILE}": saved.get("iteration") for name, saved in files.items()}
    step = one_value(said, "iteration", folder)
    if not isinstance(step, int) or folder.name not in (RELEASE, _iteration_name(step)):
        found = f"its files are of iteration {step}"
        raise CheckpointError(f"checkpoint {folder}", found, "Restore the folder's name (iter_NNNNNNN)")
    return step


def _plain_args(path: Path, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments in a rank's file that say what the tensors are."""
    args = vars(saved["args"]) if isinstance(saved.get("args"), Namespace) else {}
    missing = [key for key in ASKED_ARGS if not isinstance(args.get(key), int)]
    if missing or min(args["tensor_model_parallel_size"], args["pipeline_model_parallel_size"]) < 1:
        found = f"its args do not say {', '.join(missing) or 'sizes above 0'}"
        raise CheckpointError(f"file {path}", found, "Give a model_optim_rng.pt of Megatron-LM 2.0 or later")
    return {key: args[key] for key in ASKED_ARGS}


def _check_args(folder: Path, files: Mapping[str, Mapping[str, Any]], blueprint: Blueprint) -> dict[str, int]:
    """The arguments, the same in every file and those of the model."""
    args: dict[str, int] = {}
    said = {f"{name}/{RANK_FILE}": _plain_args(folder / name / RANK_FILE, saved) for name, saved in files.items()}
    for key in ASKED_ARGS:
        args[key] = one_value({file: values[key] for file, values in said.items()}, f"args.{key}", folder)
    config = blueprint.config
    expected = {arg: blueprint.sizes[size] for arg, size in SIZES.items()}
    expected["max_position_embeddings"] = config.data.max_length
    differing = [
        f"args.{key} is {args[key]}, the model's is {value}" for key, value in expected.items() if args[key] != value
    ]
    if args["padded_vocab_size"] < blueprint.vocab_size:
        differing.append(
            f"args.padded_vocab_size is {args['padded_vocab_size']}, the vocabulary has {blueprint.vocab_size}"
        )
    if differing:
        raise CheckpointError(
            f"checkpoint {folder}", "; ".join(differing), "Use the configuration that the checkpoint was made with"
        )
    return args


def _collect_pieces(
    folder: Path, files: Mapping[str, Mapping[str, Any]], blueprint: Blueprint, optimizer: bool
) -> dict[str, Pieces]:
    """Kind -> parameter -> pieces of the tensor ranks, from all files."""
    names = find_names(blueprint.config.model.name)
    own_names = {names.container_name(name): name for name in blueprint.template}
    pieces: dict[str, Pieces] = {}
    for folder_name, saved in files.items():
        file = f"{folder_name}/{RANK_FILE}"
        version = check_version(saved.get("checkpoint_version", 0), f"file {folder / file}")
        found = {WEIGHT: _tensors(folder / file, saved.get("model"))}
        if optimizer and saved.get("optimizer") is not None:
            found |= _read_moments(folder / file, saved["optimizer"])
        extra = {key: None for tensors in found.values() for key in tensors if key not in own_names}
        raise_faults(folder / file, [f"extra {key}" for key in extra])
        for kind, tensors in found.items():
            for key, tensor in tensors.items():
                name = own_names[key]
                read = partial(_own_order, names, kind, name, tensor, blueprint.head_size, version)
                pieces.setdefault(kind, {}).setdefault(name, []).append(Piece(folder_name, tuple(tensor.shape), read))
    return pieces


def _own_order(
    names: MegatronNames, kind: str, name: str, tensor: torch.Tensor, head_size: int, version: int
) -> torch.Tensor:
    return tensor if kind == "step" else names.reorder(name, tensor, head_size, version, 3)


def _tensors(path: Path, found: Any) -> dict[str, torch.Tensor]:
    """The `model` mapping of a file, nested mappings joined by dots; modules' `_extra_state` left out."""
    if not isinstance(found, Mapping):
        raise CheckpointError(f"file {path}", "it has no mapping `model`", "Give a model_optim_rng.pt of Megatron-LM")
    flat: dict[str, torch.Tensor] = {}
    for key, value in found.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": tensor for inner, tensor in _tensors(path, value).items()}
        elif not str(key).endswith("_extra_state"):
            check_values(path, str(key), value)
            flat[str(key)] = value
    return flat


def _read_moments(path: Path, section: Mapping[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """Moments by parameter name from an optimizer section that names its parameters.

    Raises:
        CheckpointError: it does not: Megatron numbers them by its own modules, and a wrong guess would not be seen.
    """
    groups = section.get("param_groups") if isinstance(section, Mapping) else None
    if not groups or not all("param_names" in group for group in groups):
        found = "its optimizer numbers its parameters and does not name them, or is Megatron's mixed-precision form"
        do = "Take the weights alone: optimizer=False (--no-optimizer)"
        raise CheckpointError(f"file {path}", found, do)
    moments: dict[str, dict[str, torch.Tensor]] = {moment: {} for moment in MOMENTS}
    for group in groups:
        for index, name in zip(group["params"], group["param_names"], strict=True):
            state = section["state"].get(index, {})
            raise_faults(path, [f"missing {moment} of {name}" for moment in MOMENTS if moment not in state])
            for moment in MOMENTS:
                value = state[moment]
                if moment == "step" and isinstance(value, int | float):
                    value = torch.tensor(float(value))
                check_values(path, f"{moment} of {name}", value)
                moments[moment][name] = value
    return moments


def _find_config(
    folder: Path, extra: Mapping[str, Any], config: RunConfig | None, vocab_size: int | None
) -> tuple[RunConfig, int]:
    """The model's configuration: the container's own, where biokit wrote it, else the one given."""
    about = extra.get("about") or {}
    if about.get("config") and isinstance(extra.get("vocabulary"), str):
        return config_from_dict(about["config"], where=str(folder)), count_entries(extra["vocabulary"])
    if config is None or vocab_size is None:
        found = "it was not written by biokit, and its args do not say which model it is"
        raise CheckpointError(f"checkpoint {folder}", found, "Give the model's configuration: config=... (--config)")
    return config, vocab_size


def _iteration_name(step: int) -> str:
    return f"iter_{step:07d}"


def _folders(path: Path) -> list[Path]:
    return [child for child in path.iterdir() if child.is_dir()] if path.is_dir() else []
