"""Where a MolBART looks, and which atoms a score rests on.

Shapes: B batch, L layers, H heads, S source length, T target length, D hidden; A atoms.
Attention weights are those of the model's own queries and keys. They say where a layer reads, not why (Jain and Wallace
2019, "Attention is not explanation"); contributions by occlusion ask the model itself (Zeiler and Fergus 2014, section
4.2).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch

from biokit.chem.tokens import atom_positions
from biokit.errors import DataError
from biokit.generate.inputs import Hiddens, check_ranges, encode_smiles, hiddens_of
from biokit.kernels.attention import attention_weights
from biokit.models.layers import AttentionCore
from biokit.models.molbart import DecoderLayer, EncoderLayer, MolBART

if TYPE_CHECKING:
    from biokit.tokenizers import SmilesTokenizer

Floats = npt.NDArray[np.float32]
Score = Callable[[Hiddens], torch.Tensor | npt.NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Attention:
    """The attention weights of one molecule; each row sums to 1.

    Attributes:
        tokens: the encoder's S tokens, begin and end included.
        target_tokens: the decoder's T tokens, begin included; at each the model predicts the next one.
        encoder_LHSS: self-attention, [layer, head, token that looks, token that is looked at].
        cross_LHTS: [layer, head, target token that looks, token that is looked at].
    """

    tokens: tuple[str, ...]
    target_tokens: tuple[str, ...]
    encoder_LHSS: Floats
    cross_LHTS: Floats


def attention_of(model: MolBART, tokenizer: SmilesTokenizer, smiles: str, target: str = "") -> Attention:
    """The attention of the encoder in `smiles`, and of the decoder to it while it reads `target` (empty: `smiles`).

    The model is left in evaluation mode.

    Raises:
        DataError: a SMILES that is empty, has unknown tokens, or is longer than the model's positions.
    """
    source_ids, target_ids = (encode_smiles(tokenizer, [text]) for text in (smiles, target or smiles))
    target_ids = target_ids[:, :-1]  # the end is only predicted
    encoder, cross = attention_of_batch(model, source_ids, target_ids)
    source_tokens, target_tokens = (
        tuple(tokenizer.vocabulary[int(index)] for index in ids[0]) for ids in (source_ids, target_ids)
    )
    return Attention(source_tokens, target_tokens, encoder[0].cpu().numpy(), cross[0].cpu().numpy())


@torch.inference_mode()
def attention_of_batch(model: MolBART, src_BS: torch.Tensor, tgt_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Self-attention (B,L,H,S,S) of the encoder and attention (B,L,H,T,S) of the decoder to it, in fp32.

    Padding is never looked at (0); what padding looks at means nothing.

    Args:
        src_BS, tgt_BT: encoder and decoder inputs, padded.

    Raises:
        DataError: an input longer than the model's positions.
    """
    model.eval()
    num_positions = model.embed.embedding.num_positions
    if (longest := max(src_BS.shape[1], tgt_BT.shape[1])) > num_positions:
        found = f"{longest} tokens, begin and end included, and the model has {num_positions} positions"
        raise DataError("attention of a molecule", found, "Take a shorter one")
    device = next(model.parameters()).device
    encoder_cores = [cast(EncoderLayer, layer).attention.core for layer in model.encoder]
    cross_cores = [cast(DecoderLayer, layer).cross_attention.core for layer in model.decoder]
    with _weights_kept(encoder_cores) as encoder, _weights_kept(cross_cores) as cross:
        model(src_BS.to(device), tgt_BT.to(device))
    return torch.stack(encoder, 1), torch.stack(cross, 1)


@contextlib.contextmanager
def _weights_kept(cores: list[AttentionCore]) -> Iterator[list[torch.Tensor]]:
    """Computes the weights (B,H,T,S) from what arrives at each core, where the fused kernels keep none."""
    kept: list[torch.Tensor] = []

    def keep(_: Any, arguments: tuple[Any, ...]) -> None:
        q_BHTK, k_BHSK, _, key_mask_BS, causal = arguments
        kept.append(attention_weights(q_BHTK, k_BHSK, key_mask_BS, causal))

    hooks = [core.register_forward_pre_hook(keep) for core in cores]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def contributions(
    model: MolBART, tokenizer: SmilesTokenizer, smiles: str, score: Score, *, batch_size: int = 64
) -> npt.NDArray[np.float64]:
    """What each atom gives to a score: (A,), the score of the molecule less its score with that atom masked.

    Above 0: the score is higher because of this atom. The contributions need not add up to the score. Atoms stand in
    the order of the SMILES; the model is left in evaluation mode.

    Args:
        score: takes the hiddens of several molecules and returns one number each (B,), the same for a molecule whatever
            stands beside it: a head, a likelihood, a distance.
        batch_size: masked molecules at once.

    Raises:
        ConfigError: `batch_size` below 1.
        DataError: a SMILES that cannot be encoded, or a score that returns something else, NaN or infinity.
    """
    check_ranges({"batch_size": (batch_size, batch_size >= 1)}, "1 or more")
    ids_1S = encode_smiles(tokenizer, [smiles])
    atoms = atom_positions([tokenizer.vocabulary[int(index)] for index in ids_1S[0, 1:-1]])
    ids_BS = ids_1S.repeat(len(atoms) + 1, 1)
    for row, position in enumerate(atoms, start=1):
        ids_BS[row, position + 1] = tokenizer.mask_id
    values_B = np.concatenate([_scores(score, hiddens_of(model, part)) for part in ids_BS.split(batch_size)])
    return values_B[0] - values_B[1:]


@torch.inference_mode()
def _scores(score: Score, hiddens: Hiddens) -> npt.NDArray[np.float64]:
    found = score(hiddens)
    values = found.double().cpu().numpy() if isinstance(found, torch.Tensor) else np.asarray(found, dtype=np.float64)
    if values.shape != (len(hiddens),):
        shape = f"it returned the shape {values.shape} for {len(hiddens)} molecules"
        raise DataError("contributions: the score", shape, f"Return one number a molecule, ({len(hiddens)},)")
    if not np.isfinite(values).all():
        raise DataError("contributions: the score", "it returned NaN or infinity", "Return finite numbers")
    return values
