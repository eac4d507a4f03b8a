"""One Slurm for all tests of a session; where it cannot be, they skip and say why."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing_parts


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say aloud that these tests did not run: a quiet report shows no reasons."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if "tests/slurm/" in report.nodeid]
    if skipped:
        terminalreporter.write_line(f"Slurm: {len(skipped)} tests skipped: {missing_parts()}")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes on this machine; Slurm's commands of this process and its children find them."""
    if why := missing_parts():
        pytest.skip(f"no Slurm of our own: {why}")
    before = os.environ.get("SLURM_CONF")
    with Cluster() as started:
        os.environ["SLURM_CONF"] = started.environment["SLURM_CONF"]
        yield started
    os.environ.pop("SLURM_CONF")
    if before is not None:
        os.environ["SLURM_CONF"] = before
