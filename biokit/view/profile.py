"""Where the time of a step goes: torch's profiler as a short table."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

STDERR = 2


def profile_operations(work: Callable[[], object], num_rows: int = 10) -> str:
    """Run `work` once under torch's profiler; a table of the operations that took most CPU time of their own (ms)."""
    from torch.profiler import ProfilerActivity, profile

    with _silent_stderr(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events) or 1.0
    lines = [f"{'operation':<48} {'ms':>8} {'share':>7} {'calls':>6}"]
    for event in events[:num_rows]:
        own = event.self_cpu_time_total
        lines.append(f"{event.key[:48]:<48} {own / 1000:8.2f} {own / total:7.1%} {event.count:6d}")
    return "\n".join(lines)


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler's C++ part writes its start and stop straight to file descriptor 2."""
    kept = os.dup(STDERR)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, STDERR)
    try:
        yield
    finally:
        os.dup2(kept, STDERR)
        os.close(kept)
        os.close(nowhere)
