"""Views where people see them: alive in JupyterLab and in a converted page without a network, pictures elsewhere."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from nbconvert import HTMLExporter
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tests.browser.checks import check_grid
from tests.browser.jupyterlab import MIN_COLOURS, count_colours, list_missing, look_at, sign

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(bool(list_missing()), reason=f"no browser test: missing {list_missing()}"),
]

SETUP = """\
from biokit.config import ModelConfig
from biokit.generate.attention import attention_of
from biokit.models.molbart import MOLBART
from biokit.tokenizers import SmilesTokenizer
from biokit.view.attention import show_attention
from biokit.view.conformers import show_conformers
from biokit.view.contributions import show_contributions
from biokit.view.grid import show_grid
from biokit.view.interpolation import show_interpolation
from biokit.view.map import show_map
ibuprofen, others = "CC(C)Cc1ccc(cc1)C(C)C(=O)O", ["CCO", "CCN", "c1ccccc1", "CC(=O)O", "CCOCC", "c1ccncc1"]
tokenizer = SmilesTokenizer.packaged()
model = MOLBART.build(ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4), tokenizer.vocab_size, 64, 3)"""
VIEWS: dict[str, tuple[str, str]] = {  # name -> what shows it, and a selector of what only its running script draws
    "conformers": (
        'show_conformers([ibuprofen, "CC(=O)Nc1ccc(cc1)S(N)(=O)=O"], ["ibuprofen", "a sulfonamide"], num_conformers=8)',
        ".biokit-stage canvas",
    ),
    "conformer": ('show_conformers("OC(=O)c1ccccc1OC(C)=O", title="Aspirin")', ".biokit-stage canvas"),
    "contributions": (
        'show_contributions(ibuprofen, [0.1 * i - 0.5 for i in range(15)], unit="logP")',
        ".biokit-atom",
    ),
    "attention": ("show_attention(ibuprofen, attention_of(model, tokenizer, ibuprofen))", ".biokit-query"),
    "grid": ('show_grid(others, {"length": [len(text) for text in others]})', ".biokit-grid"),
    "map": (
        "import numpy as np\nshow_map(others, np.array([[i % 3, i // 3] for i in range(6)], dtype=float))",
        ".biokit-map",
    ),
    "interpolation": ("show_interpolation([others[0], *others])", ".biokit-slider"),
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("views")
    path = root / "views.ipynb"
    cells = [new_code_cell(SETUP), *(new_code_cell(source) for source, _ in VIEWS.values())]
    nbformat.write(new_notebook(cells=cells), path)
    papermill.execute_notebook(path, path, kernel_name="python3", progress_bar=False)
    executed = nbformat.read(path, as_version=4)
    sign(path, root)
    (root / "views.json").write_text(json.dumps([{"name": name, "alive": alive} for name, (_, alive) in VIEWS.items()]))
    _write_pages(root, executed)
    untrusted = nbformat.from_dict({**executed, "cells": [new_markdown_cell("From somewhere else"), *executed.cells]})
    nbformat.write(untrusted, root / "untrusted.ipynb")
    return look_at("views.mjs", "views.ipynb", root)


def _write_pages(root: Path, executed: Any) -> None:
    """The notebook as a page; an empty notebook as one; the page without 3Dmol, and 3Dmol; a page without scripts."""
    from biokit.view.conformers import _embedded_library

    exporter = HTMLExporter()
    page, library = exporter.from_notebook_node(executed)[0], _embedded_library()
    assert page.count(library) == 1
    (root / "views.html").write_text(page)
    (root / "empty.html").write_text(exporter.from_notebook_node(new_notebook(cells=[new_code_cell("1")]))[0])
    (root / "late.html").write_text(page.replace(library, ""))
    (root / "library.js").write_text(library.removeprefix("<script>").removesuffix("</script>"))
    outputs = (output.data["text/html"] for cell in executed.cells for output in cell.get("outputs", []))
    (root / "preview.html").write_text("<!doctype html><meta charset=utf-8>" + "\n".join(map(_sanitise, outputs)))


def _sanitise(page: str) -> str:
    """What code hosts leave of HTML: no script, no style, pictures with their alternative text."""
    kept: list[str] = []

    class Filter(HTMLParser):
        hidden = ""

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            if tag in ("script", "style"):
                self.hidden = tag
            elif tag == "img" and not self.hidden:
                found = dict(attributes)
                kept.append(
                    f'<p><img src="{found["src"]}" alt="{(found["alt"] or "").replace(chr(34), "&quot;")}"></p>'
                )

        def handle_endtag(self, tag: str) -> None:
            self.hidden = "" if tag == self.hidden else self.hidden

        def handle_data(self, data: str) -> None:
            kept.append("" if self.hidden else data)

    Filter().feed(page)
    return "".join(kept)


@pytest.mark.parametrize("mode", ["trusted", "converted"])
def test_views_are_alive_and_answer(seen: dict[str, Any], mode: str) -> None:
    words = seen["trusted"] if mode == "trusted" else seen["converted"]["seen"]
    assert set(words) == set(VIEWS)
    first, second = words["conformers"]
    assert first.startswith("ibuprofen: conformer 1 of ") and "+0.00 kcal/mol" in first and "conformer 2 of" in second
    assert words["contributions"] == ["O15: +0.9 logP"]
    encoder, cross = words["attention"]
    assert encoder.startswith("C (token 7) looks at") and cross.startswith("C (token 3) looks at")
    check_grid(words["grid"])
    assert words["map"] == ["CCO", "CCO", "CCO", "c1ccncc1", "c1ccncc1"]
    assert [text.split(" of the way")[0] for text in words["interpolation"]] == [
        "point 1 of 7, 0 %", "point 2 of 7, 17 %", "point 7 of 7, 100 %"
    ]  # fmt: skip


@pytest.mark.parametrize("mode", ["lab", "html"])
def test_3d_is_drawn(seen: dict[str, Any], mode: str) -> None:
    stage = next(path for path in seen["pictures"] if path.stem == f"views_{mode}_stage")
    assert count_colours(stage) > MIN_COLOURS


@pytest.mark.parametrize("mode", ["untrusted", "preview"])
def test_pictures_stand_where_no_script_runs(seen: dict[str, Any], mode: str) -> None:
    pictures = seen["untrusted"] if mode == "untrusted" else seen["preview"]["seen"]
    assert len(pictures) == len(VIEWS)
    assert all(width > 300 and shown > 300 and len(alt) > 20 for width, shown, alt in pictures)


def test_views_ask_for_nothing(seen: dict[str, Any]) -> None:
    nbconvert_asks = set(seen["empty"]["requests"])
    assert set(seen["converted"]["requests"]) - nbconvert_asks == set()
    assert seen["preview"]["requests"] == []


def test_a_3d_view_waits_for_its_script_as_a_picture(seen: dict[str, Any]) -> None:
    late, without = seen["late"]["seen"], seen["noWebgl"]["seen"]
    assert "the script for 3D is not on this page" in late["note"] and late["width"] > 300 and late["notes"] == 0
    assert "this browser cannot draw in 3D (no WebGL 2)" in without["note"] and without["width"] > 300
