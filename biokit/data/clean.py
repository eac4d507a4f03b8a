"""Rows to clean molecules, tokenised, with a report whose counts add up to the rows read."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biokit.config import DataConfig
from biokit.data.clean_worker import UNPARSABLE, ChunkOptions, make_chunk_function
from biokit.data.columns import PARTS
from biokit.data.guarded import GuardedPool
from biokit.data.tables import BLANK, Row
from biokit.errors import DataError
from biokit.tokenizers import SmilesTokenizer

DUPLICATE = "duplicate"
TOO_LONG = "too long"
UNKNOWN_TOKEN = "unknown token"
NO_PART = "unknown split value"

REJECT_COLUMNS = ("file", "row", "text", "reason", "detail")

_HARMLESS = (BLANK, DUPLICATE)  # counted and saved, but no reason to stop for on_bad="raise"
_CHUNK_ROWS = 256


@dataclass
class CleanReport:
    """What cleaning did. `num_read` = `num_kept` + all of `rejects`.

    Attributes:
        changes: kept molecules by what was done to them (`biokit.chem.molecules.CHANGES`).
        unknown_tokens: tokens that the vocabulary lacks, with the number of molecules that have them.
        lengths: kept molecules by tokens, begin and end included.
    """

    num_read: int = 0
    num_kept: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    unknown_tokens: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)

    def check(self) -> None:
        """Raises AssertionError where a row is unaccounted for."""
        accounted = self.num_kept + self.rejects.total()
        assert self.num_read == accounted, f"{self.num_read} rows read, {accounted} accounted for"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "num_read": self.num_read,
            "num_kept": self.num_kept,
            "rejects": dict(self.rejects.most_common()),
            "changes": dict(self.changes.most_common()),
            "unknown_tokens": dict(self.unknown_tokens.most_common()),
            "lengths": dict(sorted(self.lengths.items())),
        }

    def __str__(self) -> str:
        lines = [f"{self.num_read:>10,} rows read", f"{self.num_kept:>10,} molecules kept"]
        lines += [f"{count:>10,} rejected: {reason}" for reason, count in self.rejects.most_common()]
        lines += [
            f"{count:>10,} of the kept: {change.replace('_', ' ')}" for change, count in self.changes.most_common()
        ]
        if self.unknown_tokens:
            lines.append("unknown tokens: " + ", ".join(f"{t} ({n:,})" for t, n in self.unknown_tokens.most_common(10)))
        return "\n".join(lines)


@dataclass(slots=True)
class CleanBatch:
    """N kept molecules.

    Attributes:
        rows: where each came from.
        ids, offsets: tokens of their SMILES without begin and end: the canonical one, then `num_sequences` - 1 random
            ones, molecule by molecule.
        mols: each molecule in RDKit's binary form, where asked for.
        parts: 0 train, 1 val, 2 test; -1 where no split column says so.
        hashes: 64 bits of the hash of the canonical SMILES.
    """

    rows: list[Row]
    smiles: list[str]
    ids: NDArray[np.uint16]
    offsets: NDArray[np.int64]
    num_sequences: int
    mols: list[bytes]
    scaffolds: list[str]
    parts: NDArray[np.int8]
    hashes: NDArray[np.uint64]


def clean(
    rows: Iterable[Row],
    config: DataConfig,
    tokenizer: SmilesTokenizer,
    *,
    num_workers: int = 0,
    progress: bool = False,
    rejects_file: Path | None = None,
    seed: int = 0,
    by_column: bool = False,
    with_scaffold: bool = False,
) -> Cleaning:
    """Clean rows as they stream; iterate over the result for batches, then read its `report`.

    Args:
        num_workers: 0: in this process, which absurd input may end; else so many guarded processes.
        rejects_file: a CSV of `REJECT_COLUMNS`, one line a rejected row.
        seed: of the random SMILES (`config.pool`), with the number of the row.
        by_column: every row must say its part in `split`.
    """
    return Cleaning(rows, config, tokenizer, num_workers, progress, rejects_file, seed, by_column, with_scaffold)


class Cleaning:
    """One pass over rows; `report` is complete when the iteration is over. The rows of 16-byte hashes that find
    duplicates are all that grows with the data (about 100 bytes a molecule)."""

    def __init__(
        self,
        rows: Iterable[Row],
        config: DataConfig,
        tokenizer: SmilesTokenizer,
        num_workers: int,
        progress: bool,
        rejects_file: Path | None,
        seed: int,
        by_column: bool,
        with_scaffold: bool,
    ) -> None:
        self.report = CleanReport()
        self._rows, self._config, self._tokenizer = rows, config, tokenizer
        self._num_workers, self._progress, self._rejects_file = num_workers, progress, rejects_file
        self.with_scaffold, self._by_column = with_scaffold, by_column
        self._known = frozenset(tokenizer.vocabulary)
        self._seen: set[bytes] = set()
        self._rejects_csv: Any = None
        self.first_reject = ""  # of a row that is not blank, for the message where no molecule is left
        self._options = ChunkOptions(
            clean={
                "salts": config.salts,
                "atom_maps": config.atom_maps,
                "neutralize": config.neutralize,
                "canonical_tautomer": config.canonical_tautomer,
            },
            key={"smiles": "smiles", "inchikey": "inchikey", "keep": ""}[config.duplicates],
            with_scaffold=with_scaffold,
            with_mol=config.cache_molecules,
            pool=config.pool,
            max_atoms=config.max_length - 2,
            seed=seed,
        )

    def __iter__(self) -> Iterator[CleanBatch]:
        with ExitStack() as stack:
            if self._rejects_file is not None:
                file = stack.enter_context(
                    self._rejects_file.open("w", encoding="utf-8", errors="backslashreplace", newline="")
                )
                self._rejects_csv = csv.writer(file)
                self._rejects_csv.writerow(REJECT_COLUMNS)
            bar = stack.enter_context(_progress_bar()) if self._progress else None
            for chunk, results, blob in self._results(stack):
                batch = self._finish(chunk, results, blob)
                if bar is not None:
                    bar.update(len(chunk))
                if batch.smiles:
                    yield batch
        self.report.check()

    def _results(self, stack: ExitStack) -> Iterator[tuple[list[_Numbered], list[Any], bytes]]:
        """Chunks of rows with what the workers made of those that were readable."""
        pending: list[list[_Numbered]] = []

        def requests() -> Iterator[list[Any]]:
            for chunk in self._chunks():
                pending.append(chunk)
                yield [[number, row.text, row.is_mol_block] for number, row, problem, _ in chunk if not problem]

        if self._num_workers:
            pool = GuardedPool(
                "biokit.data.clean_worker",
                dataclasses.asdict(self._options),
                self._num_workers,
                failed=lambda reason: [reason, ""],
            )
            for _, results, blob in stack.enter_context(pool).map(requests()):
                yield pending.pop(0), results, blob
        else:
            run = make_chunk_function(self._options)
            for request in requests():
                yield pending.pop(0), *run(request)

    def _chunks(self) -> Iterator[list[_Numbered]]:
        numbered = ((number, row, *self._problem(row)) for number, row in enumerate(self._rows))
        while chunk := list(islice(numbered, _CHUNK_ROWS)):
            yield chunk

    def _problem(self, row: Row) -> tuple[str, str]:
        if row.problem:
            return row.problem, row.detail
        if self._by_column and row.split.lower() not in PARTS:
            return NO_PART, f'it says "{row.split}"'
        return "", ""

    def _finish(self, chunk: list[_Numbered], results: list[Any], blob: bytes) -> CleanBatch:
        """Count, reject, and gather what is kept of one chunk, in the order of its rows."""
        self.report.num_read += len(chunk)
        texts = [result[0] for result in results if len(result) > 2]
        ids, offsets = self._tokenizer.encode_batch(texts)
        lengths = np.diff(offsets) + 2
        unknown = np.zeros(len(texts), dtype=bool)
        unknown[np.searchsorted(offsets, np.flatnonzero(ids == self._tokenizer.unknown_id), side="right") - 1] = True
        answers, place, start = iter(results), 0, 0
        kept: list[tuple[Row, list[Any], bytes, int]] = []
        for _, row, problem, detail in chunk:
            if problem:
                self._reject(row, problem, detail)
                continue
            result = next(answers)
            if len(result) == 2:
                self._reject(row, *result)
                continue
            mol = blob[start : start + result[5]]
            start += result[5]
            problem, detail = self._unfit(result, int(lengths[place]), bool(unknown[place]))
            if problem:
                self._reject(row, problem, detail)
            else:
                kept.append((row, result, mol, place))
            place += 1
        return self._gather(kept, ids, offsets)

    def _unfit(self, result: list[Any], length: int, has_unknown: bool) -> tuple[str, str]:
        """Why a parsed molecule is rejected all the same."""
        smiles, _, key, *_ = result
        if length > self._config.max_length:
            return TOO_LONG, f"{length} tokens, at most {self._config.max_length}"
        if has_unknown:
            odd = [token for token in dict.fromkeys(self._tokenizer.tokens(smiles)) if token not in self._known]
            self.report.unknown_tokens.update(odd)
            if self._config.unknown_tokens == "drop":
                return UNKNOWN_TOKEN, " ".join(odd)
        if self._config.duplicates != "keep":
            digest = hashlib.blake2b((key or smiles).encode(), digest_size=16).digest()
            if digest in self._seen:
                return DUPLICATE, key or smiles
            self._seen.add(digest)
        self.report.lengths[length] += 1
        return "", ""

    def _reject(self, row: Row, reason: str, detail: str) -> None:
        if self._config.on_bad == "raise" and reason not in _HARMLESS:
            why = detail if reason == UNPARSABLE else f"is rejected: {reason}" + (f" ({detail})" if detail else "")
            form = "molecule" if row.is_mol_block else "SMILES"
            shown = row.name if row.is_mol_block else row.text[:80]
            do = 'Fix the row, or pass on_bad="drop"'
            raise DataError(f"{row.file} row {row.row}", f'{form} "{shown}" {why}', do)
        self.report.rejects[reason] += 1
        if not self.first_reject and reason != BLANK:
            shown = row.name if row.is_mol_block else row.text[:80]
            self.first_reject = f'{Path(row.file).name} row {row.row} "{shown}" {detail or reason}'
        if self._rejects_csv is not None:
            self._rejects_csv.writerow((row.file, row.row, row.text, reason, detail))

    def _gather(self, kept: list[Any], ids: NDArray[np.uint16], offsets: NDArray[np.int64]) -> CleanBatch:
        self.report.num_kept += len(kept)
        smiles = [result[0] for _, result, _, _ in kept]
        for _, result, _, _ in kept:
            self.report.changes.update(result[1])
        if self._config.pool:
            ids, offsets = self._encode_pools(kept)
        else:
            mask = np.zeros(len(offsets) - 1, dtype=bool)
            mask[[place for *_, place in kept]] = True
            lengths = np.diff(offsets)
            ids = ids[np.repeat(mask, lengths)]
            offsets = np.concatenate(([0], np.cumsum(lengths[mask])))
        digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in smiles]
        parts = [_PART_NUMBERS[PARTS[row.split.lower()]] if self._by_column else -1 for row, *_ in kept]
        return CleanBatch(
            rows=[row for row, *_ in kept],
            smiles=smiles,
            ids=ids,
            offsets=offsets,
            num_sequences=1 + self._config.pool,
            mols=[mol for _, _, mol, _ in kept] if self._config.cache_molecules else [],
            scaffolds=[result[3] for _, result, _, _ in kept],
            parts=np.array(parts, dtype=np.int8),
            hashes=np.frombuffer(b"".join(digests), dtype="<u8"),
        )

    def _encode_pools(self, kept: list[Any]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        """The canonical SMILES and its random ones; one that is too long or unknown gives way to the canonical."""
        texts: list[str] = []
        for _, result, _, _ in kept:
            texts += [result[0], *result[4]]
        ids, offsets = self._tokenizer.encode_batch(texts)
        unfit = np.diff(offsets) + 2 > self._config.max_length
        unfit[np.searchsorted(offsets, np.flatnonzero(ids == self._tokenizer.unknown_id), side="right") - 1] = True
        if not unfit.any():
            return ids, offsets
        each = 1 + self._config.pool
        texts = [texts[index - index % each] if unfit[index] else text for index, text in enumerate(texts)]
        return self._tokenizer.encode_batch(texts)


_Numbered = tuple[int, Row, str, str]
_PART_NUMBERS = {"train": 0, "val": 1, "test": 2}


def _progress_bar() -> Any:
    from tqdm.auto import tqdm

    return tqdm(desc="cleaning", unit=" rows", mininterval=0.5)
