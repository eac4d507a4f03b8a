"""Files that hold one layer each: their names, their index, their tensors, and the part that a tensor rank takes.

A folder holds one file a layer, in the order of the model's list, with the layer's own parameter names inside:
    model.layers.0.safetensors  model.layers.1.safetensors  ...  index.json      (`biokit split-layers`)
    model.layers.0.pt           model.layers.1.pt           ...                  (state dicts, no pickled objects)
The index holds shapes and the sha256 of every file; a file that it does not name is left over from another split.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from biokit.errors import CheckpointError, ConfigError, list_faults
from biokit.parallel.cuts import cut_tensor, find_cut, padded_size
from biokit.runs import describe_file

FORMAT, INDEX = "biokit-layers-1", "index.json"
FILE_NAME = re.compile(r"model\.layers\.\d+\.(pt|safetensors)")
VOCABULARY_TABLES = ("tokens", "embed_tokens", "word_embeddings", "lm_head")  # module names, where no plan says which
ROWS_AT_ONCE = 4096
SPLIT_AGAIN = "Split the checkpoint into a new folder (biokit split-layers)"


@dataclass(frozen=True)
class Share:
    """The part of a layer's file that a tensor rank takes.

    Attributes:
        plan: the tensor-parallel plan, and `layer_name` the layer's name in it; empty: nothing is cut.
        new_num_tokens: rows that token tables and output projections shall have; 0: those that the file has.
    """

    plan: Mapping[str, str] = field(default_factory=dict)
    layer_name: str = ""
    num_parts: int = 1
    part: int = 0
    new_num_tokens: int = 0

    def take(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This rank's piece of a tensor; a view of it, unless rows are added. Runs on `meta` too.

        Raises:
            ConfigError: a dimension that cannot be divided, or fewer tokens than the file has.
        """
        cut = find_cut(self.plan, f"{self.layer_name}.{name}")
        owner = name.rpartition(".")[0].rpartition(".")[2]  # empty: the layer is a table itself
        grows = self.new_num_tokens and not self.plan and whole.dim() and owner in ("", *VOCABULARY_TABLES)
        if cut.padded or grows:
            return _take_rows(whole, self.new_num_tokens or len(whole), self.num_parts, self.part)
        return cut_tensor(whole, cut, self.num_parts, self.part)


def is_layer_folder(directory: Path) -> bool:
    """Whether a folder holds layer files."""
    return any((directory / layer_file_name(0, suffix)).is_file() for suffix in (".safetensors", ".pt"))


def layer_file_name(position: int, suffix: str = ".safetensors") -> str:
    """The file of the layer at a position in the model's list."""
    return f"model.layers.{position}{suffix}"


