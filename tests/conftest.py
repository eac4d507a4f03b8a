"""Shared fixtures. Larger real data is found through BIOKIT_REAL_DATA; without it those tests skip and say so."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REAL_DATA_LOG = "BIOKIT_REAL_DATA_LOG"


@pytest.fixture(scope="session", autouse=True)
def own_register(tmp_path_factory) -> Iterator[None]:
    """Runs of the tests do not stand in the user's own list of runs."""
    before = os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
    yield
    os.environ.pop("XDG_STATE_HOME")
    if before is not None:
        os.environ["XDG_STATE_HOME"] = before


@pytest.fixture(autouse=True)
def own_main() -> Iterator[None]:
    """A shell that a test makes, and a program that it runs, put themselves into `__main__`'s place."""
    before = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = before


@pytest.fixture
def real_data() -> Path:
    """The folder of the larger real data sets."""
    folder = os.environ.get("BIOKIT_REAL_DATA", "")
    if not folder:
        pytest.skip("BIOKIT_REAL_DATA is not set: the larger real data sets are not here")
    return Path(folder)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Note every real-data test that ran or was skipped, for the last line of .ci/run."""
    outcome = yield
    report = outcome.get_result()
    log = os.environ.get(REAL_DATA_LOG)
    if log and "real_data" in getattr(item, "fixturenames", ()):
        if report.skipped:
            _note(log, f"skipped {item.nodeid}")
        elif report.when == "call":
            _note(log, f"run {item.nodeid}")


def _note(log: str, line: str) -> None:
    with Path(log).open("a") as file:
        file.write(line + "\n")
