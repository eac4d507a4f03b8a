"""What a training's metrics cost: CPU seconds of measuring and writing a line over CPU seconds of the step it tells of.

The step is that of `molbart_mini` on real molecules. Steps and lines take turns. The dashboard costs the training
nothing: it is another process, which reads the files.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from biokit.config import load_config
from biokit.parallel.grid import Layout
from biokit.process import used_memory
from biokit.runs import MetricsWriter, RunFolder
from tests.bench.rigs import CPU, Rig, read_batches, share, start
from tests.bench.timing import Row

CONFIG, TARGET, NUM_LINES = "molbart_mini", 0.01, 200


def measure(config: str = CONFIG, rounds: int = 10) -> list[Row]:
    """One row."""
    asked = load_config(config)
    rig = Rig(Layout(), asked.model, asked.train.micro_batch_size, asked.train.global_batch_size)
    batches = read_batches(rig.global_batch_size, rounds + 1)
    with start(rig) as strategy, tempfile.TemporaryDirectory() as name:
        folder = RunFolder(name)
        folder.create()
        writer = MetricsWriter(folder)
        steps, lines = [], []
        for number, arrays in enumerate(batches):
            batch = share(arrays, rig, strategy)
            steps.append(_time(partial(strategy.train_batch, batch.micros, batch.num_valid, batch.seeds, 1e-4)))
            lines.append(_time(partial(_write_lines, writer, number)) / NUM_LINES)
        writer.close()
    return [compare_shares(f"a metrics line over a step of {config}", lines[1:], steps[1:])]


def measure_all() -> list[Row]:
    return measure()


def compare_shares(what: str, ours_s: list[float], theirs_s: list[float]) -> Row:
    """A row of what ours adds, in per cent of the peer's CPU time."""
    shares = [100 * a / b for a, b in zip(ours_s, theirs_s, strict=True)]
    median = statistics.median(shares)
    return Row(
        what=what,
        peer="the step",
        ours=f"{1e6 * statistics.median(ours_s):,.0f} µs",
        theirs=f"{1e3 * statistics.median(theirs_s):,.1f} ms",
        ratio=f"{median:.3f} %",
        spread=f"{min(shares):.3f} - {max(shares):.3f}",
        target=f"at most {100 * TARGET:g} %",
        met=median <= 100 * TARGET,
    )


def _write_lines(writer: MetricsWriter, number: int) -> None:
    """As training does at each step."""
    for step in range(NUM_LINES):
        started, cpu_s = time.perf_counter(), time.thread_time()
        own_s = time.perf_counter() - started + time.thread_time() - cpu_s
        line: dict[str, Any] = {
            "step": number * NUM_LINES + step, "epoch": 3, "loss": 1.23456789012345, "token_accuracy": 0.712345678,
            "perplexity": 3.4369123456, "lr": 0.00031622776, "grad_norm": 1.0123456789, "skipped": False,
            "num_tokens": 4321, "tokens_per_s": 12345.678901, "samples_per_s": 123.45678901, "step_s": own_s,
            "memory_bytes": used_memory(CPU),
        }  # fmt: skip
        writer.write(line)


def _time(work: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    gc.collect()
    started = time.process_time()
    work()
    return time.process_time() - started
