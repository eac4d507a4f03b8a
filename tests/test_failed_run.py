"""What is said of runs that did not start, or did not end as they should."""

from __future__ import annotations

from pathlib import Path

import pytest

from biokit.errors import RunError
from biokit.launch.failed_run import Interrupted, explain_end, told_shortly
from biokit.launch.orders import Order
from biokit.launch.started import complete_order
from biokit.runs import RunFolder


def test_a_folder_that_is_gone_promises_nothing(tmp_path: Path) -> None:
    error = explain_end(RunFolder(tmp_path / "gone"), "lost", "train")
    assert "Its folder is gone" in str(error) and "checkpoint" not in str(error)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="it cannot be made"):
        complete_order(RunFolder(tmp_path / "file"), Order("script", ("x.py",)))


def test_an_interrupt_is_told_in_one_line() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, told_shortly():
        raise KeyboardInterrupt
    assert isinstance(caught.value, Interrupted) and caught.value.__suppress_context__
    assert caught.value._render_traceback_() == ["KeyboardInterrupt: the cell was interrupted"]
