"""3D structures that turn under the mouse (py3Dmol), with a rendered picture where no script runs.

3Dmol's own script (`scripts/3Dmol-min.js`, see `scripts/README.md`) travels in the notebook, once: see `_must_embed`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from biokit.errors import DataError, EngineError
from biokit.view.canvas import FRAME, GREY, INK, Canvas, Rgb
from biokit.view.interactive import InteractiveView, read_script, script_code
from biokit.view.picture import Picture
from biokit.view.sticks import BALL_RADIUS, HYDROGEN_RADIUS, STICK_RADIUS, render_sticks

if TYPE_CHECKING:
    from biokit.chem.conformers import Conformers

MAX_STRUCTURES = 60  # each is about 3 kB in the notebook
_TILES = 4
_MARGIN = 12
_LARGE, _SMALL = (640, 400), (400, 280)  # of a tile in pixels: one alone, or each of several
_OTHER: Rgb = (0.55, 0.55, 0.35)
_COLOURS: dict[str, Rgb] = {  # Okabe-Ito, told apart by colour-blind readers; the key under the picture names them
    "H": (0.88, 0.88, 0.88), "C": (0.40, 0.40, 0.40), "N": (0.0, 0.45, 0.70), "O": (0.84, 0.37, 0.0),
    "S": (0.94, 0.83, 0.15), "P": (0.80, 0.47, 0.65), "F": (0.34, 0.71, 0.91), "Cl": (0.0, 0.62, 0.45),
    "Br": (0.0, 0.38, 0.28), "I": (0.38, 0.18, 0.32), "B": (0.95, 0.69, 0.55),
}  # fmt: skip


@dataclass(frozen=True)
class _Structure:
    """One conformer and the words under it."""

    conformers: Conformers
    number: int
    caption: str

    @property
    def mol_block(self) -> str:
        return self.conformers.conformers[self.number].mol_block


@dataclass(frozen=True, repr=False)
class ConformerView(InteractiveView):
    """A 3D view; `commands` (JavaScript by py3Dmol) gives its structures to 3Dmol's viewer."""

    commands: str = ""

    def page(self) -> str:
        return (_embedded_library() if _must_embed() else "") + super().page()

    def code(self) -> str:
        return f"{super().code()}function addStructures(viewer_UNIQUEID){{{script_code(self.commands)}}}"


def show_conformers(
    molecules: str | Conformers | Sequence[str | Conformers],
    legends: Sequence[str] = (),
    *,
    title: str = "",
    num_conformers: int = 1,
    seed: int = 1234,
) -> ConformerView:
    """Molecules in 3D: turn with the mouse, step through structures and their energies, show or hide hydrogens.

    Args:
        molecules: SMILES, which are embedded, or what `embed_conformers` returned; one or several.
        legends: a name a molecule; empty: its SMILES.
        num_conformers: structures a SMILES at most.
        seed: of the embedding.

    Raises:
        DataError: a molecule that cannot be embedded, no molecule, another number of legends, or too many structures.
        ConfigError: see `embed_conformers`. EngineError: py3Dmol is not installed.
    """
    from biokit.chem.conformers import Conformers, embed_conformers

    given = [molecules] if isinstance(molecules, (str, Conformers)) else list(molecules)
    if legends and len(legends) != len(given):
        found = f"{len(given)} molecules but {len(legends)} legends"
        raise DataError("3D view", found, "Give one legend a molecule, or none")
    found_all = [embed_conformers(one, num_conformers, seed) if isinstance(one, str) else one for one in given]
    names = list(legends) or [found.smiles for found in found_all]
    structures = [
        _Structure(found, k, _caption(name, found, k))
        for name, found in zip(names, found_all, strict=True)
        for k in range(len(found))
    ]
    if not 1 <= len(structures) <= MAX_STRUCTURES:
        raise DataError("3D view", f"{len(structures)} structures", f"Give 1 to {MAX_STRUCTURES}")
    picture = _draw(structures, title, _alt(names, found_all, title))
    elements = _elements(structures)
    data = {
        "title": title,
        "captions": [structure.caption for structure in structures],
        "molecules": [number for number, found in enumerate(found_all) for _ in found.conformers],
        "key": [{"element": element, "colour": _hex(_colour(element))} for element in elements],
        "hydrogens": _style(HYDROGEN_RADIUS),
        "height": _LARGE[1],
    }
    return ConformerView(picture.png, picture.alt, "conformers.js", data, _viewer_commands(structures))


def _viewer_commands(structures: Sequence[_Structure]) -> str:
    """What py3Dmol would have the viewer do: one model a structure, balls and sticks."""
    try:
        import py3Dmol
    except ImportError as error:
        raise EngineError("3D view", "py3Dmol is not installed", "Install biokit[notebooks]") from error
    view = py3Dmol.view(js="")
    for structure in structures:
        view.addModel(structure.mol_block, "sdf", {"keepH": True})
    view.setStyle({}, _style(BALL_RADIUS))
    view.setStyle({"elem": "H"}, _style(HYDROGEN_RADIUS))
    return view.updatejs


def _style(ball_radius: float) -> dict[str, Any]:
    colours = {"prop": "elem", "map": {element: _hex(colour) for element, colour in _COLOURS.items()}}
    return {
        "stick": {"radius": STICK_RADIUS, "singleBonds": True, "colorscheme": colours},
        "sphere": {"radius": ball_radius, "colorscheme": colours},
    }


