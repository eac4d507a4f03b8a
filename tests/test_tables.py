import gzip
import os
import tracemalloc
from pathlib import Path

import pytest

from biokit.data.paths import expand_paths, list_tables
from biokit.data.tables import (
    BLANK,
    BROKEN_RECORD,
    LONG_FIELD,
    QUOTING,
    RAGGED,
    Row,
    describe_table,
    read_table,
)
from biokit.errors import DataError

SMILES = ["CCO", "c1ccccc1", "CC(=O)O", "CCN"]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(path: Path, **options: str) -> list[str]:
    return [row.text for row in read_table(path, **options) if not row.problem]


def problems(path: Path) -> list[tuple[int, str]]:
    return [(row.row, row.problem) for row in read_table(path) if row.problem]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "smiles,y\nCCO,1\nc1ccccc1,2\nCC(=O)O,3\nCCN,4\n"),
        ("bom.csv", b"\xef\xbb\xbfsmiles,y\nCCO,1\nc1ccccc1,2\nCC(=O)O,3\nCCN,4\n"),
        ("crlf.csv", "smiles,y\r\nCCO,1\r\nc1ccccc1,2\r\nCC(=O)O,3\r\nCCN,4\r\n"),
        ("cr.csv", "smiles,y\rCCO,1\rc1ccccc1,2\rCC(=O)O,3\rCCN,4"),
        ("utf16.csv", "smiles,y\nCCO,1\nc1ccccc1,2\nCC(=O)O,3\nCCN,é\n".encode("utf-16")),
        ("utf32.csv", "smiles,y\nCCO,1\nc1ccccc1,2\nCC(=O)O,3\nCCN,é\n".encode("utf-32")),
        ("quoted.csv", 'y,smiles\n"a, b","CCO"\n"two\nlines",c1ccccc1\n"say ""x""",CC(=O)O\n1,CCN\n'),
        ("spaces.csv", 'y, smiles\n1, CCO \n"2", "c1ccccc1"\n3,CC(=O)O \n4,CCN\n'),
        ("semicolon.csv", "y;smiles\n1,5;CCO\n2,5;c1ccccc1\n3,5;CC(=O)O\n4,5;CCN\n"),
        ("tab.tsv", "y\tsmiles\n1\tCCO\n2\tc1ccccc1\n3\tCC(=O)O\n4\tCCN\n"),
        ("tab_in.csv", "y\tsmiles\n1\tCCO\n2\tc1ccccc1\n3\tCC(=O)O\n4\tCCN\n"),
        ("one.csv", "SMILES\nCCO\nc1ccccc1\nCC(=O)O\nCCN\n"),
        ("bare.csv", "CCO\nc1ccccc1\nCC(=O)O\nCCN"),
        ("bare2.csv", "x1,CCO\nx2,c1ccccc1\nx3,CC(=O)O\nx4,CCN\n"),
        ("content.csv", "who,what\nx1,CCO\nx2,c1ccccc1\nx3,CC(=O)O\nx4,CCN\n"),
        ("byname.csv", "other,canonical_smiles\nC,CCO\nCC,c1ccccc1\nCCC,CC(=O)O\nCCCC,CCN\n"),
        ("letters.csv", "class,structure\nN,CCO\nP,c1ccccc1\nS,CC(=O)O\nN,CCN\n"),
        ("names.smi", "CCO ethanol, pure\nc1ccccc1\tbenzene\nCC(=O)O acetic acid\nCCN\n"),
        ("head.smi", "smiles name\nCCO a\nc1ccccc1 b c\nCC(=O)O d\nCCN\n"),
        ("zinc.smi", "zinc_id\tsmiles\nZ1\tCCO\nZ2\tc1ccccc1\nZ3\tCC(=O)O\nZ4\tCCN\n"),
        ("words.txt", "CCO ethanol\nc1ccccc1 benzene\nCC(=O)O acid\nCCN amine\n"),
    ],
)
def test_tables_that_say_the_same_read_the_same(tmp_path: Path, name: str, content: str | bytes) -> None:
    path = write(tmp_path / name, content)
    rows = list(read_table(path))
    assert [row.text for row in rows] == SMILES
    assert not any(row.problem for row in rows)
    data = content if isinstance(content, bytes) else content.encode()
    zipped = write(tmp_path / f"{name}.gz", gzip.compress(data))
    assert texts(zipped) == SMILES


