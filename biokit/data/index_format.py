"""The bytes of Megatron's `.idx` files (mmap format, version 1), as megatron-core's IndexedDataset reads them.

Little endian: magic (9 bytes), u64 version, u8 dtype code, u64 number of sequences N, u64 number of documents + 1,
int32 lengths[N], int64 byte offsets[N], int64 first sequence of each document (and N at the end).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biokit.errors import StoreError

Ints = NDArray[np.integer]

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPE_CODES = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float64",
    7: "float32",
    8: "uint16",
}
CODE_OF = {name: code for code, name in DTYPE_CODES.items()}
_HEADER = struct.Struct("<9sQBQQ")
REBUILD = "Make the store again with `biokit preprocess`"


def build_index(lengths: Ints, document_starts: Ints, dtype: np.dtype[Any]) -> bytes:
    """The bytes of an `.idx` file; byte offsets are 64-bit whatever the dtype of `lengths`."""
    offsets = np.zeros(len(lengths), dtype="<i8")
    np.cumsum(np.asarray(lengths[:-1], dtype=np.int64) * dtype.itemsize, out=offsets[1:])
    header = _HEADER.pack(MAGIC, VERSION, CODE_OF[dtype.name], len(lengths), len(document_starts))
    return b"".join(
        [header, lengths.astype("<i4").tobytes(), offsets.tobytes(), document_starts.astype("<i8").tobytes()]
    )


def parse_index(path: Path, raw: Any) -> tuple[np.dtype[Any], tuple[Ints, Ints, Ints]]:
    """Views of the three arrays of an `.idx`, after checks that hold for any writer's file.

    Raises:
        StoreError: not Megatron's format, or arrays that contradict one another.
    """
    asked = f"token store {path}"
    if len(raw) < _HEADER.size:
        raise StoreError(asked, f"it has {len(raw)} bytes: truncated, or not an index", REBUILD)
    magic, version, code, num_sequences, num_bounds = _HEADER.unpack_from(raw)
    if magic != MAGIC:
        raise StoreError(asked, f"it begins with {magic!r}, not {MAGIC!r}", "Give the prefix of Megatron's mmap format")
    if version != VERSION or code not in DTYPE_CODES:
        found = f"version {version}, dtype code {code}"
        raise StoreError(asked, found, f"Known: version {VERSION}, dtype codes {DTYPE_CODES}")
    size = _HEADER.size + 12 * num_sequences + 8 * num_bounds
    if len(raw) != size:
        found = f"it has {len(raw)} bytes, its header says {size}: truncated, or with modes (multimodal)"
        raise StoreError(asked, found, REBUILD)
    dtype = np.dtype(DTYPE_CODES[code]).newbyteorder("<")
    lengths = np.frombuffer(raw, "<i4", num_sequences, _HEADER.size)
    offsets = np.frombuffer(raw, "<i8", num_sequences, _HEADER.size + 4 * num_sequences)
    starts = np.frombuffer(raw, "<i8", num_bounds, _HEADER.size + 12 * num_sequences)
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    contiguous = not num_sequences or (offsets[0] == 0 and np.array_equal(offsets[1:], ends[:-1]))
    if not contiguous or (lengths < 0).any():
        raise StoreError(asked, "its byte offsets do not follow from its lengths", REBUILD)
    if not num_bounds or starts[0] != 0 or starts[-1] != num_sequences or (np.diff(starts) < 0).any():
        raise StoreError(asked, "its documents do not cover its sequences", REBUILD)
    return dtype, (lengths, offsets, starts)
