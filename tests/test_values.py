"""Values between processes: what comes back is what went in, and no file can run code."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import tempfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from biokit.errors import DataError
from biokit.launch.values import check_values, read_values, write_values

TORCH_TYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip
NUMPY_TYPES = ["?", "i1", "u2", "<i8", ">i4", "<f2", "<f8", ">f8", "g", "<c8", "<c16", "M8[ns]", "m8[D]", "S3", "<U4"]


def round_trip(value: Any, path: Path) -> Any:
    write_values(path / "values.safetensors", {"x": value})
    return read_values(path / "values.safetensors")["x"]


@pytest.mark.parametrize("dtype", TORCH_TYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (), (0, 2), (4,)], ids=str)
def test_tensors(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = (torch.arange(math.prod(shape)).reshape(shape) % 2).to(dtype)
    back = round_trip(tensor, tmp_path)
    assert type(back) is torch.Tensor and (back.dtype, back.shape) == (dtype, tensor.shape)
    assert back.flatten().tolist() == tensor.flatten().tolist()


def test_tensors_of_every_kind(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    for tensor in (base.t(), base[:, 1], base.expand(4, 2, 3), torch.nn.Parameter(base), (base * 1j).conj()):
        back = round_trip(tensor, tmp_path)
        assert type(back) is torch.Tensor and not back.requires_grad and torch.equal(back, tensor.detach())
    back[0] = 7  # one's own memory, not the file's
    assert torch.isnan(round_trip(torch.tensor([math.nan, -0.0]), tmp_path)[0])


@pytest.mark.parametrize("dtype", NUMPY_TYPES)
def test_arrays_and_their_scalars(dtype: str, tmp_path: Path) -> None:
    array = np.arange(6).astype(dtype).reshape(2, 3)
    for value in (array, array.T, array[:0], array[0, 1], np.array(array[0, 1])):
        back = round_trip(value, tmp_path)
        assert type(back) is type(value) and back.dtype == value.dtype and back.shape == value.shape
        np.testing.assert_array_equal(back, value)
    empty_text = round_trip(np.str_(""), tmp_path)
    assert empty_text == "" and type(empty_text) is np.str_


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    | st.complex_numbers(allow_nan=False),
    lambda part: (
        st.lists(part, max_size=4)
        | st.lists(part, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.floats(allow_nan=False), part, max_size=4)
    ),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(plain)
def test_plain_values(value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        back = round_trip(value, Path(folder))
    assert back == value and repr(back) == repr(value)  # repr: -0.0, 1 and True, tuples and lists


def test_numbers_that_json_does_not_know(tmp_path: Path) -> None:
    value = [math.nan, math.inf, -math.inf, 10**6000, -(2**53), 2**53 - 1, complex(-0.0, math.inf), "\ud800\0é"]
    back = round_trip(value, tmp_path)
    assert math.isnan(back[0]) and repr(back[1:3]) == "[inf, -inf]" and back[3:6] == value[3:6]
    assert repr(back[6:]) == repr(value[6:])


def test_a_state_dict(tmp_path: Path) -> None:
    state = torch.nn.Linear(2, 3).state_dict()
    assert type(state) is OrderedDict
    back = round_trip({"model": state, "shape": state["weight"].shape, 3: None}, tmp_path)
    assert type(back["model"]) is dict and torch.equal(back["model"]["weight"], state["weight"])
    assert back["shape"] == (3, 2) and list(back) == ["model", "shape", 3]


cycle: list[Any] = [1]
cycle.append({"again": cycle})
deep: list[Any] = []
for _ in range(5000):
    deep = [deep]
REFUSED = [
    ({"head": torch.nn.Linear(1, 1)}, r'--out x: x\["head"\] is a Linear. Give its state_dict\(\).'),
    ([0, {1, 2}], r"x\[1\] is a set. Give a list of it."),
    (lambda: 0, r"x is a function. Give numbers, texts, arrays"),
    (b"bytes", r"x is a bytes."),
    (Path("a"), r"x is a PosixPath. Give str of it."),
    ({(1, 2): 3}, r"a key of x is a tuple."),
    (Counter("a"), r"x is a Counter."),
    (np.array([None]), r"x is an array of type object. Give its tolist\(\)."),
    (np.zeros(1, dtype=[("a", "i4")]), r"x is an array of type \[\('a', '<i4'\)\]"),
    (np.ma.masked_array([1]), r"x is a MaskedArray."),
    (torch.eye(2).to_sparse(), r"x is a sparse tensor. Give its to_dense\(\)."),
    (torch.empty(2, device="meta"), r"x is a meta tensor."),
    (cycle, r'x\[1\]\["again"\] is one of the things that it is in.'),
    (deep, r"x\[0\]\[0\].*\.\.\. is more than 100 levels deep."),
]


@pytest.mark.parametrize(("value", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_what_is_not_data_is_refused_by_its_place(value: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "values.safetensors"
    write_values(path, {"x": 1})
    with pytest.raises(DataError, match=message):
        write_values(path, {"y": 1, "x": value}, "--out")
    assert read_values(path) == {"x": 1} and os.listdir(tmp_path) == [path.name]  # noqa: PTH208


def test_several_values_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "new" / "values"
    write_values(path, {})
    assert read_values(path) == {}
    same = torch.ones(2)
    write_values(path, {"a": same, "b": {"c": same}, "d": np.ones(2)})
    back = read_values(path)
    assert torch.equal(back["a"], back["b"]["c"]) and back["d"].sum() == 2
    with pytest.raises(DataError, match="there is no such file"):
        read_values(tmp_path / "other")


class Trap:
    """A pickle that would leave a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