def test_a_row_is_the_line_on_which_it_begins(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'name,smiles\n"two\nlines",CCO\nx,CCN\n')
    assert list(read_table(path)) == [
        Row(str(path), 2, "CCO", name="two\nlines"),
        Row(str(path), 4, "CCN", name="x"),
    ]


def test_blank_and_torn_rows_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'id,smiles\n1,CCO\n\n , \n2,CCN,3\n"a"b,CC\n3,\n4,CCC\n')
    assert problems(path) == [(3, BLANK), (4, BLANK), (5, RAGGED), (6, QUOTING)]
    rows = list(read_table(path))
    assert len(rows) == 7
    assert (rows[3].text, rows[3].detail) == ("2,CCN,3", "3 fields, 2 expected")
    assert rows[4].text == '"a"b,CC'  # the line as it stands, for the table of rejects
    assert (rows[5].text, rows[5].problem) == ("", "")  # a row without its SMILES is for cleaning to refuse


def test_a_field_that_is_too_long_costs_its_row(tmp_path: Path) -> None:
    long = "C" * 200_000  # the csv module reads at most 131,072 characters a field
    path = write(tmp_path / "a.csv", f"id,smiles\n1,CCO\n2,{long}\n3,CCN\n")
    assert texts(path) == ["CCO", "CCN"]
    assert problems(path) == [(3, LONG_FIELD)]
    assert list(read_table(path))[1].text == f"2,{long}"


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.csv", b"", "it is empty"),
        ("a.csv", b"\n\n  \n", "blank rows only"),
        ("a.csv", b"smiles,y\nCCO,\xe9\n", "row 2: byte 0xe9 at character 5 is not UTF-8"),
        ("a.csv", "smiles\nCCO\n".encode("utf-16-le"), "without a byte order mark"),
        ("a.csv", "smiles\nCCO\n".encode("utf-16")[:-1], "not valid"),
        ("a.csv", b"PK\x03\x04xxxx", "Excel"),
        ("a.csv", b"BZh9xxxx", "bzip2"),
        ("a.csv.gz", b"smiles\nCCO\n", "is not gzip"),
        ("a.csv", b'smiles,y\nCCO,1\n"CCN,2\nCC,3\n', "row 3: a quote that opens here"),
        ("a.csv", b"a,b\n1,2\n3,4\n", "none holds SMILES (first row: a, b)"),
        ("a.csv", b"a,b\nCCO,CCN\nCCC,CC\n", "several hold SMILES (a, b)"),
        ("a.csv", b"smiles,smiles\nCCO,CCN\nCCC,CC\n", "2 columns bear the name"),
        ("a.csv", b"smiles,y\nCCO,1,x\nCCC,2,x\n", "the header has 2 fields, the rows have 3"),
        ("a.csv", b"a,set,split,smiles\n1,train,test,CCO\n2,val,train,CCN\n", "several name parts (set, split)"),
        ("a.csv", b'{"smiles":["CCO","CCN"]}\n', "can be read (bad quoting)"),
        ("a.csv.gz", gzip.compress(gzip.compress(b"smiles\nCCO\n", mtime=0), mtime=0), "gzip inside gzip"),
        ("a.csv", b"\xd0\xcf\x11\xe0" + bytes(600), "an old Excel or Word file"),
        ("a.parquet", b"PAR1 but torn", "cannot be read as Parquet"),
    ],
)
def test_files_that_cannot_be_read_are_refused(tmp_path: Path, name: str, content: bytes, found: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        list(read_table(path))
    assert found in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_folder_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it is a folder"):
        list(read_table(tmp_path))


@pytest.mark.parametrize("name", ["a.csv", "a.sdf", "a.parquet"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)  # read twice, a pipe would be empty the second time
    with pytest.raises(DataError, match="it is a pipe or a device"):
        list(read_table(tmp_path / name))


def test_a_torn_gzip_names_the_row(tmp_path: Path) -> None:
    whole = gzip.compress(b"smiles\n" + b"".join(b"%s\n" % os.urandom(20).hex().encode() for _ in range(5000)))
    path = write(tmp_path / "a.smi.gz", whole[: len(whole) // 2])
    seen = 0
    with pytest.raises(DataError, match=r"row \d+: the gzip file is cut off"):
        for row in read_table(path):
            seen = row.row
    assert seen > 100


def test_named_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "Reactants,product\nCCO,CCN\n")
    assert texts(path, smiles_column="product") == ["CCN"]
    assert texts(path, smiles_column="reactants") == ["CCO"]
    assert texts(path, smiles_column="1") == ["CCN"]
    with pytest.raises(DataError, match="it has Reactants, product"):
        texts(path, smiles_column="smiles")


@pytest.mark.parametrize("values", ["train,valid,test", "Train,Val,Test", "TRAINING,VALIDATION,dev"])
@pytest.mark.parametrize("column", ["set", "Set", "split"])
def test_the_split_column_is_found(tmp_path: Path, column: str, values: str) -> None:
    lines = [f"{smiles},{value}" for smiles, value in zip(SMILES, values.split(","), strict=False)]
    path = write(tmp_path / "a.csv", "\n".join([f"smiles,{column}", *lines]))
    assert [row.split for row in read_table(path)] == values.split(",")


def test_a_set_column_of_other_things_is_no_split(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "smiles,set\nCCO,1\nCCN,2\n")
    assert describe_table(path).columns.split is None


def test_sdf_streams_and_tells_broken_records(tmp_path: Path) -> None:
    from rdkit import Chem

    block = Chem.MolToMolBlock(Chem.MolFromSmiles("CCO")).replace("\n", "ethanol\n", 1)
    records = f"{block}> <Set>\ntrain\n\n$$$$\nno end line\n\n\n$$$$\n\n$$$$\n{block}"
    for name, content in (("a.sdf", records.encode()), ("a.sdf.gz", gzip.compress(records.encode()))):
        rows = list(read_table(write(tmp_path / name, content)))
        assert [row.problem for row in rows] == ["", BROKEN_RECORD, BLANK, ""]
        assert [row.row for row in rows] == [1, 2, 3, 4]
        assert (rows[0].name, rows[0].split, rows[0].is_mol_block) == ("ethanol", "train", True)
        assert rows[0].text.endswith("M  END\n") and rows[3].text == rows[0].text


@pytest.mark.parametrize(("values", "found"), [(("train", "test"), "SET"), (("a", "b"), "")])
def test_the_split_field_of_an_sdf_is_found(tmp_path: Path, values: tuple[str, str], found: str) -> None:
    record = "x\n\n\nM  END\n> <SET>\n{}\n\n$$$$\n"
    path = write(tmp_path / "a.sdf", "".join(record.format(value) for value in values))
    assert describe_table(path).columns.split_name == found
    assert [row.split for row in read_table(path)] == (list(values) if found else ["", ""])
    assert [row.split for row in read_table(path, split_column="SET")] == list(values)


def test_cells_of_further_columns(tmp_path: Path) -> None:
    """By name, in any case, or by number; as text, whatever the form of the table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    block = "x\n\n\nM  END\n> <y>\n{}\n\n$$$$\n"
    pq.write_table(pa.table({"y": [1.5, None], "smiles": ["CCO", "CCN"]}), tmp_path / "a.parquet")
    write(tmp_path / "a.csv", 'smiles,"log S, 25",y\nCCO,7,1.5\nCCN,8,\n')
    write(tmp_path / "a.smi", "smiles\ty\nCCO\t1.5\nCCN\t\n")
    write(tmp_path / "b.smi", "CCO 1.5\nCCN\n")
    write(tmp_path / "a.sdf", block.format("1.5") + block.format(""))
    columns = {"a.parquet": "y", "a.csv": "Y", "a.smi": "1", "b.smi": "1", "a.sdf": "y"}
    for name, column in columns.items():
        rows = list(read_table(tmp_path / name, value_columns=[column]))
        assert [row.values for row in rows] == [("1.5",), ("",)], name
    (first, _) = read_table(tmp_path / "a.csv", value_columns=["y", "log S, 25", "smiles"])
    assert first.values == ("1.5", "7", "CCO") and first.name == ""
    for name in ("a.csv", "a.parquet"):
        with pytest.raises(DataError, match=r'column "z": it has .*y.*Give one of them'):
            list(read_table(tmp_path / name, value_columns=["z"]))


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"y": [1.0, 2.0, 3.0], "smiles": ["CCO", None, "CCN"], "set": ["train", "x", "test"]}), path
    )
    assert [(row.row, row.text, row.split, row.problem) for row in read_table(path)] == [
        (1, "CCO", "train", ""),
        (2, "", "x", BLANK),
        (3, "CCN", "test", ""),
    ]
    whole = path.read_bytes()
    with pytest.raises(DataError, match="Parquet"):
        list(read_table(write(tmp_path / "b.parquet", whole[:-8])))
    broken = bytearray(whole)
    broken[4:150] = bytes(146)  # pages of the first column; the footer stays whole
    with pytest.raises(DataError, match=r"c\.parquet: the file is damaged"):
        list(read_table(write(tmp_path / "c.parquet", bytes(broken))))
    pq.write_table(pa.table({"smiles": [b"CCO", None, b"CC\xe9"]}), path)  # text that lost its type
    assert [row.text for row in read_table(path)] == ["CCO", "", "CC\\xe9"]


def test_a_large_file_streams(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.write("smiles,note\n")
        for index in range(100_000):
            file.write(f"{'C' * (index % 40 + 1)},{'x' * 100}\n")
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_table(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 100_000
    assert peak < 4 * 2**20  # the text alone is 12 MB


def test_ranges(tmp_path: Path) -> None:
    for number in range(12):
        write(tmp_path / f"x{number:03d}.csv", "smiles\nCC\n")
    names = [f"x{number:03d}.csv" for number in range(12)]

    def expand(pattern: str | list[str]) -> list[str]:
        return [path.name for path in expand_paths(pattern, tmp_path)]

    assert expand("x[000..011]") == names
    assert expand("x_OP_000..011_CL_") == names
    assert expand("x[000..011].csv") == names
    assert expand("x[001,007..008]") == [names[1], names[7], names[8]]
    assert expand("x00[0..2],x011.csv") == [*names[:3], names[11]]
    assert expand("x[000..010..5]") == [names[0], names[5], names[10]]
    assert expand(["x000", "x001"]) == names[:2]
    assert expand("x*.csv") == names
    assert [path.name for path in list_tables(tmp_path)] == names
    assert len(list(read_table(str(tmp_path / "x[000..011]")))) == 12


def test_all_missing_files_are_in_one_error(tmp_path: Path) -> None:
    write(tmp_path / "x001.csv", "smiles\nCC\n")
    with pytest.raises(DataError) as caught:
        expand_paths("x[000..003]", tmp_path)
    assert "3 do not exist" in caught.value.found
    assert all(f"x{number:03d}" in caught.value.found for number in (0, 2, 3))
    assert "x001" not in caught.value.found


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("x[000..", "pair up"),
        ("x[3..1]", "is empty"),
        ("x[0..99999999]", "more than"),
        ("x[a..]", "is no range"),
        ("y", "several fit"),
        ("y.csv,y.csv", "named twice"),
    ],
)
def test_bad_ranges(tmp_path: Path, pattern: str, found: str) -> None:
    write(tmp_path / "y.csv", "")
    write(tmp_path / "y.smi", "")
    with pytest.raises(DataError, match=found):
        expand_paths(pattern, tmp_path)


def test_a_name_with_brackets_stands_for_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "x[0..1].csv", "smiles\nCCO\n")
    assert expand_paths(path.name, tmp_path) == [path]


def test_no_file_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file is named"):
        expand_paths(" , ", tmp_path)


def test_a_link_that_leads_nowhere_is_not_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "smiles\nCCO\n")
    (tmp_path / "b.csv").symlink_to(tmp_path / "gone.csv")
    (tmp_path / "c.csv").symlink_to(tmp_path / "c.csv")
    assert [path.name for path in list_tables(tmp_path)] == ["a.csv", "b.csv", "c.csv"]
    for name in ("b.csv", "c.csv"):
        with pytest.raises(DataError, match=f"{name}: it cannot be opened"):
            describe_table(tmp_path / name)
