"""What SMILES may go on with, token by token: branches balanced, ring bonds closed (OpenSMILES 1.0, sections 3 and 4).

Shapes: N rows being decoded, V vocabulary, C classes of tokens, R ring bonds, A atoms, D depth of branches.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from biokit.tokenizers import SmilesTokenizer

NUM_RINGS = 100  # %99 is the last of OpenSMILES
ATOM, BOND, OPEN, CLOSE, RING, DOT, BEGIN, END, OTHER, BRANCH_BOND = range(10)
_SINGLE = {"(": OPEN, ")": CLOSE, ".": DOT, **dict.fromkeys("-=#$:/\\~", BOND)}
_RING = re.compile(r"[0-9]|%[0-9]{2}")
_ATOM = re.compile(r"\[.*\]|[A-Za-z]+|\*", re.DOTALL)
_FOLLOWS = {  # class of a token: classes that may follow it
    BEGIN: (ATOM,),
    ATOM: (ATOM, BOND, OPEN, CLOSE, RING, DOT, END),
    BOND: (ATOM, RING),
    BRANCH_BOND: (ATOM,),  # a bond at the beginning of a branch, or behind one
    OPEN: (ATOM, BOND),
    CLOSE: (ATOM, BOND, OPEN, CLOSE, DOT, END),
    RING: (ATOM, BOND, OPEN, CLOSE, RING, DOT, END),
    DOT: (ATOM,),
    END: (),
    OTHER: (),
}
_SPARE = 3  # tokens that one more may add to what is still needed


class Grammar:
    """Where each row stands in its SMILES. Valences and aromaticity it does not know.

    A ring bond closes at an atom that is not bonded to its first one already, with a bond symbol at one of its ends at
    most; a dot stands between whole molecules. When the tokens left are just enough, only what closes may come.
    """

    def __init__(self, tokenizer: SmilesTokenizer, device: torch.device, max_length: int) -> None:
        classes = [_classify(token, index, tokenizer) for index, token in enumerate(tokenizer.vocabulary)]
        rings = [int(t.lstrip("%")) if c == RING else -1 for t, c in zip(tokenizer.vocabulary, classes, strict=True)]
        self.class_V = torch.tensor(classes, device=device)
        self.ring_V = torch.tensor(rings, device=device)
        self.ring_tokens = (self.ring_V >= 0).nonzero().squeeze(1)
        self.allowed_CV = torch.zeros(len(_FOLLOWS), len(classes), dtype=torch.bool, device=device)
        for before, following in _FOLLOWS.items():
            self.allowed_CV[before] = torch.isin(self.class_V, torch.tensor(following, device=device))
        self.max_length = max_length
        self.begin(0)

    def begin(self, num_rows: int) -> None:
        """Before the first token of so many rows."""

        def full(value: int, *sizes: int) -> torch.Tensor:
            return torch.full((num_rows, *sizes), value, device=self.class_V.device)

        self.class_N, self.atom_N, self.num_atoms_N, self.depth_N = full(BEGIN), full(0), full(0), full(0)
        self.num_tokens_N = full(0)
        self.branch_ND = full(0, self.max_length + 1)  # the atom that each open branch goes back to
        self.bonded_NA = full(0, self.max_length + 1).bool()  # bonded to the row's atom, itself included
        self.ring_NR = full(-1, NUM_RINGS)  # the atom where a ring bond was opened; -1: it is not open
        self.ring_bond_NR = full(0, NUM_RINGS).bool()  # with a bond symbol

    def select(self, rows_N: torch.Tensor) -> None:
        """Go on from these rows, in this order."""
        for name in ("class_N", "atom_N", "num_atoms_N", "depth_N", "num_tokens_N", "branch_ND", "bonded_NA",
                     "ring_NR", "ring_bond_NR"):  # fmt: skip
            setattr(self, name, getattr(self, name)[rows_N])

    def apply(self, logits_NV: torch.Tensor) -> torch.Tensor:
        """The logits, -inf where SMILES cannot go on so."""
        allowed_NV = self.allowed_CV[self.class_N].clone()
        closes_NR, opens_NR = self._ring_moves()
        moves_NR = (closes_NR | opens_NR)[:, self.ring_V[self.ring_tokens]]
        allowed_NV[:, self.ring_tokens] &= moves_NR
        num_open_N = (self.ring_NR >= 0).sum(1)
        whole_N = (self.depth_N == 0) & (num_open_N == 0)
        allowed_NV &= whole_N[:, None] | ((self.class_V != END) & (self.class_V != DOT))
        allowed_NV &= (self.depth_N > 0)[:, None] | (self.class_V != CLOSE)
        left_N = self.max_length - self.num_tokens_N
        hurried_N = left_N <= 2 * num_open_N + self.depth_N + 3 + _SPARE
        allowed_NV &= ~hurried_N[:, None] | self._closing(allowed_NV, closes_NR, num_open_N)
        return logits_NV.masked_fill(~allowed_NV, float("-inf"))

    def _ring_moves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Which ring bonds (N,R) may be closed here, and which opened."""
        is_open_NR = self.ring_NR >= 0
        is_bonded_NR = self.bonded_NA.gather(1, self.ring_NR.clamp(min=0))
        after_bond_N1 = (self.class_N == BOND)[:, None]
        return is_open_NR & ~is_bonded_NR & ~(after_bond_N1 & self.ring_bond_NR), ~is_open_NR

    def _closing(self, allowed_NV: torch.Tensor, closes_NR: torch.Tensor, num_open_N: torch.Tensor) -> torch.Tensor:
        """The quickest way to the end: a ring bond that can be closed, else an atom, a branch's end, the end."""
        closers_NV = torch.zeros_like(allowed_NV)
        closers_NV[:, self.ring_tokens] = closes_NR[:, self.ring_V[self.ring_tokens]]
        closers_NV &= allowed_NV
        can_close_N1 = closers_NV.any(1, keepdim=True)
        needs_atom_N1 = (num_open_N > 0)[:, None] | torch.isin(
            self.class_N, torch.tensor([BEGIN, BOND, BRANCH_BOND, OPEN, DOT], device=self.class_N.device)
        )[:, None]
        atoms_NV = needs_atom_N1 & (self.class_V == ATOM)
        ends_NV = ~needs_atom_N1 & ((self.class_V == CLOSE) | (self.class_V == END))
        return torch.where(can_close_N1, closers_NV, atoms_NV | ends_NV)

    def advance(self, tokens_N: torch.Tensor) -> None:
        """These tokens came next."""
        class_N, before_N = self.class_V[tokens_N], self.class_N
        is_at_branch_N = (before_N == OPEN) | (before_N == CLOSE)
        class_N = torch.where((class_N == BOND) & is_at_branch_N, BRANCH_BOND, class_N)
        self.num_tokens_N = self.num_tokens_N + 1
        rows = torch.arange(len(tokens_N), device=tokens_N.device)
        self._add_atoms(rows[class_N == ATOM], before_N)
        self._turn_rings(rows[class_N == RING], self.ring_V[tokens_N], before_N)
        opened, closed = rows[class_N == OPEN], rows[class_N == CLOSE]
        self.branch_ND[opened, self.depth_N[opened]] = self.atom_N[opened]
        self.depth_N[opened] += 1
        self.depth_N[closed] -= 1
        self.atom_N[closed] = self.branch_ND[closed, self.depth_N[closed]]
        self.class_N = class_N

    def _add_atoms(self, rows: torch.Tensor, before_N: torch.Tensor) -> None:
        parent = self.atom_N[rows]
        self.bonded_NA[rows] = False
        joined = ~torch.isin(before_N[rows], torch.tensor([BEGIN, DOT], device=rows.device))
        self.bonded_NA[rows[joined], parent[joined]] = True
        self.atom_N[rows] = self.num_atoms_N[rows]
        self.bonded_NA[rows, self.atom_N[rows]] = True
        self.num_atoms_N[rows] += 1

    def _turn_rings(self, rows: torch.Tensor, ring_N: torch.Tensor, before_N: torch.Tensor) -> None:
        ring = ring_N[rows]
        first = self.ring_NR[rows, ring]
        is_closed = first >= 0
        self.bonded_NA[rows[is_closed], first[is_closed]] = True
        self.ring_NR[rows, ring] = torch.where(is_closed, -1, self.atom_N[rows])
        self.ring_bond_NR[rows, ring] = ~is_closed & (before_N[rows] == BOND)


def _classify(token: str, index: int, tokenizer: SmilesTokenizer) -> int:
    if index == tokenizer.end_id:
        return END
    if index < tokenizer.chem_start:
        return OTHER
    if token in _SINGLE:
        return _SINGLE[token]
    return RING if _RING.fullmatch(token) else ATOM if _ATOM.fullmatch(token) else OTHER
