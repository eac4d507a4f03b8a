"""Views that come alive: one bundle each, nothing in a page that is not text, and a clear error for bad input."""

from __future__ import annotations

import base64
import html
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from biokit.chem.similarity import fingerprints
from biokit.errors import ConfigError, DataError
from biokit.view.grid import show_grid
from biokit.view.interactive import InteractiveView, script_json
from biokit.view.interpolation import show_interpolation
from biokit.view.map import project, show_map
from biokit.view.picture import PNG_SIGNATURE
from biokit.view.sheets import COLUMNS, draw_sheet

ETHANOL, ASPIRIN, BENZENE = "CCO", "CC(=O)Oc1ccccc1C(=O)O", "c1ccccc1"
EVIL = "</script><img src=x onerror=alert(1)><!--"


def pages_data(view: InteractiveView) -> dict:
    """What the page's script is called with."""
    call = r"biokitView\(document.getElementsByClassName\(\"biokit-[0-9a-f]{16}\"\), (.*)\);}\)\(\);</script>$"
    found = re.search(call, view.page())
    assert found
    return json.loads(found[1])


@pytest.fixture(scope="module")
def views() -> dict[str, InteractiveView]:
    smiles = [ETHANOL, ASPIRIN, BENZENE]
    return {
        "grid": show_grid(smiles, {"mass": [46.0, 180.0, float("nan")], "name": ["a", EVIL, "c"]}, title=EVIL),
        "map": show_map(smiles, np.array([[0.0, 0], [1, 1], [3, 2]]), ["a", EVIL, "a"], title=EVIL),
        "interpolation": show_interpolation([ETHANOL, EVIL, BENZENE], title=EVIL),
    }


@pytest.mark.parametrize("name", ["grid", "map", "interpolation"])
def test_a_view_is_one_bundle_of_a_page_a_png_and_words(views, name):
    view = views[name]
    bundle = view._repr_mimebundle_()
    assert list(bundle) == ["text/html", "image/png", "text/plain"]
    assert base64.b64decode(bundle["image/png"]).startswith(PNG_SIGNATURE) and bundle["text/plain"] == view.alt
    image = f'<img src="data:image/png;base64,{bundle["image/png"]}" alt="{html.escape(view.alt)}"'
    assert image in bundle["text/html"]


@pytest.mark.parametrize("name", ["grid", "map", "interpolation"])
def test_a_page_asks_for_nothing_and_no_text_in_it_is_read_as_html(views, name):
    page = views[name].page()
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert not re.search(r"\b(fetch|XMLHttpRequest|import)\s*\(", page)
    assert page.count("</script>") == 1 == page.count("<script>") and page.endswith("</script>")
    assert EVIL not in page and "innerHTML" not in page and json.dumps(pages_data(views[name])).count("onerror") >= 1


def test_json_in_a_script_is_the_same_json():
    value = {"a": [EVIL, "&amp; \u2028 漢", 1.5, None]}
    text = script_json(value)
    assert json.loads(text) == value and not set("<>&") & set(text)
    with pytest.raises(ValueError):
        script_json(float("nan"))


def test_a_grid_holds_its_columns_and_counts_the_rest():
    view = show_grid([ETHANOL, ASPIRIN, BENZENE], {"mass": [46.0, float("nan"), 78.123456]}, max_molecules=2)
    data = pages_data(view)
    assert data["smiles"] == [ETHANOL, ASPIRIN] and data["values"] == [[46.0, None]] and data["rest"] == 1
    assert pages_data(show_grid([BENZENE], {"mass": [78.123456]}))["values"] == [[78.12]]
    assert "1. CCO (mass 46)" in view.alt
    assert show_grid([]).alt.startswith("0 molecules")


@pytest.mark.parametrize(
    ("columns", "arguments", "message"),
    [
        ({"mass": [1.0]}, {}, 'column "mass": 1 values for 2 molecules'),
        ({"mass": [1.0, 2.0]}, {"legend": "weight"}, 'legend "weight": there is no such column. Valid: mass'),
        ({}, {"max_molecules": 0}, "max_molecules=0"),
    ],
)
def test_a_grid_that_cannot_be(columns, arguments, message):
    with pytest.raises(DataError, match=re.escape(message)):
        show_grid([ETHANOL, BENZENE], columns, **arguments)


