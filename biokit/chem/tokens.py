"""Which tokens of a SMILES write atoms; needs no rdkit."""

from __future__ import annotations

import re
from collections.abc import Sequence

_ATOM_TOKEN = re.compile(r"\[|[BCNOPSFIbcnops*]")


def atom_positions(tokens: Sequence[str]) -> list[int]:
    """The positions of the tokens that write an atom; special tokens such as `<MASK>` write none."""
    return [i for i, token in enumerate(tokens) if _ATOM_TOKEN.match(token)]
