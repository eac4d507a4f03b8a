"""torchrun's own flags: its parser, and what it would refuse only in a process that has been started."""

from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path
from typing import Any, cast

from biokit.errors import ConfigError
from biokit.launch.whole_imports import import_whole


@functools.cache
def torchrun_parser() -> argparse.ArgumentParser:
    """torchrun's parser; the first call imports torch."""
    parser = cast(argparse.ArgumentParser, _torchrun().get_args_parser())
    parser.prog = "%torchrun"
    return parser


def count_processes(options: argparse.Namespace, asked: str) -> tuple[int, int]:
    """Nodes (the most) and processes on each.

    Raises:
        ConfigError: torchrun would refuse these options, once it runs.
    """
    module = _torchrun()
    try:
        # without what it would make or change at once: the folder of its logs, OMP_NUM_THREADS, a warning
        tame = {"log_dir": None, "nproc_per_node": "1", "rdzv_backend": "static", "rdzv_endpoint": "", "node_rank": 0}
        module.config_from_args(argparse.Namespace(**(vars(options) | tame)))
        _, num_nodes = module.parse_min_max_nnodes(options.nnodes)
        num_local = module.determine_local_world_size(options.nproc_per_node)
    except Exception as error:  # any: they are torchrun's, and of many kinds
        raise ConfigError(asked, " ".join(str(error).split()) or type(error).__name__, "See %torchrun?") from error
    if num_local < 1:
        raise ConfigError(f"{asked} --nproc-per-node {options.nproc_per_node}", "it is below 1", "Give 1 or more")
    if options.log_dir:
        _check_log_dir(Path(options.log_dir))
    return num_nodes, num_local


def _check_log_dir(path: Path) -> None:
    """Refuse a folder that cannot be made; what says so is the attempt (permissions do not, for root)."""
    try:
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        tempfile.TemporaryDirectory(prefix=".biokit-", dir=there).cleanup()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--log-dir {path}", f"it cannot be made ({error})", "Give another folder") from error


def _torchrun() -> Any:
    return import_whole("torch.distributed.run")
