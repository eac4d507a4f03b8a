"""How likely a model finds given molecules.

Shapes: B batch, S source length, T target length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from biokit.errors import DataError
from biokit.generate.inputs import Hiddens, encode_smiles, hiddens_of
from biokit.generate.rules import TokenRules
from biokit.models.molbart import DecodingState, MolBART

if TYPE_CHECKING:
    from biokit.tokenizers import SmilesTokenizer


@torch.inference_mode()
def log_likelihoods(
    model: MolBART, tokenizer: SmilesTokenizer, source: torch.Tensor | Hiddens, smiles: Sequence[str]
) -> list[float]:
    """The log-likelihood (nats) of writing each SMILES, end included, for the encoder input in the same row.

    Over the tokens that may be emitted, as `sample_molecules` and `beam_search` tell it of what they wrote.

    Raises:
        DataError: rows that do not pair, a SMILES with unknown tokens, one longer than the model's positions.
    """
    if len(source) != len(smiles):
        found = f"{len(source)} encoder inputs and {len(smiles)} SMILES"
        raise DataError("log-likelihoods of pairs", found, "Give as many of the one as of the other")
    whole_BT = encode_smiles(tokenizer, smiles)
    num_positions = model.embed.embedding.num_positions
    if whole_BT.shape[1] - 1 > num_positions:
        found = f"{whole_BT.shape[1] - 1} tokens, and the model has {num_positions} positions"
        raise DataError("log-likelihoods", found, "Leave out the long ones")
    memory = hiddens_of(model, source)
    whole_BT = whole_BT.to(memory.mask_BS.device)
    inputs_BT, labels_BT = whole_BT[:, :-1], whole_BT[:, 1:]
    state = DecodingState(model, memory.values_BSD, memory.mask_BS, keep_cache=False)
    logits_BTV = state.advance(inputs_BT).float()
    log_BTV = TokenRules(tokenizer, logits_BTV.device).apply(logits_BTV).log_softmax(-1)
    log_BT = log_BTV.gather(2, labels_BT[..., None]).squeeze(2)
    return log_BT.masked_fill(labels_BT == tokenizer.pad_id, 0.0).sum(1).tolist()
