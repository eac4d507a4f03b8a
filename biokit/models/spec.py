"""What the rest of biokit knows of a model: plain data that training, strategies and checkpoints read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from biokit.config import ModelConfig
from biokit.errors import ConfigError

Layers = list[tuple[str, Callable[[], nn.Module]]]


@dataclass(frozen=True)
class ModelSpec:
    """A model as data.

    Attributes:
        build: (config, vocab_size, max_positions, seed) -> the whole model for one device, initialised.
        layers: (config, vocab_size, max_positions, seed) -> (name, builder) in order; each layer is
            `forward(carry: tuple) -> tuple`, floats first, then ids; one device folds over the same list.
        tensor_parallel_plan: module pattern -> word (`biokit.parallel.cuts`); unmatched modules are replicated.
        batch_keys: the arrays of a batch, inputs of the first layer first, labels last.
        tokenizer: name of the tokenizer family.
        presets: name -> sizes.
        num_parameters: preset -> parameter count at the published vocabulary size.
        tied: with `model.tie_word_embeddings`: parameter -> the earlier one whose tensor it shares.
        divided: names of the sizes that tensor parallelism must divide.
    """

    name: str
    build: Callable[..., nn.Module]
    layers: Callable[..., Layers]
    tensor_parallel_plan: Mapping[str, str]
    batch_keys: tuple[str, ...]
    tokenizer: str
    presets: Mapping[str, Mapping[str, int]]
    num_parameters: Mapping[str, int]
    tied: Mapping[str, str] = field(default_factory=dict)
    divided: tuple[str, ...] = ("num_attention_heads", "ffn_hidden_size")

    def resolve(self, config: ModelConfig) -> dict[str, Any]:
        """Sizes of a configuration: the preset's, overridden by those that are not 0.

        Raises:
            ConfigError: an unknown preset, or a hidden size that the heads do not divide.
        """
        if config.preset not in self.presets:
            raise ConfigError(
                f"model.preset={config.preset}", f"{self.name} has no such preset", f"Valid: {', '.join(self.presets)}"
            )
        preset = self.presets[config.preset]
        sizes = {key: getattr(config, key) or value for key, value in preset.items()}
        if config.hidden_size and not config.ffn_hidden_size:
            sizes["ffn_hidden_size"] = preset["ffn_hidden_size"] * config.hidden_size // preset["hidden_size"]
        hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        if hidden % heads or hidden % 2:
            valid = [n for n in range(1, hidden + 1) if hidden % n == 0]
            raise ConfigError(
                f"model.hidden_size={hidden}, model.num_attention_heads={heads}",
                "the heads must divide an even hidden size",
                f"Valid heads: {', '.join(map(str, valid))}",
            )
        return sizes

    def tied_parameters(self, config: ModelConfig) -> dict[str, str]:
        """Parameter -> the earlier parameter whose tensor it shares, for a configuration."""
        return dict(self.tied) if config.tie_word_embeddings else {}
