"""Where a model looks in a molecule: attention weights as discs on the drawing.

Shapes: L layers, H heads, S source length, T target length.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from biokit.errors import DataError
from biokit.view.interactive import InteractiveView, data_address
from biokit.view.overlay import HEIGHT, WARM, WIDTH, draw_overlay, draw_scale, mix, read_drawable

if TYPE_CHECKING:
    from biokit.generate.attention import Attention

MAX_WEIGHTS = 3_000_000  # a byte each in the notebook, and a third more as text
_FOOT = 70


def show_attention(smiles: str, attention: Attention, *, title: str = "") -> InteractiveView:
    """Point at a token or an atom and see what it looks at; choose encoder or decoder, layer and head.

    The picture (and what a page without scripts shows): how much each atom is looked at in the last encoder layer, as
    the mean over heads and over the tokens that look.

    Args:
        smiles: what `attention` was computed for.

    Raises:
        DataError: no molecule, tokens that are not those of `smiles`, or more than `MAX_WEIGHTS` weights.
    """
    from biokit.chem.draw import atoms_of_tokens, draw_with_places

    molecule = read_drawable(smiles, "attention")
    name = f'attention of "{smiles[:100]}"'
    written = "".join(attention.tokens[1:-1])
    if written != smiles:
        raise DataError(name, f'the weights are those of "{written[:100]}"', "Give its own weights")
    if (size := attention.encoder_LHSS.size + attention.cross_LHTS.size) > MAX_WEIGHTS:
        found = f"{size:,} weights"
        raise DataError(name, found, f"Keep fewer layers: {MAX_WEIGHTS:,} weights fit in a notebook")
    atoms = {position + 1: atom for position, atom in atoms_of_tokens(molecule, attention.tokens[1:-1]).items()}
    if not atoms:
        raise DataError(name, "its tokens do not match its atoms one to one", "Give a SMILES that rdkit reads as it is")
    received_S = attention.encoder_LHSS[-1].mean((0, 1))
    largest = max(float(received_S[position]) for position in atoms)
    title = title or "Where the encoder looks"
    overlay = draw_overlay(
        molecule, {atom: mix(float(received_S[at]) / largest, WARM) for at, atom in atoms.items()}, {}, title, _FOOT
    )
    num_layers, num_heads = attention.encoder_LHSS.shape[:2]
    words = f"mean share of attention an atom gets, encoder layer {num_layers}, over {num_heads} heads and all tokens"
    draw_scale(overlay, lambda value: mix(value / largest, WARM), 0.0, largest, ("", ""), words)
    picture = overlay.canvas.picture(_alt(smiles, title, words, received_S, atoms, attention.tokens))
    png, places = draw_with_places(molecule, WIDTH, HEIGHT)
    data = {
        "title": title, "image": data_address(png), "width": WIDTH, "height": HEIGHT,
        "radius": round(overlay.radius, 1), "tokens": attention.tokens, "targets": attention.target_tokens,
        "atoms": [[at, *(round(part, 1) for part in places[atom])] for at, atom in atoms.items()],
        "layers": num_layers, "heads": num_heads,
        "encoder": _pack(attention.encoder_LHSS), "cross": _pack(attention.cross_LHTS),
    }  # fmt: skip
    return InteractiveView(picture.png, picture.alt, "attention.js", data)


def _pack(weights: npt.NDArray[np.float32]) -> str:
    """Bytes of 255 times the square root, which keeps small weights apart; as base64."""
    return base64.b64encode(np.round(255 * np.sqrt(weights.clip(0, 1))).astype(np.uint8).tobytes()).decode("ascii")


def _alt(smiles: str, title: str, words: str, received_S: Any, atoms: dict[int, int], tokens: Sequence[str]) -> str:
    most = sorted(atoms, key=lambda at: -float(received_S[at]))[:5]
    named = ", ".join(f"{tokens[at]} (atom {atoms[at] + 1}) {received_S[at]:.3f}" for at in most)
    on_atoms = sum(float(received_S[at]) for at in atoms)
    return f"{title}: {smiles}\n{words[0].upper()}{words[1:]}\nMost: {named}\nAll atoms together get {on_atoms:.0%}"
