"""Balls and sticks as pixels, without a graphics card: every pixel shows the nearest surface, lit from the upper left.

Seen along z from above, without perspective. Shapes: N atoms, H and W the height and width of a picture in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from biokit.view.canvas import Rgb

Floats = npt.NDArray[np.float64]

BALL_RADIUS = 0.34  # ångström
HYDROGEN_RADIUS = 0.22
STICK_RADIUS = 0.13
_FINER = 2  # pixels are rendered so much finer, then averaged: smooth edges
_LIGHT = np.array([-0.45, 0.55, 0.70]) / np.linalg.norm([-0.45, 0.55, 0.70])
_FOG = 0.45  # share of white at the far end
_MARGIN = 0.6  # ångström around the atoms
_MAX_SCALE = 60.0  # pixels an ångström at most: small molecules are not blown up


@dataclass
class _Scene:
    """What is nearest at each pixel so far."""

    depth_HW: Floats
    normal_HW3: Floats
    colour_HW3: Floats


def render_sticks(
    positions_N3: Floats,
    colours: Sequence[Rgb],
    radii: Sequence[float],
    bonds: Sequence[tuple[int, int, float]],
    width: int,
    height: int,
) -> npt.NDArray[np.uint8]:
    """The picture (H,W,3) of a molecule, centred, as large as fits; far parts are paler.

    Args:
        positions_N3: in ångström.
        radii: of the balls, in ångström.
        bonds: (atom, atom, order) each; a stick takes the colour of the nearer atom on each half.
    """
    low_3, high_3 = positions_N3.min(0) - _MARGIN, positions_N3.max(0) + _MARGIN
    fits = min(width / (high_3[0] - low_3[0]), height / (high_3[1] - low_3[1]))
    scale = _FINER * min(_MAX_SCALE, fits)
    rows, columns = _FINER * height, _FINER * width
    places_N3 = (positions_N3 - (low_3 + high_3) / 2) * scale * np.array([1.0, -1.0, 1.0])
    places_N3 += np.array([columns / 2, rows / 2, 0.0])
    scene = _Scene(np.full((rows, columns), -np.inf), np.zeros((rows, columns, 3)), np.ones((rows, columns, 3)))
    for place_3, colour, radius in zip(places_N3, colours, radii, strict=True):
        _add_ball(scene, place_3, radius * scale, colour)
    for first, second, _ in bonds:
        middle_3 = (places_N3[first] + places_N3[second]) / 2
        for atom in (first, second):
            _add_stick(scene, places_N3[atom], middle_3, STICK_RADIUS * scale, colours[atom])
    picture_HW3 = _light(scene)
    averaged_HW3 = picture_HW3.reshape(height, _FINER, width, _FINER, 3).mean((1, 3))
    return np.round(averaged_HW3 * 255).astype(np.uint8)


def _add_ball(scene: _Scene, place_3: Floats, radius: float, colour: Rgb) -> None:
    window, x_HW, y_HW = _window(scene, place_3[:2] - radius, place_3[:2] + radius)
    dx_HW, dy_HW = x_HW - place_3[0], y_HW - place_3[1]
    height_HW = np.sqrt(np.clip(radius**2 - dx_HW**2 - dy_HW**2, 0, None))
    normal_HW3 = np.stack((dx_HW, dy_HW, height_HW), -1) / radius
    _show_nearer(scene, window, height_HW > 0, place_3[2] + height_HW, normal_HW3, colour)


def _add_stick(scene: _Scene, start_3: Floats, end_3: Floats, radius: float, colour: Rgb) -> None:
    """A round stick without ends; they lie in balls and in the other half."""
    axis_3 = end_3 - start_3
    length = float(np.linalg.norm(axis_3))
    flat = float(np.hypot(axis_3[0], axis_3[1]))
    if flat < 1e-6 * length or length == 0:  # it points at the viewer: its ball hides it
        return
    low_2, high_2 = np.minimum(start_3, end_3)[:2] - radius, np.maximum(start_3, end_3)[:2] + radius
    window, x_HW, y_HW = _window(scene, low_2, high_2)
    along_2, across_2 = axis_3[:2] / flat, np.array([-axis_3[1], axis_3[0]]) / flat
    u_HW = (x_HW - start_3[0]) * along_2[0] + (y_HW - start_3[1]) * along_2[1]
    v_HW = (x_HW - start_3[0]) * across_2[0] + (y_HW - start_3[1]) * across_2[1]
    lift_HW = np.sqrt(np.clip(radius**2 - v_HW**2, 0, None))  # of the surface above the axis, across it
    slope = axis_3[2] / flat
    depth_HW = start_3[2] + u_HW * slope + lift_HW * length / flat
    share_HW = (u_HW + (depth_HW - start_3[2]) * slope) / (flat + axis_3[2] * slope)  # how far along the axis
    up_3 = np.array([*(-along_2 * axis_3[2] / length), flat / length])
    normal_HW3 = (v_HW[..., None] * np.array([*across_2, 0.0]) + lift_HW[..., None] * up_3) / radius
    inside_HW = (lift_HW > 0) & (share_HW >= 0) & (share_HW <= 1)
    _show_nearer(scene, window, inside_HW, depth_HW, normal_HW3, colour)


def _window(scene: _Scene, low_2: Floats, high_2: Floats) -> tuple[tuple[slice, slice], Floats, Floats]:
    """The part of the picture between two corners, and the places (x, y) of its pixels."""
    rows, columns = scene.depth_HW.shape
    left, top = (max(0, int(np.floor(value))) for value in low_2)
    right, bottom = min(columns, int(np.ceil(high_2[0])) + 1), min(rows, int(np.ceil(high_2[1])) + 1)
    y_HW, x_HW = np.mgrid[top:bottom, left:right] + 0.5
    return (slice(top, bottom), slice(left, right)), x_HW, y_HW


def _show_nearer(
    scene: _Scene,
    window: tuple[slice, slice],
    inside_HW: npt.NDArray[np.bool_],
    depth_HW: Floats,
    normal_HW3: Floats,
    colour: Rgb,
) -> None:
    nearer_HW = inside_HW & (depth_HW > scene.depth_HW[window])
    scene.depth_HW[window][nearer_HW] = depth_HW[nearer_HW]
    scene.normal_HW3[window][nearer_HW] = normal_HW3[nearer_HW]
    scene.colour_HW3[window][nearer_HW] = colour


def _light(scene: _Scene) -> Floats:
    """Colours with light, shine and fog on white."""
    seen_HW = np.isfinite(scene.depth_HW)
    picture_HW3 = np.ones((*seen_HW.shape, 3))
    depth, normal = scene.depth_HW[seen_HW], scene.normal_HW3[seen_HW] * np.array([1.0, -1.0, 1.0])
    bright = np.clip(normal @ _LIGHT, 0, 1)[:, None]
    half = _LIGHT + np.array([0.0, 0.0, 1.0])
    shine = np.clip(normal @ (half / np.linalg.norm(half)), 0, 1)[:, None] ** 40
    lit = scene.colour_HW3[seen_HW] * (0.42 + 0.62 * bright) + 0.35 * shine
    span = depth.max() - depth.min()
    fog = _FOG * ((depth.max() - depth) / span if span > 0 else 0 * depth)[:, None]
    picture_HW3[seen_HW] = np.clip(lit * (1 - fog) + fog, 0, 1)
    return picture_HW3
