"""Where a model's data and a strategy's arithmetic meet, before anything starts."""

from __future__ import annotations

from functools import partial

from biokit.config import RunConfig
from biokit.models import find_model
from biokit.parallel.deepspeed_config import effective_config
from biokit.parallel.grid import ZERO_STAGE, Layout, check_sequence_parallel, plan_layout
from biokit.parallel.strategy import ModelParts
from biokit.process import choose_device


def find_layout(config: RunConfig, world_size: int) -> Layout:
    """The layout of a run over so many processes; starts nothing.

    Raises:
        ConfigError: no such model, preset or strategy, or an impossible layout; names the valid choices.
    """
    spec = find_model(config.model.name)
    sizes = spec.resolve(config.model)
    num_layers = len(spec.layers(config.model, 1, config.data.max_length))
    layout = plan_layout(config, world_size, {name: sizes[name] for name in spec.divided}, num_layers)
    if config.parallel.sequence_parallel:
        check_sequence_parallel(choose_device(config.train.device).type)
    if layout.strategy in ZERO_STAGE:
        effective_config(config, layout)  # refuses a user's ds_config.json that cannot be used
    return layout


def model_parts(config: RunConfig, vocab_size: int, pad_id: int) -> ModelParts:
    """What a strategy needs of the untrained model of a configuration.

    Raises:
        ConfigError: no such model or preset, or sizes that do not fit one another.
    """
    spec = find_model(config.model.name)
    sizes = (config.model, vocab_size, config.data.max_length, config.seed)
    return ModelParts(
        layers=spec.layers(*sizes),
        build=partial(spec.build, *sizes),
        plan=spec.tensor_parallel_plan,
        tied=spec.tied_parameters(config.model),
        batch_keys=spec.batch_keys,
        pad_id=pad_id,
    )
