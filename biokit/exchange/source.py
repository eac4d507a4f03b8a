"""A checkpoint of any form, opened: whole parameters by name, read from the pieces that its files hold."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from biokit.config import RunConfig
from biokit.errors import CheckpointError, list_faults
from biokit.layouts import model_parts
from biokit.models import find_model
from biokit.models.spec import ModelSpec
from biokit.parallel.cuts import WHOLE, Cut, cut_tensor, find_cut, join_tensors
from biokit.parallel.strategy import MOMENTS, ModelParts

WEIGHT = "weight"
MOST_MISSING = 1000  # files; beyond that they are counted, not looked for
KINDS = (WEIGHT, *MOMENTS)  # what there is of a parameter


@dataclass(frozen=True)
class Piece:
    """One tensor rank's piece of a parameter, in biokit's order of rows.

    Attributes:
        files: where it stands, as a plan names it.
        read: gets the values; until then they stay on the disk.
    """

    files: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


Pieces = dict[str, list[Piece]]  # parameter -> the pieces of all tensor ranks, in order


@dataclass(frozen=True)
class Blueprint:
    """The parameters of a configuration's model, and how they are cut."""

    config: RunConfig
    vocab_size: int

    @property
    def spec(self) -> ModelSpec:
        """The model as data."""
        return find_model(self.config.model.name)

    @cached_property
    def sizes(self) -> dict[str, Any]:
        """Layers, hidden size, heads and so on."""
        return self.spec.resolve(self.config.model)

    @property
    def head_size(self) -> int:
        """Of one attention head."""
        return self.sizes["hidden_size"] // self.sizes["num_attention_heads"]

    @cached_property
    def parts(self) -> ModelParts:
        """What a strategy would get."""
        return model_parts(self.config, self.vocab_size, pad_id=0)

    @cached_property
    def template(self) -> dict[str, torch.Tensor]:
        """Every parameter by name, in order, without storage; tied ones once."""
        return self.parts.template()

    @cached_property
    def layers(self) -> dict[str, list[str]]:
        """The model's layers in order, each with its parameters."""
        return {
            layer: [name for name in self.template if name.startswith(f"{layer}.")] for layer, _ in self.parts.layers
        }

    def stages(self, num_stages: int) -> list[list[str]]:
        """The parameters of each pipeline stage; the dearest stage is as cheap as can be.

        Raises:
            ConfigError: more stages than layers.
        """
        layers = list(self.layers.values())
        bounds = itertools.pairwise(self.parts.stage_bounds(num_stages))
        return [[name for names in layers[start:end] for name in names] for start, end in bounds]

    def cut(self, kind: str, name: str) -> Cut:
        """How tensor parallelism cuts a parameter or its moment."""
        return WHOLE if kind == "step" else self._cuts[name]

    @cached_property
    def _cuts(self) -> dict[str, Cut]:
        return {name: find_cut(self.spec.tensor_parallel_plan, name) for name in self.template}

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Of the whole parameter or its moment."""
        return () if kind == "step" else tuple(self.template[name].shape)


@dataclass
class Source:
    """A checkpoint opened for reading.

    Attributes:
        form: what it is, for people.
        pieces: kind -> parameter -> the pieces of all tensor ranks in order; the weights only, where it has no
            optimizer that can be read.
        state, about, vocabulary: what else a biokit checkpoint holds; empty where the form has none.
        notes: what a reader of the plan should know.
    """

    path: Path
    form: str
    blueprint: Blueprint
    step: int
    tensor: int
    pieces: dict[str, Pieces]
    state: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    vocabulary: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def has_optimizer(self) -> bool:
        """Whether AdamW's moments can be read."""
        return len(self.pieces) == len(KINDS)

    def read(self, kind: str, name: str) -> torch.Tensor:
        """A whole parameter or moment, in fp32.

        Raises:
            CheckpointError: tensor ranks that should hold the same values do not.
        """
        cut, found = self.blueprint.cut(kind, name), self.pieces[kind][name]
        pieces = [piece.read() for piece in found]
        if cut.dim is None:
            for piece, tensor in zip(found[1:], pieces[1:], strict=True):
                if not _same_bits(tensor, pieces[0]):
                    raise CheckpointError(
                        f"checkpoint {self.path}",
                        f"{kind} of {name} in {piece.files} differs from that in {found[0].files}, yet it is not cut",
                        "Its ranks have drifted apart: take an earlier checkpoint",
                    )
        return join_tensors(pieces, cut, self.blueprint.shape(kind, name)).detach().float()

    def check(self) -> None:
        """Compare names and shapes with the model.

        Raises:
            CheckpointError: a missing, extra or misshapen tensor; names it and its file.
        """
        expected = self.blueprint.template
        for kind, found in self.pieces.items():
            what = "" if kind == WEIGHT else f"{kind} of "
            faults = [f"missing {what}{name}" for name in expected if name not in found]
            faults += [f"extra {what}{name} in {found[name][0].files}" for name in found if name not in expected]
            for name in expected:
                faults += [f"{what}{fault}" for fault in self._faults(kind, name, found.get(name, []))]
            raise_faults(self.path, faults)

    def _faults(self, kind: str, name: str, pieces: Sequence[Piece]) -> list[str]:
        """What is wrong with the pieces of one parameter."""
        if not pieces:
            return []
        if len(pieces) != self.tensor:
            return [f"{name} has {len(pieces)} pieces instead of {self.tensor}"]
        cut, shape = self.blueprint.cut(kind, name), self.blueprint.shape(kind, name)
        wanted = tuple(cut_tensor(torch.empty(shape, device="meta"), cut, self.tensor, 0).shape)
        if cut.padded and pieces[0].shape and pieces[0].shape[0] >= wanted[0]:
            wanted = (pieces[0].shape[0], *wanted[1:])  # padded to a multiple of 128 x tp, say
        return [
            f"{name} in {piece.files} is {piece.shape} instead of {wanted}" for piece in pieces if piece.shape != wanted
        ]


