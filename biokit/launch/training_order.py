"""The order of a training: the same whether a notebook, `biokit launch` or a Slurm job has it carried out."""

from __future__ import annotations

import os
from collections.abc import Mapping

from biokit.config import RunConfig, config_hash
from biokit.errors import ConfigError
from biokit.launch.facts import asked_file
from biokit.launch.orders import HERE, TRAIN, Order
from biokit.launch.whole_imports import import_whole
from biokit.runs import RunFolder


def training_order(
    config: RunConfig,
    folder: RunFolder,
    num_processes: int,
    *,
    num_nodes: int = 1,
    placement: str = HERE,
    endpoint: str = "",
    max_lives: int = 1,
    timeout_s: float = 0.0,
    environment: Mapping[str, str] = os.environ,
) -> Order:
    """What `biokit train` needs to be started with a configuration, which the caller leaves in `asked_file(folder)`.

    Args:
        num_processes: on each node.
        environment: of who starts it.

    Raises:
        ConfigError: an impossible layout, or lives that could not go on where the one before ended.
    """
    import_whole("torch")
    from biokit.launch.torchrun import one_thread
    from biokit.layouts import find_layout

    check_lives(config, max_lives)
    layout = find_layout(config, num_nodes * num_processes)
    return Order(
        "train",
        (*TRAIN, str(asked_file(folder).absolute())),
        () if layout.strategy == "Single" else ("--nproc-per-node", str(num_processes)),
        placement,
        num_nodes,
        endpoint,
        timeout_s=timeout_s,
        max_lives=max_lives,
        environment={"TQDM_DISABLE": "1", **({} if layout.world_size == 1 else one_thread(environment))},
        facts={"config_hash": config_hash(config), "layout": layout.as_dict()},
    )


def check_lives(config: RunConfig, max_lives: int) -> None:
    """Nothing, where each life can go on where the one before it ended.

    Raises:
        ConfigError: it cannot.
    """
    if max_lives > 1 and not config.resume:
        found = f"each of {max_lives} lives but the first goes on from a checkpoint"
        raise ConfigError("resume=false", found, "Leave it out, or ask for one life")
