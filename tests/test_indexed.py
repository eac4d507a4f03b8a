"""The token store: Megatron's bytes both ways, faults found at opening, atomic writing."""

import json
import random
import shutil
import struct
import warnings
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biokit.data.index_format import DTYPE_CODES, build_index
from biokit.data.indexed import (
    StoreWriter,
    TokenStore,
    pad_rows,
    sequence_numbers,
)
from biokit.errors import StoreError

DOCUMENTS = [[[5, 6, 7], [8]], [[9, 10]], [], [[], [65535, 1]]]


def write(prefix, documents=DOCUMENTS, dtype=np.uint16, metadata=None):
    with StoreWriter(prefix, dtype, metadata) as writer:
        for document in documents:
            writer.add_document([np.array(s, dtype=np.int64) for s in document])
    return str(prefix)


def read(store):
    counts = np.diff(store.document_starts)
    return [[store.sequence(d, k).tolist() for k in range(n)] for d, n in enumerate(counts)]


@pytest.fixture
def megatron():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(
            "megatron.core.datasets.indexed_dataset",
            reason="megatron-core is not installed",
            exc_type=ImportError,
        )


def test_round_trip(tmp_path):
    store = TokenStore.open(write(tmp_path / "sub" / "a", metadata={"vocab_hash": "x"}))
    assert read(store) == DOCUMENTS
    assert (len(store), store.num_sequences, store.dtype) == (4, 5, np.uint16)
    assert store.lengths.dtype == np.int32 and store.lengths.tolist() == [3, 2, 0, 0]
    assert store.metadata == {"vocab_hash": "x"} and len(store.manifest_hash) == 64
    assert sorted(p.name for p in (tmp_path / "sub").iterdir()) == ["a.bin", "a.idx", "a.json"]
    with pytest.raises(ValueError, match="read-only"):
        store.sequence(0)[0] = 1


@settings(max_examples=30, deadline=None)
@given(
    documents=st.lists(st.lists(st.lists(st.integers(0, 255), max_size=5), max_size=3), max_size=6),
    code=st.sampled_from([code for code, name in DTYPE_CODES.items() if name not in ("int8",)]),
)
def test_round_trip_of_any_documents(tmp_path_factory, documents, code):
    prefix = tmp_path_factory.mktemp("store") / "a"
    store = TokenStore.open(write(prefix, documents, DTYPE_CODES[code]))
    assert read(store) == documents
    flat, offsets = store.gather(np.arange(store.num_sequences))
    assert flat.tolist() == [i for d in documents for s in d for i in s]
    assert np.diff(offsets).tolist() == store.sequence_lengths.tolist()


def test_bulk_equals_one_by_one(tmp_path):
    write(tmp_path / "a", [[[1, 2], [3]], [[4], [5, 6, 7]]])
    with StoreWriter(tmp_path / "b", np.uint16) as writer:
        writer.add_documents(np.arange(1, 8), np.array([0, 2, 3, 4, 7]), 2)
    with StoreWriter(tmp_path / "c", np.uint16) as writer:
        writer.add_documents(np.arange(-2, 8), np.array([3, 5, 6, 7, 10]), np.array([2, 2]))
    for suffix in (".bin", ".idx", ".json"):
        contents = {Path(f"{tmp_path}/{name}{suffix}").read_bytes() for name in "abc"}
        assert len(contents) == 1


def test_bytes_equal_megatrons(tmp_path, megatron):
    import torch

    for number, dtype in enumerate((np.uint8, np.uint16, np.int32, np.int64)):
        documents = [[[5, 6, 7], [8]], [[9, 10]], [], [[], [11, 12]]]
        ours, theirs = tmp_path / f"ours{number}", tmp_path / f"theirs{number}"
        write(ours, documents, dtype)
        builder = megatron.IndexedDatasetBuilder(f"{theirs}.bin", dtype=dtype)
        for document in documents:
            for sequence in document:
                builder.add_item(torch.tensor(sequence, dtype=torch.int64))
            builder.end_document()
        builder.finalize(f"{theirs}.idx")
        for suffix in (".bin", ".idx"):
            assert Path(f"{ours}{suffix}").read_bytes() == Path(f"{theirs}{suffix}").read_bytes()
        with pytest.raises(StoreError, match=r"theirs\d\.json: there is no such manifest.*verify=False"):
            TokenStore.open(theirs)
        assert read(TokenStore.open(theirs, verify=False)) == documents
        dataset = megatron.IndexedDataset(str(ours))
        assert [dataset[i].tolist() for i in range(len(dataset))] == [s for d in documents for s in d]
        assert dataset.document_indices.tolist() == [0, 2, 3, 3, 5]


