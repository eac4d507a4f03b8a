"""Notebooks as people see them: real clicks, cards and panels in JupyterLab."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from biokit.runs import RunFolder
from tests.browser.jupyterlab import list_missing, look

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(bool(list_missing()), reason=f"no browser test: missing {list_missing()}"),
]
MIN_PICTURE_BYTES = 10_000


def test_the_stop_button_stops_the_training(tmp_path: Path) -> None:
    seen = look("stop_button.mjs", "03_debug_one_device", tmp_path, run_dir="run", press_stop=False, overfit_steps=120)
    manifest = RunFolder(tmp_path / "run").read_manifest()
    assert manifest["status"] == "stopped" and 0 < manifest["step"] < manifest["train_iters"]
    assert seen["before"].startswith("running") and seen["pressed"] and seen["width"] > 500
    assert [path.stem for path in seen["pictures"]] == ["stop_button_running", "stop_button_stopped"]
    assert all(path.stat().st_size > MIN_PICTURE_BYTES for path in seen["pictures"])


def test_cards_and_dashboard_are_there(tmp_path: Path) -> None:
    seen = look("cards.mjs", "04_launch_distributed", tmp_path, run_dir="run")
    texts = seen["texts"]
    assert texts["finished"].count("FINISHED") == 1 and "1,523,467" in texts["finished"]
    assert "rank 1 was ended by SIGKILL" in texts["failed"]
    went_with_it = r"1 other rank went with it: rank 0 (lost another rank|was ended by SIGTERM with the run)"
    assert re.search(went_with_it, texts["failed"])
    assert "Rank 0 waits in all_reduce" in texts["hung"] and "time.sleep(600)" in texts["hung"]
    assert "60 of 60" in texts["resumed"]
    assert re.match(r"(running|stopping): step [1-9]", seen["live"]["label"])  # the next cell stops it soon
    assert len(seen["widths"]) >= 5 and min(seen["widths"]) > 300  # no picture is broken
    assert all(path.stat().st_size > MIN_PICTURE_BYTES for path in seen["pictures"]) and len(seen["pictures"]) == 7
