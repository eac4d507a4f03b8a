"""Low-rank adapters on frozen linear layers (LoRA: Hu et al. 2021, arXiv 2106.09685, section 4.1).

Shapes: I input features, O output features, R rank.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import nn

from biokit.errors import ConfigError
from biokit.kernels.dropout import dropout

LORA_MODES = ("full", "lora", "freeze")


@dataclass(frozen=True)
class LoraConfig:
    """Adapters: their rank, their weight alpha / rank, dropout before them, and which linear layers get one.

    Attributes:
        targets: patterns of the last parts of a module's name (`qkv`, `attention.*`); the default is the attention's
            projections of queries, keys and values.
        seed: of the adapters' first values, together with the module's name.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.1
    targets: tuple[str, ...] = ("qkv", "q", "kv")
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0.0 <= self.dropout < 1.0 or not self.targets:
            found = f"rank={self.rank}, dropout={self.dropout}, targets={self.targets}"
            raise ConfigError("LoRA", found, "Give rank >= 1, 0 <= dropout < 1, and at least one target")


class LoraLinear(nn.Module):
    """A frozen linear layer plus scale x B A x; B begins at zero, so that the output begins as that of the layer.

    The layer's own parameters keep their names (`weight`, `bias`) beside `lora_a` (R,I) and `lora_b` (O,R).
    """

    def __init__(self, base: nn.Linear, config: LoraConfig, name: str) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.dropout = config.alpha / config.rank, config.dropout
        first_RI = torch.empty(config.rank, base.in_features, dtype=base.weight.dtype)
        if not base.weight.is_meta:  # no draw where parameters are only counted
            stream = torch.Generator("cpu").manual_seed(config.seed * 2**32 + zlib.crc32(name.encode()))
            bound = 1 / math.sqrt(base.in_features)
            first_RI.uniform_(-bound, bound, generator=stream)
        self.lora_a = nn.Parameter(first_RI.to(base.weight.device))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, config.rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = F.linear(dropout(x, self.dropout) if self.training else x, self.lora_a)
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(low, self.lora_b)


def set_trainable(layer: nn.Module, mode: str, config: LoraConfig, name: str) -> int:
    """Make a layer trainable as a whole (`full`), not at all (`freeze`), or by adapters only (`lora`).

    Args:
        name: of the layer in the model; with it two layers' adapters begin with different values.

    Returns:
        How many adapters were added.

    Raises:
        ConfigError: there is no such mode.
    """
    if mode not in LORA_MODES:
        raise ConfigError(f"lora_mode={mode}", "there is no such mode", f"Valid: {', '.join(LORA_MODES)}")
    if mode == "full":
        return 0
    layer.requires_grad_(False)
    return add_adapters(layer, config, name) if mode == "lora" else 0


def add_adapters(model: nn.Module, config: LoraConfig, name: str = "") -> int:
    """Put an adapter on every linear layer inside `model` that a target names; returns how many."""
    found = [
        (key, module)
        for key, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(_ends_with(key, pattern) for pattern in config.targets)
    ]
    for key, module in found:
        model.set_submodule(key, LoraLinear(module, config, f"{name}.{key}"))
    return len(found)


@torch.no_grad()
def merge_adapters(model: nn.Module) -> int:
    """Add every adapter to its linear layer, which is plain again and trainable; returns how many there were."""
    found = [(key, module) for key, module in model.named_modules() if isinstance(module, LoraLinear)]
    for key, module in found:
        out_features, in_features = module.weight.shape
        plain = nn.Linear(in_features, out_features, module.bias is not None, device="meta")
        plain.weight, plain.bias = module.weight, module.bias
        plain.weight += module.scale * (module.lora_b @ module.lora_a)
        model.set_submodule(key, plain.requires_grad_(True))
    return len(found)


def _ends_with(name: str, pattern: str) -> bool:
    """`*` stands for one part of a dotted name, never for a dot."""
    wanted = pattern.split(".")
    parts = name.split(".")[-len(wanted) :]
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))
