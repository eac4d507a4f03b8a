"""Where network namespaces cannot be made, their tests skip and say why."""

from __future__ import annotations

import pytest

from tests.namespaces.pair import missing_parts


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say aloud that these tests did not run: a quiet report shows no reasons."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if "tests/namespaces/" in report.nodeid]
    if skipped:
        terminalreporter.write_line(f"network namespaces: {len(skipped)} tests skipped: {missing_parts()}")
