"""Values that cross from one process to another: real objects, in one safetensors file that cannot run code.

Tensors and arrays are the file's tensors; all else is JSON in its metadata, under `biokit`:
    null, true, "text", 17, 0.5, [list]                                     as they are
    {"int": "0x..."}  {"float": "nan"}  {"complex": [re, im]}               numbers that JSON does not know
    {"tuple": [...]}  {"dict": [[key, value], ...]}                         the other containers
    {"tensor" | "array" | "scalar": "3", "dtype": "bfloat16", "shape": []}  the file's tensor 3, flat; its bytes where
                                                                            safetensors or numpy lacks the type
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biokit.errors import DataError
from biokit.launch.whole_imports import import_whole
from biokit.runs import LEFTOVER, flush_to_disk
from biokit.secrets import is_secret_text, looks_secret, mask

if TYPE_CHECKING:
    import numpy as np

MAX_DEPTH = 100
JSON_INT = 2**53  # larger ones are written in base 16, which every reader takes exactly and at any length
_NATIVE = re.compile(r"\|b1|\|[iu]1|<[iu][248]|<f[248]|<c8")  # numpy's types that safetensors has
_PLAIN_ARRAY = re.compile(r"\|b1|\|[iu]1|[<>][iu][248]|[<>]f\d+|[<>]c\d+|[<>][mM]8(\[\w+\])?|\|S\d+|[<>]U\d+")


def write_values(path: Path, values: Mapping[str, Any], flag: str = "values", secrets: Collection[str] = ()) -> None:
    """Replace a file of named values in one step.

    Tensors come back on the CPU, without gradients and of the plain class; subclasses of dict as dict.

    Args:
        flag: what an error names as asked for, e.g. `--out`.
        secrets: beside those of the environment.

    Raises:
        DataError: a value that is not data, or that holds a secret; names its place: `model["head"] is a Linear`.
    """
    import_whole("safetensors.numpy")
    from safetensors.numpy import save_file

    writer, nodes = _encode(values, flag, secrets)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=LEFTOVER)
    os.close(handle)
    try:
        save_file(writer.arrays, beside, metadata={"biokit": json.dumps(nodes, allow_nan=False)})
        Path(beside).chmod(0o644)
        flush_to_disk(Path(beside))
        Path(beside).replace(path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def check_values(values: Mapping[str, Any], flag: str = "values", secrets: Collection[str] = ()) -> None:
    """Refuse what `write_values` would refuse; nothing is written.

    Raises:
        DataError: a value that is not data, or that holds a secret.
    """
    _encode(values, flag, secrets)


def part_secrets(values: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Texts with secret names, which are written to no file, and all other values."""
    secret = {name: value for name, value in values.items() if looks_secret(name) and isinstance(value, str)}
    return secret, {name: value for name, value in values.items() if name not in secret}