def match_names(found: Iterable[str], expected: Iterable[str], where: str) -> dict[str, str]:
    """Names as found -> as expected; all may have one prefix more (`module.`), as a wrapper adds.

    Raises:
        CheckpointError: names that the model does not have.
    """
    names, wanted = list(found), set(expected)
    prefixes = {""} | {names[0].removesuffix(name) for name in wanted if names and names[0].endswith(f".{name}")}
    fitting = [p for p in prefixes if all(name.startswith(p) and name.removeprefix(p) in wanted for name in names)]
    if not fitting:
        raise_faults(where, [f"extra {name}" for name in names if name not in wanted])
    prefix = max(fitting, key=len)
    return {name: name.removeprefix(prefix) for name in names}


def count_entries(vocabulary: str) -> int:
    """Entries of a vocabulary file's text."""
    return vocabulary.removesuffix("\n").count("\n") + 1


def raise_faults(where: str | Path, faults: Sequence[str]) -> None:
    """Say which tensors do not fit, up to five.

    Raises:
        CheckpointError: there are faults.
    """
    if faults:
        raise CheckpointError(
            f"checkpoint {where}",
            f"its tensors do not fit the model: {list_faults(faults)}",
            "Use the configuration that the checkpoint was made with",
        )


def check_number(where: str | Path, num_found: int, num_wanted: int, said: str) -> None:
    """Refuse a layout that has far more files than are there, before each is looked for: a number may be a wrong one.

    Args:
        said: what the files say of their layout.

    Raises:
        CheckpointError: more files are missing than are worth looking for.
    """
    if num_wanted > num_found + MOST_MISSING:
        found = f"its files say {said}, which is {num_wanted} files, and {num_found} are there"
        raise CheckpointError(f"checkpoint {where}", found, "Restore it from a copy")


def check_values(path: Path, name: str, value: Any) -> None:
    """Refuse what cannot be cut, joined and widened to fp32 as a parameter is.

    Raises:
        CheckpointError: it is no tensor, or sparse, nested, without storage, of integers or of complex numbers.
    """
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(f"file {path}", f"{name} is a {type(value).__name__}, no tensor", "Restore the file")
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_nested
    if not plain or not value.is_floating_point():
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        found = f"{name} is a {kind} tensor of {str(value.dtype).removeprefix('torch.')} on {value.device.type}"
        raise CheckpointError(f"file {path}", found, "Save it as a dense floating-point tensor")


def one_value(values: Mapping[str, Any], what: str, path: Path) -> Any:
    """What all files say.

    Args:
        values: file -> what it says.

    Raises:
        CheckpointError: they differ; names the first that does.
    """
    (first, expected), *others = values.items()
    for file, value in others:
        if value != expected:
            raise CheckpointError(
                f"checkpoint {path}", f"{what} is {value!r} in {file} and {expected!r} in {first}", "Restore the folder"
            )
    return expected


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equality that holds for NaN too."""
    return first.dtype == second.dtype and torch.equal(
        first.reshape(-1).contiguous().view(torch.uint8), second.reshape(-1).contiguous().view(torch.uint8)
    )
