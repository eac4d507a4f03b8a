"""A step of each strategy against a bare script of the same model, on real processes over gloo: wall and CPU time.

Strategy and script live in the same processes and take turns, each step on the same micro-batches; every other pair
the script goes first. A pair's wall time is that of the slowest rank, its CPU time that of all ranks together.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch.distributed as dist

from biokit.config import ModelConfig
from biokit.parallel.grid import Layout
from tests.bench.bare import start_bare
from tests.bench.rigs import Arrays, Rig, read_batches, share, start
from tests.bench.timing import Row, compare_times
from tests.distributed import Ranks

LAYOUTS = {
    Layout(): "a torch loop",
    Layout("DDP", data=2): "torch DDP",
    Layout("Zero1", data=2): "`deepspeed.initialize`",
    Layout("Zero2", data=2): "`deepspeed.initialize`",
    Layout("Zero3", data=2): "`deepspeed.initialize`",
    Layout("ZeroInf", data=2): "`deepspeed.initialize`",
    Layout("Pipeline", pipeline=2): "DeepSpeed `PipelineModule`",
    Layout("ThreeD", tensor=2): "Megatron-core's layers in a DeepSpeed `PipelineModule`",
}
MODEL = ModelConfig(preset="mini", dropout=0.1)
MICRO_BATCH_SIZE, GLOBAL_BATCH_SIZE, NUM_BATCHES = 16, 64, 4
WARM_UP, TARGET = 2, 1.10

Pair = tuple[tuple[float, float], tuple[float, float]]  # (wall, CPU) seconds a step of ours, of the peer


def measure(layout: Layout, pairs: int = 15, steps: int = 1, model: ModelConfig = MODEL) -> list[Row]:
    """Two rows, wall and CPU time of a step; a pair is `steps` steps of each."""
    rig = Rig(layout, model, MICRO_BATCH_SIZE, GLOBAL_BATCH_SIZE)
    batches = read_batches(GLOBAL_BATCH_SIZE, NUM_BATCHES)
    with Ranks(layout.world_size, timeout_s=600.0) as ranks:
        by_rank: list[list[Pair]] = ranks.run(_time_pairs, rig, batches, pairs, steps)
    seconds = np.array(by_rank)  # rank, pair, ours or the peer's, wall or CPU
    kinds = {"wall": seconds[..., 0].max(axis=0), "CPU": seconds[..., 1].sum(axis=0)}
    return [
        compare_times(f"step of {layout}, {kind} time", LAYOUTS[layout], ours, theirs, TARGET)
        for kind, found in kinds.items()
        for ours, theirs in [found.T.tolist()]
    ]


def measure_all() -> list[Row]:
    return [row for layout in LAYOUTS for row in measure(layout)]


def _time_pairs(rig: Rig, batches: Sequence[Arrays], pairs: int, steps: int) -> list[Pair]:
    """On every rank."""
    with start(rig) as strategy, start_bare(rig) as bare:
        shares = [share(batch, rig, strategy) for batch in batches]
        turns = [itertools.cycle(shares) for _ in range(2)]

        def ours() -> None:
            batch = next(turns[0])
            strategy.train_batch(batch.micros, batch.num_valid, batch.seeds, rig.config.train.lr)

        def theirs() -> None:
            bare(next(turns[1]).micros)

        found: list[Pair] = []
        for number in range(pairs + 1):
            works: list[Callable[[], None]] = [ours, theirs]
            if number % 2:
                works.reverse()
            times = [_time(work, steps if number else WARM_UP) for work in works]
            if number % 2:
                times.reverse()
            if number:
                found.append((times[0], times[1]))
        return found


def _time(work: Callable[[], None], steps: int) -> tuple[float, float]:
    """(wall, CPU) seconds a step on this rank, from a common start, without the garbage collector."""
    gc.collect()
    gc.disable()
    if dist.is_initialized():
        dist.barrier()
    try:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            work()
        return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps
    finally:
        gc.enable()
