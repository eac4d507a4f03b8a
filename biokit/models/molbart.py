"""MolBART: a pre-LN encoder-decoder on SMILES (Irwin et al. 2022, Mach. Learn.: Sci. Technol. 3 015022).

Shapes: B batch, S source length, T target length, D hidden, V vocabulary.

The model is a list of layers, each `forward(carry) -> carry` with floats first, then ids:
    embed     (src, tgt)             -> (x, y, src, tgt)
    encoder.i (x, y, src, tgt)       -> (x, y, src, tgt)       the last one norms x into the memory
    decoder.i (memory, y, src, tgt)  -> (memory, y, src, tgt)  the last one drops the memory
    head      (y, src, tgt)          -> logits
Masks are made from the ids in each layer, so that a pipeline can cut anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from biokit.config import ModelConfig
from biokit.models.layers import (
    CrossAttention,
    Dropout,
    FeedForward,
    KeyValueCache,
    LayerNorm,
    SelfAttention,
    TokenEmbedding,
    initialize_xavier,
)
from biokit.models.spec import Layers, ModelSpec

PAD_ID = 0

PRESETS: dict[str, dict[str, int]] = {
    name: {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "ffn_hidden_size": 4 * hidden}
    for name, layers, hidden, heads in (
        ("mini", 3, 128, 4),
        ("xsmall", 2, 256, 4),
        ("megatron", 4, 256, 8),
        ("small", 6, 512, 8),
        ("base", 3, 768, 12),
        ("large", 8, 1024, 16),
    )
}

TENSOR_PARALLEL_PLAN = {
    "embed.embedding.tokens": "vocab",
    "encoder.*.attention.qkv": "column",
    "encoder.*.attention.core": "local",
    "encoder.*.attention.out": "row",
    "encoder.*.ffn.up": "column",
    "encoder.*.ffn.inner_dropout": "local",
    "encoder.*.ffn.down": "row",
    "decoder.*.self_attention.qkv": "column",
    "decoder.*.self_attention.core": "local",
    "decoder.*.self_attention.out": "row",
    "decoder.*.cross_attention.q": "column",
    "decoder.*.cross_attention.kv": "column",
    "decoder.*.cross_attention.core": "local",
    "decoder.*.cross_attention.out": "row",
    "decoder.*.ffn.up": "column",
    "decoder.*.ffn.inner_dropout": "local",
    "decoder.*.ffn.down": "row",
    "head.tokens": "vocab",
}


class Embed(nn.Module):
    """Both inputs through one table."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        self.embedding = TokenEmbedding(
            sizes["vocab_size"], sizes["hidden_size"], sizes["max_positions"], sizes["dropout"]
        )

    def forward(self, carry: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        src_BS, tgt_BT = carry
        return self.embedding(src_BS), self.embedding(tgt_BT), src_BS, tgt_BT


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, normed before, added after."""

    def __init__(self, sizes: dict[str, Any], last: bool) -> None:
        super().__init__()
        hidden, dropout = sizes["hidden_size"], sizes["dropout"]
        self.attention_norm = LayerNorm(hidden)
        self.attention = SelfAttention(hidden, sizes["num_attention_heads"], dropout)
        self.ffn_norm = LayerNorm(hidden)
        self.ffn = FeedForward(hidden, sizes["ffn_hidden_size"], dropout)
        self.dropout = Dropout(dropout)
        self.final_norm = LayerNorm(hidden) if last else nn.Identity()

    def forward(self, carry: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x_BSD, y_BTD, src_BS, tgt_BT = carry
        return self.encode(x_BSD, src_BS != PAD_ID), y_BTD, src_BS, tgt_BT

    def encode(self, x_BSD: torch.Tensor, mask_BS: torch.Tensor) -> torch.Tensor:
        x_BSD = x_BSD + self.dropout(self.attention(self.attention_norm(x_BSD), mask_BS))
        x_BSD = x_BSD + self.dropout(self.ffn(self.ffn_norm(x_BSD)))
        return self.final_norm(x_BSD)


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the memory, feed-forward."""

    def __init__(self, sizes: dict[str, Any], last: bool) -> None:
        super().__init__()
        hidden, heads, dropout = sizes["hidden_size"], sizes["num_attention_heads"], sizes["dropout"]
        self.self_attention_norm = LayerNorm(hidden)
        self.self_attention = SelfAttention(hidden, heads, dropout)
        self.cross_attention_norm = LayerNorm(hidden)
        self.cross_attention = CrossAttention(hidden, heads, dropout)
        self.ffn_norm = LayerNorm(hidden)
        self.ffn = FeedForward(hidden, sizes["ffn_hidden_size"], dropout)
        self.dropout = Dropout(dropout)
        self.last = last

    def forward(self, carry: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        memory_BSD, y_BTD, src_BS, tgt_BT = carry
        key_value = self.cross_attention.project_memory(memory_BSD)
        y_BTD = self.decode(y_BTD, key_value, src_BS != PAD_ID)
        return (y_BTD, src_BS, tgt_BT) if self.last else (memory_BSD, y_BTD, src_BS, tgt_BT)

    def decode(
        self,
        y_BTD: torch.Tensor,
        memory_key_value: tuple[torch.Tensor, torch.Tensor],
        memory_mask_BS: torch.Tensor,
        cache: KeyValueCache | None = None,
        num_targets: int = 1,
    ) -> torch.Tensor:
        """One layer over whole targets, or (with a cache) over the next token only.

        Padding stands at the end of a target, so the causal mask alone keeps it from every real token. The targets of
        a memory stand next to one another (beams); to the memory they are queries side by side.
        """
        normed = self.self_attention_norm(y_BTD)
        y_BTD = y_BTD + self.dropout(self.self_attention(normed, None, causal=cache is None, cache=cache))
        normed = self.cross_attention_norm(y_BTD)
        if num_targets > 1:
            normed = normed.unflatten(0, (-1, num_targets)).flatten(1, 2)
        attended = self.cross_attention(normed, memory_key_value, memory_mask_BS)
        y_BTD = y_BTD + self.dropout(attended.reshape(y_BTD.shape) if num_targets > 1 else attended)
        return y_BTD + self.dropout(self.ffn(self.ffn_norm(y_BTD)))


class Head(nn.Module):
    """Final norm of the decoder and the untied projection to token logits."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        self.norm = LayerNorm(sizes["hidden_size"])
        self.tokens = nn.Linear(sizes["hidden_size"], sizes["vocab_size"])

    def forward(self, carry: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self.tokens(self.norm(carry[0]))


class MolBART(nn.Module):
    """The whole model on one device: a fold over its layers, and the two halves that generation needs."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        built = {name: build() for name, build in layers}
        self.embed = cast(Embed, built["embed"])
        self.encoder = nn.ModuleList(module for name, module in built.items() if name.startswith("encoder."))
        self.decoder = nn.ModuleList(module for name, module in built.items() if name.startswith("decoder."))
        self.head = cast(Head, built["head"])

    def layers(self) -> list[nn.Module]:
        """The layers in order; folding them over `(src, tgt)` is the forward pass."""
        return [self.embed, *self.encoder, *self.decoder, self.head]

    def forward(self, src_BS: torch.Tensor, tgt_BT: torch.Tensor) -> torch.Tensor:
        """Logits (B,T,V) of the next token after each token of `tgt_BT`."""
        carry: Any = (src_BS, tgt_BT)
        for layer in self.layers():
            carry = layer(carry)
        return carry

    def encode(self, src_BS: torch.Tensor) -> torch.Tensor:
        """The memory (B,S,D) of encoder inputs (begin ... end, padded with 0)."""
        x_BSD = self.embed.embedding(src_BS)
        for layer in self.encoder:
            x_BSD = cast(EncoderLayer, layer).encode(x_BSD, src_BS != PAD_ID)
        return x_BSD

    def decode(self, tgt_BT: torch.Tensor, memory_BSD: torch.Tensor, src_BS: torch.Tensor) -> torch.Tensor:
        """Logits (B,T,V) for whole targets, given a memory and the ids it came from."""
        return DecodingState(self, memory_BSD, src_BS != PAD_ID, keep_cache=False).advance(tgt_BT)


class DecodingState:
    """Decoding with keys and values kept: the memory's are computed once, the target's grow a token at a time.

    Args:
        memory_mask_BS: where the memory has tokens.
        num_targets: targets a memory, next to one another (beams); they share its keys and values.
        max_length: tokens a target at most; 0: as many as the model has positions.
    """

    def __init__(
        self,
        model: MolBART,
        memory_BSD: torch.Tensor,
        memory_mask_BS: torch.Tensor,
        keep_cache: bool = True,
        num_targets: int = 1,
        max_length: int = 0,
    ) -> None:
        self.model = model
        self.memory_mask_BS = memory_mask_BS
        self.num_targets = num_targets
        self.layers = [cast(DecoderLayer, layer) for layer in model.decoder]
        self.memory_key_values = [layer.cross_attention.project_memory(memory_BSD) for layer in self.layers]
        capacity = max_length or model.embed.embedding.num_positions
        self.caches = [KeyValueCache(capacity) if keep_cache else None for _ in self.layers]
        self.num_decoded = 0

    def advance(self, tgt_BT: torch.Tensor) -> torch.Tensor:
        """Feed the next tokens (one, where a cache is kept); returns their logits (B,T,V)."""
        y_BTD = self.model.embed.embedding(tgt_BT, self.num_decoded)
        for layer, key_value, cache in zip(self.layers, self.memory_key_values, self.caches, strict=True):
            y_BTD = layer.decode(y_BTD, key_value, self.memory_mask_BS, cache, self.num_targets)
        self.num_decoded += tgt_BT.shape[1]
        return self.model.head((y_BTD,))

    def select(self, rows: torch.Tensor) -> None:
        """Keep these memories and their targets, in this order (finished ones leave)."""
        self.select_memories(rows)
        self.select_targets(self.targets_of(rows))

    def targets_of(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of the targets of these memories."""
        return (rows[:, None] * self.num_targets + torch.arange(self.num_targets, device=rows.device)).flatten()

    def select_memories(self, rows: torch.Tensor) -> None:
        """Keep these memories, in this order; `select_targets` must follow with the targets of these."""
        self.memory_mask_BS = self.memory_mask_BS[rows]
        self.memory_key_values = [(k[rows], v[rows]) for k, v in self.memory_key_values]

    def select_targets(self, rows: torch.Tensor) -> None:
        """Go on from these targets, in this order, as many a memory as before (beams are re-ordered)."""
        for cache in self.caches:
            if cache is not None:
                cache.select(rows)


def molbart_layers(config: ModelConfig, vocab_size: int, max_positions: int, seed: int = 0) -> Layers:
    """(name, builder) of every layer; a builder initialises from (seed, position) alone, on whichever rank it runs."""
    sizes: dict[str, Any] = MOLBART.resolve(config)
    sizes |= {"vocab_size": vocab_size, "max_positions": max_positions, "dropout": config.dropout}
    last = sizes["num_layers"] - 1
    makers: Layers = [("embed", partial(Embed, sizes))]
    makers += [(f"encoder.{i}", partial(EncoderLayer, sizes, i == last)) for i in range(last + 1)]
    makers += [(f"decoder.{i}", partial(DecoderLayer, sizes, i == last)) for i in range(last + 1)]
    makers.append(("head", partial(Head, sizes)))
    return [(name, partial(_build_layer, make, seed, i)) for i, (name, make) in enumerate(makers)]


def build_molbart(config: ModelConfig, vocab_size: int, max_positions: int, seed: int = 0) -> MolBART:
    """The whole model, initialised; the global random state is left as it was."""
    model = MolBART(molbart_layers(config, vocab_size, max_positions, seed))
    if config.tie_word_embeddings:
        model.head.tokens.weight = model.embed.embedding.tokens.weight
    return model


def _build_layer(make: Callable[[], nn.Module], seed: int, position: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed((seed * 1_000_003 + position) % 2**63)  # not those of CUDA devices
        layer = make()
        initialize_xavier(layer)
    return layer


MOLBART = ModelSpec(
    name="molbart",
    build=build_molbart,
    layers=molbart_layers,
    tensor_parallel_plan=TENSOR_PARALLEL_PLAN,
    batch_keys=("encoder_ids", "decoder_ids", "labels"),
    tokenizer="smiles",
    presets=PRESETS,
    num_parameters={
        "mini": 1_523_467,
        "xsmall": 3_955_723,
        "megatron": 7_642_123,
        "small": 44_676_619,
        "base": 50_425_867,
        "large": 236_218_891,
    },
    tied={"head.tokens.weight": "embed.embedding.tokens.weight"},
)
