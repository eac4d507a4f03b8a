"""Layers shared by the models, written for one device.

Shapes: B batch, T queries (target length), S keys (source length), D hidden, H heads, K head size, V vocabulary.
No size that tensor parallelism divides is read from a configuration: attention keeps the head size, and the number
of heads is what arrives.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from biokit.kernels.attention import attention
from biokit.kernels.dropout import dropout
from biokit.kernels.layer_norm import layer_norm


class LayerNorm(nn.Module):
    """Layer norm over the last dimension."""

    def __init__(self, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        self.eps = eps

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return layer_norm(x_BTD, self.weight, self.bias, self.eps)


class Dropout(nn.Module):
    """Dropout in training, nothing else."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dropout(x, self.p) if self.training else x


class AttentionCore(nn.Module):
    """Attention of heads without weights of its own; its dropout takes a stream of its own a tensor rank."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(
        self,
        q_BHTK: torch.Tensor,
        k_BHSK: torch.Tensor,
        v_BHSK: torch.Tensor,
        key_mask_BS: torch.Tensor | None,
        causal: bool,
    ) -> torch.Tensor:
        dropout_p = self.dropout if self.training else 0.0
        y_BHTK = attention(q_BHTK, k_BHSK, v_BHSK, key_mask_BS, causal, dropout_p)
        return y_BHTK.transpose(1, 2).flatten(2)


class KeyValueCache:
    """Keys and values of the tokens decoded so far, one layer; for inference, it keeps no gradients.

    They lie as (B,S,H,K) in buffers of `capacity` tokens: a token is written in its place, and other rows are copied
    into a second buffer, so that no step asks for new memory.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_tokens = 0
        self._key_value: list[torch.Tensor] = []
        self._spare: list[torch.Tensor] = []

    def append(self, k_BHSK: torch.Tensor, v_BHSK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add those of the next tokens; returns all so far, (B,H,S,K)."""
        start, end = self.num_tokens, self.num_tokens + k_BHSK.shape[2]
        if not self._key_value:
            num_rows, num_heads, _, head_size = k_BHSK.shape
            sizes = (num_rows, self.capacity, num_heads, head_size)
            self._key_value = [new.new_empty(sizes) for new in (k_BHSK, v_BHSK)]
        for kept, new in zip(self._key_value, (k_BHSK, v_BHSK), strict=True):
            kept[:, start:end] = new.detach().transpose(1, 2)
        self.num_tokens = end
        k_BHSK, v_BHSK = (kept[:, :end].transpose(1, 2) for kept in self._key_value)
        return k_BHSK, v_BHSK

    def select(self, rows: torch.Tensor) -> None:
        """Keep these batch rows, in this order. Raises ValueError for more rows than there are."""
        if not self._key_value:
            return
        if len(rows) > len(self._key_value[0]):
            raise ValueError(f"{len(rows)} rows of a cache that has {len(self._key_value[0])}")
        if not self._spare:
            self._spare = [torch.empty_like(kept) for kept in self._key_value]
        selected = [spare[: len(rows)] for spare in self._spare]
        for kept, into in zip(self._key_value, selected, strict=True):
            torch.index_select(kept[:, : self.num_tokens], 0, rows, out=into[:, : self.num_tokens])
        self._key_value, self._spare = selected, self._key_value


class SelfAttention(nn.Module):
    """Multi-head self-attention; rows of the fused QKV weight are ordered (head, q|k|v, head size)."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.head_size = hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.core = AttentionCore(dropout)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(
        self,
        x_BTD: torch.Tensor,
        key_mask_BS: torch.Tensor | None = None,
        causal: bool = False,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        qkv = self.qkv(x_BTD).unflatten(-1, (-1, 3, self.head_size)).transpose(1, 2)  # B,H,T,3,K
        q_BHTK, k_BHSK, v_BHSK = qkv.unbind(3)
        if cache is not None:
            k_BHSK, v_BHSK = cache.append(k_BHSK, v_BHSK)
        return self.out(self.core(q_BHTK, k_BHSK, v_BHSK, key_mask_BS, causal))


class CrossAttention(nn.Module):
    """Attention from the target to the encoder's memory; rows of the fused KV weight: (head, k|v, head size)."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.head_size = hidden_size // num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.core = AttentionCore(dropout)
        self.out = nn.Linear(hidden_size, hidden_size)

    def project_memory(self, memory_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B,H,S,K) of the memory; generation computes them once."""
        kv = self.kv(memory_BSD).unflatten(-1, (-1, 2, self.head_size)).transpose(1, 2)  # B,H,S,2,K
        k_BHSK, v_BHSK = kv.unbind(3)
        return k_BHSK, v_BHSK

    def forward(
        self,
        y_BTD: torch.Tensor,
        key_value: tuple[torch.Tensor, torch.Tensor],
        memory_mask_BS: torch.Tensor | None,
    ) -> torch.Tensor:
        q_BHTK = self.q(y_BTD).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        return self.out(self.core(q_BHTK, *key_value, memory_mask_BS, False))


class FeedForward(nn.Module):
    """Two linear layers with GELU (exact) between."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, ffn_hidden_size)
        self.inner_dropout = Dropout(dropout)
        self.down = nn.Linear(ffn_hidden_size, hidden_size)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.down(self.inner_dropout(F.gelu(self.up(x_BTD))))


class TokenEmbedding(nn.Module):
    """Token table scaled by sqrt(D), plus sinusoidal positions, plus dropout."""

    def __init__(self, vocab_size: int, hidden_size: int, max_positions: int, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, hidden_size)
        self.dropout = Dropout(dropout)
        self.scale = math.sqrt(hidden_size)
        self.num_positions = max_positions
        self.register_buffer("positions_TD", sinusoidal_positions(max_positions, hidden_size), persistent=False)

    def forward(self, ids_BT: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Embed ids whose first column stands at position `start`; returns (B,T,D).

        Raises:
            ValueError: the sequence is longer than the model's positions.
        """
        end = start + ids_BT.shape[1]
        positions_TD: torch.Tensor = self.positions_TD  # type: ignore[assignment]
        if end > self.num_positions:
            raise ValueError(f"a sequence of {end} tokens exceeds the model's {self.num_positions} positions")
        x_BTD = self.tokens(ids_BT) * self.scale
        return self.dropout(x_BTD + positions_TD[start:end].to(x_BTD.dtype))


def sinusoidal_positions(max_positions: int, hidden_size: int) -> torch.Tensor:
    """Fixed positions (T,D), sin and cos interleaved, divisor 10000^(dim/D) (Vaswani et al. 2017, section 3.5)."""
    dims = torch.arange(0, hidden_size, 2, dtype=torch.float64)
    angles = torch.arange(max_positions, dtype=torch.float64)[:, None] / 10000.0 ** (dims / hidden_size)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :hidden_size].float()


def initialize_xavier(module: nn.Module) -> None:
    """Xavier-uniform for every parameter of two or more dimensions; biases zero (norms keep one and zero)."""
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 2:
            nn.init.xavier_uniform_(parameter)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
