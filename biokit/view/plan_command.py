"""`biokit plan`: what a configuration needs on so many GPUs, before it is queued."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

SWITCHES = ("--all",)
FIGURES = ("--link", "--node-link", "--tflops", "--memory-bandwidth")
WITH_VALUE = (
    "--gpus",
    "--gpu-memory",
    "--gpus-per-node",
    "--device",
    *FIGURES,
    "--vocab-size",
    "--sequence-length",
    "--reserve",
    "--picture",
)
EPILOG = """\
Memory by part, messages, bubble and an estimated step time of every layout that the model and the batch allow:
  biokit plan molbart_small model.preset=large --gpus 64 --gpu-memory 80
  biokit plan run.yaml --gpus 16 --gpus-per-node 4 --device a100 --node-link 12.5 --picture plan.png
A device's figures can be replaced by your own; what the plan takes for granted stands below it."""


def add_parser(commands: Any) -> None:
    """Add the command to the command line's own parser."""
    parser = commands.add_parser("plan", help="memory and step time of every layout on so many GPUs, the best first")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add = parser.add_argument
    add("config", metavar="CONFIG", help="a packaged configuration, or a YAML file")
    add("overrides", nargs="*", metavar="key=value", help="as `biokit train` takes them")
    add("--gpus", type=int, required=True, metavar="N", help="devices in all")
    add("--gpu-memory", type=float, default=0.0, metavar="GiB", help="of each (the device's)")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="devices of a node (8)")
    add("--device", default="h100", metavar="NAME", help="v100, a100, h100, h200 or cpu (h100)")
    add("--link", type=float, default=0.0, metavar="GB/s", help="in a node, each direction (the device's)")
    add("--node-link", type=float, default=0.0, metavar="GB/s", help="between nodes, a device (the device's)")
    add("--tflops", type=float, default=0.0, metavar="N", help="dense rate in the run's precision (the device's)")
    add("--memory-bandwidth", type=float, default=0.0, metavar="GB/s", help="(the device's)")
    add("--vocab-size", type=int, default=0, metavar="N", help="entries (of data.vocab_file, or the packaged one)")
    add("--sequence-length", type=int, default=0, metavar="N", help="tokens a side (data.max_length, the longest)")
    add("--reserve", type=float, default=-1.0, metavar="GiB", help="left to driver and libraries (4; cpu: 0)")
    add("--all", action="store_true", help="every layout, not the fastest only")
    add("--picture", type=Path, metavar="FILE.png", help="draw it too")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry out `biokit plan`; returns the exit status.

    Raises:
        ConfigError: no such configuration or device, sizes that do not fit one another, no layout that fits.
    """
    from biokit.config import load_config
    from biokit.planning.devices import adjust_device, find_device
    from biokit.planning.plans import plan_run
    from biokit.planning.report import MOST_ROWS, write_report

    device = adjust_device(
        find_device(options.device),
        tflops=options.tflops,
        memory_gb_s=options.memory_bandwidth,
        link_gb_s=options.link,
        node_link_gb_s=options.node_link,
    )
    table = plan_run(
        load_config(options.config, options.overrides),
        options.gpus,
        device,
        memory_gib=options.gpu_memory,
        gpus_per_node=options.gpus_per_node,
        vocab_size=options.vocab_size,
        length=options.sequence_length,
        reserve_gib=options.reserve,
    )
    print(write_report(table, 0 if options.all else MOST_ROWS))
    if options.picture:
        from biokit.view.plan import show_plan

        print(f"\npicture: {show_plan(table).save(options.picture)}")
    return 0
