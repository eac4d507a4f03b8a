"""Every committed notebook as it opens: all its outputs are drawn, its views are alive, and nothing is asked for."""

from __future__ import annotations

import json
import shutil
from typing import Any

import nbformat
import pytest

from tests.browser.jupyterlab import MIN_COLOURS, REPOSITORY, count_colours, list_missing, look_at, sign

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(bool(list_missing()), reason=f"no browser test: missing {list_missing()}"),
]
FOLDER = REPOSITORY / "notebooks"
NOTEBOOKS = [str(path.relative_to(FOLDER)) for path in sorted(FOLDER.rglob("[0-9]*.ipynb"))]
COMPLAINTS = ("Error displaying widget", "Loading widget", "Javascript Error", "A still picture")
WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("committed")
    (root / "solutions").mkdir()
    for name in NOTEBOOKS:
        shutil.copy(FOLDER / name, root / name)
        sign(root / name, root)
    shutil.copytree(FOLDER / "images", root / "images")
    counts = [{"notebook": name, "cells": len(_read(name).cells), "outputs": len(_outputs(name))} for name in NOTEBOOKS]
    (root / "notebooks.json").write_text(json.dumps(counts))
    return look_at("notebooks.mjs", NOTEBOOKS[0], root)


def _read(name: str) -> Any:
    return nbformat.read(FOLDER / name, as_version=4)


def _outputs(name: str) -> list[Any]:
    """The outputs as JupyterLab shows them: what a cell prints to one stream, one after the other, is one."""
    found: list[Any] = []
    for cell in _read(name).cells:
        before = ""
        for output in cell.get("outputs", []):
            stream = output.get("name", "")
            if not stream or stream != before:
                found.append(output)
            before = stream
    return found


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_all_outputs_are_drawn(seen: dict[str, Any], name: str) -> None:
    committed, shown = _outputs(name), seen["notebooks"][name]
    assert len(shown) == len(committed)
    for output, place in zip(committed, shown, strict=True):
        data = output.get("data", {})
        if WIDGET in data:  # what answers to nobody is not on the page; the picture after it is
            assert place["height"] == 0
            continue
        assert place["width"] > 300 and place["height"] > 10
        assert all(width > 100 for width in place["images"]) and not any(text in place["text"] for text in COMPLAINTS)
        if "text/html" in data:
            assert place["view"] == place["alive"] == ("biokit-view" in data["text/html"])
        elif "image/png" in data:
            assert len(place["images"]) == 1


def test_3d_is_drawn(seen: dict[str, Any]) -> None:
    stages = [path for path in seen["pictures"] if path.stem.endswith("_stage")]
    assert [path.stem for path in stages] == ["notebooks_10_analysis_2_stage"]
    assert count_colours(stages[0]) > MIN_COLOURS
