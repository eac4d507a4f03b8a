"""What a decoder starts from: SMILES as ids, and the hiddens that the encoder makes of them.

Shapes: B batch, S source length, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from biokit.errors import ConfigError, DataError
from biokit.models.molbart import PAD_ID, MolBART

if TYPE_CHECKING:
    from biokit.tokenizers import SmilesTokenizer


@dataclass(frozen=True)
class Hiddens:
    """The encoder's output of molecules: a vector a token.

    Attributes:
        mask_BS: True where there is a token (begin and end included); what stands elsewhere means nothing.
    """

    values_BSD: torch.Tensor
    mask_BS: torch.Tensor

    def __len__(self) -> int:
        return len(self.values_BSD)

    def select(self, rows: torch.Tensor) -> Hiddens:
        """These rows, in this order, perhaps repeated."""
        return Hiddens(self.values_BSD[rows], self.mask_BS[rows])


def check_ranges(values: Mapping[str, tuple[Any, bool]], valid: str) -> None:
    """Refuse the first value, by its name, that is not in its range; `valid` says what all of them may be.

    Raises:
        ConfigError: a value whose second entry is False.
    """
    for name, (value, is_valid) in values.items():
        if not is_valid:
            raise ConfigError(f"{name}={value}", "it is out of range", f"Give {valid}")


def encode_smiles(tokenizer: SmilesTokenizer, smiles: Sequence[str]) -> torch.Tensor:
    """Encoder inputs (B,S): begin, tokens, end, padded.

    Raises:
        DataError: no SMILES, one string in place of a list, an empty one, one with tokens outside the vocabulary.
    """
    if isinstance(smiles, str):
        raise DataError("encode SMILES", "it was given one string", f'Give a list: ["{smiles[:80]}"]')
    if not smiles:
        raise DataError("encode SMILES", "the list is empty", "Give at least one")
    ids, offsets = tokenizer.encode_batch(list(smiles))
    rows = [ids[start:end] for start, end in pairwise(offsets)]
    for text, row in zip(smiles, rows, strict=True):
        if not len(row) or tokenizer.unknown_id in row:
            if not len(row):
                raise DataError(f'SMILES "{text}"', "it is empty", "Leave it out")
            do = "Leave it out, or use a model whose vocabulary has them"
            raise DataError(f'SMILES "{text}"', "it has tokens that are not in the vocabulary", do)
    ids_BS = np.full((len(rows), max(map(len, rows)) + 2), tokenizer.pad_id, dtype=np.int64)
    for row_S, row in zip(ids_BS, rows, strict=True):
        row_S[: len(row) + 2] = [tokenizer.begin_id, *row, tokenizer.end_id]
    return torch.from_numpy(ids_BS)


@torch.inference_mode()
def hiddens_of(model: MolBART, source: torch.Tensor | Hiddens) -> Hiddens:
    """The hiddens of encoder inputs (B,S), on the model's device; hiddens are taken as they are.

    The model is left in evaluation mode.

    Raises:
        DataError: an input longer than the model's positions.
    """
    model.eval()
    device = next(model.parameters()).device
    if isinstance(source, Hiddens):
        return Hiddens(source.values_BSD.to(device), source.mask_BS.to(device))
    num_positions = model.embed.embedding.num_positions
    if source.shape[1] > num_positions:
        found = f"{source.shape[1]} tokens, begin and end included, and the model has {num_positions} positions"
        raise DataError("decode molecules", found, "Leave out the long ones, or train with a larger data.max_length")
    src_BS = source.to(device)
    return Hiddens(model.encode(src_BS), src_BS != PAD_ID)
