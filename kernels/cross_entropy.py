"""Token cross entropy, summed over the valid tokens: reference is the formula, fast is torch's fused form.

Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from biokit.kernels.dispatch import reference_forced


def cross_entropy_reference(logits_NV: torch.Tensor, labels_N: torch.Tensor, ignore_id: int) -> torch.Tensor:
    """sum over labels != ignore_id of log(sum(exp(logits))) - logits[label], in fp32; a scalar."""
    valid_N = labels_N != ignore_id
    logits = logits_NV.float()[valid_N]
    picked = logits.gather(1, labels_N[valid_N].unsqueeze(1)).squeeze(1)
    highest = logits.max(dim=1).values if logits.numel() else logits.new_zeros(0)
    log_sum = highest + (logits - highest.unsqueeze(1)).exp().sum(dim=1).log()
    return (log_sum - picked).sum()


def cross_entropy_torch(logits_NV: torch.Tensor, labels_N: torch.Tensor, ignore_id: int) -> torch.Tensor:
    """torch's fused log-softmax and negative log likelihood, in fp32; a scalar."""
    return F.cross_entropy(logits_NV.float(), labels_N, ignore_index=ignore_id, reduction="sum")


def implementation() -> str:
    """Name of the implementation that runs: `reference` or `torch`."""
    return "reference" if reference_forced() else "torch"


def cross_entropy_sum(logits_NV: torch.Tensor, labels_N: torch.Tensor, ignore_id: int) -> torch.Tensor:
    """Summed cross entropy of the labels that are not `ignore_id` (0 where there is none)."""
    return _IMPLEMENTATIONS[implementation()](logits_NV, labels_N, ignore_id)


_IMPLEMENTATIONS = {"reference": cross_entropy_reference, "torch": cross_entropy_torch}
