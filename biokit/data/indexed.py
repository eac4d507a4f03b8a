"""The token store: Megatron's memory-mapped `.bin`/`.idx` pair, with a manifest of checksums beside it.

The pair is byte-compatible, both ways, with megatron-core's IndexedDataset and IndexedDatasetBuilder: `.idx` as in
`biokit.data.index_format`, `.bin` the ids without a header. `.json` is biokit's own: sizes and sha256 of both files,
counts, and what the writer wants remembered.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from biokit.data.index_format import CODE_OF, REBUILD, build_index, parse_index
from biokit.errors import StoreError
from biokit.runs import flush_to_disk

Ints = NDArray[np.integer]

_MANIFEST_FORMAT = "biokit token store 1"
_LONG_ROW = 64  # mean length from which copying row by row beats one scatter of all ids (measured)


class StoreWriter:
    """Write a token store; a context manager. What was written appears at a clean exit, whole, or not at all.

    Args:
        prefix: path without extension; `.bin`, `.idx` and `.json` are added.
        dtype: uint8, uint16, int32 or another of `DTYPE_CODES`.
        metadata: anything JSON can hold, e.g. the hash of the vocabulary.

    Raises:
        StoreError: a dtype without a code, or ids that it cannot hold.
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike, metadata: dict[str, Any] | None = None) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype.name not in CODE_OF:
            raise StoreError(f"token store {prefix}", f"no code for {self.dtype.name}", f"Use one of {sorted(CODE_OF)}")
        self.metadata = dict(metadata or {})
        self._lengths: list[Ints] = []
        self._documents: list[Ints] = []  # sequences of each document
        self._hash = hashlib.sha256()
        self._num_bytes = 0

    def __enter__(self) -> StoreWriter:
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._bin = self._partial(".bin").open("wb")
        return self

    @property
    def bin_sha256(self) -> str:
        """sha256 of what was added so far."""
        return self._hash.hexdigest()

    def add_document(self, sequences: Sequence[Ints]) -> None:
        """Append one document: a list, possibly empty, of 1-d arrays."""
        arrays = [np.asarray(s) for s in sequences]
        flat = np.concatenate(arrays) if arrays else np.empty(0, self.dtype)
        offsets = np.cumsum([0] + [len(a) for a in arrays])
        self.add_documents(flat, offsets, np.array([len(arrays)]))

    def add_documents(self, flat: Ints, offsets: Ints, sequences_per_document: int | Ints = 1) -> None:
        """Append many documents at once.

        Args:
            flat: ids of all sequences, one after another.
            offsets: (S + 1,) where each sequence begins in flat, and where the last ends.
            sequences_per_document: how many of the S sequences each document has, or one number for all.
        """
        offsets = np.asarray(offsets, dtype=np.int64)
        lengths = np.diff(offsets)
        if np.ndim(sequences_per_document) == 0:
            each = int(sequences_per_document)
            whole = each > 0 and len(lengths) % each == 0
            counts = np.full(len(lengths) // each if whole else 0, each, dtype=np.int64)
        else:
            counts = np.asarray(sequences_per_document, dtype=np.int64)
            whole = int(counts.sum()) == len(lengths) and not (counts < 0).any()
        asked = f"token store {self.prefix}: adding documents"
        if not whole:
            found = f"{len(lengths)} sequences do not make up {sequences_per_document} a document"
            raise StoreError(asked, found, "Give counts that add up to the sequences")
        if len(lengths) and (lengths.min() < 0 or lengths.max() > 2**31 - 1 or offsets[-1] > len(flat)):
            raise StoreError(asked, "offsets do not fit the ids", "Give ascending offsets inside `flat`")
        data = self._as_stored(np.asarray(flat)[int(offsets[0]) : int(offsets[-1])], asked)
        self._bin.write(data.data)
        self._hash.update(data.data)
        self._num_bytes += data.nbytes
        self._lengths.append(lengths.astype("<i4"))
        self._documents.append(counts)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            self._bin.close()
            for suffix in (".bin", ".idx", ".json"):
                self._partial(suffix).unlink(missing_ok=True)

    def _partial(self, suffix: str) -> Path:
        return Path(f"{self.prefix}{suffix}.partial-{os.getpid()}")

    def _as_stored(self, flat: NDArray[Any], asked: str) -> NDArray[Any]:
        if len(flat) and flat.dtype != self.dtype and self.dtype.kind in "iu":
            limits = np.iinfo(self.dtype)
            low, high = flat.min(), flat.max()
            if flat.dtype.kind not in "iu" or low < limits.min or high > limits.max:
                found = f"values from {low} to {high} ({flat.dtype}) do not fit {self.dtype.name}"
                raise StoreError(asked, found, "Open the writer with a wider dtype")
        return np.ascontiguousarray(flat, dtype=self.dtype)

    def _publish(self) -> None:
        """Fsync all three under other names, rename them, the manifest last, and fsync the folder."""
        lengths = np.concatenate([np.empty(0, "<i4"), *self._lengths])
        counts = np.concatenate([np.zeros(1, np.int64), *self._documents])
        index = build_index(lengths, np.cumsum(counts), self.dtype)
        _flush(self._bin)
        manifest = {
            "format": _MANIFEST_FORMAT,
            "dtype": self.dtype.name,
            "num_documents": len(counts) - 1,
            "num_sequences": len(lengths),
            "num_tokens": int(lengths.sum(dtype=np.int64)),
            "bin": {"size": self._num_bytes, "sha256": self.bin_sha256},
            "idx": {"size": len(index), "sha256": hashlib.sha256(index).hexdigest()},
            "metadata": self.metadata,
        }
        manifest["checksum"] = _manifest_checksum(manifest)
        text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
        for suffix, content in ((".idx", index), (".json", text.encode())):
            with self._partial(suffix).open("wb") as file:
                file.write(content)
                _flush(file)
        Path(f"{self.prefix}.json").unlink(missing_ok=True)  # a store half replaced must not look whole
        for suffix in (".bin", ".idx", ".json"):
            self._partial(suffix).replace(f"{self.prefix}{suffix}")
        flush_to_disk(Path(self.prefix).parent)


class TokenStore:
    """A token store, mapped read-only. `len` is the number of documents.

    Attributes:
        dtype: of the ids. metadata: what the writer noted (empty without a manifest).
        sequence_lengths: (S,) int32. document_starts: (D + 1,) int64, the first sequence of each document.
    """

    def __init__(self, prefix: str, data: NDArray[Any], index: tuple[Ints, Ints, Ints], manifest: dict[str, Any]):
        self.prefix, self.dtype = prefix, data.dtype
        self.metadata: dict[str, Any] = manifest.get("metadata", {})
        self._manifest_hash: str = manifest.get("checksum", "")
        self.bin_sha256: str = manifest.get("bin", {}).get("sha256", "")
        self.sequence_lengths, self._offsets, self.document_starts = index
        self.num_sequences = len(self.sequence_lengths)
        self._data = data
        self._bytes = _items(data, "B")
        # single items are read faster from a memoryview (Python ints) than from an array (numpy scalars)
        self._length_items = _items(self.sequence_lengths, "i")
        self._offset_items = _items(self._offsets, "q")
        self._document_items = _items(self.document_starts, "q")
        self._num_documents = len(self.document_starts) - 1
        self._itemsize = self.dtype.itemsize
        self._lengths: Ints | None = None

    @classmethod
    def open(cls, prefix: str | Path, verify: bool = True) -> TokenStore:
        """Map a store.

        Args:
            prefix: path without extension.
            verify: read both files once and compare them with the manifest's checksums. False reads a store that
                another tool wrote (no manifest), or one that this process's parent has verified.

        Raises:
            StoreError: a missing, truncated, altered or foreign file, named with its cause.
        """
        prefix = str(prefix)
        manifest = _read_manifest(prefix, required=verify)
        mapped: dict[str, Any] = {}
        for suffix in (".idx", ".bin"):
            mapped[suffix] = _map_file(Path(prefix + suffix), manifest.get(suffix[1:]), verify)
        dtype, index = parse_index(Path(prefix + ".idx"), mapped[".idx"])
        if verify and dtype.name != manifest["dtype"]:
            found = f"it holds {dtype.name}, the manifest says {manifest['dtype']}"
            raise StoreError(f"token store {prefix}.idx", found, REBUILD)
        expected = int(index[1][-1]) + int(index[0][-1]) * dtype.itemsize if len(index[0]) else 0
        if len(mapped[".bin"]) != expected:
            found = f"it has {len(mapped['.bin'])} bytes, its index says {expected}: truncated, or of another store"
            raise StoreError(f"token store {prefix}.bin", found, REBUILD)
        data = np.frombuffer(mapped[".bin"], dtype=dtype) if expected else np.empty(0, dtype)
        return cls(prefix, data, index, manifest)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.prefix,)

    def __len__(self) -> int:
        return self._num_documents

    @property
    def ids(self) -> NDArray[Any]:
        """All ids of the store, one sequence after another; read-only."""
        return self._data

    @property
    def manifest_hash(self) -> str:
        """The manifest's checksum, which names the whole content; "" without a manifest."""
        return self._manifest_hash

    @property
    def lengths(self) -> Ints:
        """(D,) int32: the length of each document's first (canonical) sequence; 0 for a document without one."""
        if self._lengths is None:
            starts = np.asarray(self.document_starts)
            if self.num_sequences == len(self) and np.array_equal(starts, np.arange(len(self) + 1)):
                self._lengths = self.sequence_lengths
            else:
                firsts = np.append(self.sequence_lengths, np.int32(0))[starts[:-1]]
                self._lengths = np.where(np.diff(starts) > 0, firsts, 0).astype(np.int32)
        return self._lengths

    def sequence(self, document: int, k: int = 0) -> NDArray[Any]:
        """A read-only view of sequence k of a document, no copy.

        Raises:
            StoreError: no such document or sequence.
        """
        if 0 <= document < self._num_documents:
            index = self._document_items[document] + k
            if k >= 0 and index < self._document_items[document + 1]:
                start = self._offset_items[index] // self._itemsize
                return self._data[start : start + self._length_items[index]]
        asked = f"token store {self.prefix}: document {document}, sequence {k}"
        if not 0 <= document < len(self):
            raise StoreError(asked, f"it holds {len(self)} documents", "Ask for 0 to that, exclusive")
        number = int(self.document_starts[document + 1] - self.document_starts[document])
        raise StoreError(asked, f"that document has {number} sequences", "Ask for 0 to that, exclusive")

    def gather(self, sequences: Ints) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Copy many sequences (by number over the whole store) into (flat, offsets)."""
        lengths = self.sequence_lengths[sequences]
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        flat = np.frombuffer(self._joined(sequences, lengths), dtype=self.dtype)
        return flat, offsets

    def gather_padded(
        self, sequences: Ints, pad_id: int, dtype: DTypeLike = np.int64, out: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """Copy many sequences into one matrix (N, longest), filled up with `pad_id`.

        Args:
            out: a matrix to use again, at least that large; the part that is filled is returned. Fresh memory for
                a large batch costs more than copying the ids.
        """
        lengths = self.sequence_lengths[sequences]
        if out is None and lengths.sum(dtype=np.int64) < _LONG_ROW * len(lengths):
            return pad_rows(*self.gather(sequences), pad_id, dtype)
        shape = len(lengths), int(lengths.max(initial=0))
        out = np.empty(shape, dtype) if out is None else out[: shape[0], : shape[1]]
        if out.shape != shape:
            raise StoreError(f"token store {self.prefix}: a batch {shape}", "`out` is smaller", "Give a larger matrix")
        starts = (self._offsets[sequences] // self._itemsize).tolist()
        data = self._data
        for row, start, length in zip(out, starts, lengths.tolist(), strict=True):
            row[:length] = data[start : start + length]
            row[length:] = pad_id
        return out

    def _joined(self, sequences: Ints, lengths: Ints) -> bytearray:
        starts = self._offsets[sequences]
        ends = starts + lengths.astype(np.int64) * self._itemsize
        data = self._bytes
        return bytearray().join([data[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)])


def pad_rows(
    flat: Ints, offsets: Ints, pad_id: int, dtype: DTypeLike = np.int64, width: int = 0, shift: int = 0
) -> NDArray[Any]:
    """Ragged rows as a matrix (N, width), each beginning in column `shift`; width 0: the longest row + shift."""
    lengths = np.diff(offsets)
    width = width or shift + int(lengths.max(initial=0))
    out = np.full((len(lengths), width), pad_id, dtype=dtype)
    # a row's ids go to row * width + shift + (0, 1, ...)
    base = np.arange(len(lengths)) * width + shift - offsets[:-1]
    where = np.repeat(base, lengths)
    where += np.arange(int(offsets[0]), int(offsets[-1]))
    out.reshape(-1)[where] = flat
    return out


def _items(array: NDArray[Any], code: str) -> memoryview:
    """A view of an array, aligned or not, whose items come as Python numbers."""
    return array.view(np.uint8).data.cast("B").cast(code) if len(array) else memoryview(b"").cast(code)  # type: ignore[call-overload]


def _reopen(prefix: str) -> TokenStore:
    return TokenStore.open(prefix, verify=False)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _manifest_checksum(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_manifest(prefix: str, required: bool) -> dict[str, Any]:
    path = Path(prefix + ".json")
    asked = f"token store {path}"
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        if not required:
            return {}
        do = f"{REBUILD}, or pass verify=False for a store that another tool wrote"
        raise StoreError(asked, "there is no such manifest: never finished, or not biokit's", do) from None
    except (ValueError, OSError, RecursionError) as error:
        raise StoreError(asked, f"it cannot be read ({error})", REBUILD) from error
    if not isinstance(manifest, dict) or manifest.get("format") != _MANIFEST_FORMAT:
        raise StoreError(asked, "it is not the manifest of a token store", REBUILD)
    if manifest.get("checksum") != _manifest_checksum(manifest):
        raise StoreError(asked, "it was altered after writing (checksum)", REBUILD)
    return manifest


def _map_file(path: Path, noted: dict[str, Any] | None, verify: bool) -> Any:
    asked = f"token store {path}"
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if noted is not None and size != noted["size"]:
                change = "truncated" if size < noted["size"] else "of another store"
                raise StoreError(asked, f"it has {size} bytes, the manifest says {noted['size']}: {change}", REBUILD)
            if verify and noted is not None and hashlib.file_digest(file, "sha256").hexdigest() != noted["sha256"]:
                found = "its sha256 is not the manifest's: altered, or of another store"
                raise StoreError(asked, found, REBUILD)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except FileNotFoundError:
        raise StoreError(asked, "there is no such file", REBUILD) from None
    except OSError as error:
        raise StoreError(asked, f"it cannot be read ({error.strerror})", REBUILD) from error


def sequence_numbers(store: TokenStore, documents: Ints, ks: Ints | int = 0) -> Ints:
    """Numbers over the whole store of sequence k of each document, for `gather`."""
    return store.document_starts[documents] + np.asarray(ks)
