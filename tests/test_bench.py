"""The benchmarks: their arithmetic on a fake clock, and that each still runs, at a tiny size. No timing is asserted."""

import importlib.util
from pathlib import Path

import pytest

from biokit.config import ModelConfig
from biokit.errors import EngineError
from biokit.models.molbart import MOLBART
from biokit.parallel.grid import Layout
from biokit.tasks.property_head import HeadOptions
from biokit.tokenizers import SmilesTokenizer
from tests.bench import __main__ as bench
from tests.bench import (
    batches,
    checkpoints,
    corpora,
    decoding,
    launching,
    memory,
    metrics,
    padding,
    properties,
    random_smiles,
    strategies,
    timing,
    tokenising,
    training_step,
)
from tests.bench.timing import NOT_MEASURED, Rates, Row, compare, compare_times

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed: `make bench` installs it"
)
NUM_COLUMNS = timing.HEADER.splitlines()[0].count("|")


class FakeClock:
    """Process time that moves only when a contender works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def contender(self, name, units, seconds):
        turns = iter(seconds)

        def work():
            self.order.append(name)
            self.now += next(turns)
            return units

        return work


@pytest.fixture
def clock(monkeypatch):
    fake = FakeClock()
    monkeypatch.setattr(timing.time, "process_time", lambda: fake.now)
    return fake


@pytest.fixture(autouse=True)
def without_real_data(monkeypatch):
    monkeypatch.delenv("BIOKIT_REAL_DATA", raising=False)
    corpora.load_smiles.cache_clear()
    corpora._load_texts.cache_clear()


def test_compare_divides_units_by_seconds_round_by_round_without_the_warm_up(clock):
    ours = clock.contender("ours", 12, [100.0, 1.0, 2.0, 4.0])
    peer = clock.contender("peer", 6, [1.0, 2.0, 1.0, 1.0])
    rates = compare({"ours": ours, "peer": peer}, "things", rounds=3)
    assert rates.per_cpu_s == {"ours": 6.0, "peer": 6.0}
    assert rates.ratios == {"peer": [4.0, 1.0, 0.5]}
    assert clock.order == ["ours", "peer"] * 4


def test_rows_say_whether_the_median_reaches_the_target():
    rates = Rates("things", {"ours": 1234.0, "slow": 600.0, "fast": 2000.0}, {"slow": [1.9, 2.1, 9.0], "fast": [0.5]})
    slow, fast = rates.rows({"slow": 2.0, "fast": 1.0})
    assert str(slow) == "| ours | slow | 1,234 things | 600 | 2.10x | 1.90 - 9.00 | at least 2x | yes |"
    assert (slow.met, fast.met) == (True, False)
    assert "NO" in str(fast) and "NO" not in str(rates.rows({})[0])
    assert rates.rows({"slow": 2.1})[0].met and not rates.rows({"slow": 2.11})[0].met
    assert str(slow).count("|") == str(Row("what", "peer")).count("|") == NUM_COLUMNS


def test_times_are_compared_pair_by_pair():
    row = compare_times("step", "peer", [0.11, 0.4, 0.2], [0.1, 0.2, 0.25], target=1.1)
    assert str(row) == "| step | peer | 200.0 ms | 200.0 ms | 1.10x | 0.80 - 2.00 | at most 1.10x | yes |"
    assert compare_times("step", "peer", [0.112], [0.1], target=1.1).met is False
    assert compare_times("step", "peer", [0.112], [0.1]).met is None


@pytest.mark.parametrize("module", [tokenising, random_smiles, padding], ids=lambda module: module.__name__)
def test_a_tiny_run(module):
    settings = {"limit": 300, "epochs": 1, "aug_limit": 100} if module is padding else {"limit": 50, "rounds": 1}
    check_rows(module.measure("WEHI", **settings))


@needs_transformers
def test_a_tiny_run_of_batches():
    check_rows(batches.measure("WEHI", limit=200, rounds=1))


@needs_transformers
def test_a_tiny_run_of_decoding(monkeypatch):
    monkeypatch.setattr(decoding, "SIZES", SIZES)
    monkeypatch.setattr(decoding, "NUM_MOLECULES", 2)
    monkeypatch.setattr(decoding, "LENGTH", 4)
    check_rows(decoding.measure(rounds=1))


@needs_transformers
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_tiny_run_of_training(precision, monkeypatch):
    monkeypatch.setattr(training_step, "SIZES", SIZES)
    monkeypatch.setattr(training_step, "STEPS", 1)
    check_rows(training_step.measure(precision, rounds=1))


def layouts(module, once):
    """Those in `once` also in `make test`, the others where all tests of this file run."""
    return [
        pytest.param(layout, id=str(layout), marks=() if str(layout) in once else (pytest.mark.full,))
        for layout in module.LAYOUTS
    ]


@pytest.mark.parametrize("layout", layouts(strategies, ("DDP x dp2", "Zero1 x dp2", "ThreeD x tp2")))
def test_a_tiny_run_of_a_strategy(layout):
    check_rows(strategies.measure(layout, pairs=1, model=ModelConfig(**SIZES)))


def test_a_tiny_run_of_checkpoints():
    check_rows(checkpoints.measure(ModelConfig(**SIZES), rounds=1))
    check_rows(checkpoints.measure_gathering(Layout("Zero1", data=2), ModelConfig(**SIZES), rounds=1))


def test_a_tiny_run_of_metrics():
    check_rows(metrics.measure(rounds=1))


def test_a_tiny_run_of_properties(monkeypatch):
    tokenizer = SmilesTokenizer.packaged()
    model = MOLBART.build(ModelConfig(**SIZES), tokenizer.vocab_size, 128, 1).eval()
    options = HeadOptions(width=8, max_epochs=1)
    rows = properties.measure(
        "CHEMBL2321810", model, tokenizer, seeds=(0,), num_members=1, num_trees=5, options=options
    )
    check_rows(rows)
    assert [row.ratio == "-" for row in rows] == [False, True, True, True, False, True, True, True, True]
    assert "regression, 1,017 of 1,017 rows" in rows[0].what and "forest" in rows[-1].what
    assert properties.measure("ESOL", model, tokenizer)[0].ours == NOT_MEASURED
    monkeypatch.setenv("BIOKIT_MODEL", "nowhere")
    assert {row.ours for row in properties.measure_all()} == {properties.NO_MODEL}


@pytest.mark.full
def test_a_tiny_run_of_launching():
    rows = launching.measure_first_steps(1) + launching.measure_nodes(1)
    check_rows(rows + launching.measure_delay(5) + launching.measure_dashboard(1, 5))


def test_first_steps_are_compared_with_torchrun_and_where_it_is_there_with_accelerate(monkeypatch):
    times = {f"{who} {cell}": [2.0, 4.0] for who in ("torchrun", "accelerate") for cell in ("cold", "warm")}
    times |= {"bare": [1.0, 2.0], "ranks cold": [4.0, 4.0], "ranks warm": [0.5, 0.7]}
    for here in (True, False):
        monkeypatch.setattr(launching, "HAVE_ACCELERATE", here)
        rows = launching._compare_first_steps(times)
        check_rows(rows)
        assert str(rows[0]).startswith(
            "| `%%torchrun`: cell to first step, cold | bare torchrun, from a shell | 3,000.0 ms"
        )
        assert any(launching.NO_ACCELERATE in str(row) for row in rows) is not here
        assert "| 600.0 ms | 1 s | 0.60x | - | at most 1 s | yes |" in str(rows[-1])
    times["ranks warm"] = [1.1]
    monkeypatch.setattr(launching, "HAVE_ACCELERATE", False)
    assert launching._compare_first_steps(times)[-1].met is False


def test_shares_are_of_cpu_seconds():
    row = metrics.compare_shares("a line", [0.001, 0.004, 0.002], [0.1, 0.2, 0.4])
    assert str(row) == "| a line | the step | 2,000 µs | 200.0 ms | 1.000 % | 0.500 - 2.000 | at most 1 % | yes |"
    assert metrics.compare_shares("a line", [0.0021], [0.2]).met is False


@pytest.mark.parametrize("layout", layouts(memory, ("DDP x dp2", "Zero3 x dp2", "Pipeline x pp2")))
def test_every_byte_of_memory_is_accounted_for(layout):
    rows = memory.measure(layout)
    check_rows(rows)
    assert all(row.met for row in rows), "\n".join(map(str, rows))


def test_the_formula_of_memory():
    """16 bytes a parameter, cut as ZeRO says; 12 when the gradients are gone."""
    names = ("Single", "DDP", "Zero1", "Zero2", "Zero3", "Pipeline")
    found = [memory.formula(Layout(name, data=4), 100, True) for name in names]
    assert found == [1600, 1600, 1000, 700, 400, 1000]
    assert [memory.formula(Layout(name, data=4), 100, False) for name in names] == [1200, 1200, 600, 600, 300, 600]


SIZES = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 64}


def check_rows(rows):
    assert rows
    for row in rows:
        assert NOT_MEASURED not in str(row) and "nan" not in str(row) and str(row).count("|") == NUM_COLUMNS


@pytest.mark.parametrize("module", [tokenising, batches, random_smiles, padding], ids=lambda module: module.__name__)
def test_what_is_not_here_is_said_to_be_not_measured(module):
    rows = module.measure("ChEMBL")
    assert rows and all(row.ours == NOT_MEASURED and row.met is None and "ChEMBL" in row.what for row in rows)


def test_padding_counts_every_cell(tmp_path):
    """One and three tokens, each after begin: two rows of four cells, two of which are padding."""
    tokenizer = padding.SmilesTokenizer.packaged()
    store = corpora.write_store(tmp_path / "ids", tokenizer, ["C", "CCO"])
    _, decoder = padding._padding(store, None, "mask", 0, buckets=True)
    assert decoder == pytest.approx(8 / 6)


def test_the_command_prints_a_table_and_fails_where_a_target_is_missed(monkeypatch, capsys):
    monkeypatch.setattr(bench, "_prepare", lambda names: None)
    for met, status in ((True, 0), (None, 0), (False, 1)):
        rows = [Row("speed", "peer", met=met)]
        monkeypatch.setattr(tokenising, "measure_all", lambda rows=rows: rows)
        assert bench.main(["tokenising"]) == status
        machine, _, *table = capsys.readouterr().out.splitlines()
        assert "torch" in machine and "one thread" in machine
        assert table == [*timing.HEADER.splitlines(), str(rows[0])]


def test_without_transformers_the_benchmarks_that_need_it_are_refused(monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match="transformers is not installed"):
        bench.main(["padding", "batches"])


def test_an_unknown_benchmark_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["speed"])
    assert "there is no benchmark speed" in capsys.readouterr().err


def test_every_benchmark_is_run():
    folder = Path(bench.__file__).parent
    helpers = {"__init__", "__main__", "timing", "corpora", "rigs", "bare"}
    assert {path.stem for path in folder.glob("*.py")} - helpers == set(bench.NAMES)