def describe_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Shape and type of each tensor, as the index holds them."""
    return {key: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for key, t in tensors.items()}


def read_index(directory: Path) -> dict[str, Any] | None:
    """The index of a folder of layer files; None where it has none.

    `sizes` are the model's name and resolved sizes. Each entry of `layers`, in order, has `name`, `file`, `bytes`,
    `sha256` and `tensors`: tensors by name, without storage.

    Raises:
        CheckpointError: it cannot be read, is of another kind, or lists no layers or files by other names.
    """
    path = directory / INDEX
    if not path.exists():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(f"its format is {index['format']}, not {FORMAT}")
        if not isinstance(index["layers"], list) or not index["layers"]:
            raise ValueError("it lists no layers")
        if not isinstance(index.get("sizes", {}), dict) or not isinstance(index.get("tied", {}), dict):
            raise ValueError("its sizes or tied are no mapping")
        for position, entry in enumerate(index["layers"]):
            entry["name"], entry["bytes"], entry["sha256"]
            if entry["file"] != layer_file_name(position):
                raise ValueError(f"the file of layer {position} is {entry['file']!r}, not {layer_file_name(position)}")
            entry["tensors"] = {
                key: torch.empty(form["shape"], dtype=getattr(torch, form["dtype"]), device="meta")
                for key, form in entry["tensors"].items()
            }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"index {path}", f"it cannot be used ({error!r})", SPLIT_AGAIN) from error
    return index


def find_layer_files(directory: Path, layer_names: Sequence[str]) -> list[Path]:
    """The file of each layer of a model, in order; the files' content is checked where they are opened.

    Raises:
        CheckpointError: a missing file, one too many, or files of a model with other layers.
    """
    asked = f"layer files in {directory}"
    found = {path.name for path in directory.glob("model.layers.*") if FILE_NAME.fullmatch(path.name)}
    index = read_index(directory)
    suffix = ".pt" if index is None and layer_file_name(0, ".pt") in found else ".safetensors"
    expected = [layer_file_name(position, suffix) for position in range(len(layer_names))]
    if index is not None and [entry["name"] for entry in index["layers"]] != list(layer_names):
        theirs, ours = [
            f"{len(names)} layers, {names[0]} to {names[-1]}"
            for names in ([entry["name"] for entry in index["layers"]], list(layer_names))
        ]
        raise CheckpointError(asked, f"they are of a model of {theirs}, not {ours}", "Use the model that was split")
    faults = [f"missing {name}" for name in expected if name not in found]
    faults += [f"extra {name}" for name in sorted(found - set(expected))]
    if faults:
        raise CheckpointError(asked, list_faults(faults), SPLIT_AGAIN)
    return [directory / name for name in expected]


def open_layer_file(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a layer file after a check against the index beside it; mapped: a page is read when touched.

    Raises:
        CheckpointError: no such file, an altered or left-over one, or one that does not map names to tensors.
    """
    asked = f"layer file {path}"
    if not path.is_file():
        raise CheckpointError(asked, "there is no such file", "Give the layer's file, or load_ckpt=False")
    index = read_index(path.parent)
    if index is not None:
        noted = {entry["file"]: {key: entry[key] for key in ("bytes", "sha256")} for entry in index["layers"]}
        if path.name not in noted:
            found = f"the {INDEX} beside it does not name it: it is left over from another split"
            raise CheckpointError(asked, found, SPLIT_AGAIN)
        if describe_file(path) != noted[path.name]:
            raise CheckpointError(asked, f"it is not what {INDEX} says (size or sha256 differs)", SPLIT_AGAIN)
    try:
        tensors = _map_tensors(path)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        found = f"it cannot be read safely ({(str(error) or repr(error)).splitlines()[0]})"
        do = "Give a .safetensors file, or a .pt file that torch.save made of a mapping of names to tensors"
        raise CheckpointError(asked, found, do) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise CheckpointError(asked, "it does not map names to tensors", "Save the layer's state_dict() alone")
    return tensors


def _map_tensors(path: Path) -> Any:
    if path.suffix == ".pt":
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)


def _take_rows(whole: torch.Tensor, num_rows: int, num_parts: int, part: int) -> torch.Tensor:
    """Rows of `part` of a table that is grown to `num_rows`, then padded with zeros to a multiple of `num_parts`.

    A new row is the mean of the old ones: its token's logit begins as the mean logit (Hewitt 2021, "Initializing new
    word embeddings for pretrained language models").
    """
    if num_rows < len(whole):
        raise ConfigError(f"new_num_tokens={num_rows}", f"the file has {len(whole)} tokens", "Give as many, or more")
    num_own = padded_size(num_rows, num_parts) // num_parts
    first, last = part * num_own, (part + 1) * num_own
    kept = whole[first:last]
    if len(kept) == num_own:
        return kept
    num_new = max(0, min(last, num_rows) - max(first, len(whole)))
    padding = whole.new_zeros(num_own - len(kept) - num_new, *whole.shape[1:])
    new = _mean_row(whole).expand(num_new, *whole.shape[1:]) if num_new else kept[:0]
    return torch.cat([kept, new, padding])


def _mean_row(table: torch.Tensor) -> torch.Tensor:
    """In float64, some rows at a time: a table may be most of a rank's memory."""
    total = torch.zeros(table.shape[1:], dtype=torch.float64, device=table.device)
    for rows in table.split(ROWS_AT_ONCE):
        total += rows.double().sum(0)
    return (total / len(table)).to(table.dtype)
