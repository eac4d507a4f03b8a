"""Dropout (Srivastava et al. 2014): reference is torch's, fast draws 16 random bits an element on the CPU.

torch draws one Mersenne-Twister number an element, one after another; that was 13 % (fp32) and 38 % (bf16) of a
training step. Here one SFC64 word, from a seed that torch's generator gives, serves four elements, so that
`torch.manual_seed` decides the mask as before.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from biokit.kernels.dispatch import reference_forced

LEVELS = 2**16  # p is rounded to a multiple of 1 / LEVELS, and the scale follows the rounded value


def dropout_reference(x: torch.Tensor, p: float) -> torch.Tensor:
    """Zero with probability p, else x / (1 - p)."""
    return F.dropout(x, p)


def dropout_lanes(x: torch.Tensor, p: float) -> torch.Tensor:
    """The same law on the CPU, from 16-bit lanes of SFC64 words."""
    num_kept = round((1.0 - p) * LEVELS)
    seed = int(torch.randint(2**63 - 1, (1,)).item())
    words = np.random.SFC64(seed).random_raw((x.numel() + 3) // 4)
    lanes = torch.from_numpy(words.view(np.int16))[: x.numel()].view(x.shape)
    noise = (lanes < num_kept - LEVELS // 2).to(x.dtype).mul_(LEVELS / num_kept)
    return x * noise


def implementation(device: torch.device | str) -> str:
    """Name of the implementation for a device: `lanes` on the CPU, else torch's own (`reference`)."""
    return "lanes" if torch.device(device).type == "cpu" and not reference_forced() else "reference"


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """Dropout by the fastest implementation for the device; p in [0, 1). The mask follows torch's random state."""
    return _IMPLEMENTATIONS[implementation(x.device)](x, p) if p else x


_IMPLEMENTATIONS = {"reference": dropout_reference, "lanes": dropout_lanes}
