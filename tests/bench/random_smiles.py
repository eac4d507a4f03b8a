"""Random SMILES from cached molecules and in pools of ten, against RDKit's parse and write of one at a time."""

from __future__ import annotations

from collections.abc import Callable

from rdkit import Chem

from biokit.chem.molecules import mol_to_bytes, random_smiles
from tests.bench import corpora
from tests.bench.timing import Row, compare

POOL = 10
PEER = "RDKit parse + write, one at a time"
ONE = "random SMILES one at a time, cached molecules, {}"
POOLED = "random SMILES in pools of ten, cached molecules, {}"
PARSED = "random SMILES in pools of ten, parsed first, {}"
TARGETS = {ONE: 1.9, POOLED: 4.0, PARSED: None}


def measure(name: str, limit: int = 0, rounds: int = 5) -> list[Row]:
    """Rows of one corpus; strings per CPU-second."""
    smiles = corpora.load_smiles(name, limit)
    if smiles is None:
        return [
            Row(what.format(name), PEER, target=f"at least {least:g}x" if least else "-")
            for what, least in TARGETS.items()
        ]
    cached = [mol_to_bytes(text) for text in smiles]
    pooled = cached[:: POOL // 2]
    texts = smiles[:: POOL // 2]
    works: dict[str, Callable[[], int]] = {
        ONE: lambda: sum(len(random_smiles(mol, 1, seed)) for seed, mol in enumerate(cached)),
        POOLED: lambda: sum(len(random_smiles(mol, POOL, seed)) for seed, mol in enumerate(pooled)),
        PARSED: lambda: sum(len(random_smiles(mol_to_bytes(text), POOL, seed)) for seed, text in enumerate(texts)),
    }
    rows = []
    for what, work in works.items():
        least = TARGETS[what]
        rates = compare({what.format(name): work, PEER: lambda: _parse_and_write(smiles)}, "strings", rounds)
        rows += rates.rows({PEER: least} if least else {})
    return rows


def measure_all() -> list[Row]:
    return [row for name in corpora.NAMES for row in measure(name, limit=3_000)]


def _parse_and_write(smiles: tuple[str, ...]) -> int:
    return len([Chem.MolToSmiles(Chem.MolFromSmiles(text), doRandom=True) for text in smiles])