def read_values(path: Path) -> dict[str, Any]:
    """The values of a file that `write_values` made. Nothing in the file is executed, whoever wrote it.

    Raises:
        DataError: no such file, or not one of these.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            nodes = json.loads((file.metadata() or {})["biokit"])
            return {name: _decode(node, file, 0) for name, node in nodes.items()}
    except FileNotFoundError as error:
        raise DataError(f"values of {path}", "there is no such file", "Check that the run gave values back") from error
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError, SafetensorError
    ) as error:  # fmt: skip
        found = f"it is not a file of values ({type(error).__name__}: {error})"
        raise DataError(f"values of {path}", found, "Run the cell again") from error


def _encode(values: Mapping[str, Any], flag: str, secrets: Collection[str]) -> tuple[_Writer, dict[str, Any]]:
    writer, nodes = _Writer(), {}
    for name, value in values.items():
        writer.asked, writer.texts = f"{flag} {name}", []
        if is_secret_text(name, value):
            raise writer.refuse_secret(name)
        nodes[name] = writer.encode(value, name, ())
        text = "\n".join(writer.texts)  # at once: to look at each for every secret takes minutes for many
        if mask(text, secrets) != text:
            raise writer.refuse_secret("it")
    return writer, nodes


class _Writer:
    """Turns values into JSON nodes and, beside them, flat arrays."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.asked = ""
        self.texts: list[str] = []  # all that could hold a secret

    def encode(self, value: Any, place: str, above: tuple[int, ...]) -> Any:
        """The node of a value. `place`: how Python reaches it; `above`: ids of the containers that it is in."""
        kind = type(value)
        if kind is str:
            self.texts.append(value)
        if value is None or kind in (bool, str):
            return value
        if kind is int:
            return value if abs(value) < JSON_INT else {"int": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if kind is complex:
            return {"complex": [repr(value.real), repr(value.imag)]}
        if kind.__module__ == "numpy":
            return self._encode_array(value, place)
        if hasattr(value, "detach") and hasattr(value, "untyped_storage"):
            return self._encode_tensor(value, place)
        return self._encode_container(value, place, above)

    def _encode_container(self, value: Any, place: str, above: tuple[int, ...]) -> Any:
        kind = type(value)
        if kind not in (list, tuple, dict, OrderedDict) and not (
            kind.__module__ == "torch" and kind.__name__ == "Size"
        ):
            raise self._refuse(place, _with_article(kind.__name__), _advise(value))
        if id(value) in above:
            raise self._refuse(place, "one of the things that it is in", "Give it without the cycle")
        if len(above) >= MAX_DEPTH:
            raise self._refuse(place[:80] + "...", f"more than {MAX_DEPTH} levels deep", "Give a flatter one")
        above = (*above, id(value))
        if not isinstance(value, dict):
            parts = [self.encode(part, f"{place}[{i}]", above) for i, part in enumerate(value)]
            return parts if kind is list else {"tuple": parts}
        pairs = []
        for key, part in value.items():
            if type(key) not in (str, int, float, bool):
                do = "Give it strings or numbers as keys"
                raise self._refuse(f"a key of {place}", _with_article(type(key).__name__), do)
            inner = f"{place}[{json.dumps(key, ensure_ascii=False)}]"
            if type(key) is str and is_secret_text(key, part):
                raise self.refuse_secret(inner)
            pairs.append([self.encode(key, inner, above), self.encode(part, inner, above)])
        return {"dict": pairs}

    def _encode_array(self, value: Any, place: str) -> Any:
        """A numpy array or scalar."""
        import numpy as np

        if not isinstance(value, np.generic) and type(value) is not np.ndarray:
            raise self._refuse(place, f"a numpy {type(value).__name__}", "Give numpy.asarray of it")
        dtype = value.dtype
        if not _PLAIN_ARRAY.fullmatch(dtype.str):
            do = "Give its tolist()" if dtype.kind == "O" else "Give an array of numbers or texts"
            raise self._refuse(place, f"an array of type {dtype}", do)
        flat = np.ascontiguousarray(value).reshape(-1)
        if not dtype.itemsize:  # texts that are all empty
            flat = flat.astype(f"{dtype.kind}1")
        if dtype.kind in "SU":
            self.texts += [part if dtype.kind == "U" else part.decode("latin-1") for part in flat.tolist()]
        kind = "array" if type(value) is np.ndarray else "scalar"
        stored = flat if _NATIVE.fullmatch(dtype.str) else flat.view(np.uint8)
        return self._keep(kind, stored, flat.dtype.str, value.shape)

    def _encode_tensor(self, value: Any, place: str) -> Any:
        import torch

        if type(value) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
            do = "Give its full_tensor()" if hasattr(value, "full_tensor") else "Give a plain tensor"
            raise self._refuse(place, _with_article(type(value).__name__), do)
        if value.layout is not torch.strided:
            raise self._refuse(place, "a sparse tensor", "Give its to_dense()")
        if value.is_quantized or value.device.type == "meta":
            kind = "quantized" if value.is_quantized else "meta"
            raise self._refuse(place, f"a {kind} tensor", "Give a tensor that holds its numbers")
        flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        try:
            stored = flat.numpy()
        except TypeError:  # bfloat16, float8: numpy has no such type
            stored = flat.view(torch.uint8).numpy()
        if not _NATIVE.fullmatch(stored.dtype.str):
            stored = flat.view(torch.uint8).numpy()
        return self._keep("tensor", stored, str(value.dtype).removeprefix("torch."), value.shape)

    def _keep(self, kind: str, stored: Any, dtype: str, shape: Any) -> dict[str, Any]:
        number = str(len(self.arrays))
        self.arrays[number] = stored
        return {kind: number, "dtype": dtype, "shape": list(shape)}

    def refuse_secret(self, place: str) -> DataError:
        """The error of a secret, which would be written to a file."""
        found = f"{place} holds a secret, which would be written to a file"
        return DataError(self.asked, found, "Leave it out, or read it from os.environ where it is needed")

    def _refuse(self, place: str, found: str, do: str) -> DataError:
        return DataError(self.asked, f"{place} is {found}", do)


def _decode(node: Any, file: Any, depth: int) -> Any:
    """The value of a node.

    Raises:
        ValueError, KeyError, TypeError, ...: it is none that `_Writer` makes.
    """
    if depth > 2 * MAX_DEPTH:
        raise ValueError("nested too deep")
    if isinstance(node, list):
        return [_decode(part, file, depth + 1) for part in node]
    if not isinstance(node, dict):
        return node
    kind, content = [*node.items(), ("", None)][0]
    if kind == "int":
        return int(content, 16)
    if kind == "float":
        return float(content)
    if kind == "complex":
        return complex(*map(float, content))
    if kind == "tuple":
        return tuple(_decode(part, file, depth + 1) for part in content)
    if kind == "dict":
        return {_decode(key, file, depth + 1): _decode(part, file, depth + 1) for key, part in content}
    if kind not in ("tensor", "array", "scalar"):
        raise ValueError(f"unknown kind {kind!r}")
    stored, dtype, shape = file.get_tensor(content), str(node["dtype"]), [int(size) for size in node["shape"]]
    return _decode_tensor(stored, dtype, shape) if kind == "tensor" else _decode_array(stored, dtype, shape, kind)


def _decode_array(stored: Any, dtype: str, shape: list[int], kind: str) -> Any:
    if not _PLAIN_ARRAY.fullmatch(dtype):
        raise ValueError(f"an array of type {dtype}")
    array = stored.view(dtype).reshape(shape)
    return array[()] if kind == "scalar" else array


def _decode_tensor(stored: Any, dtype: str, shape: list[int]) -> Any:
    import_whole("torch")
    import torch

    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or dtype.startswith("q"):
        raise ValueError(f"a tensor of type {dtype}")
    flat = torch.from_numpy(stored).view(kind) if stored.size else torch.empty(0, dtype=kind)
    return flat.reshape(shape)


def _with_article(name: str) -> str:
    return f"an {name}" if name[0] in "AEIOaeio" else f"a {name}"


def _advise(value: Any) -> str:
    """What to give instead of an object that is not data."""
    if callable(getattr(value, "state_dict", None)):
        return "Give its state_dict()"
    if isinstance(value, (set, frozenset)):
        return "Give a list of it"
    if isinstance(value, os.PathLike):
        return "Give str of it"
    if callable(getattr(value, "to_dict", None)):
        return "Give its to_dict()"
    return "Give numbers, texts, arrays, tensors, or lists and dicts of them"
