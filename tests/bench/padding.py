"""Padded over real tokens of both sides, in batches of 128, of what the loader really hands out."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from biokit.chem.molecules import mol_to_bytes, random_smiles
from biokit.config import DataConfig
from biokit.data.indexed import TokenStore
from biokit.data.molecules import MoleculeLoader
from biokit.tokenizers import SmilesTokenizer
from tests.bench import corpora
from tests.bench.timing import Row

BATCH_SIZE, SEED, POOL, TARGET = 128, 1234, 10, 1.05
RANDOM = "random batches padded to their longest"
MASK = "padded / real tokens (encoder / decoder), task mask, {}"
AUG = "padded / real tokens, task aug, made on the way, {}"
AUG_POOL = "padded / real tokens, task aug, pool of ten, {}"

Sides = tuple[float, float]  # encoder, decoder


def measure(name: str, limit: int = 0, aug_limit: int = 0, epochs: int = 3) -> list[Row]:
    """Rows of one corpus; the numbers are padded over real tokens, encoder / decoder, the worst of the epochs."""
    smiles = corpora.load_smiles(name, limit)
    if smiles is None:
        return [Row(MASK.format(name), RANDOM, target=f"at most {TARGET}")] + [
            Row(what.format(name), RANDOM) for what in (AUG, AUG_POOL)
        ]
    tokenizer = SmilesTokenizer.packaged()
    fewer = smiles[:: max(1, len(smiles) // aug_limit)] if aug_limit else smiles
    with tempfile.TemporaryDirectory() as folder:
        store = corpora.write_store(Path(folder) / "mask", tokenizer, smiles)
        few = corpora.write_store(Path(folder) / "aug", tokenizer, fewer)
        mols = corpora.write_molecules(Path(folder) / "aug_molecules", fewer)
        pool = corpora.write_store(Path(folder) / "pool", tokenizer, _pools(fewer), 1 + POOL)
        return [
            _row(MASK.format(name), store, None, "mask", epochs, TARGET),
            _row(AUG.format(name), few, mols, "aug", 1),
            _row(AUG_POOL.format(name), pool, None, "aug", epochs),
        ]


def measure_all() -> list[Row]:
    return [row for name in corpora.NAMES for row in measure(name, aug_limit=10_000)]


def _pools(smiles: Sequence[str]) -> list[str]:
    """Each canonical SMILES with its pool."""
    pools = ([text, *random_smiles(mol_to_bytes(text), POOL, seed)] for seed, text in enumerate(smiles))
    return [text for pool in pools for text in pool]


def _row(
    what: str, store: TokenStore, mols: TokenStore | None, task: str, epochs: int, target: float | None = None
) -> Row:
    bucketed = [_padding(store, mols, task, epoch, True) for epoch in range(epochs)]
    at_random = [_padding(store, mols, task, epoch, False) for epoch in range(epochs)]
    worst = max(max(sides) for sides in bucketed)
    return Row(
        what=f"{what} ({len(store):,} molecules)",
        peer=RANDOM,
        ours=_show(bucketed),
        theirs=_show(at_random),
        target="-" if target is None else f"at most {target}",
        met=None if target is None else worst <= target,
    )


def _show(sides: list[Sides]) -> str:
    encoder, decoder = (max(side) for side in zip(*sides, strict=True))
    return f"{encoder:.3f} / {decoder:.3f}"


def _padding(store: TokenStore, mols: TokenStore | None, task: str, epoch: int, buckets: bool) -> Sides:
    """Padded over real tokens of an epoch's encoder and decoder matrices."""
    tokenizer = SmilesTokenizer.packaged()
    data = DataConfig(task=task, length_buckets=buckets, max_length=corpora.MAX_LENGTH)
    padded, real = {"encoder_ids": 0, "decoder_ids": 0}, {"encoder_ids": 0, "decoder_ids": 0}
    for batch in MoleculeLoader(store, mols, tokenizer, data, SEED, BATCH_SIZE).epoch(epoch):
        for key in padded:
            padded[key] += batch[key].size
            real[key] += int((batch[key] != tokenizer.pad_id).sum())
    return padded["encoder_ids"] / real["encoder_ids"], padded["decoder_ids"] / real["decoder_ids"]
