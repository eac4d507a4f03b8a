"""What one process does to a chunk of rows: parse, clean, canonicalise, and what the options ask besides."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from biokit.data.guarded import ChunkFunction, limit_cpu_time, serve

UNPARSABLE = "not parsable"

Result = list[Any]
"""A rejected row: [reason, detail]. A kept one: [SMILES, changes, key, scaffold, pool, bytes of its molecule]."""


@dataclass(frozen=True, slots=True)
class ChunkOptions:
    """What is to be done to every row, as plain values.

    Attributes:
        clean: the arguments of `biokit.chem.molecules.CleanOptions`.
        key: "smiles", "inchikey" or "" (no key): what makes two rows duplicates.
        with_scaffold, with_mol: whether to return those.
        pool: random SMILES a molecule; none for one with more atoms than `max_atoms`, which is too long anyway.
        seed: with a row's number it decides its random SMILES.
        row_timeout_s: processor seconds that one row may take in a guarded process.
    """

    clean: dict[str, Any] = field(default_factory=dict)
    key: str = "smiles"
    with_scaffold: bool = False
    with_mol: bool = False
    pool: int = 0
    max_atoms: int = 510
    seed: int = 0
    row_timeout_s: float = 30.0


def make_chunk_function(options: ChunkOptions, guarded: bool = False) -> ChunkFunction:
    """A function from rows [number, text, is_mol_block] to results and the bytes of their molecules."""
    from biokit.chem.molecules import CleanOptions, clean_molecule
    from biokit.errors import DataError

    clean_options = CleanOptions(**options.clean)

    def run(rows: list[Any]) -> tuple[list[Result], bytes]:
        results: list[Result] = []
        mols: list[bytes] = []
        for number, text, is_mol_block in rows:
            if guarded:
                limit_cpu_time(options.row_timeout_s)
            try:
                cleaned = clean_molecule(text, clean_options, is_mol_block)
                result, mol = _extras(cleaned, number, options)
            except DataError as error:
                result, mol = [UNPARSABLE, error.found], b""
            except (RuntimeError, ValueError, MemoryError) as error:  # RDKit's own, from a step after parsing
                result, mol = [UNPARSABLE, f"RDKit fails on it ({str(error).strip().splitlines()[:1]})"], b""
            results.append(result)
            mols.append(mol)
        if guarded:
            limit_cpu_time(0)
        return results, b"".join(mols)

    return run


def row_seed(seed: int, number: int) -> int:
    """The seed of one row: 31 well mixed bits of (seed, number)."""
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


def _extras(cleaned: Any, number: int, options: ChunkOptions) -> tuple[Result, bytes]:
    from biokit.chem.molecules import inchikey, mol_to_bytes, random_smiles, scaffold

    key = inchikey(cleaned.mol) if options.key == "inchikey" else ""
    group = scaffold(cleaned.mol) if options.with_scaffold else ""
    mol = mol_to_bytes(cleaned.mol) if options.with_mol or options.pool else b""
    wanted = options.pool if cleaned.mol.GetNumAtoms() <= options.max_atoms else 0
    pool = random_smiles(mol, wanted, row_seed(options.seed, number)) if wanted else []
    if not options.with_mol:
        mol = b""
    return [cleaned.smiles, list(cleaned.changes), key, group, pool, len(mol)], mol


def _prepare(setup: dict[str, Any]) -> ChunkFunction:
    return make_chunk_function(ChunkOptions(**setup), guarded=True)


if __name__ == "__main__":
    serve(_prepare)