HOSTILE = [
    {"x": {"object": "os.system"}},
    {"x": {}},
    {"x": {"tensor": "0", "dtype": "load", "shape": [4]}},
    {"x": {"tensor": "0", "dtype": "float32", "shape": [10**15]}},
    {"x": {"tensor": "0", "dtype": "float32", "shape": [-7]}},
    {"x": {"tensor": "no", "dtype": "float32", "shape": [1]}},
    {"x": {"tensor": "0", "dtype": "qint8", "shape": [4]}},
    {"x": {"array": "0", "dtype": "O", "shape": [1]}},
    {"x": {"array": "0", "dtype": "|O8", "shape": [1]}},
    {"x": {"array": "0", "dtype": "V4", "shape": [1]}},
    {"x": {"array": "0", "dtype": "<U0", "shape": [0]}},
    {"x": {"array": "0", "dtype": "<f4", "shape": "many"}},
    {"x": {"array": "0"}},
    {"x": {"int": "import os"}},
    {"x": {"int": None}},
    {"x": {"float": "[]"}},
    {"x": {"complex": ["1"] * 3}},
    {"x": {"dict": [[[1], 2]]}},
    {"x": {"dict": [[1]]}},
    {"x": {"tuple": 5}},
    [1],
    "x",
]


@pytest.mark.parametrize("nodes", HOSTILE, ids=str)
def test_hostile_contents_are_refused(nodes: Any, tmp_path: Path) -> None:
    path = tmp_path / "values"
    save_file({"0": np.zeros(4, np.uint8)}, path, metadata={"biokit": json.dumps(nodes)})
    with pytest.raises(DataError, match="it is not a file of values"):
        read_values(path)


def test_hostile_files_are_refused(tmp_path: Path) -> None:
    path, trap = tmp_path / "values", tmp_path / "trapped"
    bomb = "[" * 100_000 + "]" * 100_000
    save_file({}, tmp_path / "bomb", metadata={"biokit": f'{{"x": {bomb}}}'})
    save_file({"a": np.zeros(1)}, tmp_path / "bare")
    torch.save({"x": Trap(trap)}, tmp_path / "torch")
    np.save(tmp_path / "numpy.npy", np.array([Trap(trap)], dtype=object), allow_pickle=True)
    contents = [
        b"", b"\0" * 7, b"\xff" * 64, pickle.dumps(Trap(trap)), (2**62).to_bytes(8, "little") + b"{}",
        *(p.read_bytes() for p in (tmp_path / "bomb", tmp_path / "bare", tmp_path / "torch", tmp_path / "numpy.npy")),
    ]  # fmt: skip
    write_values(path, {"x": torch.ones(100)})
    contents.append(path.read_bytes()[:-5])
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(DataError, match="it is not a file of values"):
            read_values(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError):
        read_values(path)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"hf_token": "hf_abcdef123456"}, 'cfg["hf_token"]'),
        ({"hub": [{"api_key": "k-123456"}]}, 'cfg["hub"][0]["api_key"]'),
        ({"api_keys": 3, "basic_auth": ("basic", "pa55word")}, 'cfg["basic_auth"]'),
        ({"password": "pa55word"}, 'cfg["password"]'),
    ],
)
def test_secrets_inside_of_values_are_found_by_name(value: Any, place: str) -> None:
    with pytest.raises(DataError, match=re.escape(f"--with cfg: {place} holds a secret")):
        check_values({"cfg": value}, "--with")
    check_values({"cfg": {"attention.key": [1.0], "pad_token": "<PAD>", "num_tokens": 7, "api_key": "none"}})
    check_values({"rows": [{"token": "C", "id": 3}, {"key": "smiles_column", "auth": "anonymous"}]})
    with pytest.raises(DataError, match="--with hf_token: hf_token holds a secret"):
        check_values({"hf_token": ["hf_abcdef123456"]}, "--with")


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"a": [s]}, lambda s: {f"<{s}>": 1}, np.array, np.bytes_])
def test_secrets_are_not_written(wrap: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "values.safetensors"
    with pytest.raises(DataError, match="--out x: it holds a secret"):
        write_values(path, {"y": 1, "x": wrap("hf_QwErTy123456")}, "--out", ["hf_QwErTy123456"])
    monkeypatch.setenv("HF_TOKEN", "hf_QwErTy123456")
    with pytest.raises(DataError, match="it holds a secret"):
        write_values(path, {"x": wrap("hf_QwErTy123456")})
    assert not path.exists()
