"""Greedy decoding and top-k / top-p sampling with keys and values kept.

Shapes: B batch, S source length, T target length, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import count
from typing import TYPE_CHECKING

import torch

from biokit.errors import ConfigError, DataError
from biokit.generate.inputs import Hiddens, check_ranges, hiddens_of
from biokit.generate.rules import TokenRules
from biokit.models.molbart import DecodingState, MolBART

if TYPE_CHECKING:
    from biokit.data.molecules import MoleculeLoader
    from biokit.tokenizers import SmilesTokenizer

SAMPLING_ALGS = ("greedy", "sample")


@torch.inference_mode()
def sample_molecules(
    model: MolBART,
    tokenizer: SmilesTokenizer,
    source: torch.Tensor | Hiddens,
    sampling_alg: str = "greedy",
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    temperature: float = 1.0,
    banned: Collection[str] = (),
    grammar: bool = False,
    max_length: int = 0,
    seed: int = 1234,
) -> tuple[list[str], list[float]]:
    """Decode one molecule a row of encoder inputs or hiddens.

    Unused, property and special tokens are never emitted (end excepted). A row that reaches `max_length` tokens
    without an end is returned as it stands. The model is left in evaluation mode.

    Args:
        source: encoder inputs (B,S) (begin ... end, padded with 0), masked or not; or hiddens.
        sampling_alg: `greedy`, or `sample` under the filters below.
        top_k: keep the k likeliest tokens; 0: all.
        top_p: keep the likeliest tokens up to this probability mass, in (0, 1].
        temperature: divides the logits, > 0.
        banned: tokens that must not come, beside special, property and unused ones.
        grammar: only what SMILES can go on with (`TokenRules`).
        max_length: tokens a molecule, end included; 0: as many as the model has positions.

    Returns:
        SMILES, and the log-likelihood (nats) of each at temperature 1, before top-k and top-p, over the tokens that
        may be emitted.

    Raises:
        ConfigError: a value outside its range. DataError: an input longer than the model's positions.
    """
    num_positions = model.embed.embedding.num_positions
    max_length = max_length or num_positions
    if sampling_alg not in SAMPLING_ALGS:
        raise ConfigError(f"sampling_alg={sampling_alg}", "it is not known", f"Valid: {', '.join(SAMPLING_ALGS)}")
    check_ranges(
        {
            "top_k": (top_k, top_k >= 0),
            "top_p": (top_p, 0 < top_p <= 1),
            "temperature": (temperature, 0 < temperature < math.inf),
            "max_length": (max_length, 1 <= max_length <= num_positions),
        },
        f"top_k >= 0, 0 < top_p <= 1, temperature > 0, 0 < max_length <= {num_positions}",
    )
    memory = hiddens_of(model, source)
    device = memory.mask_BS.device
    generator = torch.Generator(device).manual_seed(seed)
    state = DecodingState(model, memory.values_BSD, memory.mask_BS, max_length=max_length)
    rules = TokenRules(tokenizer, device, banned, grammar, max_length)
    rules.begin(len(memory))
    tokens_BT = torch.full((len(memory), max_length), tokenizer.pad_id, dtype=torch.long, device=device)
    scores_B = torch.zeros(len(memory), device=device)
    rows_B = torch.arange(len(memory), device=device)  # rows still being decoded
    next_B1 = torch.full((len(memory), 1), tokenizer.begin_id, dtype=torch.long, device=device)
    for position in range(max_length):
        logits_BV = rules.apply(state.advance(next_B1)[:, -1].float())
        if sampling_alg == "greedy":
            chosen_B = logits_BV.argmax(-1)
        else:
            likeliest_B1 = logits_BV.max(-1, keepdim=True).values  # 0 then, whatever the temperature
            filtered_BV = filter_logits((logits_BV - likeliest_B1) / temperature, top_k, top_p)
            chosen_B = torch.multinomial(filtered_BV.softmax(-1), 1, generator=generator).squeeze(1)
        scores_B[rows_B] += logits_BV.log_softmax(-1).gather(1, chosen_B[:, None]).squeeze(1)
        tokens_BT[rows_B, position] = chosen_B
        rules.advance(chosen_B)
        going_B = (chosen_B != tokenizer.end_id).nonzero().squeeze(1)
        if not len(going_B):
            break
        if len(going_B) < len(rows_B):
            rows_B, chosen_B = rows_B[going_B], chosen_B[going_B]
            state.select(going_B)
            rules.select(going_B)
        next_B1 = chosen_B[:, None]
    return tokenizer.decode_batch(tokens_BT.cpu().numpy()), scores_B.tolist()


def sample_like(
    model: MolBART,
    tokenizer: SmilesTokenizer,
    loader: MoleculeLoader,
    num_samples: int,
    *,
    sampling_alg: str = "sample",
    top_k: int = 0,
    top_p: float = 1.0,
    temperature: float = 1.0,
    seed: int = 1234,
) -> list[str]:
    """New SMILES around the loader's molecules: each is masked as in training, and the decoder fills it in.

    Molecules are taken in the order of the loader's epochs, again with other masks where there are too few.

    Raises:
        DataError: the loader's part holds no molecule.
        ConfigError: num_samples below 1, or a value outside its range.
    """
    if num_samples < 1:
        raise ConfigError(f"num_samples={num_samples}", "it is out of range", "Give 1 or more")
    if not len(loader):
        raise DataError(f"sample like {loader.store.prefix}", "it holds no molecule", "Check the split")
    samples: list[str] = []
    for epoch in count():
        for batch in loader.epoch(epoch):
            src_BS = torch.from_numpy(batch["encoder_ids"][: num_samples - len(samples)])
            samples += sample_molecules(
                model, tokenizer, src_BS, sampling_alg, top_k=top_k, top_p=top_p, temperature=temperature,
                max_length=loader.data.max_length, seed=(seed + len(samples)) % 2**63,
            )[0]  # fmt: skip
            if len(samples) >= num_samples:
                return samples
    raise AssertionError("epochs do not end")


def filter_logits(logits_BV: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Set to -inf what top-k and nucleus sampling (Holtzman et al. 2020) leave out; the likeliest token stays."""
    if top_k:
        kth_B1 = logits_BV.topk(min(top_k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, float("-inf"))
    if top_p < 1.0:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        probabilities_BV = sorted_BV.softmax(-1)
        mass_before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
        drop_BV = (mass_before_BV >= top_p).scatter(1, order_BV, mass_before_BV >= top_p)
        logits_BV = logits_BV.masked_fill(drop_BV, float("-inf"))
    return logits_BV
