"""Parameters put together from the shares that DeepSpeed's ZeRO gives its data ranks.

ZeRO-1 and 2 lay all parameters of a group end to end, cut that vector between the ranks, and write where each one
lies (`param_slice_mappings`). ZeRO-3 cuts every parameter into equal shares, the last one padded, and lays a rank's
shares end to end in the order of `param_shapes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from biokit.errors import CheckpointError
from biokit.exchange.safe_load import load_safely
from biokit.exchange.source import WEIGHT, Piece, check_values, one_value

WEIGHTS_ONLY = "Take the weights alone: optimizer=False (--no-optimizer)"
Shapes = Sequence[Mapping[str, torch.Size]]
Shares = list[tuple[list[torch.Tensor], int, int]]  # flat tensors laid end to end, first value, number of values


def read_shares(
    folder: Path, paths: Mapping[int, Path], shapes: Shapes, kinds: Sequence[str]
) -> dict[str, dict[str, Piece]]:
    """fp32 weights and moments of one model rank: kind -> parameter as DeepSpeed names it -> piece.

    Args:
        paths: data rank -> its optimizer states.
        shapes: of each group, in order.
        kinds: `weight` and moments.

    Raises:
        CheckpointError: a missing or foreign rank, shares that do not make up a parameter, an unknown form.
    """
    sections = {rank: _section(paths[rank]) for rank in sorted(paths)}
    said = {paths[rank].name: _largest(section.get("partition_count")) for rank, section in sections.items()}
    num_ranks = one_value(said, "partition_count", folder)
    if len(sections) != num_ranks or list(sections) != list(range(len(sections))):
        found = f"it has the optimizer states of data ranks {', '.join(map(str, sections))} of {num_ranks}"
        raise CheckpointError(f"checkpoint {folder}", found, "Restore the missing ones, and move foreign ones away")
    stages = {paths[rank].name: section.get("zero_stage") for rank, section in sections.items()}
    place = _places_stage3 if one_value(stages, "zero_stage", folder) == 3 else _places_sliced
    files = f"{paths[0].name.removesuffix('_optim_states.pt')}"
    if num_ranks > 1:
        files += f" to {num_ranks - 1}"
    pieces: dict[str, dict[str, Piece]] = {}
    for kind in kinds:
        pieces[kind] = {}
        for name, group, shape, shares in place(paths, sections, shapes, "exp_avg" if kind == "step" else kind):
            if kind == "step":
                steps = {paths[rank].name: _step(paths[rank], section, group) for rank, section in sections.items()}
                step = torch.tensor(float(one_value(steps, "step", folder)))
                pieces[kind][name] = Piece(files, (), step.clone)
            else:
                pieces[kind][name] = Piece(files, tuple(shape), partial(_join, shares, shape))
    return pieces


def _section(path: Path) -> Mapping[str, Any]:
    section = load_safely(path).get("optimizer_state_dict")
    if not isinstance(section, Mapping):
        raise CheckpointError(f"file {path}", "it has no mapping `optimizer_state_dict`", "Restore it from a copy")
    if "ds_zero_partition_groups" in section:
        found = "its parameters are cut over several process groups"
        raise CheckpointError(
            f"file {path}", found, "Convert it with DeepSpeed's ds_to_universal, or save without them"
        )
    return section


def _places_sliced(
    paths: Mapping[int, Path], sections: Mapping[int, Mapping[str, Any]], shapes: Shapes, kind: str
) -> Iterator[tuple[str, int, torch.Size, Shares]]:
    """(parameter, its group, shape, shares) under ZeRO-1 and 2."""
    flats = {rank: _flats(paths[rank], section, kind) for rank, section in sections.items()}
    slices = {rank: _slices(paths[rank], section) for rank, section in sections.items()}
    for rank, path in paths.items():
        if not len(flats[rank]) == len(slices[rank]) == len(shapes):
            _refuse(path, f"it has {len(flats[rank])} groups of parameters instead of {len(shapes)}")
    for group, by_name in enumerate(shapes):
        for name, shape in by_name.items():
            shares: Shares = []
            for rank in sections:
                if name in slices[rank][group]:
                    tensors, place = [flats[rank][group]], slices[rank][group][name]
                    start, numel = getattr(place, "start", -1), getattr(place, "numel", -1)
                    _check_share(paths[rank], name, tensors, start, numel)
                    shares.append((tensors, start, numel))
            found = sum(numel for _, _, numel in shares)
            if found != prod(shape):
                _refuse(paths[0], f"the shares of {name} hold {found} values instead of {prod(shape)}")
            yield name, group, shape, shares


def _places_stage3(
    paths: Mapping[int, Path], sections: Mapping[int, Mapping[str, Any]], shapes: Shapes, kind: str
) -> Iterator[tuple[str, int, torch.Size, Shares]]:
    """(parameter, group 0, shape, shares) under ZeRO-3."""
    flats = {rank: _flats(paths[rank], section, kind) for rank, section in sections.items()}
    start = 0
    for name, shape in ((name, shape) for by_name in shapes for name, shape in by_name.items()):
        numel = -(-prod(shape) // len(sections))
        for rank in sections:
            _check_share(paths[rank], name, flats[rank], start, numel)
        yield name, 0, shape, [(flats[rank], start, numel) for rank in sections]
        start += numel
    for rank, tensors in flats.items():
        if sum(tensor.numel() for tensor in tensors) != start:
            _refuse(paths[rank], f"its share of all parameters is not the {start} values that param_shapes say")


def _flats(path: Path, section: Mapping[str, Any], kind: str) -> list[torch.Tensor]:
    """A data rank's flat tensors of the fp32 weights or a moment, one a group."""
    stage3 = "fp32_flat_groups" in section
    if kind == WEIGHT:
        found = section.get("fp32_flat_groups" if stage3 else "single_partition_of_fp32_groups")
    else:
        states = _states(section)
        found = [states[i].get(kind) for i in sorted(states)] if states else None
    if not isinstance(found, list) or not all(isinstance(tensor, torch.Tensor) for tensor in found):
        what = (
            "no fp32 weights" if kind == WEIGHT else f"no {kind} of AdamW (none yet, offloaded, or another optimizer)"
        )
        raise CheckpointError(f"file {path}", f"it holds {what}", WEIGHTS_ONLY)
    for tensor in found:
        check_values(path, f"a flat {kind}", tensor)
    return [tensor.reshape(-1) for tensor in found]


