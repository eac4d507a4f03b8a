"""Beam search with 10 beams against HF's `generate` with its cache, and against a decoder without one.

All write molecules of the same number of tokens (the end is put out of reach): tokens of all beams per CPU-second.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from biokit.config import ModelConfig
from biokit.generate import Hiddens, beam_search, encode_smiles, hiddens_of
from biokit.models.molbart import MOLBART, MolBART
from biokit.tokenizers import SmilesTokenizer
from tests.bench.corpora import load_smiles
from tests.bench.timing import Row, compare

NUM_BEAMS, NUM_MOLECULES, LENGTH = 10, 8, 40
HF_TARGET, UNCACHED_TARGET = 1.15, 10.0
SIZES = {"num_layers": 3, "hidden_size": 256, "num_attention_heads": 8, "ffn_hidden_size": 1024}
OUT_OF_REACH = -1e4


def ours(model: MolBART, tokenizer: SmilesTokenizer, src_BS: torch.Tensor) -> Callable[[], int]:
    def work() -> int:
        found = beam_search(model, tokenizer, src_BS, NUM_BEAMS, max_length=LENGTH)
        assert all(len(tokenizer.tokens(one.smiles)) == LENGTH for hypotheses in found for one in hypotheses)
        return len(src_BS) * NUM_BEAMS * LENGTH

    return work


def uncached(model: MolBART, tokenizer: SmilesTokenizer, src_BS: torch.Tensor) -> Callable[[], int]:
    """The same search; for each token the whole beginning of each beam is decoded again."""
    banned = torch.as_tensor(tokenizer.non_chemical_ids())

    @torch.inference_mode()
    def work() -> int:
        num_molecules = len(src_BS)
        each = torch.arange(num_molecules).repeat_interleave(NUM_BEAMS)
        memory: Hiddens = hiddens_of(model, src_BS).select(each)
        ids_NT = torch.full((num_molecules * NUM_BEAMS, 1), tokenizer.begin_id)
        scores_BK = torch.zeros(num_molecules, NUM_BEAMS)
        scores_BK[:, 1:] = float("-inf")
        for _ in range(LENGTH):
            logits_NV = model.decode(ids_NT, memory.values_BSD, src_BS[each])[:, -1].float()
            logits_NV[:, banned] = float("-inf")
            totals = scores_BK[..., None] + logits_NV.log_softmax(-1).view(num_molecules, NUM_BEAMS, -1)
            scores_BK, best_BK = totals.flatten(1).topk(NUM_BEAMS)
            rows_N = (best_BK // logits_NV.shape[1] + torch.arange(num_molecules)[:, None] * NUM_BEAMS).flatten()
            ids_NT = torch.cat((ids_NT[rows_N], (best_BK % logits_NV.shape[1]).flatten()[:, None]), dim=1)
        return num_molecules * NUM_BEAMS * LENGTH

    return work


def hugging_face(tokenizer: SmilesTokenizer, src_BS: torch.Tensor, attention: str) -> Callable[[], int]:
    """HF BART of the same sizes, its beam search with the cache, no length penalty."""
    from transformers import BartConfig, BartForConditionalGeneration

    size, heads, layers = SIZES["hidden_size"], SIZES["num_attention_heads"], SIZES["num_layers"]
    config = BartConfig(
        vocab_size=tokenizer.vocab_size, d_model=size, max_position_embeddings=512, pad_token_id=0, bos_token_id=2,
        eos_token_id=3, decoder_start_token_id=2, forced_eos_token_id=None, encoder_layers=layers,
        decoder_layers=layers, encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=4 * size,
        decoder_ffn_dim=4 * size, tie_word_embeddings=False, attn_implementation=attention,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    model.final_logits_bias[0, 3] = OUT_OF_REACH
    mask = (src_BS != 0).long()

    @torch.inference_mode()
    def work() -> int:
        found = model.generate(
            input_ids=src_BS, attention_mask=mask, num_beams=NUM_BEAMS, num_return_sequences=NUM_BEAMS,
            max_new_tokens=LENGTH, length_penalty=0.0, do_sample=False, use_cache=True,
        )  # fmt: skip
        assert found.shape == (len(src_BS) * NUM_BEAMS, LENGTH + 1)
        return len(src_BS) * NUM_BEAMS * LENGTH

    return work


def measure(rounds: int = 5) -> list[Row]:
    tokenizer = SmilesTokenizer.packaged()
    model = MOLBART.build(ModelConfig(**SIZES), tokenizer.vocab_size, 512, 1).eval()
    with torch.no_grad():
        model.head.tokens.bias[tokenizer.end_id] = OUT_OF_REACH
    src_BS = encode_smiles(tokenizer, (load_smiles("WEHI") or ())[:NUM_MOLECULES])
    peers = {f"HF BART generate, {name}": hugging_face(tokenizer, src_BS, name) for name in ("eager", "sdpa")}
    contenders = {f"beam search, {NUM_BEAMS} beams": ours(model, tokenizer, src_BS)} | peers
    contenders["without a cache"] = uncached(model, tokenizer, src_BS)
    rates = compare(contenders, "tokens", rounds)
    return rates.rows(dict.fromkeys(peers, HF_TARGET) | {"without a cache": UNCACHED_TARGET})


def measure_all() -> list[Row]:
    return measure()
