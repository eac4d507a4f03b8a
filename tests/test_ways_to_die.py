"""However a run ends, nothing of it is left ten seconds later: one trial of each way; `make drills` has ten."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.drills.dying import WAYS, try_once

NUM_AT_ONCE = 3  # most of a trial is waiting


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[list[str]]]:
    """What was wrong in a trial of each way, by its name."""
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        return {way: pool.submit(try_once, way, tmp_path_factory.mktemp("trial")) for way in WAYS}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_left(way: str, trials: dict[str, Future[list[str]]]) -> None:
    assert trials[way].result() == []


def test_what_is_left_is_counted_and_ended(tmp_path: Path) -> None:
    """The harness itself: a process that lives on is seen, whatever its name and session."""
    import subprocess
    import sys

    from tests import ways_to_die

    trial = ways_to_die.Trial(tmp_path)
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    left = subprocess.Popen(command, env=trial.environment, start_new_session=True)
    other = subprocess.Popen(command)
    try:
        trial.check_left(limit_s=0.2)
        assert trial.num_left == 1 and f"{left.pid}" in trial.faults[0]
        assert left.wait(10) and other.poll() is None
    finally:
        for process in (left, other):
            process.kill()
            process.wait()
