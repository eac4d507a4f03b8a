"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1) through one function.

Shapes: B batch, H heads, T queries, S keys, K head size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from biokit.kernels.dispatch import reference_forced
from biokit.kernels.dropout import dropout


def attention_weights(
    q_BHTK: torch.Tensor,
    k_BHSK: torch.Tensor,
    key_mask_BS: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(K)) as (B,H,T,S), in fp32: how much each query takes from each key; 0 where it may not.

    Arguments as in `attention_reference`.
    """
    scores_BHTS = torch.matmul(q_BHTK * (1.0 / math.sqrt(q_BHTK.shape[-1])), k_BHSK.transpose(-2, -1))
    if causal:
        num_queries, num_keys = scores_BHTS.shape[-2:]
        future_TS = torch.ones(num_queries, num_keys, dtype=torch.bool, device=scores_BHTS.device)
        scores_BHTS = scores_BHTS.masked_fill(future_TS.triu_(num_keys - num_queries + 1), float("-inf"))
    if key_mask_BS is not None:
        scores_BHTS = scores_BHTS.masked_fill(~key_mask_BS[:, None, None, :], float("-inf"))
    return scores_BHTS.softmax(dim=-1, dtype=torch.float32)


def attention_reference(
    q_BHTK: torch.Tensor,
    k_BHSK: torch.Tensor,
    v_BHSK: torch.Tensor,
    key_mask_BS: torch.Tensor | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(K)) v, written out; often the faster form on the CPU (see `implementation`).

    Args:
        key_mask_BS: True where a key may be attended to; None: everywhere.
        causal: query t sees the keys up to t + S - T.
        dropout_p: probability of dropping an attention weight.
    """
    weights_BHTS = attention_weights(q_BHTK, k_BHSK, key_mask_BS, causal).to(v_BHSK.dtype)
    return torch.matmul(dropout(weights_BHTS, dropout_p), v_BHSK)


def attention_sdpa(
    q_BHTK: torch.Tensor,
    k_BHSK: torch.Tensor,
    v_BHSK: torch.Tensor,
    key_mask_BS: torch.Tensor | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """torch's fused attention; arguments as in `attention_reference` (causal needs T = S and no key mask)."""
    mask = None if key_mask_BS is None else key_mask_BS[:, None, None, :]
    return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, mask, dropout_p, is_causal=causal)


def implementation(device: torch.device | str, dtype: torch.dtype, dropout_p: float = 0.0) -> str:
    """Name of the implementation that runs: `reference` (plain matmul and softmax) or `sdpa`.

    On the CPU the plain form is faster in bf16, and wherever dropout keeps torch from its fused form.
    """
    plain_is_faster = torch.device(device).type == "cpu" and (dtype == torch.bfloat16 or dropout_p > 0)
    return "reference" if reference_forced() or plain_is_faster else "sdpa"


def attention(
    q_BHTK: torch.Tensor,
    k_BHSK: torch.Tensor,
    v_BHSK: torch.Tensor,
    key_mask_BS: torch.Tensor | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Attention by the faster implementation for the device and dtype; arguments as in `attention_reference`."""
    chosen = _IMPLEMENTATIONS[implementation(q_BHTK.device, q_BHTK.dtype, dropout_p)]
    return chosen(q_BHTK, k_BHSK, v_BHSK, key_mask_BS, causal, dropout_p)


_IMPLEMENTATIONS = {"reference": attention_reference, "sdpa": attention_sdpa}
