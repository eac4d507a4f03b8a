import csv
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from biokit.config import DataConfig, DatasetConfig
from biokit.data.indexed import TokenStore
from biokit.data.molecules import store_prefixes
from biokit.data.preprocess import PreprocessReport, load_report, preprocess
from biokit.data.sources import find_sources
from biokit.errors import ConfigError, DataError
from biokit.tokenizers import SmilesTokenizer

SMILES = [f"{'C' * (n % 20 + 1)}{'O' * (n // 20)}" for n in range(60)]


def write_table(path: Path, smiles: list[str], column: str = "smiles") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([column, *smiles]) + "\n")
    return path


def run(data: DataConfig, out: Path, seed: int = 1, **options: bool) -> PreprocessReport:
    data.num_workers = data.num_workers or 1
    return preprocess(data, out, seed, progress=False, **options)


def stored(out: Path, part: str) -> list[str]:
    store, tokenizer = TokenStore.open(out / part), SmilesTokenizer.from_file(out / "vocab.txt")
    return [tokenizer.decode(store.sequence(document)) for document in range(len(store))]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_table(tmp_path / "m.csv", [*SMILES, "C1CC(", "", "CCO"])


def test_everything_is_there(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = run(DataConfig(dataset_path=str(table), split="ratio", split_ratio="80,10,10", pool=2), out)
    assert report.folder == out and not report.reused
    assert report.molecules == {"train": 48, "val": 6, "test": 6}
    assert [len(stored(out, part)) for part in report.molecules] == [48, 6, 6]
    assert [*stored(out, "train"), *stored(out, "val"), *stored(out, "test")] == SMILES
    from biokit.chem.molecules import canonicalize

    tokenizer = SmilesTokenizer.from_file(out / "vocab.txt")
    for part in report.molecules:
        ids, mols = (TokenStore.open(prefix) for prefix in store_prefixes(out, part))
        assert len(ids) == len(mols)
        assert ids.metadata["vocab_hash"] == tokenizer.hash
        assert np.array_equal(ids.document_starts, 3 * np.arange(len(ids) + 1))
        for document in range(len(ids)):
            texts = {tokenizer.decode(ids.sequence(document, k)) for k in range(3)}
            assert {canonicalize(text) for text in texts} == {tokenizer.decode(ids.sequence(document))}
            from rdkit import Chem

            assert Chem.MolToSmiles(Chem.Mol(mols.sequence(document).tobytes())) in texts
    with (out / "rejects.csv").open(newline="") as file:
        assert [(row["row"], row["reason"]) for row in csv.DictReader(file)] == [
            ("62", "not parsable"),
            ("63", "blank row"),
            ("64", "duplicate"),
        ]
    assert load_report(out).cleaning == report.cleaning
    about = json.loads((out / "preprocess.json").read_text())
    assert about["inputs"][0]["path"] == str(table) and about["molecules"] == report.molecules
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.csv", "out"]
    assert not list(out.glob(".*")) and not (out / "spool").exists()


@pytest.mark.parametrize("split", ["random", "scaffold", "ratio"])
def test_the_same_seed_makes_the_same_bytes(table: Path, tmp_path: Path, split: str) -> None:
    for name, num_workers in (("a", 1), ("b", 2)):
        data = DataConfig(dataset_path=str(table), split=split, split_ratio="60,20,20", num_workers=num_workers, pool=1)
        run(data, tmp_path / name, seed=7)
    for path in (tmp_path / "a").glob("*.bin"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    everything = [smiles for part in ("train", "val", "test") for smiles in stored(tmp_path / "a", part)]
    assert sorted(everything) == sorted(SMILES)


def test_split_by_column(tmp_path: Path) -> None:
    table = write_table(tmp_path / "m.csv", ["CC,train", "CCC,Valid", "CCCC,test", "CCCCC,other"], "smiles,set")
    report = run(DataConfig(dataset_path=str(table)), tmp_path / "out")
    assert report.split == "column"
    assert report.molecules == {"train": 1, "val": 1, "test": 1}
    assert report.cleaning.rejects == {"unknown split value": 1}
    plain = write_table(tmp_path / "n.csv", ["CC", "CCC"])
    with pytest.raises(DataError, match="no column `set` or `split`"):
        run(DataConfig(dataset_path=str(plain), split="column"), tmp_path / "out2")


def test_bionemo_folders(tmp_path: Path) -> None:
    for number in range(3):
        write_table(
            tmp_path / "zinc" / "train" / f"x{number:03d}.csv",
            [f"Z{number},{'C' * (number + 1)}"],
            "zinc_id,smiles",
        )
    write_table(tmp_path / "zinc" / "val" / "x000.csv", ["Z,N", "Z,C"], "zinc_id,smiles")
    write_table(tmp_path / "zinc" / "test" / "x000.csv", ["Z,O"], "zinc_id,smiles")
    (tmp_path / "zinc" / "train" / "metadata").write_text("file,size\n")
    whole = DataConfig(dataset_path=str(tmp_path / "zinc"))
    report = run(whole, tmp_path / "a")
    assert report.split == "files"
    assert report.molecules == {"train": 3, "val": 1, "test": 1}
    assert report.cleaning.rejects == {"duplicate": 1}  # the val row that train has already
    named = DataConfig(
        dataset_path=str(tmp_path / "zinc"),
        dataset=DatasetConfig(train="x_OP_000..001_CL_", val="x[000..000]"),
    )
    assert run(named, tmp_path / "b").molecules == {"train": 2, "val": 1, "test": 0}
    named.dataset.train = "x[000..004]"
    with pytest.raises(DataError, match=r"2 do not exist: .*x003.*x004"):
        run(named, tmp_path / "c")


def test_folders_of_files(tmp_path: Path) -> None:
    for part in ("train", "valid"):
        write_table(tmp_path / "a" / f"{part}.csv", ["CC"])
    assert [source.part for source in find_sources(DataConfig(dataset_path=str(tmp_path / "a")))] == [
        "train",
        "val",
    ]
    write_table(tmp_path / "a" / "more.csv", ["CC"])
    with pytest.raises(DataError, match=r"more\.csv"):
        find_sources(DataConfig(dataset_path=str(tmp_path / "a")))
    for number in range(2):
        write_table(tmp_path / "b" / f"x{number}.csv", ["CC"])
    assert [source.part for source in find_sources(DataConfig(dataset_path=str(tmp_path / "b")))] == ["", ""]
    write_table(tmp_path / "b" / "train" / "x.csv", ["CC"])
    with pytest.raises(DataError, match="Keep one of the two"):
        find_sources(DataConfig(dataset_path=str(tmp_path / "b")))


def test_a_named_data_set_and_a_slip(tmp_path: Path) -> None:
    report = run(DataConfig(limit_rows=200), tmp_path / "out")
    assert report.cleaning.num_read == 200
    with pytest.raises(DataError, match='Did you mean "wehi_mols"'):
        run(DataConfig(dataset_path="wehi_mol"), tmp_path / "out2")
    with pytest.raises(DataError, match="do not exist"):
        run(DataConfig(dataset_path=str(tmp_path / "nothing.csv")), tmp_path / "out2")


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("", "it is empty"),
        (",", "no file is named"),
        ("x" * 300 + ".csv", "cannot be reached"),
        ("a\0b.csv", "not exist"),
    ],
)
def test_paths_that_cannot_be(tmp_path: Path, path: str, found: str) -> None:
    with pytest.raises(DataError, match=found):
        run(DataConfig(dataset_path=path), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_without_permission_is_told(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)  # root may read everything
    with pytest.raises(DataError, match=r"cannot be reached \(Permission denied\)"):
        find_sources(DataConfig(dataset_path=str(tmp_path)))


def test_a_file_in_two_parts_is_refused(tmp_path: Path) -> None:
    for number in range(3):
        write_table(tmp_path / f"x{number}.csv", ["CC"])
    data = DataConfig(dataset_path=str(tmp_path), dataset=DatasetConfig(train="x[0..1]", val="x1"))
    with pytest.raises(DataError, match=r"a file stands in two parts: .*x1\.csv"):
        find_sources(data)


def test_some_files_with_a_split_column_and_some_without(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("smiles,set\nCCO,train\nCCN,test\n")
    write_table(tmp_path / "b.csv", ["CCC"])
    data = DataConfig(dataset_path=str(tmp_path))
    with pytest.raises(DataError, match=r"b\.csv has no split column, other files have one"):
        run(data, tmp_path / "out")
    data.split = "random"
    assert sum(run(data, tmp_path / "out").molecules.values()) == 3


def test_a_vocabulary_that_the_stores_cannot_keep_is_refused_first(table: Path, tmp_path: Path) -> None:
    special = ("[P]", "[U]", "[S]", "[E]", "[M]", "[SEP]")
    SmilesTokenizer((*special, "C", "O"), 6, special).save(tmp_path / "v.json")
    data = DataConfig(dataset_path=str(table), vocab_file=str(tmp_path / "v.json"), smiles_column="nope")
    with pytest.raises(DataError, match=r"data\.vocab_file .*v\.json: the token stores keep it as vocab\.txt"):
        run(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["report.json", "preprocess.json"])
@pytest.mark.parametrize("content", ["[]", "{", "{}"])
def test_a_finished_folder_with_a_damaged_file_is_told(table: Path, tmp_path: Path, name: str, content: str) -> None:
    data = DataConfig(dataset_path=str(table))
    run(data, tmp_path / "out")
    (tmp_path / "out" / name).write_text(content)
    with pytest.raises(DataError, match="cannot be read"):
        run(data, tmp_path / "out")


def test_a_finished_folder_is_used_again(table: Path, tmp_path: Path) -> None:
    data, out = DataConfig(dataset_path=str(table)), tmp_path / "out"
    first = run(data, out)
    stamp = (out / "train.bin").stat().st_mtime_ns
    data.task, data.num_workers, data.mask_prob = "mask_aug", 2, 0.2  # these decide batches, not stores
    again = run(data, out)
    assert again.reused and again.molecules == first.molecules and again.cleaning == first.cleaning
    os.utime(table)
    assert run(data, out).reused  # touched, but the same
    with pytest.raises(DataError, match="another seed"):
        run(data, out, seed=2)
    data.max_length = 12
    with pytest.raises(DataError, match="another max_length"):
        run(data, out)
    assert (out / "train.bin").stat().st_mtime_ns == stamp
    report = run(data, out, overwrite=True)
    assert report.cleaning.rejects["too long"] and not report.reused
    with table.open("a") as file:
        file.write("CN\n")
    with pytest.raises(DataError, match="changed"):
        run(data, out)
    table.unlink()
    assert run(data, out).reused  # a store does not need its source any more
    assert run(DataConfig(dataset_path=str(out)), tmp_path / "other").folder == out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_other_things_are_not_overwritten(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="something else stands there"):
        run(DataConfig(dataset_path=str(table)), out)
    assert (out / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"split_ratio": "0,50,50", "split": "ratio"}, DataError, "train is empty"),
        ({"split_ratio": "a"}, ConfigError, "split_ratio"),
        ({"on_bad": "raise"}, DataError, "m.csv row 62"),
        ({"max_length": 3, "smiles_column": "smiles"}, None, ""),
        ({"smiles_column": "nope"}, DataError, "nope"),
    ],
)
def test_a_failure_leaves_nothing(table: Path, tmp_path: Path, change: dict, error: type | None, message: str) -> None:
    data = DataConfig(dataset_path=str(table), **change)
    if error is None:
        assert run(data, tmp_path / "out").molecules["train"] >= 1
        return
    with pytest.raises(error, match=message):
        run(data, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.csv"]


def test_no_molecule_left(tmp_path: Path) -> None:
    table = write_table(tmp_path / "m.csv", ["C1CC(", "xyz"])
    with pytest.raises(DataError, match="no molecule is left of 2 rows") as caught:
        run(DataConfig(dataset_path=str(table)), tmp_path / "out")
    assert 'the first: m.csv row 2 "C1CC(" cannot be parsed' in caught.value.found
    table.write_text("smiles,fold\nCCO,a\n")
    with pytest.raises(DataError, match=r'it says "a"\)\. Check the file and data\.split_column'):
        run(DataConfig(dataset_path=str(table), split_column="fold"), tmp_path / "out")


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(DataError, match="the disk or quota is full") as caught:
            run(DataConfig(limit_rows=2000), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path / "out") in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_no_folder_and_the_next_succeeds(tmp_path: Path, sent: signal.Signals) -> None:
    code = (
        "import sys\n"
        "from biokit.config import DataConfig\n"
        "from biokit.data import spool\n"
        "from biokit.data.preprocess import preprocess\n"
        "add = spool.Spool.add\n"
        "def told(self, batch):\n"
        "    add(self, batch)\n"
        "    print('batch', flush=True)\n"
        "spool.Spool.add = told\n"
        "preprocess(DataConfig(num_workers=1), sys.argv[1], 1, progress=False)\n"
    )
    out = tmp_path / "out"
    caller = subprocess.Popen([sys.executable, "-c", code, out], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert caller.stdout is not None and caller.stdout.readline() == b"batch\n"
    with pytest.raises(DataError, match="another process is writing it"):
        run(DataConfig(), out)
    os.kill(caller.pid, sent)
    caller.wait(timeout=20)
    caller.stdout.close()
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ([".out.partial"] if sent == signal.SIGKILL else [])
    assert run(DataConfig(limit_rows=300), out).cleaning.num_read == 300
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_ready_store_needs_no_rdkit(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(DataConfig(dataset_path=str(table)), out)
    code = (
        "import sys\n"
        "from biokit.config import DataConfig\n"
        "from biokit.data.preprocess import preprocess\n"
        "assert preprocess(DataConfig(dataset_path=sys.argv[1]), sys.argv[2], 1).reused\n"
        "print(sorted({'rdkit', 'pyarrow', 'numba', 'tqdm', 'torch'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, table, out], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
