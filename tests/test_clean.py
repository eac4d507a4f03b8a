import csv
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from biokit.config import DataConfig
from biokit.data.clean import Cleaning, clean
from biokit.data.guarded import ENDED, TIMED_OUT, GuardedPool
from biokit.data.tables import Row, read_table
from biokit.errors import DataError, EngineError
from biokit.tokenizers import SmilesTokenizer

TOKENIZER = SmilesTokenizer.packaged()
MESSY = [
    "OCC",
    "",
    "C1CC(",
    "CCO",
    "CC(=O)[O-].[Na+]",
    "C[C@H](C)O",
    "C" * 60,
    "[238U]",
    "C\0C",
    "é",
    "\udcff",
    "C" * 30_000,
    "[CH3:1][NH2:2]",
    "CO.CC>>COC",
    "CC\nCC",
]


def rows_of(smiles: list[str], split: str = "") -> list[Row]:
    return [Row("m.csv", number, text, split) for number, text in enumerate(smiles, start=2)]


def run(cleaning: Cleaning) -> list[str]:
    return [smiles for batch in cleaning for smiles in batch.smiles]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_messy_file_adds_up(tmp_path: Path, num_workers: int) -> None:
    rows = [*rows_of(MESSY), Row("m.csv", 99, "", problem="blank row")]
    config = DataConfig(max_length=50)
    cleaning = clean(rows, config, TOKENIZER, num_workers=num_workers, rejects_file=tmp_path / "r.csv")
    assert run(cleaning) == ["CCO", "CC(=O)[O-]", "CC(C)O", "CN"]
    report = cleaning.report
    assert report.num_read == 16 == report.num_kept + report.rejects.total()
    assert report.rejects == {
        "not parsable": 8,
        "duplicate": 1,
        "too long": 1,
        "unknown token": 1,
        "blank row": 1,
    }
    assert report.changes == {"salts_stripped": 1, "stereo_lost": 1, "atom_maps_stripped": 1}
    assert report.unknown_tokens == {"[238U]": 1}
    assert report.lengths.total() == 4 and report.lengths[5] == 1
    with (tmp_path / "r.csv").open(encoding="utf-8", newline="") as file:
        rejects = list(csv.DictReader(file))
    assert len(rejects) == report.rejects.total()
    assert [int(reject["row"]) for reject in rejects] == sorted(int(reject["row"]) for reject in rejects)
    by_row = {int(reject["row"]): reject for reject in rejects}
    assert by_row[4]["text"] == "C1CC(" and "syntax error at position 5" in by_row[4]["detail"]
    assert by_row[12]["text"] == "\\udcff"
    assert by_row[16]["text"] == "CC\nCC"


def test_processes_change_nothing(tmp_path: Path) -> None:
    rows = rows_of(["C" * (n % 37 + 1) + "O" * (n % 2) + "N" for n in range(1500)])
    config = DataConfig(pool=2, duplicates="keep")
    here, there = (
        [
            (batch.smiles, batch.ids.tolist(), batch.offsets.tolist(), batch.mols, batch.hashes.tolist())
            for batch in clean(rows, config, TOKENIZER, num_workers=num_workers, seed=5)
        ]
        for num_workers in (0, 2)
    )
    assert here == there
    assert sum(len(batch[0]) for batch in here) == 1500


def test_what_a_batch_holds() -> None:
    config = DataConfig(pool=3, duplicates="inchikey")
    (batch,) = clean(rows_of(["OCC", "C(O)C", "c1ccccc1CO"], "Valid"), config, TOKENIZER, seed=1, by_column=True)
    assert batch.smiles == ["CCO", "OCc1ccccc1"]
    assert batch.num_sequences == 4 and len(batch.offsets) == 2 * 4 + 1
    assert batch.parts.tolist() == [1, 1]
    sequences = [TOKENIZER.decode(batch.ids[a:b]) for a, b in zip(batch.offsets, batch.offsets[1:], strict=False)]
    from biokit.chem.molecules import canonicalize, random_smiles
    from biokit.data.clean_worker import row_seed

    assert sequences[0] == "CCO" and sequences[4] == "OCc1ccccc1"
    assert sequences[5:] == random_smiles(batch.mols[1], 3, row_seed(1, 2))
    assert [canonicalize(s) for s in sequences[:4]] == ["CCO"] * 4


def test_a_random_smiles_that_is_too_long_gives_way_to_the_canonical_one() -> None:
    smiles = "CC(C)(C)C(C)(C)CO"
    config = DataConfig(pool=30, max_length=len(smiles) + 2)
    (batch,) = clean(rows_of([smiles]), config, TOKENIZER, seed=1)
    lengths = (batch.offsets[1:] - batch.offsets[:-1]).tolist()
    assert max(lengths) == len(smiles)
    texts = [TOKENIZER.decode(batch.ids[a:b]) for a, b in zip(batch.offsets, batch.offsets[1:], strict=False)]
    assert len(set(texts)) > 1 and texts.count(batch.smiles[0]) > 1


def test_keeping_what_is_usually_dropped() -> None:
    config = DataConfig(duplicates="keep", unknown_tokens="keep", salts="keep", atom_maps="keep")
    cleaning = clean(rows_of(["[238U]", "CCO.Cl", "OCC.Cl", "[CH3:1]C"]), config, TOKENIZER)
    assert len(run(cleaning)) == 4
    assert cleaning.report.changes == {"salts_kept": 2, "atom_maps_kept": 1}
    assert cleaning.report.unknown_tokens["[238U]"] == 1


