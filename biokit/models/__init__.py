"""Models by name."""

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