@pytest.mark.parametrize("documents", [[], [[]], [[[]], [[], []]]])
def test_empty_stores(tmp_path, documents):
    store = TokenStore.open(write(tmp_path / "a", documents))
    assert read(store) == documents and len(store.lengths) == len(documents)
    assert store.gather(np.empty(0, np.int64))[1].tolist() == [0]
    assert store.gather_padded(np.empty(0, np.int64), 0).shape == (0, 0)


def test_gather_takes_any_order_and_repeats(tmp_path):
    store = TokenStore.open(write(tmp_path / "a"))
    numbers = sequence_numbers(store, np.array([3, 0, 1, 0]), np.array([1, 1, 0, 0]))
    flat, offsets = store.gather(numbers)
    assert flat.tolist() == [65535, 1, 8, 9, 10, 5, 6, 7] and offsets.tolist() == [0, 2, 3, 5, 8]
    expected = [[65535, 1, 0], [8, 0, 0], [9, 10, 0], [5, 6, 7]]
    assert store.gather_padded(numbers, 0).tolist() == expected
    buffer = np.full((6, 9), 77)
    assert store.gather_padded(numbers, 0, out=buffer).tolist() == expected
    with pytest.raises(StoreError, match="`out` is smaller"):
        store.gather_padded(numbers, 0, out=buffer[:, :2])
    flat[0] = 3  # a copy, which its owner may change
    assert pad_rows(flat, offsets, 9, shift=1)[1].tolist() == [9, 8, 9, 9]


def test_long_rows_take_the_other_path(tmp_path):
    rows = [list(range(n)) for n in (100, 3, 180)]
    store = TokenStore.open(write(tmp_path / "a", [[row] for row in rows]))
    padded = store.gather_padded(np.array([2, 0, 1]), 7)
    assert [row.tolist() for row in padded] == [rows[i] + [7] * (180 - len(rows[i])) for i in (2, 0, 1)]


def test_bad_requests_name_what_there_is(tmp_path):
    store = TokenStore.open(write(tmp_path / "a"))
    for document, k, found in (
        (4, 0, "4 documents"),
        (-1, 0, "4 documents"),
        (0, 2, "2 seq"),
        (2, 0, "0 seq"),
        (1, -1, "1 seq"),
    ):
        with pytest.raises(StoreError, match=found):
            store.sequence(document, k)


def test_ids_that_do_not_fit_are_refused(tmp_path):
    for value in (65536, -1):
        with pytest.raises(StoreError, match="do not fit uint16"):
            write(tmp_path / "a", [[[value]]])
    with (
        pytest.raises(StoreError, match="do not fit uint16"),
        StoreWriter(tmp_path / "a", np.uint16) as writer,
    ):
        writer.add_document([np.array([1.5])])
    with pytest.raises(StoreError, match="no code for complex128"):
        StoreWriter(tmp_path / "a", np.complex128)
    for offsets, counts in (([0, 2, 1], 1), ([0, 9], 1), ([0, 1, 2, 3], 2), ([0, 1, 2], np.array([1]))):
        with pytest.raises(StoreError), StoreWriter(tmp_path / "a", np.uint16) as writer:
            writer.add_documents(np.array([1, 2, 3]), np.array(offsets), counts)
    assert not list(tmp_path.iterdir())