def test_the_tiles_of_a_sheet_are_the_molecules_drawings():
    smiles = [ETHANOL] * COLUMNS + ["C1CC(", ASPIRIN]
    sheet = draw_sheet(smiles, (100, 80))
    image = Image.open(io.BytesIO(base64.b64decode(sheet["image"].removeprefix("data:image/png;base64,")))).convert("L")
    assert image.size == (COLUMNS * 100, 160) and sheet["drawn"] == [*[True] * COLUMNS, False, True]

    def ink(i: int) -> float:
        x, y = i % COLUMNS * 100, i // COLUMNS * 80
        return float((np.asarray(image.crop((x, y, x + 100, y + 80))) < 128).mean())

    assert ink(0) == ink(9) > 0.005 and ink(10) == 0.0 and ink(11) > 2 * ink(0)


def test_principal_components_are_those_of_the_covariance():
    vectors = np.random.default_rng(0).normal(size=(50, 5)) * [5, 3, 1, 0.5, 0.1]
    places = project(vectors)
    values = np.sort(np.linalg.eigvalsh(np.cov(vectors, rowvar=False)))[::-1]
    np.testing.assert_allclose(np.cov(places, rowvar=False), np.diag(values[:2]), atol=1e-10)
    np.testing.assert_array_equal(project(vectors), places)
    assert project(vectors[:, :1]).shape == (50, 2)


def test_neighbours_by_fingerprint_stay_neighbours():
    alkanes, rings = ["C" * n + "O" for n in range(4, 14)], [f"c1ccccc1{'C' * n}N" for n in range(10)]
    places = project(fingerprints([*alkanes, *rings]), "tsne")
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1)
    np.fill_diagonal(apart, np.inf)
    same = [(i < 10) == (j < 10) for i, j in enumerate(apart.argmin(1))]
    assert np.mean(same) >= 0.9


@pytest.mark.parametrize(
    ("vectors", "projection", "error", "message"),
    [
        (np.zeros((5, 2)), "umap", ConfigError, "projection=umap: it is not known. Valid: pca, tsne"),
        (np.zeros((2, 2)), "pca", DataError, "shape (2, 2)"),
        (np.full((5, 2), np.nan), "pca", DataError, "NaN or infinity"),
    ],
)
def test_a_projection_that_cannot_be(vectors, projection, error, message):
    with pytest.raises(error, match=re.escape(message)):
        project(vectors, projection)


def test_a_map_keeps_places_groups_and_values():
    places = np.array([[0.0, 10.0], [4.0, 10.0], [2.0, 12.0]])
    data = pages_data(show_map([ETHANOL, ASPIRIN, BENZENE], places, ["b", "a", "b"], {"x": [1.0, 2.0, float("nan")]}))
    assert data["names"] == ["b", "a"] and data["groups"] == [0, 1, 0] and data["values"] == [[1.0, 2.0, None]]
    np.testing.assert_allclose(data["places"], [[0, 0.25], [1, 0.25], [0.5, 0.75]])  # one scale for both directions
    assert "2 b, 1 a" in show_map([ETHANOL, ASPIRIN, BENZENE], places, ["b", "a", "b"]).alt


@pytest.mark.parametrize(
    ("num", "arguments", "message"),
    [
        (3, {"groups": ["a"]}, "1 groups for 3 molecules"),
        (3, {"columns": {"x": [1.0]}}, "1 x for 3 molecules"),
        (3, {"max_molecules": 2}, "3 molecules. Give 1 to 2"),
        (7, {"groups": list("abcdefg")}, "7 groups. Give 6 at most"),
        (0, {}, "0 molecules. Give 1 to"),
    ],
)
def test_a_map_that_cannot_be(num, arguments, message):
    with pytest.raises(DataError, match=re.escape(message)):
        show_map([ETHANOL] * num, np.zeros((num, 2)), **arguments)


def test_places_that_are_nowhere_and_values_that_are_missing():
    with pytest.raises(DataError, match="a place is NaN or infinity"):
        show_map([ETHANOL] * 2, np.array([[0.0, 1.0], [np.nan, 0.0]]))
    assert pages_data(show_grid([ETHANOL, BENZENE], {"x": [1.0, None]}))["values"] == [[1.0, None]]


def test_the_way_between_two_molecules_has_its_similarities():
    view = show_interpolation([ETHANOL, "C1CC(", BENZENE])
    data = pages_data(view)
    assert data["shares"] == [0.0, 0.5, 1.0] and data["similarities"][1] is None
    assert data["similarities"][0][0] == data["similarities"][2][1] == 1.0
    assert data["similarities"][0][1] == data["similarities"][2][0] < 0.2
    assert "not a molecule" in view.alt
    for smiles, message in (([ETHANOL], "1 molecules"), ([ETHANOL, "C("], 'its end "C(" is not a molecule')):
        with pytest.raises(DataError, match=re.escape(message)):
            show_interpolation(smiles)
