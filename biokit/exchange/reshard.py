"""From any checkpoint to any layout: `reshard` reads one form, says what moves, and writes another.

Read: a biokit checkpoint or run, Megatron's container, DeepSpeed's folder. Written: Megatron's container cut over
tensor ranks and pipeline stages, or a run folder with one biokit checkpoint (whole tensors: it fits every layout).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from biokit.checkpoint import (
    MANIFEST,
    MODEL,
    OPTIMIZER,
    VOCABULARY,
    TensorFile,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from biokit.config import (
    ParallelConfig,
    RunConfig,
    config_from_dict,
    config_hash,
    config_to_dict,
    config_to_yaml,
    load_config,
)
from biokit.data.publish import publish_folder
from biokit.errors import CheckpointError, ConfigError
from biokit.exchange.deepspeed import is_deepspeed, open_deepspeed
from biokit.exchange.megatron import is_megatron, open_megatron, rank_folder, write_megatron
from biokit.exchange.names import OWN_VERSION, check_version
from biokit.exchange.source import MOMENTS, WEIGHT, Blueprint, Piece, Pieces, Source, count_entries
from biokit.parallel.cuts import Cut, cut_tensor, find_word
from biokit.parallel.grid import plan_layout
from biokit.runs import RunFolder
from biokit.tokenizers import SmilesTokenizer

FORMATS = ("megatron", "biokit")
FP32_BYTES = 4
FRESH_STATE: dict[str, Any] = {"position": None, "best_val_loss": None, "evaluations_since_best": 0, "scaler": {}}


@dataclass(frozen=True)
class Move:
    """One parameter: where its pieces come from and go to. `num_bytes` are written for it, its moments included."""

    name: str
    shape: tuple[int, ...]
    word: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    num_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a `reshard` moves; `str` makes it a table."""

    source: str
    target: str
    moves: tuple[Move, ...]
    num_files: int
    notes: tuple[str, ...]
    dry_run: bool

    @property
    def num_values(self) -> int:
        """Values of all parameters, moments left out."""
        return sum(torch.Size(move.shape).numel() for move in self.moves)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors written: copies on several ranks and padding included."""
        return sum(move.num_bytes for move in self.moves)

    def __str__(self) -> str:
        heads = ("parameter", "shape", "word", "from", "to", "bytes")
        rows = [
            (m.name, str(m.shape), m.word, ", ".join(m.sources), ", ".join(m.targets), f"{m.num_bytes:,}")
            for m in self.moves
        ]
        widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
        lines = [f"from  {self.source}", f"to    {self.target}", *(f"note  {note}" for note in self.notes)]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [heads, *rows]
        ]
        lines.append(
            f"{len(self.moves)} parameters, {self.num_values:,} values; "
            f"{self.num_bytes:,} bytes of tensors in {self.num_files} files"
            f"{'; nothing is written (dry run)' if self.dry_run else ''}"
        )
        return "\n".join(lines)


def reshard(
    src: str | Path,
    dst: str | Path,
    tensor: int = 1,
    pipeline: int = 1,
    dry_run: bool = False,
    format: str = "megatron",
    config: str | Path | RunConfig | None = None,
    optimizer: bool = True,
    version: float = OWN_VERSION,
) -> Plan:
    """Write a checkpoint in another layout or form.

    Args:
        src: a biokit checkpoint or run, Megatron's container or an iteration of it, DeepSpeed's folder or a tag of it.
        dst: a new folder; under its name it is whole or not there.
        tensor, pipeline: ranks and stages of Megatron's container.
        dry_run: write nothing.
        format: `megatron`, or `biokit` (a run folder with one checkpoint).
        config: of the model, where the source does not hold it.
        optimizer: take the moments too; False takes the weights alone, as for a fine-tuning.
        version: Megatron's `checkpoint_version`, which orders fused rows.

    Raises:
        ConfigError: an impossible layout (names the valid ones), or an unknown format.
        CheckpointError: a source that cannot be read, a destination that exists or cannot be written.
    """
    src, dst = Path(src), Path(dst)
    if format not in FORMATS:
        raise ConfigError(f"format={format}", "there is no such form", f"Valid: {', '.join(FORMATS)}")
    version = check_version(version, f"write {dst}")
    source = open_source(src, config, optimizer)
    if format == "biokit" and (tensor, pipeline) != (1, 1):
        found = "a biokit checkpoint holds whole tensors and fits every layout"
        raise ConfigError(f"tp={tensor} x pp={pipeline}", found, "Leave them out")
    check_layout(source.blueprint, tensor, pipeline)
    if dst.exists():
        raise CheckpointError(f"write {dst}", "it is there already", "Give a new folder, or move the old one away")
    plan = make_plan(source, dst, tensor, pipeline, format, dry_run)
    if not dry_run:
        with publish_folder(dst) as folder:
            if format == "megatron":
                write_megatron(source, folder, tensor, pipeline, version)
            else:
                _write_biokit(source, folder, dst)
    return plan


def open_source(src: Path, config: str | Path | RunConfig | None, optimizer: bool) -> Source:
    """Open a checkpoint of any form that is known.

    Raises:
        CheckpointError: it is none, or cannot be read.
        ConfigError: the configuration is missing, or given although the source holds it.
    """
    if (src / "checkpoints").is_dir():
        src = find_checkpoint(src)
    given = load_config(config) if isinstance(config, str | Path) else config
    tokenizer = _tokenizer(given) if given else None
    if (src / MANIFEST).is_file():
        source = _open_biokit(src, optimizer)
    elif is_megatron(src):
        source = open_megatron(src, given, tokenizer.vocab_size if tokenizer else None, optimizer)
    elif is_deepspeed(src):
        if given is None or tokenizer is None:
            found = "DeepSpeed's folder does not say which model it is"
            raise ConfigError(f"read {src}", found, "Give the model's configuration: config=... (--config)")
        source = open_deepspeed(src, given, tokenizer.vocab_size, optimizer)
    else:
        found = "it is neither a biokit checkpoint or run, nor Megatron's container, nor DeepSpeed's folder"
        raise CheckpointError(f"read {src}", found, "Check the path")
    if given and source.about:
        raise ConfigError(f"read {src}", "it holds its own configuration", "Leave config (--config) out")
    if given and tokenizer:
        about = {"config": config_to_dict(given), "config_hash": config_hash(given), "vocab_hash": tokenizer.hash}
        source.about = {**about, "data_hash": "", "layout": {}}
        source.vocabulary = "\n".join(tokenizer.vocabulary) + "\n"
    return source


def check_layout(blueprint: Blueprint, tensor: int, pipeline: int) -> None:
    """Refuse what the model cannot be cut into, as a run would.

    Raises:
        ConfigError: an impossible layout; names the valid choices.
    """
    for name, size in (("tp", tensor), ("pp", pipeline)):
        if size < 1:
            raise ConfigError(f"{name}={size}", "a layout has one at least", "Give 1 or more")
    parallel = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    divided = {name: blueprint.sizes[name] for name in blueprint.spec.divided}
    plan_layout(
        RunConfig(strategy="ThreeD", parallel=parallel), tensor * pipeline, divided, num_layers=len(blueprint.layers)
    )


def make_plan(source: Source, dst: Path, tensor: int, pipeline: int, format: str, dry_run: bool) -> Plan:
    """What moves where; reads no values."""
    blueprint, moves = source.blueprint, []
    for stage, names in enumerate(blueprint.stages(pipeline)):
        for name in names:
            folders = (
                [rank_folder(rank, stage, pipeline) for rank in range(tensor)] if format == "megatron" else [MODEL]
            )
            moves.append(_plan_move(source, name, folders))
    step = f"iter_{source.step:07d}, tp{tensor} x pp{pipeline}"
    target = f"Megatron container {dst}, {step}" if format == "megatron" else f"biokit run {dst}, step {source.step}"
    kept = "weights and AdamW's moments" if source.has_optimizer else "weights only"
    return Plan(
        f"{source.form} {source.path} (step {source.step}, {kept})",
        target,
        tuple(moves),
        tensor * pipeline if format == "megatron" else 1 + source.has_optimizer,
        tuple(source.notes),
        dry_run,
    )


def _plan_move(source: Source, name: str, folders: list[str]) -> Move:
    blueprint = source.blueprint
    cut, whole = blueprint.cut(WEIGHT, name), blueprint.template[name]
    word = find_word(blueprint.spec.tensor_parallel_plan, name.rpartition(".")[0])
    piece = cut_tensor(whole, cut, len(folders), 0).shape
    per_piece = piece.numel() * FP32_BYTES
    if source.has_optimizer:
        per_piece += sum(FP32_BYTES * (1 if kind == "step" else piece.numel()) for kind in MOMENTS)
    found = source.pieces[WEIGHT][name]
    return Move(
        name,
        tuple(whole.shape),
        word if word and cut.dim is not None else "replicated",
        _slices([piece.files for piece in found], [piece.shape for piece in found], cut, whole.shape),
        _slices(folders, [tuple(piece)] * len(folders), cut, whole.shape),
        per_piece * len(folders),
    )


def _slices(files: Sequence[str], shapes: Sequence[tuple[int, ...]], cut: Cut, whole: Sequence[int]) -> tuple[str, ...]:
    """Files, each with the part of the whole parameter that it holds (`[0:48]` rows, `[:, 0:48]` columns)."""
    if cut.dim is None or len(files) == 1:
        return tuple(files)
    named, start = [], 0
    for file, shape in zip(files, shapes, strict=True):
        end = min(start + shape[cut.dim], whole[cut.dim])
        named.append(f"{file}[{':, ' * cut.dim}{min(start, end)}:{end}]")
        start += shape[cut.dim]
    return tuple(named)


def _open_biokit(path: Path, optimizer: bool) -> Source:
    """A biokit checkpoint, every file of it checked."""
    saved = load_checkpoint(path)
    manifest = saved.manifest
    vocabulary = (path / VOCABULARY).read_text(encoding="utf-8")
    config = config_from_dict(manifest["config"], where=str(path / MANIFEST))
    pieces: dict[str, Pieces] = {WEIGHT: _whole_pieces(saved.model, MODEL, "")}
    if optimizer and len(saved.optimizer):
        pieces |= {moment: _whole_pieces(saved.optimizer, OPTIMIZER, f"{moment}.") for moment in MOMENTS}
    about = {key: value for key, value in manifest.items() if key not in ("format", "step", "files")}
    blueprint = Blueprint(config, count_entries(vocabulary))
    source = Source(path, "biokit checkpoint", blueprint, manifest["step"], 1, pieces, saved.state, about, vocabulary)
    source.check()
    return source


def _whole_pieces(tensors: TensorFile, file: str, prefix: str) -> Pieces:
    return {
        name.removeprefix(prefix): [Piece(file, tuple(form.shape), partial(tensors.__getitem__, name))]
        for name, form in tensors.forms().items()
        if name.startswith(prefix)
    }


def _write_biokit(source: Source, folder: Path, dst: Path) -> None:
    """A run folder with one checkpoint, which a run goes on from or loads."""
    template, state = source.blueprint.template, {"step": source.step, **FRESH_STATE, **source.state}
    model = {name: source.read(WEIGHT, name) for name in template}
    optimizer = {
        f"{moment}.{name}": source.read(moment, name)
        for name in (template if source.has_optimizer else ())
        for moment in MOMENTS
    }
    run = RunFolder(folder)
    run.create()
    save_checkpoint(run, source.step, model, optimizer, state, source.about, source.vocabulary)
    run.write_config(config_to_yaml(replace(source.blueprint.config, run_dir=str(dst))))


def _tokenizer(config: RunConfig) -> SmilesTokenizer:
    """That of a configuration, as preprocessing takes it."""
    file = config.data.vocab_file
    return SmilesTokenizer.from_file(file) if file else SmilesTokenizer.packaged()
