"""Embeddings of a file: each row's, in order, whatever interrupts them."""

import csv
import json
import resource
import signal

import numpy as np
import pytest

from biokit.chem.molecules import canonicalize
from biokit.config import ModelConfig
from biokit.errors import ConfigError, DataError
from biokit.generate import embed, embeddings
from biokit.generate.embeddings import embed_file, read_embeddings
from biokit.generate.kept import hold_folder
from biokit.models.molbart import MOLBART
from biokit.tokenizers import SmilesTokenizer

TOKENIZER = SmilesTokenizer.packaged()
GOOD = ["OCC", "c1ccccc1C(=O)O", "N", "CC(C)Cc1ccc(cc1)C(C)C(=O)O", "CCCl", "C1CC1", "CS", "NCCO", "c1ccncc1", "CCCCCC"]


def build(seed):
    config = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2)
    return MOLBART.build(config, TOKENIZER.vocab_size, 40, seed).eval()


@pytest.fixture(scope="module")
def model():
    return build(3)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "molecules.csv"
    path.write_text("smiles,name\n" + "".join(f"{text},m{row}\n" for row, text in enumerate(GOOD)))
    return path


@pytest.mark.parametrize("form", ["parquet", "npz"])
def test_every_row_has_its_own(model, table, tmp_path, form):
    done = embed_file(model, TOKENIZER, table, tmp_path / "out", form=form, part_rows=4, batch_size=3, progress=False)
    assert (done.num_rows, done.num_embedded, done.num_rejected) == (10, 10, 0)
    names = sorted(path.name for path in (tmp_path / "out").glob("part_*"))
    assert names == [f"part_00000000{first}.{form}" for first in (0, 4, 8)]
    smiles, vectors = read_embeddings(tmp_path / "out")
    assert smiles == [canonicalize(text) for text in GOOD] and vectors.dtype == np.float32
    for text, vector in zip(smiles, vectors, strict=True):
        np.testing.assert_allclose(vector, embed(model, TOKENIZER, [text])[0], atol=1e-5)  # padding changes sums' order


