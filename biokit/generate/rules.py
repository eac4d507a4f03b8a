"""Which tokens may come next.

Shapes: N rows being decoded, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

from biokit.errors import ConfigError
from biokit.generate.grammar import ATOM, Grammar

if TYPE_CHECKING:
    from biokit.tokenizers import SmilesTokenizer


class TokenRules:
    """What a decoder may emit: chemistry and the end, less `banned`; with `grammar`, only what SMILES go on with.

    The grammar keeps branches balanced and ring bonds closed, opens no ring bond at an atom that closes it again, and
    closes everything before `max_length` tokens are over. Valences and aromaticity it does not know.

    Raises:
        ConfigError: a banned token that the vocabulary does not have, no atom left, or no end under the grammar.
    """

    def __init__(
        self,
        tokenizer: SmilesTokenizer,
        device: torch.device,
        banned: Collection[str] = (),
        grammar: bool = False,
        max_length: int = 0,
    ) -> None:
        if isinstance(banned, str):
            raise ConfigError(f"banned={banned}", "it is one string", f'Give a list of tokens: ["{banned}"]')
        known = {token: index for index, token in enumerate(tokenizer.vocabulary)}
        if unknown := [token for token in banned if token not in known]:
            raise ConfigError(f"banned={list(banned)}", f"{unknown} are no tokens of the vocabulary", "Leave them out")
        self.penalty_V = torch.zeros(tokenizer.vocab_size, device=device)
        self.penalty_V[torch.as_tensor(tokenizer.non_chemical_ids(), device=device)] = float("-inf")
        self.penalty_V[[known[token] for token in banned]] = float("-inf")
        if grammar and tokenizer.vocabulary[tokenizer.end_id] in banned:
            raise ConfigError("banned tokens", "the grammar must be able to end", "Do not ban the end")
        if ")" in banned and grammar:
            self.penalty_V[known["("]] = float("-inf")
        self.grammar = Grammar(tokenizer, device, max_length) if grammar else None
        if self.grammar is not None and not bool(((self.grammar.class_V == ATOM) & (self.penalty_V == 0)).any()):
            raise ConfigError("banned tokens", "no atom is left", "Ban fewer")

    def apply(self, logits_NV: torch.Tensor) -> torch.Tensor:
        """The logits, -inf at what must not come."""
        logits_NV = logits_NV + self.penalty_V
        return logits_NV if self.grammar is None else self.grammar.apply(logits_NV)

    def begin(self, num_rows: int) -> None:
        """Before the first token of so many rows."""
        if self.grammar is not None:
            self.grammar.begin(num_rows)

    def advance(self, tokens_N: torch.Tensor, rows_N: torch.Tensor | None = None) -> None:
        """These tokens came next in the rows (in these rows of the last step, where they were re-ordered)."""
        if self.grammar is not None:
            if rows_N is not None:
                self.grammar.select(rows_N)
            self.grammar.advance(tokens_N)

    def select(self, rows_N: torch.Tensor) -> None:
        """Only these rows go on."""
        if self.grammar is not None:
            self.grammar.select(rows_N)
