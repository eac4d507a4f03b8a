"""How tensor parallelism cuts each parameter: pure arithmetic on a model's plan, with no process and no engine.

A plan maps module patterns to words. A parameter `<module>.weight` or `<module>.bias` follows its module's word:
    column  output features: weight and bias by rows          row    input features: weight by columns, bias whole
    vocab   the vocabulary, rows padded to a multiple of tp   local  (no parameters) an own random stream a rank
Modules that no pattern matches are replicated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from biokit.errors import ConfigError

PLAN_WORDS = ("column", "row", "vocab", "local")


@dataclass(frozen=True)
class Cut:
    """The dimension along which a parameter is cut (None: every tensor rank holds the whole), and whether it pads."""

    dim: int | None
    padded: bool = False


WHOLE = Cut(None)


def find_word(plan: Mapping[str, str], module_name: str) -> str | None:
    """The plan's word for a module of the whole model (`encoder.3.attention.qkv`); None: replicated.

    Raises:
        ConfigError: two patterns with different words match.
    """
    words = {word for pattern, word in plan.items() if _matches(pattern, module_name)}
    if len(words) > 1:
        raise ConfigError(
            f"tensor-parallel plan of {module_name}", f"patterns say {', '.join(sorted(words))}", "Keep one of them"
        )
    return words.pop() if words else None


def find_cut(plan: Mapping[str, str], parameter_name: str) -> Cut:
    """How the plan cuts a parameter of the whole model."""
    module_name, _, leaf = parameter_name.rpartition(".")
    word = find_word(plan, module_name)
    if word == "vocab":
        return Cut(0, padded=True)
    if word == "column" or (word == "row" and leaf != "bias"):
        return Cut(1 if word == "row" else 0)
    return WHOLE


def padded_size(size: int, num_parts: int) -> int:
    """`size` rounded up to a multiple of `num_parts`."""
    return -(-size // num_parts) * num_parts


def cut_tensor(whole: torch.Tensor, cut: Cut, num_parts: int, part: int) -> torch.Tensor:
    """The piece of tensor rank `part`; a view where nothing is padded (padding is zero).

    Raises:
        ConfigError: the dimension cannot be divided.
    """
    if cut.dim is None or num_parts == 1:
        return whole
    size = whole.shape[cut.dim]
    if cut.padded:
        missing = padded_size(size, num_parts) - size
        if missing:
            fill = list(whole.shape)
            fill[cut.dim] = missing
            whole = torch.cat([whole, whole.new_zeros(fill)], dim=cut.dim)
    elif size % num_parts:
        raise ConfigError(f"tp={num_parts}", f"it does not divide a dimension of {size}", "Give a divisor")
    return whole.chunk(num_parts, dim=cut.dim)[part]


def join_tensors(pieces: Sequence[torch.Tensor], cut: Cut, shape: Sequence[int]) -> torch.Tensor:
    """The whole tensor of `shape` from the pieces of all tensor ranks, padding left out.

    Raises:
        ConfigError: the pieces do not make up that shape.
    """
    if cut.dim is None:
        whole = pieces[0]
    else:
        whole = torch.cat(list(pieces), dim=cut.dim) if len(pieces) > 1 else pieces[0]
        if cut.padded:
            whole = whole.narrow(cut.dim, 0, min(shape[cut.dim], whole.shape[cut.dim]))
    if tuple(whole.shape) != tuple(shape):
        raise ConfigError(
            f"a tensor of shape {tuple(shape)}", f"its pieces make up {tuple(whole.shape)}", "Check the plan's words"
        )
    return whole


def describe_form(tensor: torch.Tensor) -> str:
    """Shape and type, for messages."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _matches(pattern: str, name: str) -> bool:
    """`*` stands for one part of a dotted name, never for a dot."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))