def test_an_exception_leaves_nothing_and_the_old_store_stands(tmp_path):
    write(tmp_path / "a")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(RuntimeError), StoreWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document([np.array([1])])
        raise RuntimeError
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_death_at_any_step_of_publishing_is_seen(tmp_path, monkeypatch):
    real = Path.replace
    for steps in range(3):
        prefix = tmp_path / f"s{steps}"
        write(prefix, [[[1, 2]]])
        done = []

        def dying(source, target, done=done, steps=steps):
            if len(done) == steps:
                raise KeyboardInterrupt
            done.append(target)
            return real(source, target)

        monkeypatch.setattr(Path, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            write(prefix, [[[3, 4]]])
        monkeypatch.setattr(Path, "replace", real)
        with pytest.raises(StoreError, match="no such manifest"):
            TokenStore.open(prefix)


def test_no_fault_is_silent(tmp_path):
    rng = random.Random(0)
    documents = [[[rng.randrange(65536) for _ in range(rng.randrange(1, 9))] for _ in range(2)] for _ in range(60)]
    whole, other, torn = (write(tmp_path / name, documents) for name in ("whole", "other", "torn"))
    write(other, [[[token ^ 1 for token in s] for s in d] for d in documents])
    silent = []
    for trial in range(500):
        for suffix in (".bin", ".idx", ".json"):
            shutil.copyfile(whole + suffix, torn + suffix)
        suffix = rng.choice([".bin", ".idx"])
        raw = bytearray(Path(whole + suffix).read_bytes())
        kind = rng.choice(["truncate", "flip", "swap", "append", "missing"])
        if kind == "truncate":
            raw = raw[: rng.randrange(len(raw))]
        elif kind == "flip":
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        elif kind == "swap":
            suffix, raw = ".bin", bytearray(Path(other + ".bin").read_bytes())
        elif kind == "append":
            raw += b"\0"
        Path(torn + suffix).write_bytes(raw)
        if kind == "missing":
            Path(torn + suffix).unlink()
        try:
            TokenStore.open(torn)
            silent.append((trial, kind, suffix))
        except StoreError as error:
            assert f"torn{suffix}" in str(error), (kind, suffix, error)
    assert silent == []


def test_causes_are_named(tmp_path):
    prefix = write(tmp_path / "a")
    bin_path, idx_path, json_path = (Path(prefix + s) for s in (".bin", ".idx", ".json"))
    index, ids, manifest = idx_path.read_bytes(), bin_path.read_bytes(), json_path.read_text()

    def refused(match, verify=True):
        with pytest.raises(StoreError, match=match):
            TokenStore.open(prefix, verify=verify)

    bin_path.write_bytes(ids[:-1])
    refused(r"a\.bin: it has 15 bytes, the manifest says 16: truncated")
    bin_path.write_bytes(ids)
    json_path.write_text(manifest.replace('"num_documents": 4', '"num_documents": 5'))
    refused("altered after writing")
    json_path.write_text(json.dumps([1]))
    refused("not the manifest of a token store")
    for torn in ("{", "[" * 100_000):
        json_path.write_text(torn)
        refused("cannot be read")
    json_path.write_text(manifest)
    bin_path.unlink()
    bin_path.mkdir()
    refused(r"a\.bin: it cannot be read \(Is a directory\)")
    bin_path.rmdir()
    json_path.unlink()
    bin_path.write_bytes(ids[:-2])
    refused(r"a\.bin: it has 14 bytes, its index says 16", verify=False)
    bin_path.write_bytes(ids)
    for at, patch, match in (
        (0, b"TNTIDX\0\0\0", "begins with b'TNTIDX"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\x09", "dtype code 9"),
        (18, struct.pack("<Q", 6), "its header says"),
        (34, struct.pack("<i", 2), "byte offsets do not follow"),
        (len(index) - 8, struct.pack("<q", 4), "documents do not cover"),
    ):
        idx_path.write_bytes(index[:at] + patch + index[at + len(patch) :])
        refused(match, verify=False)
    idx_path.write_bytes(index[:20])
    refused("truncated", verify=False)
    idx_path.write_bytes(index)
    assert read(TokenStore.open(prefix, verify=False)) == DOCUMENTS


def test_offsets_beyond_two_gibibytes(tmp_path):
    lengths = np.array([2**30, 2**30, 3], dtype=np.int32)  # uint16: the third begins at byte 2**32
    index = build_index(lengths, np.arange(4), np.dtype("<u2"))
    (tmp_path / "a.idx").write_bytes(index)
    with (tmp_path / "a.bin").open("wb") as file:  # sparse
        file.seek(2**32)
        file.write(np.array([7, 8, 9], "<u2").tobytes())
    store = TokenStore.open(tmp_path / "a", verify=False)
    assert store.sequence(2).tolist() == [7, 8, 9]
    assert store.gather_padded(np.array([2, 2]), 0).tolist() == [[7, 8, 9]] * 2


def test_stores_leak_no_files(tmp_path):
    prefix = write(tmp_path / "a")
    before = psutil.Process().num_fds()
    for _ in range(200):
        TokenStore.open(prefix).sequence(0)
    assert psutil.Process().num_fds() <= before
