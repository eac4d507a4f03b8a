"""Run the benchmarks and print one Markdown table: `python -m tests.bench [name ...]`.

One thread a process; but for strategies and their memory, everything in this process. The exit status is 1 where a
target is not met.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import sys
import time
from pathlib import Path

from biokit.errors import EngineError
from tests.bench.timing import HEADER, Row

NAMES = (
    "tokenising",
    "batches",
    "random_smiles",
    "training_step",
    "decoding",
    "padding",
    "strategies",
    "checkpoints",
    "memory",
    "metrics",
    "launching",
    "properties",
    "ready_model",
)
NEED_TRANSFORMERS = {"batches", "training_step", "decoding"}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"which to run of {', '.join(NAMES)}; default all")
    names = parser.parse_args(arguments).names or list(NAMES)
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    _prepare(names)
    print(describe_machine(), end=f"\n\n{HEADER}\n", flush=True)
    rows: list[Row] = []
    for name in names:
        started = time.perf_counter()
        measured = importlib.import_module(f"tests.bench.{name}").measure_all()
        print(*measured, sep="\n", flush=True)
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
        rows += measured
    return int(any(row.met is False for row in rows))


def describe_machine() -> str:
    """The processor and the versions that the figures were taken with."""
    import rdkit
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = f"{len(models)} x {models[0]}" if models else platform.processor() or platform.machine()
    return (
        f"{processor}, one thread; Python {platform.python_version()}, torch {torch.__version__}, "
        f"rdkit {rdkit.__version__}. Medians of interleaved rounds; rates are per CPU-second."
    )


def _prepare(names: list[str]) -> None:
    """One thread in every library, before it is imported.

    Raises:
        EngineError: the peers are not installed.
    """
    if NEED_TRANSFORMERS.intersection(names) and importlib.util.find_spec("transformers") is None:
        do = 'Run `make bench`, which installs it, or pip install -c constraints.txt -e ".[bench]"'
        raise EngineError(f"benchmarks {', '.join(names)}", "transformers is not installed", do)
    os.environ |= ONE_THREAD
    import torch

    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
