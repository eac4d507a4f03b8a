"""The SMILES vocabulary that ships with biokit, made again from molecules inside the installed rdkit wheel.

`python -m biokit.data.vocabulary` writes it. Tokens stand in order of first appearance in the canonical SMILES
and a few random ones of each molecule; what random SMILES of other molecules may write fills the rest of the 523.
"""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from biokit.errors import DataError, EngineError
from biokit.tokenizers import PACKAGED_VOCABULARY, SmilesTokenizer
from biokit.vocabularies import CHEM_START, CHEMISTRY, VOCAB_SIZE

NUM_RANDOM = 4  # random SMILES a molecule
SEED = 0

# Files of the rdkit wheel (BSD-3): path, delimiter (None: white space), columns (a number, or a prefix of names).
SOURCES: tuple[tuple[str, str | None, int | str], ...] = (
    ("Data/Pains/test_data/wehi_mols.csv", ",", 0),
    ("Data/NCI/first_5K.smi", None, 0),
    ("Contrib/FreeWilson/data/CHEMBL2321810.smi", None, 0),
    ("Contrib/NIBRSubstructureFilters/SubstructureFilter_HitTriaging_wPubChemExamples.csv", ",", "EX"),
    ("Contrib/fraggle/data/ChEMBL_11265_actives.smi", None, 0),
    ("Contrib/Fastcluster/cdk2.smi", None, 1),
)


def build_packaged_vocabulary() -> SmilesTokenizer:
    """Make the packaged vocabulary: the same bytes on every machine with the same rdkit. About 7 seconds.

    Raises:
        EngineError: rdkit, or a file of its wheel, is not installed.
    """
    return complete_vocabulary(chain.from_iterable(write_variants(smiles) for smiles in read_wheel_smiles()))


def complete_vocabulary(smiles: Iterable[str]) -> SmilesTokenizer:
    """A vocabulary of 523 entries: the chemistry of `smiles`, then the closure, as far as there is room."""
    found = dict.fromkeys(chain.from_iterable(CHEMISTRY.findall(text) for text in smiles))
    room = VOCAB_SIZE - CHEM_START - len(found)
    missing = (token for token in dict.fromkeys(close_tokens(found)) if token not in found)
    return SmilesTokenizer.build(chain(found, islice(missing, max(room, 0))))


def read_wheel_smiles() -> Iterator[str]:
    """The SMILES texts of `SOURCES`, in order, as they stand in the files."""
    spec = importlib.util.find_spec("rdkit")
    if spec is None or not spec.submodule_search_locations:
        raise EngineError("build the vocabulary", "rdkit is not installed", "Install it: pip install rdkit")
    folder = Path(spec.submodule_search_locations[0])
    for name, delimiter, columns in SOURCES:
        try:
            lines = (folder / name).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise EngineError("build the vocabulary", f"rdkit has no {name}", "Install rdkit from its wheel") from error
        rows = [line.split() for line in lines] if delimiter is None else list(csv.reader(lines, delimiter=delimiter))
        if isinstance(columns, int):
            places, rows = [columns], rows
        else:
            places, rows = [i for i, title in enumerate(rows[0]) if title.startswith(columns)], rows[1:]
        yield from (row[i] for row in rows for i in places if i < len(row) and row[i])


def write_variants(smiles: str) -> list[str]:
    """The canonical SMILES and `NUM_RANDOM` random ones; none where the text is no molecule (8 rows of NCI)."""
    from biokit.chem.molecules import canonicalize, mol_to_bytes, random_smiles

    try:
        canonical = canonicalize(smiles)
    except DataError:
        return []
    return [canonical, *random_smiles(mol_to_bytes(canonical), NUM_RANDOM, SEED)]


def close_tokens(found: Iterable[str]) -> Iterator[str]:
    """What random SMILES of molecules like these may write besides, the likeliest first; repeats included."""
    for token in found:  # the other hand of each stereo centre
        if "@" in token:
            yield token.replace("@@", "@")
            yield token.replace("@", "@@") if "@@" not in token else token
    yield from "123456789()-=#:/\\.*BCNOPSFIbcnops"
    yield from ("Cl", "Br", "[H]", *(f"%{label}" for label in range(10, 20)))
    for symbol, rest in (("C", ""), ("C", "H"), ("N", "+"), ("N", "H+"), ("S", ""), ("S", "+"), ("P", ""), ("P", "+")):
        yield from (f"[{symbol}{hand}{rest}]" for hand in ("@", "@@"))
    yield from _bracket("Si@ Si@@ B@- B@@- se te se+ te+ nH+ n- s+ o+ c- cH- c+ b- H+ 2H 3H 18F 18F- 18O 18OH")
    yield from _bracket("11C 11CH2 11CH3 13C 13CH 13CH2 13CH3 13c 13cH 14C 14CH 14CH2 14CH3 14c 14cH 15N 15n 15nH")
    yield from _bracket("123I 124I 125I 131I 76Br 32P 35S 75Se I- Br- Cl- F- OH- K+ Na+ Li+ Ca+2 Mg+2 Zn+2 Al+3 Ag+")
    yield from _bracket("B BH- BH2- BH3- B- NH- NH+ NH2+ NH3+ NH4+ O- OH+ S- SH+ P- PH PH2 PH+ C- C+ CH- CH+ CH2-")
    yield from _bracket("Se SeH Se- Se+ Te Si SiH SiH2 SiH3 Si- As As+ As- AsH I+ Rb+ Cs+ Sr+2 Ba+2 Bi+3 Cu+ Cu+2")
    yield from _bracket("Fe+2 Fe+3 Mn+2 Co+2 Ni+2 Gd+3 O-2 S-2 123I- 131I- 82Rb+ 89Sr+2 99Tc Li Na K Mg Ca Zn Ag Al")


def _bracket(atoms: str) -> Iterator[str]:
    return (f"[{atom}]" for atom in atoms.split())


if __name__ == "__main__":
    build_packaged_vocabulary().save(PACKAGED_VOCABULARY)
