"""`biokit launch`: the processes of a training on this node, by torchrun alone or under a supervisor."""

from __future__ import annotations

import argparse
import math
import os
import sys

from biokit.errors import ConfigError

SWITCHES = ("--dry-run", "--node-commands")
VARIABLES = {  # flags that say what the environment says too, under the names of the source systems
    "--nnodes": "NNODES",
    "--node-rank": "NODE_RANK",
    "--nproc-per-node": "GPUS_PER_NODE",
    "--master-addr": "MASTER_ADDR",
    "--master-port": "MASTER_PORT",
}
WITH_VALUE = (*VARIABLES, "--lives", "--timeout")


def add_flags(launch: argparse.ArgumentParser) -> None:
    """What `biokit launch` takes beside a configuration."""
    for flag, variable in VARIABLES.items():
        launch.add_argument(flag, metavar="V", help=f"the same as the variable {variable}")
    launch.add_argument(
        "--lives", type=int, default=0, metavar="N",
        help="start it again where it failed, N launches in all: a supervisor on each node sees to that",
    )  # fmt: skip
    launch.add_argument(
        "--timeout", type=float, default=0.0, metavar="S", help="end it after S seconds, and say where each rank stood"
    )
    launch.add_argument(
        "--dry-run", action="store_true", help="check the layout, print the command line, start nothing"
    )
    launch.add_argument(
        "--node-commands", action="store_true", help="print one command for each node, to be copied; start nothing"
    )
    launch.set_defaults(run=run_launch)


def run_launch(options: argparse.Namespace) -> int:
    """Carry out `biokit launch`; returns the exit status where it does not become another program.

    Raises:
        BiokitError: see `plan_launch` and `supervise_training`.
    """
    _check_numbers(options.lives, options.timeout)
    from biokit.config import load_config
    from biokit.launch.commands.supervised import supervise_training
    from biokit.launch.torchrun import list_node_commands, plan_launch

    config, words = load_config(options.config, options.overrides), [options.config, *options.overrides]
    given = {name: getattr(options, flag[2:].replace("-", "_")) for flag, name in VARIABLES.items()}
    environment = {**os.environ, **{name: value for name, value in given.items() if value is not None}}
    if options.node_commands:
        further = ["--lives", str(options.lives)] if options.lives else []
        further += ["--timeout", f"{options.timeout:g}"] if options.timeout else []
        print(*list_node_commands(config, words, environment, further), sep="\n")
        return 0
    plan = plan_launch(config, words, environment)
    print(f"biokit: {plan.layout}: {plan.layout.world_size} processes. {plan.note}".rstrip(), file=sys.stderr)
    if options.dry_run:
        print(plan)
    elif options.lives or options.timeout:
        return supervise_training(config, environment, max(1, options.lives), options.timeout)
    else:
        plan.start()
    return 0


def _check_numbers(lives: int, timeout_s: float) -> None:
    if lives < 0:
        raise ConfigError(f"--lives {lives}", "it is below 0", "Give a number of launches, 1 or more")
    if not 0 <= timeout_s < math.inf:
        raise ConfigError(f"--timeout {timeout_s:g}", "it is no time", "Give seconds, 0 or more")
