"""The molecules that are measured: WEHI from the installed rdkit; MOSES and ChEMBL where BIOKIT_REAL_DATA says."""

from __future__ import annotations

import functools
import gzip
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from biokit.chem.molecules import canonicalize, mol_to_bytes
from biokit.data.indexed import StoreWriter, TokenStore
from biokit.data.tables import read_table
from biokit.datasets import locate
from biokit.tokenizers import SmilesTokenizer

NAMES = ("WEHI", "MOSES", "ChEMBL")
MAX_LENGTH = 1024  # tokens of a side; some molecules of ChEMBL have more than the default, and all are to be measured

_FILES = {"MOSES": "smiles_moses_zinc/train.csv.gz", "ChEMBL": "smiles_chembl/chembl_deepchem.csv.gz"}
_MOSES_STEP = 16  # every 16th of 1.58 million: 99,042 molecules


@functools.cache
def load_smiles(name: str, limit: int = 0) -> tuple[str, ...] | None:
    """Canonical SMILES of a corpus (about `limit`, evenly spaced, 0: all); None where it is not on this machine."""
    texts = _load_texts(name)
    chosen = texts[:: max(1, len(texts) // limit)] if limit else texts
    return tuple(canonicalize(text) for text in chosen) or None


@functools.cache
def _load_texts(name: str) -> tuple[str, ...]:
    """What the file says, or nothing."""
    if name == "WEHI":
        return tuple(row.text for row in read_table([locate("wehi_mols")]))
    folder = os.environ.get("BIOKIT_REAL_DATA", "")
    if not folder:
        return ()
    with gzip.open(Path(folder) / _FILES[name], "rt", encoding="utf-8") as file:
        lines = islice(file, 1, None, _MOSES_STEP if name == "MOSES" else 1)
        return tuple(line.rstrip("\n").split(",")[0] for line in lines)


def write_store(prefix: Path, tokenizer: SmilesTokenizer, smiles: Sequence[str], num_sequences: int = 1) -> TokenStore:
    """A token store of SMILES, `num_sequences` a molecule."""
    with StoreWriter(prefix, np.uint16, {"vocab_hash": tokenizer.hash}) as writer:
        writer.add_documents(*tokenizer.encode_batch(smiles), num_sequences)
    return TokenStore.open(prefix)


def write_molecules(prefix: Path, smiles: Sequence[str]) -> TokenStore:
    """A store of cached molecules."""
    mols = [np.frombuffer(mol_to_bytes(text), dtype=np.uint8) for text in smiles]
    offsets = np.concatenate(([0], np.cumsum([len(mol) for mol in mols])))
    with StoreWriter(prefix, np.uint8) as writer:
        writer.add_documents(np.concatenate(mols), offsets)
    return TokenStore.open(prefix)
