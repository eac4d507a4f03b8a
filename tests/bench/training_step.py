"""A training step of MolBART against HF BART (eager and sdpa) of the same size: real tokens per CPU-second."""

from __future__ import annotations

from collections.abc import Callable

import torch

from biokit.config import ModelConfig, TrainConfig
from biokit.models.molbart import MOLBART
from biokit.parallel.single import Single
from tests.bench.timing import Row, compare

BATCH, LENGTH, VOCAB, STEPS = 32, 40, 523, 3
TARGET = 1.0
SIZES = {"num_layers": 3, "hidden_size": 256, "num_attention_heads": 8, "ffn_hidden_size": 1024}


def make_batch() -> dict[str, torch.Tensor]:
    """Random ids, lengths 32 to 40 as a length bucket has them, padded with 0."""
    generator = torch.Generator().manual_seed(0)
    batch = {
        key: torch.randint(272, VOCAB, (BATCH, LENGTH), generator=generator)
        for key in ("encoder_ids", "decoder_ids", "labels")
    }
    for row in range(BATCH):
        length = LENGTH - row % 9
        for ids in batch.values():
            ids[row, length:] = 0
    return batch


def ours(batch: dict[str, torch.Tensor], precision: str) -> Callable[[], int]:
    """Steps of the strategy `Single`, dropout 0.1."""
    model = MOLBART.build(ModelConfig(**SIZES, dropout=0.1), VOCAB, 512, 1)
    strategy = Single(model, TrainConfig(precision=precision, clip_grad=1.0), 0, torch.device("cpu"))
    num_tokens = int((batch["encoder_ids"] != 0).sum() + (batch["decoder_ids"] != 0).sum())
    num_valid = int((batch["labels"] != 0).sum())

    def work() -> int:
        for step in range(STEPS):
            strategy.backward(batch, 1 / num_valid, step)
            strategy.step(1e-4)
        return STEPS * num_tokens

    return work


def hugging_face(batch: dict[str, torch.Tensor], precision: str, attention: str) -> Callable[[], int]:
    """HF BART with the same layers, heads, sizes, dropouts, clipping and AdamW (fused)."""
    from transformers import BartConfig, BartForConditionalGeneration

    size, heads, layers = SIZES["hidden_size"], SIZES["num_attention_heads"], SIZES["num_layers"]
    config = BartConfig(
        vocab_size=VOCAB, d_model=size, max_position_embeddings=512, pad_token_id=0, bos_token_id=2, eos_token_id=3,
        decoder_start_token_id=2, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=heads,
        decoder_attention_heads=heads, encoder_ffn_dim=4 * size, decoder_ffn_dim=4 * size, dropout=0.1,
        attention_dropout=0.1, activation_dropout=0.1, tie_word_embeddings=False, attn_implementation=attention,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    mask = batch["encoder_ids"] != 0
    labels = batch["labels"].masked_fill(batch["labels"] == 0, -100)
    num_tokens = int(mask.sum() + (batch["decoder_ids"] != 0).sum())

    def work() -> int:
        for _ in range(STEPS):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = model(
                    input_ids=batch["encoder_ids"], attention_mask=mask.long(), decoder_input_ids=batch["decoder_ids"],
                    labels=labels, use_cache=False,
                ).loss  # fmt: skip
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return STEPS * num_tokens

    return work


def measure(precision: str, rounds: int = 5) -> list[Row]:
    """Ours against both HF forms in one interleaved run; ours is to be as fast as the better of them."""
    batch = make_batch()
    peers = {f"HF BART {attention}": hugging_face(batch, precision, attention) for attention in ("eager", "sdpa")}
    rates = compare({f"training step, {precision}": ours(batch, precision)} | peers, "tokens", rounds)
    return rates.rows(dict.fromkeys(peers, TARGET))


def measure_all() -> list[Row]:
    return [row for precision in ("fp32", "bf16") for row in measure(precision)]