_embedding_cell = ""
_embedding_request = ""


def _must_embed() -> bool:
    """Whether the output that is made now has to bring 3Dmol's script.

    The first 3D view of a session brings it, and again whenever its cell runs again, for that replaces the output that
    had it. A cell is known by its id, or by its text where the front end sends no id (papermill). Outside a kernel
    nothing is known, and every view brings it.
    """
    global _embedding_cell, _embedding_request
    request = _current_request()
    if request is None:
        return True
    message, cell = request
    if not _embedding_cell:
        _embedding_cell = cell
    if cell != _embedding_cell or message == _embedding_request:
        return False
    _embedding_request = message
    return True


def _current_request() -> tuple[str, str] | None:
    """(message id, cell) of the request that the kernel executes; None outside a kernel."""
    try:
        from IPython import get_ipython
    except ImportError:
        return None
    shell = get_ipython()
    parent = shell.get_parent() if hasattr(shell, "get_parent") else {}
    message = parent.get("header", {}).get("msg_id", "")
    cell = parent.get("metadata", {}).get("cellId", "") or parent.get("content", {}).get("code", "")
    return (message, cell) if message and cell else None


def _embedded_library() -> str:
    """3Dmol as a script element: kept from the module loaders that a page may have (require.js), and announced."""
    library = read_script("3Dmol-min.js")
    announce = 'window.$3Dmolpromise??=Promise.resolve();window.dispatchEvent(new Event("biokit-3dmol"));'
    return f"<script>(function(){{var exports,module,define;{library}\n}}).call(window);{announce}</script>"


def _draw(structures: Sequence[_Structure], title: str, alt: str) -> Picture:
    """The first structures of all molecules as pictures, with their captions and a key to the colours."""
    shown = sorted(structures, key=lambda structure: structure.number)[:_TILES]
    width, height = _LARGE if len(shown) == 1 else _SMALL
    columns = min(2, len(shown))
    head = 34 if title else _MARGIN
    num_rows = -(-len(shown) // columns)
    rest = len(structures) - len(shown)
    canvas = Canvas(columns * width + 2 * _MARGIN, head + num_rows * (height + 26) + (22 if rest else 0) + 34)
    if title:
        canvas.text(_MARGIN, 19, _shorten(title, 90), size=15, bold=True)
    for i, structure in enumerate(shown):
        x, y = _MARGIN + i % columns * width, head + i // columns * (height + 26)
        canvas.image(_render(structure, width, height), x, y)
        canvas.text(x + width / 2, y + height + 12, _shorten(structure.caption, width // 7), size=12, align="center")
    if rest:
        canvas.text(_MARGIN, canvas.height - 46, f"and {rest} more that are not drawn", size=12, colour=GREY)
    for i, element in enumerate(_elements(structures)):
        canvas.box(_MARGIN + 52 * i, canvas.height - 27, 14, 14, fill=_colour(element), edge=FRAME)
        canvas.text(_MARGIN + 52 * i + 20, canvas.height - 20, element, size=12, colour=INK)
    return canvas.picture(alt)


def _render(structure: _Structure, width: int, height: int) -> bytes:
    molecule = structure.conformers
    pixels = render_sticks(
        molecule.conformers[structure.number].positions_N3,
        [_colour(element) for element in molecule.elements],
        [HYDROGEN_RADIUS if element == "H" else BALL_RADIUS for element in molecule.elements],
        molecule.bonds,
        width,
        height,
    )
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _caption(name: str, found: Conformers, number: int) -> str:
    if len(found) == 1:
        return f"{name}: {found.conformers[0].energy:.1f} kcal/mol ({found.force_field})"
    above = f"{found.relative_energies[number]:+.2f} kcal/mol ({found.force_field})"
    return f"{name}: conformer {number + 1} of {len(found)}, {above}"


def _alt(names: Sequence[str], found_all: Sequence[Conformers], title: str) -> str:
    lines = [f"{title + ': ' if title else ''}3D structures of {len(names)} molecule{'' if len(names) == 1 else 's'}"]
    for name, found in zip(names, found_all, strict=True):
        energies = f"lowest energy {found.conformers[0].energy:.1f} kcal/mol ({found.force_field})"
        if len(found) > 1:
            energies += ", others " + ", ".join(f"{energy:+.2f}" for energy in found.relative_energies[1:])
        numbers = f"{len(found.elements)} atoms, {len(found)} conformer{'' if len(found) == 1 else 's'}"
        lines.append(f"{_shorten(name, 100)}: {found.formula}, {numbers}, {energies}")
    return "\n".join(lines)


def _elements(structures: Sequence[_Structure]) -> list[str]:
    """The elements of all structures, in the order of the palette."""
    found = {element for structure in structures for element in structure.conformers.elements}
    return [element for element in _COLOURS if element in found] + sorted(found - set(_COLOURS))


def _colour(element: str) -> Rgb:
    return _COLOURS.get(element, _OTHER)


def _hex(colour: Rgb) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in colour)


def _shorten(text: str, max_length: int) -> str:
    return text if len(text) <= max_length else text[: max_length - 1] + "…"
