"""Overlays: colour and place say what the numbers say, on the right atom."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from matplotlib.image import imread

from biokit.chem.draw import draw_with_places, read_molecule
from biokit.errors import DataError
from biokit.generate.attention import Attention
from biokit.view.attention import MAX_WEIGHTS, show_attention
from biokit.view.contributions import show_contributions
from biokit.view.interactive import InteractiveView
from biokit.view.overlay import COLD, WARM, mix

SMILES = "CC(=O)NCl"
TOKENS = ("^", "C", "C", "(", "=", "O", ")", "N", "Cl", "&")


def _colour_at(view: InteractiveView, place: tuple[float, float], radius: float) -> np.ndarray:
    """The commonest colour within a disc: that of the disc itself, between the lines."""
    pixels = np.asarray(imread(io.BytesIO(view.png)))[..., :3]
    x, y, reach = round(place[0]), round(place[1]), round(radius * 0.6)
    part = (pixels[y - reach : y + reach, x - reach : x + reach] * 255).round().astype(int).reshape(-1, 3)
    colours, counts = np.unique(part, axis=0, return_counts=True)
    return colours[counts.argmax()] / 255


def _attention(seed: int = 0, **shapes: tuple[int, ...]) -> Attention:
    rng = np.random.default_rng(seed)
    encoder, cross = (rng.random(shape).astype(np.float32) for shape in ((2, 3, 10, 10), (2, 3, 9, 10)))
    return Attention(
        TOKENS, TOKENS[:-1], encoder / encoder.sum(-1, keepdims=True), cross / cross.sum(-1, keepdims=True)
    )


def test_each_atom_has_the_colour_of_its_number() -> None:
    values = [0.5, -1.0, 0.0, 1.0, 0.25]
    view = show_contributions(SMILES, values, unit="logP")
    for value, place in zip(values, view.data["places"], strict=True):
        expected = mix(abs(value), COLD if value < 0 else WARM)
        np.testing.assert_allclose(_colour_at(view, place, view.data["radius"]), expected, atol=0.02)
    assert view.data["labels"] == ["C1: +0.5 logP", "C2: -1 logP", "O3: +0 logP", "N4: +1 logP", "Cl5: +0.25 logP"]
    assert "Largest: C2: -1 logP; N4: +1 logP; C1: +0.5 logP" in view.alt


def test_no_contribution_at_all_is_white() -> None:
    view = show_contributions(SMILES, [0.0] * 5)
    assert "Largest: none differs from 0" in view.alt
    np.testing.assert_allclose(_colour_at(view, view.data["places"][0], view.data["radius"]), [1, 1, 1])


@pytest.mark.parametrize(
    ("smiles", "values", "words"),
    [("C1CC(", [1.0], "not a molecule"), (SMILES, [1.0], "for 5 atoms"), (SMILES, [np.nan] * 5, "NaN or infinity")],
)
def test_what_does_not_fit_is_refused(smiles: str, values: list[float], words: str) -> None:
    with pytest.raises(DataError, match=words):
        show_contributions(smiles, values)


def test_places_are_where_the_atoms_are_drawn() -> None:
    molecule = read_molecule("O=C=O")
    assert molecule is not None
    png, places = draw_with_places(molecule, 300, 200, {0: WARM})
    pixels = np.asarray(imread(io.BytesIO(png)))[..., :3]
    rows, columns = np.nonzero((np.abs(pixels - WARM) < 0.02).all(-1))
    np.testing.assert_allclose([columns.mean(), rows.mean()], places[0], atol=3)
    assert len(places) == 3 and min(places[0][0], places[2][0]) < places[1][0] < max(places[0][0], places[2][0])


def test_weights_arrive_in_the_page_as_they_were() -> None:
    attention = _attention()
    view = show_attention(SMILES, attention)
    for name, weights in (("encoder", attention.encoder_LHSS), ("cross", attention.cross_LHTS)):
        values = (np.frombuffer(base64.b64decode(view.data[name]), np.uint8) / 255.0) ** 2
        np.testing.assert_allclose(values.reshape(weights.shape), weights, atol=0.003)  # half a step of the square root
    assert [token for token, *_ in view.data["atoms"]] == [1, 2, 5, 7, 8]
    assert (view.data["layers"], view.data["heads"]) == (2, 3)


def test_the_picture_shows_the_mean_of_the_last_layer() -> None:
    attention = _attention(1)
    view = show_attention(SMILES, attention)
    received = attention.encoder_LHSS[-1].mean((0, 1))[[1, 2, 5, 7, 8]]
    largest = int(received.argmax())
    assert f"(atom {largest + 1}) {received.max():.3f}" in view.alt.splitlines()[2].split(",")[0]
    x, y = view.data["atoms"][largest][1:]
    np.testing.assert_allclose(_colour_at(view, (x + 12, y + 34), view.data["radius"]), WARM, atol=0.02)


def test_weights_of_another_molecule_and_too_many_are_refused() -> None:
    with pytest.raises(DataError, match=r'those of "CC\(=O\)NCl"'):
        show_attention("CCO", _attention())
    few = _attention()
    many = Attention(
        TOKENS, TOKENS[:-1], np.broadcast_to(few.encoder_LHSS[:1, :1], (MAX_WEIGHTS // 100, 1, 10, 10)), few.cross_LHTS
    )
    with pytest.raises(DataError, match="Keep fewer layers"):
        show_attention(SMILES, many)
