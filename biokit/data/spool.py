"""Clean molecules between cleaning and splitting: flat files that grow, so that memory does not.

A split by ratio or scaffold needs to know all molecules before the first can be written to its part.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biokit.data.clean import CleanBatch
from biokit.data.indexed import StoreWriter

_FILES = {"ids": "<u2", "lengths": "<i4", "mols": "u1", "mol_lengths": "<i4", "parts": "i1", "hashes": "<u8"}
_BLOCK = 65_536  # molecules held at once while writing


class Spool:
    """A context manager over a folder that exists only inside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_molecules = 0
        self._num_sequences = 1

    def __enter__(self) -> Spool:
        self.folder.mkdir()
        self._files = {name: (self.folder / name).open("wb") for name in _FILES}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            try:
                file.close()
            except OSError:  # a full disk was already told by the write that met it
                if kind is None:
                    raise
        for name in _FILES:
            (self.folder / name).unlink()
        self.folder.rmdir()

    def add(self, batch: CleanBatch) -> None:
        """Append a batch."""
        self._num_sequences = batch.num_sequences
        self.num_molecules += len(batch.smiles)
        self._write("ids", batch.ids)
        self._write("lengths", np.diff(batch.offsets))
        self._write("parts", batch.parts)
        self._write("hashes", batch.hashes)
        if batch.mols:
            self._files["mols"].write(b"".join(batch.mols))
            self._write("mol_lengths", np.array([len(mol) for mol in batch.mols]))

    def parts(self) -> NDArray[np.int8]:
        """(N,) what the split column said."""
        return self._read("parts")

    def hashes(self) -> NDArray[np.uint64]:
        """(N,) hashes of the canonical SMILES."""
        return self._read("hashes")

    def write_stores(self, parts: NDArray[np.int8], writers: list[StoreWriter], mols: list[StoreWriter]) -> None:
        """Copy each molecule to the writer of its part; `mols` is empty where molecules are not cached."""
        for ids, lengths, chosen in self._blocks("ids", "lengths", parts, self._num_sequences):
            for part, writer in enumerate(writers):
                writer.add_documents(*_select(ids, lengths, chosen == part), self._num_sequences)
        if mols:
            for data, lengths, chosen in self._blocks("mols", "mol_lengths", parts, 1):
                for part, writer in enumerate(mols):
                    writer.add_documents(*_select(data, lengths, chosen == part), 1)

    def _blocks(
        self, flat_name: str, length_name: str, parts: NDArray[np.int8], each: int
    ) -> Iterator[tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int8]]]:
        """Some molecules at a time: their flat values, the length of each sequence, and its part."""
        self._files[flat_name].flush()
        lengths = self._read(length_name).astype(np.int64)
        size = max(1, _BLOCK // each)
        with (self.folder / flat_name).open("rb") as file:
            for start in range(0, self.num_molecules, size):
                chosen = lengths[start * each : (start + size) * each]
                flat = np.fromfile(file, _FILES[flat_name], int(chosen.sum()))
                yield flat, chosen, np.repeat(parts[start : start + size], each)

    def _write(self, name: str, values: NDArray[Any]) -> None:
        self._files[name].write(np.ascontiguousarray(values, dtype=_FILES[name]).tobytes())

    def _read(self, name: str) -> NDArray[Any]:
        self._files[name].flush()
        return np.fromfile(self.folder / name, _FILES[name])


def _select(
    flat: NDArray[Any], lengths: NDArray[np.int64], mask: NDArray[np.bool_]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Flat values and offsets of the sequences that the mask chooses."""
    offsets = np.concatenate(([0], np.cumsum(lengths[mask])))
    return flat[np.repeat(mask, lengths)], offsets
