"""Embeddings of a file of molecules of any size: read, encoded and written part by part, and gone on with later.

The folder that `embed_file` writes holds parts of so many rows, each of which appears whole:
    part_000000000.parquet      columns row, smiles, embedding; or part_000000000.npz with arrays of these names
    rejects_000000000.csv       row, file, line, text and reason of what has no embedding (on_bad="drop")
    embeddings.json             what was asked, and how far it is
`row` counts the rows of the table, all its files together, from 0; a part's name has that of its first one.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from biokit.chem.molecules import CleanOptions, clean_molecule
from biokit.data.paths import expand_paths
from biokit.data.tables import Row, read_table
from biokit.errors import ConfigError, DataError
from biokit.generate.inputs import check_ranges
from biokit.generate.kept import check_settings, fingerprint, hold_folder
from biokit.generate.latent import embed
from biokit.models.molbart import MolBART
from biokit.runs import flush_to_disk, write_atomically

if TYPE_CHECKING:
    from biokit.tokenizers import SmilesTokenizer

FORMS = ("parquet", "npz")
STATE = "embeddings.json"
COUNTS = ("num_rows", "num_embedded", "num_rejected")
CHARS_A_TOKEN, MAX_CHARS = 12, 8_000  # longer texts are not parsed: RDKit ends the process on some


@dataclass
class _Part:
    """Rows that become one file."""

    numbers: list[int] = field(default_factory=list)
    smiles: list[str] = field(default_factory=list)
    rejects: list[tuple[int, str, int, str, str]] = field(default_factory=list)


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
        on_bad: `raise`, or `drop`: a row that cannot be embedded goes to the rejects with its reason.

    Raises:
        ConfigError: a value outside its range.
        DataError: a row that cannot be embedded; a folder that other embeddings are in; a full disk.
    """
    for name, value, valid in (("form", form, FORMS), ("on_bad", on_bad, ("raise", "drop"))):
        if value not in valid:
            raise ConfigError(f"{name}={value}", "it is not known", f"Valid: {', '.join(valid)}")
    check_ranges({"batch_size": (batch_size, batch_size >= 1), "part_rows": (part_rows, part_rows >= 1)}, "1 or more")
    job = _Job(model, tokenizer, Path(table), Path(folder), form, smiles_column, batch_size, part_rows, on_bad)
    files = expand_paths(str(table))
    with hold_folder(job.folder, job.asked):
        return job.run(files, progress)


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
        self, model: MolBART, tokenizer: SmilesTokenizer, table: Path, folder: Path, form: str, smiles_column: str,
        batch_size: int, part_rows: int, on_bad: str,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.table, self.folder = model, tokenizer, table, folder
        self.form, self.smiles_column, self.batch_size = form, smiles_column, batch_size
        self.part_rows, self.on_bad = part_rows, on_bad
        self.max_tokens = max_tokens_of(model)
        self.asked = f"embed {table} into {folder}"

    def run(self, files: list[Path], progress: bool) -> EmbeddedFile:
        from tqdm.auto import tqdm

        stats = [(path.resolve(), path.stat()) for path in files]
        settings = {
            "table": [[str(path), found.st_size, found.st_mtime_ns] for path, found in stats],
            "smiles_column": self.smiles_column, "model": fingerprint(self.model, self.tokenizer), "form": self.form,
            "part_rows": self.part_rows, "on_bad": self.on_bad,
        }  # fmt: skip
        state = dict.fromkeys(COUNTS, 0) | check_settings(self.folder / STATE, settings, self.asked)
        rows = read_table(self.table, smiles_column=self.smiles_column)
        with tqdm(desc="embedding", unit=" molecules", initial=state["num_rows"], disable=not progress) as bar:
            for _ in islice(rows, state["num_rows"]):
                pass
            while part_of_rows := list(islice(rows, self.part_rows)):
                self._write_part(part_of_rows, state, bar)
        return EmbeddedFile(self.folder, **{name: state[name] for name in COUNTS})

    def _write_part(self, rows: list[Row], state: dict[str, Any], bar: Any) -> None:
        part, first = _Part(), state["num_rows"]
        for number, row in enumerate(rows, first):
            self._take(number, row, part)
        values_ND = embed_all(self.model, self.tokenizer, part.smiles, self.batch_size, bar.update)
        done = {
            "num_rows": first + len(rows),
            "num_embedded": state["num_embedded"] + len(part.smiles),
            "num_rejected": state["num_rejected"] + len(part.rejects),
        }
        try:
            if part.smiles:
                _save_part(self.folder / f"part_{first:09d}.{self.form}", part, values_ND)
            if part.rejects:
                write_atomically(self.folder / f"rejects_{first:09d}.csv", _format_rejects(part))
            write_atomically(self.folder / STATE, json.dumps(state | done, indent=1) + "\n")
        except OSError as error:
            do = "Free space and call again: it goes on behind the last whole part"
            raise DataError(self.asked, f"it cannot be written ({error.strerror})", do) from error
        state |= done

    def _take(self, number: int, row: Row, part: _Part) -> None:
        try:
            smiles = read_molecule(row, self.tokenizer, self.max_tokens)
        except DataError as error:
            if self.on_bad == "raise":
                shown = f"{row.file} row {row.row}" + (f": {error.asked}" if error.asked else "")
                raise DataError(shown, error.found, 'Mend the row, or pass on_bad="drop"') from error
            text = row.name if row.is_mol_block else row.text
            part.rejects.append((number, row.file, row.row, text, error.found))
            return
        part.numbers.append(number)
        part.smiles.append(smiles)


