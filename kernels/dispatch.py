"""Which implementation of a kernel runs, decided in one place.

`BIOKIT_KERNELS=reference` (environment) forces the plain references everywhere: the tests and a doubtful reader use it.
"""

from __future__ import annotations

import functools
import importlib.util
import os


def reference_forced() -> bool:
    """True when the user asks for the plain references."""
    return os.environ.get("BIOKIT_KERNELS", "") == "reference"


@functools.cache
def has_apex() -> bool:
    """True when NVIDIA apex with its compiled layer norm is importable (the index has another package of that name)."""
    try:
        return all(importlib.util.find_spec(name) for name in ("apex.normalization", "fused_layer_norm_cuda"))
    except Exception:  # a broken installation may raise anything while its parent package is imported
        return False
