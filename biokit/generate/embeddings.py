"""Embeddings of a file of molecules of any size: read, encoded and written part by part, and gone on with later.

The folder that `embed_file` writes holds parts of so many rows, each of which appears whole:
    part_000000000.parquet      columns row, smiles, embedding; or part_000000000.npz with arrays of these names
    rejects.csv                 row, text and reason of what has no embedding (on_bad="drop")
    embeddings.json             what was asked, and how far it is
The number in a part's name is that of its first row in the file.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from biokit.chem.molecules import CleanOptions, clean_molecule
from biokit.data.paths import expand_paths
from biokit.data.tables import Row, read_table
from biokit.errors import ConfigError, DataError
from biokit.generate.latent import embed
from biokit.models.molbart import MolBART
from biokit.runs import flush_to_disk, write_atomically

if TYPE_CHECKING:
    from biokit.tokenizers import SmilesTokenizer

FORMS = ("parquet", "npz")
STATE = "embeddings.json"


@dataclass
class _Part:
    """Rows that become one file."""

    numbers: list[int] = field(default_factory=list)
    smiles: list[str] = field(default_factory=list)
    rejects: list[tuple[int, str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class EmbeddedFile:
    """What `embed_file` has written: a folder, and its counts (`num_rows` = embedded + rejected)."""

    folder: Path
    num_rows: int
    num_embedded: int
    num_rejected: int


def embed_file(
    model: MolBART,
    tokenizer: SmilesTokenizer,
    table: str | Path,
    folder: str | Path,
    *,
    form: str = "parquet",
    smiles_column: str = "",
    batch_size: int = 128,
    part_rows: int = 20_000,
    on_bad: str = "raise",
    progress: bool = True,
) -> EmbeddedFile:
    """Write the embedding of every molecule of a table (a form that `read_table` reads) into a folder.

    Molecules are canonicalised first, salts kept. Interrupted or killed, the same call goes on behind the last part.

    Args:
        batch_size: molecules encoded at once; those of a part are sorted by length first.
        part_rows: rows a part; memory is bounded by one part.
        on_bad: `raise`, or `drop`: a row that cannot be embedded goes to rejects.csv with its reason.

    Raises:
        ConfigError: a value outside its range.
        DataError: a row that cannot be embedded; a folder that other embeddings are in; a full disk.
    """
    for name, value, valid in (("form", form, FORMS), ("on_bad", on_bad, ("raise", "drop"))):
        if value not in valid:
            raise ConfigError(f"{name}={value}", "it is not known", f"Valid: {', '.join(valid)}")
    for name, number in (("batch_size", batch_size), ("part_rows", part_rows)):
        if number < 1:
            raise ConfigError(f"{name}={number}", "it is out of range", "Give 1 or more")
    job = _Job(model, tokenizer, Path(table), Path(folder), form, batch_size, part_rows, on_bad)
    return job.run(smiles_column, progress)


def read_embeddings(folder: str | Path) -> tuple[list[str], npt.NDArray[np.float32]]:
    """SMILES and embeddings (N,D) of a folder that `embed_file` wrote, in the order of the file.

    Raises:
        DataError: there are none.
    """
    smiles: list[str] = []
    vectors = []
    for path in _parts(Path(folder)):
        texts, values_ND = _read_part(path)
        smiles += texts
        vectors.append(values_ND)
    if not vectors:
        raise DataError(f"embeddings in {folder}", "there are none", "Call embed_file first")
    return smiles, np.concatenate(vectors)


class _Job:
    """One table into one folder."""

    def __init__(
        self, model: MolBART, tokenizer: SmilesTokenizer, table: Path, folder: Path, form: str, batch_size: int,
        part_rows: int, on_bad: str,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.table, self.folder = model, tokenizer, table, folder
        self.form, self.batch_size, self.part_rows, self.on_bad = form, batch_size, part_rows, on_bad
        self.max_tokens = model.embed.embedding.num_positions - 2

    def run(self, smiles_column: str, progress: bool) -> EmbeddedFile:
        from tqdm.auto import tqdm

        rows = read_table(self.table, smiles_column=smiles_column)
        state = self._open()
        with tqdm(desc="embedding", unit=" molecules", initial=state["num_rows"], disable=not progress) as bar:
            for _ in islice(rows, state["num_rows"]):
                pass
            while part_of_rows := list(islice(rows, self.part_rows)):
                self._write_part(part_of_rows, state, bar)
        return EmbeddedFile(self.folder, **{name: state[name] for name in ("num_rows", "num_embedded", "num_rejected")})

    def _open(self) -> dict[str, Any]:
        """How far the folder is. Raises DataError where it holds something else."""
        files = [[str(path.resolve()), path.stat().st_size] for path in expand_paths(str(self.table))]
        asked = {
            "table": files,
            "model": _fingerprint(self.model, self.tokenizer),
            "form": self.form,
            "part_rows": self.part_rows,
        }
        path = self.folder / STATE
        if not path.exists():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise DataError(f"embed into {self.folder}", "it holds other files", "Give a new folder")
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                found = f"it cannot be made ({error.strerror})"
                raise DataError(f"embed into {self.folder}", found, "Give another folder") from error
            return asked | {"num_rows": 0, "num_embedded": 0, "num_rejected": 0}
        try:
            state: dict[str, Any] = json.loads(path.read_text())
            differs = [name for name, value in asked.items() if state[name] != value]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}", "it cannot be read", "Give a new folder") from error
        if differs:
            found = f"it holds those of another {' and '.join(differs)}"
            raise DataError(f"embed into {self.folder}", found, "Give a new folder, or what was given then")
        return state

    def _write_part(self, rows: list[Row], state: dict[str, Any], bar: Any) -> None:
        part = _Part()
        for row in rows:
            self._take(row, part)
        values_ND = self._encode(part.smiles, bar)
        first = state["num_rows"]
        state["num_rows"] += len(rows)
        state["num_embedded"] += len(part.smiles)
        state["num_rejected"] += len(part.rejects)
        try:
            if part.smiles:
                _save_part(self.folder / f"part_{first:09d}.{self.form}", part, values_ND)
            if part.rejects:
                self._note_rejects(part)
            write_atomically(self.folder / STATE, json.dumps(state, indent=1) + "\n")
        except OSError as error:
            found = f"it cannot be written ({error.strerror})"
            do = "Free space and call again: it goes on behind the last whole part"
            raise DataError(f"embeddings in {self.folder}", found, do) from error

    def _take(self, row: Row, part: _Part) -> None:
        try:
            if row.problem:
                raise DataError(row.name or row.text[:80], f"{row.problem} {row.detail}".strip(), "Mend it")
            smiles = clean_molecule(row.text, CleanOptions(salts="keep"), row.is_mol_block).smiles
            ids = self.tokenizer.encode(smiles)
            if not len(ids) or self.tokenizer.unknown_id in ids:
                raise DataError(smiles, "it has tokens outside the model's vocabulary", "Leave it out")
            if len(ids) > self.max_tokens:
                found = f"it has {len(ids)} tokens, the model takes {self.max_tokens}"
                raise DataError(smiles, found, "Leave it out")
        except DataError as error:
            if self.on_bad == "raise":
                asked = f"{row.file} row {row.row}: {error.asked}"
                raise DataError(asked, error.found, 'Mend the row, or pass on_bad="drop"') from error
            part.rejects.append((row.row, row.name if row.is_mol_block else row.text, error.found))
            return
        part.numbers.append(row.row)
        part.smiles.append(smiles)

    def _encode(self, smiles: list[str], bar: Any) -> npt.NDArray[np.float32]:
        """The vectors in the order given; batches hold molecules of like lengths."""
        order = sorted(range(len(smiles)), key=lambda index: len(smiles[index]))
        values_ND = np.empty((len(smiles), self.model.embed.embedding.tokens.embedding_dim), dtype=np.float32)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            values_ND[batch] = embed(self.model, self.tokenizer, [smiles[index] for index in batch])
            bar.update(len(batch))
        return values_ND

    def _note_rejects(self, part: _Part) -> None:
        """The file holds each row once, also where a part is done again: its earlier rows are left as they are."""
        path = self.folder / "rejects.csv"
        text = path.read_text(encoding="utf-8") if path.exists() else "row,text,reason\n"
        known = {line.split(",", 1)[0] for line in text.splitlines()}
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows(row for row in part.rejects if str(row[0]) not in known)
        write_atomically(path, text + out.getvalue())


def _fingerprint(model: MolBART, tokenizer: SmilesTokenizer) -> str:
    """Of the weights and the vocabulary: embeddings of two models do not mix."""
    digest = hashlib.sha256(tokenizer.hash.encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _save_part(path: Path, part: _Part, values_ND: npt.NDArray[np.float32]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        if path.suffix == ".npz":
            with partial.open("wb") as file:
                np.savez(file, row=np.array(part.numbers), smiles=np.array(part.smiles), embedding=values_ND)
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            flat = pa.array(values_ND.reshape(-1))
            vectors = pa.FixedSizeListArray.from_arrays(flat, values_ND.shape[1])
            columns = {"row": pa.array(part.numbers), "smiles": pa.array(part.smiles), "embedding": vectors}
            pq.write_table(pa.table(columns), partial)
        flush_to_disk(partial)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _parts(folder: Path) -> Iterator[Path]:
    yield from sorted(path for form in FORMS for path in folder.glob(f"part_*.{form}"))


def _read_part(path: Path) -> tuple[list[str], npt.NDArray[np.float32]]:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["smiles"].tolist(), arrays["embedding"]
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    flat = table["embedding"].combine_chunks().flatten().to_numpy()
    return table["smiles"].to_pylist(), flat.reshape(table.num_rows, -1)