def test_an_unknown_part_is_a_reject() -> None:
    cleaning = clean([*rows_of(["CC"], "train"), *rows_of(["CCC"], "fold 3")], DataConfig(), TOKENIZER, by_column=True)
    assert run(cleaning) == ["CC"]
    assert cleaning.report.rejects == {"unknown split value": 1}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_first_bad_row_is_raised(num_workers: int) -> None:
    rows = [Row("m.csv", 1, "", problem="blank row"), *rows_of(["CC", "CC", "C1CC(", "also bad"])]
    with pytest.raises(DataError) as caught:
        run(clean(rows, DataConfig(on_bad="raise"), TOKENIZER, num_workers=num_workers))
    assert str(caught.value) == (
        'm.csv row 4: SMILES "C1CC(" cannot be parsed (syntax error at position 5). Fix the row, or pass on_bad="drop".'
    )


def test_rdkit_ending_the_process_costs_one_row() -> None:
    """RDKit overflows the stack of its process when it writes a long chain: 20,000 carbons at 8 MiB, fewer at 1."""
    rows = rows_of(["CCO", "C" * 5_000, "CCN"])
    config = DataConfig(pool=1, max_length=65535)
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (2**20, hard))
    try:
        cleaning = clean(rows, config, TOKENIZER, num_workers=1)
        assert run(cleaning) == ["CCO", "CCN"]
    finally:
        resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))
    assert cleaning.report.rejects == {ENDED: 1}


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return "dying_worker"


def test_a_dead_or_hung_worker_costs_its_row(dying: str) -> None:
    chunks = [[1, 2], ["die", 3, "hang", "print"], [4], [], ["die"], ["interrupt"]]
    with GuardedPool(dying, {}, 2, failed=lambda reason: [reason]) as pool:
        answers = [(results, blob) for _, results, blob in pool.map(chunks)]
    assert answers == [
        ([[2], [4]], b"xx"),
        ([[ENDED], [6], [TIMED_OUT], ["printprint"]], b"xx"),
        ([[8]], b"x"),
        ([], b""),
        ([[ENDED]], b""),
        ([["interrupt" * 2]], b"x"),
    ]


def test_an_interrupt_while_a_worker_starts_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Watched(subprocess.Popen):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    def interrupt(pipe: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("biokit.data.guarded.subprocess.Popen", Watched)
    monkeypatch.setattr("biokit.data.guarded.read_frame", interrupt)
    with pytest.raises(KeyboardInterrupt), GuardedPool("biokit.data.clean_worker", {}, 1, failed=lambda why: [why]):
        pass
    assert [process.returncode for process in started] == [-signal.SIGKILL]


def test_a_worker_that_cannot_start_is_told(dying: str) -> None:
    with (
        pytest.raises(EngineError, match="no such engine"),
        GuardedPool(dying, {"refuse": True}, 1, failed=lambda reason: [reason]),
    ):
        pass


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_survives_its_caller(tmp_path: Path, sent: signal.Signals) -> None:
    code = (
        "import sys\n"
        "from itertools import count\n"
        "from biokit.config import DataConfig\n"
        "from biokit.data.clean import clean\n"
        "from biokit.data.tables import Row\n"
        "from biokit.tokenizers import SmilesTokenizer\n"
        "rows = (Row('m.csv', n, 'C' * (n % 50 + 1)) for n in count())\n"
        "for batch in clean(rows, DataConfig(duplicates='keep'), SmilesTokenizer.packaged(), num_workers=2):\n"
        "    print('batch', flush=True)\n"
    )
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert caller.stdout is not None and caller.stdout.readline() == b"batch\n"
    workers = psutil.Process(caller.pid).children(recursive=True)
    assert len(workers) == 2
    os.kill(caller.pid, sent)
    caller.stdout.read()
    assert caller.wait(timeout=20) != 0
    deadline = time.monotonic() + 10
    while any(worker.is_running() and worker.status() != "zombie" for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    caller.stdout.close()


def test_sdf_records_are_cleaned(tmp_path: Path) -> None:
    from rdkit import Chem

    blocks = [Chem.MolToMolBlock(Chem.MolFromSmiles(smiles)) for smiles in ("CCO", "CCN")]
    bad = blocks[0].replace(" C ", " Q?", 1)
    path = tmp_path / "a.sdf"
    path.write_text("$$$$\n".join([*blocks, bad, "junk\n"]))
    cleaning = clean(read_table(path), DataConfig(), TOKENIZER)
    assert run(cleaning) == ["CCO", "CCN"]
    assert cleaning.report.rejects == {"not parsable": 1, "broken record": 1}


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "kept", "rejects"),
    [("bbbp", 1966, {"duplicate": 73, "not parsable": 11}), ("lipophilicity", 4200, {})],
)
def test_moleculenet(name: str, kept: int, rejects: dict[str, int], real_data: Path) -> None:
    cleaning = clean(read_table(real_data / "moleculenet" / f"{name}.csv"), DataConfig(), TOKENIZER, num_workers=2)
    assert len(run(cleaning)) == kept
    assert cleaning.report.rejects == rejects