def _states(section: Mapping[str, Any]) -> Mapping[int, Mapping[str, Any]]:
    base = section.get("base_optimizer_state", section.get("optimizer_state_dict"))
    found = base.get("state") if isinstance(base, Mapping) else None
    return found if isinstance(found, Mapping) and all(isinstance(v, Mapping) for v in found.values()) else {}


def _step(path: Path, section: Mapping[str, Any], group: int) -> float:
    """The updates that AdamW has done; some versions keep it beside the group's settings."""
    base = section.get("base_optimizer_state", section.get("optimizer_state_dict"))
    groups = base.get("param_groups", []) if isinstance(base, Mapping) else []
    step = _states(section).get(group, {}).get("step")
    if step is None and group < len(groups):
        step = groups[group].get("step")
    if step is None:
        raise CheckpointError(f"file {path}", "its optimizer does not say its step", WEIGHTS_ONLY)
    return float(step)


def _slices(path: Path, section: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = section.get("param_slice_mappings")
    if not isinstance(found, list) or not all(isinstance(slices, Mapping) for slices in found):
        what = "it does not say where each parameter lies (param_slice_mappings; DeepSpeed 0.7 and later do)"
        raise CheckpointError(f"file {path}", what, WEIGHTS_ONLY)
    return found


def _check_share(path: Path, name: str, tensors: Sequence[torch.Tensor], start: Any, numel: Any) -> None:
    size = sum(tensor.numel() for tensor in tensors)
    if not isinstance(start, int) or not isinstance(numel, int) or start < 0 or numel < 0 or start + numel > size:
        _refuse(path, f"the share of {name} is at {start} with {numel} values, of {size}")


def _refuse(path: Path, found: str) -> None:
    raise CheckpointError(f"file {path}", found, "Restore the folder from a copy")


def _join(shares: Shares, shape: torch.Size) -> torch.Tensor:
    taken = [part for tensors, start, numel in shares for part in _take(tensors, start, numel)]
    return torch.cat(taken)[: prod(shape)].reshape(shape)


def _take(tensors: Sequence[torch.Tensor], start: int, numel: int) -> list[torch.Tensor]:
    """`numel` values from `start` of tensors laid end to end."""
    taken: list[torch.Tensor] = []
    for tensor in tensors:
        first, last = max(start, 0), min(start + numel, tensor.numel())
        if first < last:
            taken.append(tensor[first:last])
        start -= tensor.numel()
    return taken


def _largest(count: Any) -> int:
    return max(count) if isinstance(count, list) and count else int(count or 0)
