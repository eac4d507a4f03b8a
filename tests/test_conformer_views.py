"""3D views: a lit picture with words, py3Dmol's commands, and 3Dmol's script once a session."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable
from importlib.resources import files

import numpy as np
import pytest
from matplotlib.image import imread

from biokit.chem.conformers import embed_conformers
from biokit.errors import DataError
from biokit.view import conformers as view
from biokit.view.conformers import show_conformers
from biokit.view.sticks import render_sticks

SCRIPTS = files("biokit.view") / "scripts"
RED, BLUE = (0.9, 0.1, 0.1), (0.1, 0.1, 0.9)


@pytest.fixture
def execute(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], bool]:
    """Shows a view as a request of a kernel would; says whether 3Dmol came with it."""
    monkeypatch.setattr(view, "_embedding_cell", "")
    monkeypatch.setattr(view, "_embedding_request", "")
    shown = show_conformers("CO")

    def run(message: str, cell: str) -> bool:
        monkeypatch.setattr(view, "_current_request", lambda: (message, cell))
        return "3dmol" in shown._repr_mimebundle_()["text/html"].split("<div", 1)[0]

    return run


def test_the_script_is_the_one_that_py3dmol_would_load() -> None:
    import py3Dmol

    script = (SCRIPTS / "3Dmol-min.js").read_bytes()
    readme = (SCRIPTS / "README.md").read_text()
    assert hashlib.sha256(script).hexdigest() in readme
    assert "BSD-3-Clause" in (SCRIPTS / "3Dmol-LICENSE.txt").read_text()
    version = re.search(r"3dmol@([\d.]+)/", py3Dmol.view().startjs)
    assert version is not None and f"package `3dmol` {version[1]}," in readme
    assert b"</script" not in script.lower() and b"<!--" not in script  # it may stand in a page as it is


def test_the_script_comes_once_and_again_with_its_cell(execute: Callable[[str, str], bool]) -> None:
    assert execute("m1", "first") and not execute("m1", "first")
    assert not execute("m2", "second") and not execute("m3", "third")
    assert execute("m4", "first") and not execute("m5", "second")


def test_outside_a_kernel_every_view_brings_the_script() -> None:
    assert all("3dmol" in show_conformers("CO").page().split("<div", 1)[0] for _ in range(2))


def test_cells_are_known_by_id_or_by_text(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shell:
        def __init__(self) -> None:
            self.parent: dict[str, dict[str, str]] = {}

        def get_parent(self) -> dict[str, dict[str, str]]:
            return self.parent

    shell = Shell()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    assert view._current_request() is None
    shell.parent = {"header": {"msg_id": "m1"}, "metadata": {}, "content": {"code": "show()"}}
    assert view._current_request() == ("m1", "show()")
    shell.parent["metadata"] = {"cellId": "c1"}
    assert view._current_request() == ("m1", "c1")


def test_bundle_has_commands_picture_and_words() -> None:
    found = embed_conformers("CC(C)Cc1ccc(cc1)C(C)C(=O)O", 8)
    shown = show_conformers([found, "CCO"], ["ibuprofen", "ethanol"], title="Two")
    assert shown.commands.count("viewer_UNIQUEID.addModel(") == len(found) + 1
    assert json.dumps(found.conformers[1].mol_block) in shown.commands
    assert [caption.split(",")[0] for caption in shown.data["captions"]] == [
        *(f"ibuprofen: conformer {k + 1} of {len(found)}" for k in range(len(found))),
        f"ethanol: {embed_conformers('CCO').conformers[0].energy:.1f} kcal/mol (MMFF94)",
    ]
    assert f"+{found.relative_energies[1]:.2f} kcal/mol" in shown.data["captions"][1]
    assert "ibuprofen: C13H18O2, 33 atoms" in shown.alt and "ethanol: C2H6O, 9 atoms, 1 conformer, lowest" in shown.alt
    assert "function addStructures(viewer_UNIQUEID){" in shown.page()
    pixels = np.asarray(imread(io.BytesIO(shown.png)))[..., :3]
    assert len(np.unique((pixels * 255).astype(np.uint8).reshape(-1, 3), axis=0)) > 500


def test_no_text_of_the_user_is_read_as_html() -> None:
    page = show_conformers("CO", ["</script><img src=x onerror=alert(1)>"], title="<b>").page().split("<div", 1)[1]
    assert page.count("</script>") == 1 and "<b>" not in page and page.count("<img") == 1


@pytest.mark.parametrize(
    ("molecules", "legends", "words"),
    [([], [], "0 structures"), (["CO"], ["a", "b"], "1 molecules but 2 legends"), (["C"] * 61, [], "61 structures")],
)
def test_what_cannot_be_shown_is_refused(molecules: list[str], legends: list[str], words: str) -> None:
    with pytest.raises(DataError, match=words):
        show_conformers(molecules, legends)


def test_nearer_atoms_hide_farther_ones_and_sticks_have_the_colours_of_their_ends() -> None:
    positions = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 3.0], [4.0, 0.0, 3.0]])
    pixels = render_sticks(positions, [RED, BLUE, RED], [0.5, 0.5, 0.5], [(1, 2, 1.0)], 300, 100).astype(int)
    scale = 300 / (4 + 2 * 0.6)

    def is_blue(x: float) -> bool:
        red, _, blue = pixels[50, round(150 + scale * (x - 2.0))]
        return blue > red

    assert is_blue(0.0) and is_blue(1.0) and not is_blue(3.0) and not is_blue(4.0)
    assert (pixels[2, :] == 255).all()
    assert pixels.shape == (100, 300, 3)
