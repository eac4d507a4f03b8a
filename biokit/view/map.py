"""Maps of molecules: alike ones lie near one another, and the one under the pointer is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from biokit.errors import ConfigError, DataError
from biokit.view.comparison import COLOURS, MARKERS
from biokit.view.grid import Column, plain
from biokit.view.interactive import InteractiveView
from biokit.view.picture import picture_of
from biokit.view.sheets import draw_sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PROJECTIONS = ("pca", "tsne")
MAX_MOLECULES = 1000
PERPLEXITY = 30.0
_SIZE = (9.0, 6.0)  # inches

Vectors = npt.NDArray[Any]
Positions = npt.NDArray[np.float64]


def project(vectors_ND: Vectors, projection: str = "pca", *, seed: int = 1234) -> Positions:
    """Places (N,2) for vectors.

    pca: the two directions of largest variance (signs such that the largest coordinate is positive). tsne: neighbours
    stay neighbours, distances far away mean little (van der Maaten and Hinton 2008; scikit-learn); of fingerprints
    (whole numbers 0 and 1) by Tanimoto distance, of others by cosine distance.

    Raises:
        ConfigError: an unknown projection. DataError: fewer than 3 vectors, or values that are not finite.
    """
    if projection not in PROJECTIONS:
        raise ConfigError(f"projection={projection}", "it is not known", f"Valid: {', '.join(PROJECTIONS)}")
    if vectors_ND.ndim != 2 or len(vectors_ND) < 3:
        raise DataError("map of molecules", f"vectors of shape {vectors_ND.shape}", "Give 3 or more, a row each")
    if not np.isfinite(vectors_ND).all():
        raise DataError("map of molecules", "a vector holds NaN or infinity", "Leave those molecules out")
    if projection == "tsne":
        return _project_by_neighbours(vectors_ND, seed)
    centred_ND = vectors_ND.astype(np.float64) - vectors_ND.mean(0, dtype=np.float64)
    left_NK, sizes_K, _ = np.linalg.svd(centred_ND, full_matrices=False)
    places_N2 = np.zeros((len(vectors_ND), 2))
    kept = left_NK[:, :2] * sizes_K[:2]
    places_N2[:, : kept.shape[1]] = kept
    largest_2 = np.abs(places_N2).argmax(0)
    return places_N2 * np.where(places_N2[largest_2, [0, 1]] < 0, -1.0, 1.0)


def _project_by_neighbours(vectors_ND: Vectors, seed: int) -> Positions:
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        found = "scikit-learn is not installed"
        raise ConfigError("projection=tsne", found, "Install biokit[analysis], or take pca") from error
    perplexity = min(PERPLEXITY, (len(vectors_ND) - 1) / 3)
    layout = TSNE(perplexity=perplexity, metric="precomputed", init="random", random_state=seed, n_jobs=1)
    return np.asarray(layout.fit_transform(_distances(vectors_ND)), dtype=np.float64)


def _distances(vectors_ND: Vectors) -> Vectors:
    """Distances (N,N): Tanimoto's of fingerprints, else those of the cosine."""
    if vectors_ND.dtype == np.uint8:
        from biokit.chem.similarity import tanimoto

        return np.clip(1 - tanimoto(vectors_ND, vectors_ND), 0, None)
    values_ND = vectors_ND.astype(np.float64)
    unit_ND = values_ND / np.maximum(np.linalg.norm(values_ND, axis=1, keepdims=True), 1e-12)
    return np.clip(1 - unit_ND @ unit_ND.T, 0, None)


def show_map(
    smiles: Sequence[str],
    places_N2: Positions,
    groups: Sequence[str] = (),
    columns: Mapping[str, Column] | None = None,
    *,
    title: str = "",
    max_molecules: int = MAX_MOLECULES,
) -> InteractiveView:
    """Molecules as points; the one under the pointer is drawn, with its values; a click keeps it.

    Args:
        places_N2: where each lies, from `project`.
        groups: a name a molecule: colour and form of its point (up to 6 groups); later ones are drawn on top.
        columns: name -> one value a molecule, shown beside the drawing.
        max_molecules: more are refused; a map holds all it shows.

    Raises:
        DataError: numbers that do not agree, no molecule, too many, too many groups, or places not finite.
    """
    columns = dict(columns or {})
    groups = list(groups) or ["molecules"] * len(smiles)
    given = {"places": places_N2, "groups": groups, **columns}
    lengths = {name: len(values) for name, values in given.items()}
    if wrong := [f"{number} {name}" for name, number in lengths.items() if number != len(smiles)]:
        raise DataError("map of molecules", f"{', '.join(wrong)} for {len(smiles)} molecules", "Give one a molecule")
    if not 1 <= len(smiles) <= max_molecules:
        found = f"{len(smiles)} molecules"
        raise DataError("map of molecules", found, f"Give 1 to {max_molecules} (max_molecules)")
    if not np.isfinite(places_N2).all():
        raise DataError("map of molecules", "a place is NaN or infinity", "Leave those molecules out")
    names = list(dict.fromkeys(groups))
    if len(names) > len(COLOURS):
        raise DataError("map of molecules", f"{len(names)} groups", f"Give {len(COLOURS)} at most: more look alike")
    title = title or f"{len(smiles)} molecules"
    static = _draw_map(places_N2, groups, names, title)
    data = {
        "title": title, "smiles": list(smiles), "places": np.round(_to_unit(places_N2), 4).tolist(),
        "names": names, "groups": [names.index(group) for group in groups],
        "colours": list(COLOURS), "markers": MARKERS, "columns": list(columns),
        "values": [[plain(value) for value in column] for column in columns.values()], "sheet": draw_sheet(smiles),
    }  # fmt: skip
    counts = ", ".join(f"{groups.count(name)} {name}" for name in names)
    alt = f"{title}: map of {len(smiles)} molecules ({counts}); alike ones lie near one another"
    return InteractiveView(static, alt, "map.js", data)


def _to_unit(places_N2: Positions) -> Positions:
    """Into the square from 0 to 1, the same scale both ways."""
    low_2, high_2 = places_N2.min(0), places_N2.max(0)
    scale = max(float((high_2 - low_2).max()), 1e-12)
    return 0.5 + (places_N2 - (low_2 + high_2) / 2) / scale


def _draw_map(places_N2: Positions, groups: Sequence[str], names: Sequence[str], title: str) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, dpi=100, layout="constrained", facecolor="white")
    axes: Axes = figure.add_subplot()
    which = np.array([names.index(group) for group in groups])
    for i, name in enumerate(names):
        points = places_N2[which == i]
        few = len(points) <= 3
        axes.scatter(
            points[:, 0], points[:, 1], s=160 if few else 26, c=COLOURS[i], marker=MARKERS[i], alpha=1 if few else 0.75,
            edgecolors="#212121" if few else "none", label=f"{name} ({len(points)})",
        )  # fmt: skip
    axes.set_title(title, loc="left", fontsize=13, weight="bold")
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("alike molecules lie near one another; the axes have no unit")
    axes.legend(frameon=False, fontsize=11, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return picture_of(figure, title).png