def max_tokens_of(model: MolBART) -> int:
    """Tokens that a molecule may have: the model's positions less begin and end."""
    return model.embed.embedding.num_positions - 2


def read_molecule(row: Row, tokenizer: SmilesTokenizer, max_tokens: int) -> str:
    """The canonical SMILES of a row, salts kept, as a model of so many tokens takes it.

    Raises:
        DataError: a row that could not be read, no molecule, unknown tokens, or too many.
    """
    do = "Leave it out"
    if row.problem:
        raise DataError(row.text[:80], f"{row.problem} {row.detail}".strip(), do)
    if not row.is_mol_block and len(row.text) > min(CHARS_A_TOKEN * max_tokens, MAX_CHARS):
        found = f"it has {len(row.text)} characters, the model takes {max_tokens} tokens"
        raise DataError(f'SMILES "{row.text[:80]}..."', found, do)
    smiles = clean_molecule(row.text, CleanOptions(salts="keep"), row.is_mol_block).smiles
    ids = tokenizer.encode(smiles)
    if not len(ids) or tokenizer.unknown_id in ids:
        raise DataError(f'SMILES "{smiles}"', "it has tokens outside the model's vocabulary", do)
    if len(ids) > max_tokens:
        raise DataError(f'SMILES "{smiles}"', f"it has {len(ids)} tokens, the model takes {max_tokens}", do)
    return smiles


def embed_all(
    model: MolBART,
    tokenizer: SmilesTokenizer,
    smiles: Sequence[str],
    batch_size: int = 128,
    advance: Callable[[int], object] = lambda count: None,
) -> npt.NDArray[np.float32]:
    """Vectors (N,D) in the order given; batches hold molecules of like lengths. `advance` is told each one's size.

    Raises:
        DataError: see `embed`; no SMILES give no vectors.
    """
    order = sorted(range(len(smiles)), key=lambda index: len(smiles[index]))
    values_ND = np.empty((len(smiles), model.embed.embedding.tokens.embedding_dim), dtype=np.float32)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        values_ND[batch] = embed(model, tokenizer, [smiles[index] for index in batch])
        advance(len(batch))
    return values_ND


def _format_rejects(part: _Part) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["row", "file", "line", "text", "reason"])
    writer.writerows(part.rejects)
    return out.getvalue()


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
