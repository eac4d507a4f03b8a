"""Models by name."""

from torch import nn

from biokit.config import RunConfig
from biokit.errors import ConfigError
from biokit.models.molbart import MOLBART
from biokit.models.spec import ModelSpec

MODELS: dict[str, ModelSpec] = {spec.name: spec for spec in (MOLBART,)}


def find_model(name: str) -> ModelSpec:
    """The model of that name.

    Raises:
        ConfigError: there is none; names those there are.
    """
    if name not in MODELS:
        raise ConfigError(f"model.name={name}", "there is no such model", f"Valid: {', '.join(MODELS)}")
    return MODELS[name]


def build_model(config: RunConfig, vocab_size: int) -> nn.Module:
    """The untrained model of a run's configuration.

    Raises:
        ConfigError: no such model or preset, or sizes that do not fit one another.
    """
    return find_model(config.model.name).build(config.model, vocab_size, config.data.max_length, config.seed)
