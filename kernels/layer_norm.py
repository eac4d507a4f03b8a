"""Layer norm (Ba et al. 2016, eq. 4): reference is the formula, fast is torch's fused form, or apex's on CUDA.

Shapes: N any leading sizes, D normalised size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from biokit.kernels.dispatch import has_apex, reference_forced


def layer_norm_reference(
    x_ND: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor, eps: float = 1e-5
) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias with the biased variance; same shape and dtype as `x_ND`."""
    x = x_ND.float()
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return ((x - mean) * torch.rsqrt(variance + eps) * weight_D + bias_D).to(x_ND.dtype)


def layer_norm_torch(
    x_ND: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor, eps: float = 1e-5
) -> torch.Tensor:
    """torch's fused layer norm."""
    return F.layer_norm(x_ND, weight_D.shape, weight_D, bias_D, eps)


def layer_norm_apex(
    x_ND: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor, eps: float = 1e-5
) -> torch.Tensor:
    """apex's fused layer norm (CUDA)."""
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    return fused_layer_norm_affine(x_ND, weight_D, bias_D, weight_D.shape, eps)


def implementation(device: torch.device | str = "cpu") -> str:
    """Name of the implementation that runs on `device`: `reference`, `torch` or `apex`."""
    if reference_forced():
        return "reference"
    return "apex" if torch.device(device).type == "cuda" and has_apex() else "torch"


def layer_norm(x_ND: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Layer norm over the last dimension by the fastest implementation at hand."""
    return _IMPLEMENTATIONS[implementation(x_ND.device)](x_ND, weight_D, bias_D, eps)


_IMPLEMENTATIONS = {"reference": layer_norm_reference, "torch": layer_norm_torch, "apex": layer_norm_apex}
