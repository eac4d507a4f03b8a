"""However a run ends, nothing of it is left ten seconds later: one trial of each way; `make drills` has ten."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.orphans import Trial
from tests.ways_to_die import ALONE, WAYS, WITH_KERNEL, try_ways

NUM_AT_ONCE = 3  # most of a trial is waiting


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[str]]]:
    """What was wrong in a trial of each way."""
    going_on = list(WITH_KERNEL)
    groups = [*([way] for way in ALONE), going_on[::2], going_on[1::2]]
    found: dict[str, list[str]] = {}
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        for part in pool.map(try_ways, groups, (tmp_path_factory.mktemp("trial") for _ in groups)):
            found |= part
    yield found


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_left(way: str, faults: dict[str, list[str]]) -> None:
    assert faults[way] == []


def test_what_is_left_is_counted_and_ended(tmp_path: Path) -> None:
    """The harness itself: a process that lives on is seen, whatever its session, and no other one."""
    trial = Trial(tmp_path)
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    left = subprocess.Popen(command, env={**os.environ, **trial.variables}, start_new_session=True)
    other = subprocess.Popen(command)
    try:
        trial.check_left(limit_s=0.2)
        assert trial.num_left == 1 and str(left.pid) in trial.faults[0]
        assert left.wait(10) and other.poll() is None
    finally:
        for process in (left, other):
            process.kill()
            process.wait()
