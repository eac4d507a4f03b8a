"""Tables of measured properties: what is read, what is refused, and that every row is accounted for."""

import csv

import numpy as np
import pytest

from biokit.chem.molecules import canonicalize
from biokit.config import ModelConfig
from biokit.data.split import PART_NAMES
from biokit.data.tables import read_table
from biokit.datasets import locate
from biokit.errors import ConfigError, DataError
from biokit.models.molbart import MOLBART
from biokit.tasks.property_data import MIN_MOLECULES, PropertyData, read_properties
from biokit.tasks.property_splits import scaffold_keys, split_molecules
from biokit.tokenizers import SmilesTokenizer

TOKENIZER = SmilesTokenizer.packaged()
CHAINS = ["C" * length + end for length in range(1, 14) for end in ("O", "N", "Cl")]  # 39 molecules
FRACTIONS = (0.8, 0.1, 0.1)


@pytest.fixture(scope="module")
def model():
    return MOLBART.build(ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2), TOKENIZER.vocab_size, 40, 3)


@pytest.fixture
def write(tmp_path):
    def write(rows, head="smiles,y", name="table.csv"):
        path = tmp_path / name
        path.write_text("\n".join([head, *(",".join(map(str, row)) for row in rows)]) + "\n")
        return path

    return write


def numbers(smiles=CHAINS):
    return [(text, len(text) / 2) for text in smiles]


def test_regression_is_read_whole(model, write):
    data = read_properties(write(numbers()), "y", model, TOKENIZER)
    assert (data.kind, data.num_rows, data.num_merged, data.rejects) == ("regression", 39, 0, ())
    assert data.smiles == tuple(map(canonicalize, CHAINS)) and data.targets.dtype == np.float32
    assert data.targets.tolist() == [len(text) / 2 for text in CHAINS]
    assert str(data) == "table.csv, y (regression): 39 molecules of 39 rows"


def test_columns_may_be_given_by_number_and_case(model, write):
    path = write([(n, y, text) for n, (text, y) in enumerate(numbers())], head="n,Log S,mol")
    for target in ("Log S", "log s", "1"):
        assert read_properties(path, target, model, TOKENIZER, smiles_column="mol").targets[1] == 1.0


def test_two_values_are_classes_unless_asked_otherwise(model, write):
    path = write([(text, row % 2) for row, text in enumerate(CHAINS)])
    assert read_properties(path, "y", model, TOKENIZER).kind == "classification"
    assert read_properties(path, "y", model, TOKENIZER, kind="regression").kind == "regression"
    with pytest.raises(DataError, match=r"1\.5 is among its targets. Write the classes as 0 and 1"):
        read_properties(write(numbers()[:1] + numbers()), "y", model, TOKENIZER, kind="classification")


def test_repeated_molecules_have_their_mean_or_are_left_out(model, write):
    data = read_properties(write([*numbers(), ("OC", 4.0), ("C(O)", 5.5)]), "y", model, TOKENIZER)
    assert data.targets[0] == pytest.approx((1.0 + 4.0 + 5.5) / 3) and (len(data), data.num_merged) == (39, 2)
    rows = [(text, row % 2) for row, text in enumerate(CHAINS)]
    data = read_properties(write([*rows, ("OC", 1), ("NC", 1)]), "y", model, TOKENIZER)
    assert "CO" not in data.smiles and "CN" in data.smiles
    assert (len(data), data.num_merged) == (38, 1) and data.counts == {
        "labels of one molecule contradict one another": 2
    }
    assert [(reject.row, reject.detail) for reject in data.rejects] == [(2, "0 here"), (41, "1 here")]


BAD = [
    ("C1CC", "1.0", "cannot be parsed"), ("C" * 39, "1.0", "39 tokens"), ("[Og]", "1.0", "vocabulary"),
    ("CCS", "high", '"high" is no number'), ("CCS", "nan", "not finite"), ("CCS", "inf", "not finite"),
    ("CCS", "-1e16", "or beyond"), ("CCS", "", "it is empty"), ("", "1.0", "it is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("smiles", "target", "words"), BAD)
def test_a_bad_row_is_refused_or_counted(model, write, smiles, target, words):
    path = write([*numbers(), (smiles, target)])
    with pytest.raises(DataError, match=rf'table.csv row 41.*{words}.*on_bad="drop"'):
        read_properties(path, "y", model, TOKENIZER)
    data = read_properties(path, "y", model, TOKENIZER, on_bad="drop")
    (reject,) = data.rejects
    assert (len(data), data.num_rows) == (39, 40) and (reject.row, reject.text) == (41, smiles)
    assert words in reject.detail and f"1 left out ({reject.reason})" in str(data)


def test_rows_add_up(model, write):
    rows = [*numbers(), *((smiles, target) for smiles, target, _ in BAD), ("OC", 4.0)]
    path = write(rows)
    path.write_text(path.read_text() + "\nCCS,1,2\n")
    data = read_properties(path, "y", model, TOKENIZER, on_bad="drop")
    assert data.num_rows == 51 == len(data) + data.num_merged + len(data.rejects)
    assert data.counts == {"no molecule that the model takes": 6, "no number as target": 5}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (numbers()[:29], f"29 usable molecules in 29 rows. Give at least {MIN_MOLECULES}"),
        ([(text, "x") for text in CHAINS], "0 usable molecules in 39 rows; 39 rows: no number as target"),
        ([(text, 1) for text in CHAINS], "one class only: 39 of class 1"),
        ([(text, int(text == "CO")) for text in CHAINS], "one class only: 38 of class 0, 1 of class 1"),
        ([(text, 0.25) for text in CHAINS], r"every target is 0\.25"),
    ],
)
def test_what_cannot_be_learnt_is_refused(model, write, rows, words):
    with pytest.raises(DataError, match=words):
        read_properties(write(rows), "y", model, TOKENIZER, on_bad="drop")


