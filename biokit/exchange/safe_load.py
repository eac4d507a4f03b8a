"""Pickled files of other systems, read without running anything of them.

torch's restricted reader admits tensors, plain values and the names below, nothing else. The classes of other systems
are read into inert stand-ins, so that none of their code is imported: DeepSpeed's folders are read without DeepSpeed.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from biokit.errors import CheckpointError


class Inert:
    """Stands for an object of another system; keeps its plain attributes."""


_RECONSTRUCT, _SCALAR = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
_DTYPES = ("UInt8", "UInt32", "UInt64", "Int32", "Int64", "Float32", "Float64", "Bool")
ALLOWED: list[Any] = [
    argparse.Namespace,
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),  # written by numpy before 2
    (_SCALAR, "numpy._core.multiarray.scalar"),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    np.ndarray,
    np.dtype,
    *(getattr(np.dtypes, f"{name}DType") for name in _DTYPES),
    (Inert, "deepspeed.utils.tensor_fragment.fragment_address"),
    (Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


def load_safely(path: Path) -> dict[str, Any]:
    """The mapping that a `torch.save` file holds; tensors stay on the disk until they are used.

    Raises:
        CheckpointError: it cannot be read, is no mapping, or holds what is not admitted; nothing of it has run.
    """
    asked = f"file {path}"
    try:
        with torch.serialization.safe_globals(ALLOWED):
            # files of torch before 1.6 are no zip archives and cannot be mapped
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        do = "Have its owner save it again with tensors and plain values only"
        raise CheckpointError(asked, f"it is refused and nothing of it has run: {_reason(error)}", do) from error
    except MemoryError:
        raise
    except Exception as error:  # a torn file fails in any way that a parser can
        found = " ".join(str(error).split())[:200]
        raise CheckpointError(
            asked, f"it cannot be read ({type(error).__name__}: {found})", "Restore it from a copy"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(asked, f"it holds a {type(found).__name__}, no mapping", "Give a checkpoint's file")
    return found


def _reason(error: pickle.UnpicklingError) -> str:
    """What the reader did not admit, from torch's advice on how to switch it off."""
    text = " ".join(str(error).split())
    found = re.search(r"Unsupported (?:global|class): (?:GLOBAL )?(\S+)|Trying to load unsupported GLOBAL (\S+)", text)
    if found:
        return f"it names {(found[1] or found[2]).rstrip('.')}, which is neither a tensor nor a plain value"
    return re.sub(r".*WeightsUnpickler error: ", "", text)[:200]
