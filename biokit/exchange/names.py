"""What each model's tensors are called in Megatron's container, and how their fused rows are ordered there.

Rows of a fused projection, np heads of size hn in this rank's piece (Megatron's `checkpoint_version`):
    0           (q|k|v, head, hn)
    1           (head, hn, q|k|v)
    2 and 3     (head, q|k|v, hn)     biokit's own
Every tensor rank orders its own rows, so pieces are converted before they are joined.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from biokit.errors import CheckpointError
from biokit.parallel.cuts import find_word

VERSIONS = (0, 1, 2, 3)
OWN_VERSION = 3


@dataclass(frozen=True)
class MegatronNames:
    """A model in Megatron's container, as plain data.

    Attributes:
        fused: module pattern -> a letter for each projection in its rows (`qkv`, `kv`).
        modules: module pattern of biokit -> that of the container, `*` in the same order; unmatched keep their name.
        version: the order of fused rows that this model's files are written with.
    """

    fused: Mapping[str, str]
    modules: Mapping[str, str] = field(default_factory=dict)
    version: int = OWN_VERSION

    def container_name(self, name: str) -> str:
        """The container's name of a parameter."""
        module, _, leaf = name.rpartition(".")
        for own, other in self.modules.items():
            if find_word({own: other}, module):
                stars = iter(
                    part for part, wanted in zip(module.split("."), own.split("."), strict=True) if wanted == "*"
                )
                return ".".join([*(next(stars) if part == "*" else part for part in other.split(".")), leaf])
        return name

    def reorder(self, name: str, piece: torch.Tensor, head_size: int, source: int, target: int) -> torch.Tensor:
        """One rank's piece of a parameter (or moment) with its fused rows in another version's order."""
        letters = find_word(self.fused, name.rpartition(".")[0])
        if letters is None or min(source, 2) == min(target, 2):
            return piece
        return reorder_fused(piece, len(letters), head_size, source, target)


def reorder_fused(piece: torch.Tensor, num_parts: int, head_size: int, source: int, target: int) -> torch.Tensor:
    """Rows (heads x parts x head size, ...) from one version's order to another's."""
    rest = piece.shape[1:]
    if min(source, 2) == 0:
        ordered = piece.reshape(num_parts, -1, head_size, *rest).transpose(0, 1)
    elif source == 1:
        ordered = piece.reshape(-1, head_size, num_parts, *rest).transpose(1, 2)
    else:
        ordered = piece.reshape(-1, num_parts, head_size, *rest)
    if target == 0:
        ordered = ordered.transpose(0, 1)
    elif target == 1:
        ordered = ordered.transpose(1, 2)
    return ordered.reshape(piece.shape)


def find_names(model: str) -> MegatronNames:
    """How a model stands in Megatron's container.

    Raises:
        CheckpointError: it has no form there.
    """
    if model not in MEGATRON_NAMES:
        found = "it has no form in Megatron's container"
        raise CheckpointError(f"model {model}", found, f"Models that do: {', '.join(MEGATRON_NAMES)}")
    return MEGATRON_NAMES[model]


def check_version(version: float, asked: str) -> int:
    """A `checkpoint_version` as one of those known.

    Raises:
        CheckpointError: another one.
    """
    if version not in VERSIONS:
        do = f"Known versions: {', '.join(map(str, VERSIONS))}"
        raise CheckpointError(asked, f"checkpoint_version is {version!r}", do)
    return int(version)


MEGATRON_NAMES: dict[str, MegatronNames] = {
    "molbart": MegatronNames(
        fused={
            "encoder.*.attention.qkv": "qkv",
            "decoder.*.self_attention.qkv": "qkv",
            "decoder.*.cross_attention.kv": "kv",
        }
    )
}