def test_it_goes_on_where_it_was_interrupted(model, table, tmp_path, monkeypatch):
    keys = {"part_rows": 3, "progress": False}
    embed_file(model, TOKENIZER, table, tmp_path / "whole", **keys)
    real, calls = embeddings.embed, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(embeddings, "embed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embed_file(model, TOKENIZER, table, tmp_path / "out", **keys)
    assert json.loads((tmp_path / "out" / "embeddings.json").read_text())["num_rows"] == 6
    done = embed_file(model, TOKENIZER, table, tmp_path / "out", **keys)
    assert len(calls) == 3 + 2 and done.num_embedded == 10  # two parts were left
    for ours, wanted in zip(read_embeddings(tmp_path / "out"), read_embeddings(tmp_path / "whole"), strict=True):
        np.testing.assert_array_equal(ours, wanted)
    before = len(calls)
    embed_file(model, TOKENIZER, table, tmp_path / "out", **keys)
    assert len(calls) == before


def read_rejects(folder):
    files = [path.open(newline="") for path in sorted(folder.glob("rejects_*.csv"))]
    rows = [row for file in files for row in csv.DictReader(file)]
    for file in files:
        file.close()
    return rows


@pytest.mark.parametrize("fails_at", ["_save_part", "write_atomically"])
def test_it_goes_on_after_a_failure_at_any_point(model, table, tmp_path, monkeypatch, fails_at):
    def fail(*args):
        raise OSError(28, "No space left on device")

    keys = {"part_rows": 4, "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(embeddings, fails_at, fail)
        with pytest.raises(DataError, match="Free space and call again"):
            embed_file(model, TOKENIZER, table, tmp_path / "out", **keys)
    (tmp_path / "out" / ".part_000000000.parquet.partial").write_text("killed here")
    assert embed_file(model, TOKENIZER, table, tmp_path / "out", **keys).num_embedded == 10
    assert len(read_embeddings(tmp_path / "out")[0]) == 10


def test_several_files_and_two_at_once(model, tmp_path):
    for number in range(2):
        (tmp_path / f"x{number}.csv").write_text(f'smiles,name\nCCO,"a\n7,b"\nC1,bad{number}\nCN,c\n')
    keys = {"on_bad": "drop", "part_rows": 2, "progress": False}
    done = embed_file(model, TOKENIZER, tmp_path / "x[0..1].csv", tmp_path / "out", **keys)
    rejects = read_rejects(tmp_path / "out")
    assert done.num_rejected == len(rejects) == 2 and [row["row"] for row in rejects] == ["1", "4"]
    assert [row["file"][-6:] for row in rejects] == ["x0.csv", "x1.csv"]
    assert len(read_embeddings(tmp_path / "out")[0]) == 4
    with hold_folder(tmp_path / "out", "a test"), pytest.raises(DataError, match="another process is at work"):
        embed_file(model, TOKENIZER, tmp_path / "x[0..1].csv", tmp_path / "out", **keys)


def test_absurd_texts_are_not_parsed(model, tmp_path):
    (tmp_path / "long.csv").write_text("smiles\nCCO\n" + "C" * 19_999 + "\n\n")
    done = embed_file(model, TOKENIZER, tmp_path / "long.csv", tmp_path / "out", on_bad="drop", progress=False)
    assert done.num_embedded == 1 and "19999 characters" in read_rejects(tmp_path / "out")[0]["reason"]


def test_bad_rows(model, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text(f"smiles\nCCO\nC1CC\n{'C' * 39}\n[Og]\nCN\n")
    for part_rows in (1, 10):
        done = embed_file(
            model, TOKENIZER, path, tmp_path / f"out{part_rows}", on_bad="drop", part_rows=part_rows, progress=False
        )
        assert (done.num_rows, done.num_embedded, done.num_rejected) == (5, 2, 3)
        rejects = read_rejects(tmp_path / f"out{part_rows}")
        assert [(row["row"], row["line"]) for row in rejects] == [("1", "3"), ("2", "4"), ("3", "5")]
        for row, words in zip(rejects, ("unclosed ring", "39 tokens", "vocabulary"), strict=True):
            assert words in row["reason"]
    with pytest.raises(DataError, match=r"bad.csv row 3: .*cannot be parsed"):
        embed_file(model, TOKENIZER, path, tmp_path / "none", progress=False)


def test_foreign_folders_and_values(model, table, tmp_path):
    embed_file(model, TOKENIZER, table, tmp_path / "out", progress=False)
    with pytest.raises(DataError, match="another model"):
        embed_file(build(4), TOKENIZER, table, tmp_path / "out", progress=False)
    with pytest.raises(DataError, match="another form"):
        embed_file(model, TOKENIZER, table, tmp_path / "out", form="npz", progress=False)
    with pytest.raises(DataError, match="another smiles_column"):
        embed_file(model, TOKENIZER, table, tmp_path / "out", smiles_column="smiles", progress=False)
    with pytest.raises(DataError, match="other files"):
        embed_file(model, TOKENIZER, table, tmp_path, progress=False)
    with pytest.raises(DataError, match="do not exist"):
        embed_file(model, TOKENIZER, tmp_path / "none.csv", tmp_path / "new", progress=False)
    for keys in ({"form": "csv"}, {"on_bad": "skip"}, {"batch_size": 0}, {"part_rows": 0}):
        with pytest.raises(ConfigError):
            embed_file(model, TOKENIZER, table, tmp_path / "new", progress=False, **keys)
    with pytest.raises(DataError, match="there are none"):
        read_embeddings(tmp_path / "new")


def test_a_full_disk_leaves_whole_parts(model, table, tmp_path):
    """A limit on file sizes stands for it."""
    keys = {"part_rows": 5, "progress": False, "form": "npz"}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, hard))
        with pytest.raises(DataError, match="Free space"):
            embed_file(model, TOKENIZER, table, tmp_path / "out", **keys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "out").glob("*part_*"))
    assert embed_file(model, TOKENIZER, table, tmp_path / "out", **keys).num_embedded == 10
