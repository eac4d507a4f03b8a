"""From tables of molecules to a folder of token stores: read, clean, split, tokenise.

The folder holds train, val and test as token stores (and their molecules where cached), `vocab.txt`, `report.json`
(what cleaning did), `rejects.csv` (each row left out, and why) and `preprocess.json` (what it was made from).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import biokit
from biokit.config import DataConfig
from biokit.data.clean import NO_PART, Cleaning, CleanReport, clean
from biokit.data.indexed import StoreWriter
from biokit.data.molecules import store_prefixes
from biokit.data.publish import publish_folder
from biokit.data.sources import Source, find_sources
from biokit.data.split import (
    PART_NAMES,
    Parts,
    parse_ratio,
    split_at_random,
    split_by_ratio,
    split_by_scaffold,
)
from biokit.data.spool import Spool
from biokit.data.tables import Row, TableForm, describe_table, read_table
from biokit.errors import DataError
from biokit.tokenizers import SmilesTokenizer

DONE_FILE = "preprocess.json"

_FORMAT = "biokit preprocess 1"
_NOT_STORED = (  # keys that decide batches, not stores
    "store_dir",
    "task",
    "mask_scheme",
    "mask_prob",
    "span_lambda",
    "show_mask_token_prob",
    "length_buckets",
    "max_tokens",
    "num_workers",
)


_FREE_IN_READY = ("dataset_path", "dataset", "max_length")  # the loader looks at the lengths itself


@dataclass(frozen=True)
class PreprocessReport:
    """What preprocessing did, or found done.

    Attributes:
        molecules: of each part.
        tables: how each file was read.
        reused: the folder was finished already and nothing was done.
    """

    folder: Path
    molecules: dict[str, int]
    split: str
    tables: list[str]
    cleaning: CleanReport
    reused: bool = False

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {count:,}" for part, count in self.molecules.items())
        empty = [part for part, count in self.molecules.items() if not count]
        lines = [*self.tables, str(self.cleaning), f"split ({self.split}): {parts}"]
        lines += [f"{' and '.join(empty)}: no molecules"] if empty else []
        lines += ["nothing to do: the folder was finished already"] if self.reused else []
        return "\n".join(lines)


def preprocess(
    data: DataConfig, out: str | Path, seed: int, progress: bool = True, *, overwrite: bool = False
) -> PreprocessReport:
    """Make the folder of token stores `out`, or find it made from the same data and configuration.

    A `data.dataset_path` that is such a folder itself is left where it is: see `folder` of the report. `out` appears
    whole or not at all. Rows are cleaned in `data.num_workers` processes (0: one a processor).

    Args:
        seed: of the split and of the random SMILES.
        overwrite: replace a finished folder made from something else.

    Raises:
        DataError: input that cannot be read, a bad row with on_bad="raise", no molecule left, a vocabulary that the
            folder cannot keep, a folder made from something else, a full disk.
    """
    out = Path(out)
    if _is_finished(Path(data.dataset_path)):
        _check_ready(Path(data.dataset_path), data)
        return load_report(data.dataset_path)
    tokenizer = SmilesTokenizer.from_file(data.vocab_file) if data.vocab_file else SmilesTokenizer.packaged()
    identity = {"format": _FORMAT, "data_hash": data_hash(data, seed, tokenizer.hash)}
    if _is_finished(out) and not overwrite:
        return _reuse(out, data, identity)
    if not overwrite:
        _check_free(out)
    sources = find_sources(data)
    with publish_folder(out, overwrite) as folder:
        _save_vocabulary(tokenizer, folder / "vocab.txt", data.vocab_file)
        report = _build(folder, sources, data, tokenizer, seed, progress)
        inputs = [_describe_input(source) for source in sources]
        _write_json(folder / "report.json", _report_tree(report))
        about = {**identity, "biokit": biokit.__version__, "seed": seed, "vocab_hash": tokenizer.hash}
        about |= {"data": dataclasses.asdict(data), "molecules": report.molecules, "inputs": inputs}
        _write_json(folder / DONE_FILE, about)
    return dataclasses.replace(report, folder=out)


def load_report(folder: str | Path) -> PreprocessReport:
    """The report of a finished folder. Raises DataError where there is none."""
    folder = Path(folder)
    try:
        tree = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        cleaning = CleanReport(tree["num_read"], tree["num_kept"])
        for name in ("rejects", "changes", "unknown_tokens"):
            getattr(cleaning, name).update(tree[name])
        cleaning.lengths.update({int(length): count for length, count in tree["lengths"].items()})
        return PreprocessReport(folder, tree["molecules"], tree["split"], tree["tables"], cleaning, reused=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"report of {folder}", f"it cannot be read ({error})", "Preprocess again") from error


def data_hash(data: DataConfig, seed: int, vocab_hash: str) -> str:
    """sha256 of all that decides the stores, except the content of the input files."""
    tree = {key: value for key, value in dataclasses.asdict(data).items() if key not in _NOT_STORED}
    tree |= {"vocab_file": vocab_hash, "seed": seed}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _build(
    folder: Path,
    sources: list[Source],
    data: DataConfig,
    tokenizer: SmilesTokenizer,
    seed: int,
    progress: bool,
) -> PreprocessReport:
    forms = [
        describe_table(source.path, smiles_column=data.smiles_column, split_column=data.split_column)
        for source in sources
    ]
    split = _choose_split(data, sources, forms)
    fractions = parse_ratio(data.split_ratio)
    cleaning = clean(
        _rows(sources, data),
        data,
        tokenizer,
        num_workers=data.num_workers or _num_processors(),
        progress=progress,
        rejects_file=folder / "rejects.csv",
        seed=seed,
        by_column=split in ("column", "files"),
        with_scaffold=split == "scaffold",
    )
    with Spool(folder / "spool") as spool:
        groups = _fill(spool, cleaning)
        if not spool.num_molecules:
            found = f"no molecule is left of {cleaning.report.num_read} rows ({_worst(cleaning)})"
            key = "data.split_column" if cleaning.report.rejects[NO_PART] else "data.smiles_column"
            raise DataError(f"preprocess {data.dataset_path}", found, f"Check the file and {key}")
        parts: Parts
        if split in ("column", "files"):
            parts = spool.parts()
        elif split == "ratio":
            parts = split_by_ratio(spool.num_molecules, fractions)
        elif split == "scaffold":
            parts = split_by_scaffold(np.array(groups, dtype=np.int64), fractions, seed)
        else:
            parts = split_at_random(spool.hashes(), fractions, seed)
        counts = dict(zip(PART_NAMES, np.bincount(parts, minlength=3).tolist(), strict=True))
        if not counts["train"]:
            do = {"files": "Set data.dataset.train", "column": "Check its values"}.get(split, "Change data.split_ratio")
            raise DataError(f"split ({split}) of {data.dataset_path}", "train is empty", do)
        _write_stores(folder, spool, parts, tokenizer, data)
    return PreprocessReport(folder, counts, split, [str(form) for form in forms], cleaning.report)


def _rows(sources: list[Source], data: DataConfig) -> Iterator[Row]:
    """The rows of all tables; at most `data.limit_rows`, of each part where files are of parts."""
    for part in dict.fromkeys(source.part for source in sources):
        paths = [source.path for source in sources if source.part == part]
        rows = read_table(paths, smiles_column=data.smiles_column, split_column=data.split_column)
        limited = islice(rows, data.limit_rows or None)
        yield from (row._replace(split=part) for row in limited) if part else limited


def _choose_split(data: DataConfig, sources: list[Source], forms: list[TableForm]) -> str:
    """How parts are made: "files" (each is of one part), "column", "ratio", "random" or "scaffold"."""
    if any(source.part for source in sources):
        return "files"
    lacking = [form.path.name for form in forms if form.columns.split is None and not form.columns.split_name]
    if data.split == "column" and lacking:
        found = f"{', '.join(lacking[:5])} has no column `set` or `split` that says train, val or test"
        raise DataError("split by column", found, "Name it with data.split_column, or choose another data.split")
    if data.split == "auto" and lacking and len(lacking) < len(forms):
        found = f"{', '.join(lacking[:5])} has no split column, other files have one"
        raise DataError("split of several files", found, "Add it, or choose data.split=random, ratio or scaffold")
    if data.split == "auto":
        return "random" if lacking else "column"
    return data.split


def _fill(spool: Spool, cleaning: Cleaning) -> list[int]:
    """Clean everything into the spool; returns the scaffold group of each molecule (empty without scaffolds)."""
    numbers: dict[str, int] = {}
    groups: list[int] = []
    with closing(iter(cleaning)) as batches:  # type: ignore[type-var]
        for batch in batches:
            spool.add(batch)
            if cleaning.with_scaffold:
                for scaffold, smiles in zip(batch.scaffolds, batch.smiles, strict=True):
                    key = scaffold or f"acyclic {smiles}"
                    groups.append(numbers.setdefault(key, len(numbers)))
    return groups


def _write_stores(folder: Path, spool: Spool, parts: Parts, tokenizer: SmilesTokenizer, data: DataConfig) -> None:
    with ExitStack() as stack:
        writers, mols = [], []
        for part in PART_NAMES:
            metadata = {
                "vocab_hash": tokenizer.hash,
                "part": part,
                "pool": data.pool,
                "max_length": data.max_length,
            }
            prefix, mols_prefix = store_prefixes(folder, part)
            writers.append(stack.enter_context(StoreWriter(Path(prefix), np.uint16, metadata)))
            if data.cache_molecules:
                mols.append(stack.enter_context(StoreWriter(Path(mols_prefix), np.uint8, {"part": part})))
        spool.write_stores(parts, writers, mols)
        for writer, molecules in zip(writers, mols, strict=False):  # no molecules where they are not cached
            molecules.metadata["ids_sha256"] = writer.bin_sha256


def _check_ready(folder: Path, data: DataConfig) -> None:
    """Refuse keys that ask a finished folder, given as the data set itself, to be other than it is."""
    asked = f"data.dataset_path={folder}"
    try:
        made = json.loads((folder / DONE_FILE).read_text(encoding="utf-8"))["data"]
        settled = [f.name for f in dataclasses.fields(data) if f.name not in (*_NOT_STORED, *_FREE_IN_READY)]
        wanted = {key: getattr(data, key) for key in settled if getattr(data, key) != getattr(DataConfig(), key)}
        other = [f"{key}={value}, made with {made[key]}" for key, value in wanted.items() if made[key] != value]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(asked, f"its {DONE_FILE} cannot be read ({error})", "Preprocess again") from error
    if other:
        do = "Leave the key out, or preprocess the molecules again with it"
        raise DataError(asked, f"it is preprocessed already, otherwise than asked ({'; '.join(other)})", do)


def _reuse(out: Path, data: DataConfig, identity: dict[str, str]) -> PreprocessReport:
    """The report of a finished folder, if it was made from the same configuration and, where present, files."""
    asked = f"preprocess to {out}"
    do = "Give another folder (data.store_dir or run_dir), or overwrite=True"
    try:
        about = json.loads((out / DONE_FILE).read_text(encoding="utf-8"))
        same = {key: about[key] for key in identity} == identity
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(asked, f"{DONE_FILE} there cannot be read ({error})", do) from error
    if not same:
        now = {key: value for key, value in dataclasses.asdict(data).items() if key not in _NOT_STORED}
        other = [key for key, value in now.items() if about.get("data", {}).get(key) != value]
        raise DataError(asked, f"it was made with another {', '.join(other) or 'seed or vocabulary'}", do)
    changed = [noted["path"] for noted in about["inputs"] if _has_changed(noted)]
    if changed:
        raise DataError(asked, f"it was made before {', '.join(changed)} changed", do)
    return load_report(out)


def _describe_input(source: Source) -> dict[str, Any]:
    status = source.path.stat()
    with source.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "path": str(source.path.resolve()),
        "part": source.part,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "sha256": digest,
    }


def _has_changed(noted: dict[str, Any]) -> bool:
    """Whether an input file is there and holds something else; a file that is gone has not changed."""
    path = Path(noted["path"])
    if not path.is_file():
        return False
    status = path.stat()
    if (status.st_size, status.st_mtime_ns) == (noted["size"], noted["mtime_ns"]):
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() != noted["sha256"]


def _report_tree(report: PreprocessReport) -> dict[str, Any]:
    tree = {"molecules": report.molecules, "split": report.split, "tables": report.tables}
    return tree | report.cleaning.to_dict()


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def _worst(cleaning: Cleaning) -> str:
    """The commonest reasons, and the first row that was rejected."""
    reasons = ", ".join(f"{reason}: {count}" for reason, count in cleaning.report.rejects.most_common(3))
    return f"{reasons}; the first: {cleaning.first_reject}" if reasons else "no rows"


def _is_finished(folder: Path) -> bool:
    try:
        return (folder / DONE_FILE).is_file()
    except OSError:  # a name too long, or no permission: what opens it says so
        return False


def _check_free(out: Path) -> None:
    """Refuse a folder in which something else stands, or which cannot be."""
    asked = f"preprocess to {out}"
    try:
        free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    except OSError as error:
        raise DataError(asked, f"it cannot be reached ({error.strerror})", "Give another folder") from error
    if not free:
        raise DataError(asked, "something else stands there", "Give another folder, or remove it")


def _save_vocabulary(tokenizer: SmilesTokenizer, path: Path, vocab_file: str) -> None:
    """Before any row is cleaned: the stores keep the text form, and not every JSON vocabulary fits it."""
    try:
        tokenizer.save(path)
    except DataError as error:
        found = f"the token stores keep it as {path.name}, which cannot hold it: {error.found}"
        do = "Give one with MolBART's special tokens and all chemistry after chem_start_idx"
        raise DataError(f"data.vocab_file {vocab_file}", found, do) from error


def _num_processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