def test_bad_files_and_values(model, write, tmp_path):
    path = write(numbers())
    with pytest.raises(DataError, match=r'column "z": it has smiles, y. Give one of them'):
        read_properties(path, "z", model, TOKENIZER)
    with pytest.raises(DataError, match="do not exist"):
        read_properties(tmp_path / "none.csv", "y", model, TOKENIZER)
    empty = tmp_path / "empty.csv"
    empty.write_text("")
    with pytest.raises(DataError, match="it is empty"):
        read_properties(empty, "y", model, TOKENIZER)
    with pytest.raises(DataError, match="0 usable molecules in 0 rows"):
        read_properties(write([]), "y", model, TOKENIZER)
    for keys in ({"kind": "ranking"}, {"on_bad": "skip"}):
        with pytest.raises(ConfigError, match="Valid:"):
            read_properties(path, "y", model, TOKENIZER, **keys)


def test_targets_in_a_table_of_their_own(model, write):
    table = write([(text, f"m{row}") for row, text in enumerate(CHAINS)], head="smiles,name")
    rows = [("", f"m{row}", row / 4) for row in reversed(range(39))]
    data = read_properties(table, "y", model, TOKENIZER, targets_table=write(rows, "x,id,y", "act.csv"))
    assert data.targets.tolist() == [row / 4 for row in range(39)]
    with pytest.raises(DataError, match=r'table.csv row 2.*no row "m0" in .*act.csv'):
        read_properties(table, "y", model, TOKENIZER, targets_table=write(rows[:-1], "x,id,y", "act.csv"))
    for broken, words in (([*rows, rows[0]], '"m38" stands there 2 times'), ([*rows, ("m", 1)], "a row has 2 fields")):
        with pytest.raises(DataError, match=words):
            read_properties(table, "y", model, TOKENIZER, targets_table=write(broken, "x,id,y", "act.csv"))


def test_activities_inside_rdkit():
    """Joined by name, as the file itself says."""
    model = MOLBART.build(
        ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2), TOKENIZER.vocab_size, 128, 3
    )
    data = read_properties("chembl2321810", "Act", model, TOKENIZER)
    with locate("chembl2321810").with_name("CHEMBL2321810_act.csv").open() as file:
        expected = {row["Name"]: float(row["Act"]) for row in csv.DictReader(file)}
    rows = list(read_table(locate("chembl2321810")))
    assert (data.num_rows, len(data), data.kind) == (1017, 1017, "regression")
    for place in (0, 500, 1016):
        assert data.smiles[place] == canonicalize(rows[place].text)
        assert data.targets[place] == pytest.approx(expected[rows[place].name])


RINGS = [f"{'C' * length}{ring}" for length in range(1, 9) for ring in ("c1ccccc1", "C1CCCCC1", "c1ccncc1", "C1CCNC1")]


@pytest.fixture
def rings():
    smiles = tuple(map(canonicalize, [*RINGS, *CHAINS]))
    return PropertyData("rings", "y", "regression", smiles, np.arange(len(smiles), dtype=np.float32), len(smiles))


def test_a_scaffold_split_shares_no_scaffold_and_varies_with_the_seed(rings):
    keys = np.array(scaffold_keys(rings.smiles))
    assert keys[0] == "c1ccccc1" and keys[len(RINGS)] == "acyclic CO"
    tested = set()
    for seed in range(4):
        parts = split_molecules(rings, "scaffold", FRACTIONS, seed)
        assert np.array_equal(parts, split_molecules(rings, "scaffold", FRACTIONS, seed))
        members = [set(keys[parts == number]) for number in range(len(PART_NAMES))]
        assert all(members) and not (members[0] & members[1] or members[0] & members[2] or members[1] & members[2])
        tested.add(tuple(np.flatnonzero(parts == 2)))
    assert len(tested) == 4


def test_a_random_split_has_the_sizes_asked_for(rings):
    sizes = np.bincount(split_molecules(rings, "random", (0.5, 0.25, 0.25), 0))
    assert sizes.tolist() == [36, 18, 17]
    with pytest.raises(ConfigError, match="Valid: scaffold, random"):
        split_molecules(rings, "time", FRACTIONS, 0)


def test_a_part_without_both_classes_is_refused(rings):
    labels = np.zeros(len(rings), dtype=np.float32)
    labels[: len(RINGS)] = 1  # all molecules with large scaffolds, which go to train
    data = PropertyData("rings", "y", "classification", rings.smiles, labels, len(rings))
    with pytest.raises(DataError, match=r"rings: val part of the scaffold split with seed 0: all 7 .* target 0"):
        split_molecules(data, "scaffold", FRACTIONS, 0)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "target", "kind", "num_rows", "num_molecules"),
    [
        ("esol", "measured log solubility in mols per litre", "regression", 1128, 1117),
        ("freesolv", "expt", "regression", 642, 641),
        ("bbbp", "p_np", "classification", 2050, 1954),
        ("bace", "Class", "classification", 1513, 1508),
    ],
)
def test_moleculenet(name, target, kind, num_rows, num_molecules, real_data):
    model = MOLBART.build(
        ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2), TOKENIZER.vocab_size, 128, 3
    )
    data = read_properties(real_data / "moleculenet" / f"{name}.csv", target, model, TOKENIZER, on_bad="drop")
    assert (data.kind, data.num_rows) == (kind, num_rows) and len(data) == len(set(data.smiles))
    assert data.num_rows == len(data) + data.num_merged + len(data.rejects)
    assert num_molecules - 10 <= len(data) <= num_molecules + 25  # the shipped vocabulary has not all tokens of others
