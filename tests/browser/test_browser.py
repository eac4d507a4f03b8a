"""Notebooks as people see them: real clicks, cards and panels in JupyterLab."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest

from biokit.chem.similarity import fingerprints, tanimoto
from biokit.data.sources import locate_molecules
from biokit.datasets import locate_companions
from biokit.runs import RunFolder
from tests.browser.checks import check_grid
from tests.browser.jupyterlab import MIN_COLOURS, count_colours, list_missing, look

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(bool(list_missing()), reason=f"no browser test: missing {list_missing()}"),
]
MIN_PICTURE_BYTES = 10_000
CHOSEN = "COc1ccccc1OCC(O)CNC(C)C"  # the molecule of notebook 10


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


def test_the_quickstart_runs(tmp_path: Path) -> None:
    parameters = {"run_dir": "run", "train_iters": 60, "num_samples": 60}
    seen = look("quickstart.mjs", "00_quickstart", tmp_path, **parameters)
    assert re.match(r"running: step [1-9]\d* of 60, loss \d", seen["live"]) and seen["liveWidth"] > 500
    assert "finished: step 60 of 60" in seen["finished"]
    assert set(seen["widths"]) == {"panel", "curve", "known", "novel"} and min(seen["widths"].values()) > 500
    assert [path.stem for path in seen["pictures"]] == [
        f"quickstart_{name}" for name in ("curve", "known", "live", "novel", "panel")
    ]


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("analysis")
    _write_molecules(root / "molecules.csv", every=10)
    _write_measurements(root / "measured.csv", every=6)
    small = {"molecules": "molecules.csv", "measurements": "measured.csv", "num_samples": 60, "num_generations": 2}
    return look("analysis.mjs", "10_analysis", root, run_dir="run", **small)


def _write_molecules(path: Path, every: int) -> None:
    """Each so many-th molecule of wehi_mols, and the 50 that are most alike to the chosen one."""
    with locate_molecules("wehi_mols").open() as file:
        smiles = [row[0] for row in csv.reader(file)]
    order = tanimoto(fingerprints(smiles), fingerprints([CHOSEN]))[:, 0].argsort()[::-1]
    kept = dict.fromkeys([*smiles[::every], *(smiles[i] for i in order[:50])])
    path.write_text("smiles\n" + "\n".join(kept) + "\n")


def _write_measurements(path: Path, every: int) -> None:
    """Each so many-th molecule of chembl2321810, with its activity."""
    table = locate_molecules("chembl2321810")
    with locate_companions("chembl2321810")[0].open() as file:
        values = {row["Name"]: row["Act"] for row in csv.DictReader(file)}
    rows = [line.split() for line in table.read_text().splitlines()][::every]
    path.write_text("smiles,Act\n" + "".join(f"{smiles},{values[name]}\n" for smiles, name in rows))


def test_the_views_of_the_analysis_answer(analysis: dict[str, Any]) -> None:
    views = analysis["views"]
    first, second = views["conformers"]
    assert "conformer 1 of 4, +0.00 kcal/mol" in first and "conformer 2 of 4" in second
    assert "looks at" in views["attention"][0] and "looks at" in views["attention"][1]
    assert re.fullmatch(r"[A-Z][a-z]?\d+: [+-]?\d.*Act", views["contributions"][0])
    for name, num_molecules in {"neighbours": 12, "best": 6}.items():
        assert len(check_grid(views[name])) == num_molecules
    assert len(check_grid(views["found"])) == len(check_grid(views["predicted"])) > 10
    pointed = views["map"]
    assert pointed[0] == pointed[1] == pointed[2] and pointed[3] == pointed[4] == CHOSEN
    assert pointed[0] != pointed[4]
    start, step, end = (text.split(":")[0] for text in views["interpolation"])
    assert (start, step, end) == (
        "point 1 of 11, 0 % of the way", "point 2 of 11, 10 % of the way", "point 11 of 11, 100 % of the way"
    )  # fmt: skip


def test_the_analysis_is_drawn_and_tells_no_error(analysis: dict[str, Any]) -> None:
    assert analysis["stderr"] == [] and len(analysis["widths"]) == 4 and min(analysis["widths"]) > 500
    stage = next(path for path in analysis["pictures"] if path.stem == "analysis_stage")
    assert count_colours(stage) > MIN_COLOURS
    assert len(analysis["pictures"]) == 13 and all(
        path.stat().st_size > MIN_PICTURE_BYTES for path in analysis["pictures"]
    )


def test_the_sampling_panel_samples(analysis: dict[str, Any]) -> None:
    panel = analysis["panel"]
    assert panel["radii"] == ["1.20", "1.70"] and panel["width"] > 500
    before, after, error = panel["status"]
    told = r"\d of 8 are molecules, \d of them different"
    assert re.fullmatch(told, before) and re.fullmatch(told, after)
    assert '"C1CC("' in error
    assert panel["stills"] == 0  # the picture steps back while the panel is there
