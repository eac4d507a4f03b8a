"""Layer-wise loading: each layer is built from a file of its own, on the rank that owns it and on no other.

A layer is built without storage, its file is mapped, and this rank's part is copied out of it. Memory holds the layers
that a rank owns and, while one is read, the pages of that one's file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from biokit.errors import CheckpointError, ConfigError, list_faults
from biokit.parallel.cuts import describe_form
from biokit.parallel.layer_files import SPLIT_AGAIN, Share, find_layer_files, open_layer_file, read_index
from biokit.parallel.lora import LoraConfig, set_trainable
from biokit.parallel.strategy import ModelParts

Make = Callable[[], nn.Module]


@dataclass(frozen=True)
class LayerSource:
    """Where a layer's tensors are: its own file, and for tied ones (local name -> file and name there) another's."""

    path: Path
    share: Share = field(default_factory=Share)
    tied: Mapping[str, tuple[Path, str]] = field(default_factory=dict)

    def open(self) -> dict[str, torch.Tensor]:
        """The whole tensors by local name, mapped."""
        return open_layer_file(self.path) | {
            key: open_layer_file(file)[name] for key, (file, name) in self.tied.items()
        }


def load_layers(
    parts: ModelParts,
    directory: Path,
    lora_mode: str = "full",
    lora: LoraConfig | None = None,
    new_num_tokens: int = 0,
    vocabulary_hash: str = "",
    sizes: Mapping[str, Any] | None = None,
) -> ModelParts:
    """The same model with every layer built from its file in a folder; what a strategy does with it does not change.

    Shapes do not say how many heads a fused projection holds: the index does. A folder without one (state dicts that
    another program saved) cannot be checked for that; its heads must be the model's, in biokit's order of rows.

    Args:
        parts: built for `new_num_tokens` where that is given.
        lora_mode: `full`, `lora` or `freeze`; see `biokit.parallel.lora`.
        new_num_tokens: rows of token tables and output projections; new ones begin as the mean of the old ones.
        vocabulary_hash: of the run; compared with the index where no tokens are added.
        sizes: the name and resolved sizes (`ModelSpec.resolve`) of the run's model; compared with the index.

    Raises:
        CheckpointError: files that are missing, too many, or of another model, sizes or vocabulary.
        ConfigError: a mode that does not exist, or adapters that would stand nowhere.
    """
    lora = lora or LoraConfig()
    names = [name for name, _ in parts.layers]
    paths = dict(zip(names, find_layer_files(directory, names), strict=True))
    sources = {name: _find_source(parts, paths, name, new_num_tokens) for name in names}
    _check_model(parts, directory, sizes or {})
    _check_index(parts, directory, sources, "" if new_num_tokens else vocabulary_hash)
    layers = [(name, partial(_build_trainable, make, sources[name], lora_mode, lora)) for name, make in parts.layers]
    with torch.device("meta"):
        trainable = [any(weight.requires_grad for weight in build().parameters()) for _, build in layers]
    if lora_mode == "lora" and not any(trainable):
        found = f"no linear layer of the model is named {' or '.join(lora.targets)}"
        raise ConfigError("lora_mode=lora", found, "Give LoraConfig(targets=...) names of linear layers")
    build = partial(_build_model, parts, sources, lora_mode, lora)
    return replace(parts, layers=layers, build=build, untrained=partial(_build_like, parts, lora_mode, lora))


def build_layer(make: Make, source: LayerSource) -> nn.Module:
    """A layer filled from its file; on the `meta` device it is built only, for counting.

    Args:
        make: builds the layer with the shapes that this tensor rank has.

    Raises:
        CheckpointError: the file, or a tensor in it that is missing, extra or misshapen.
    """
    with torch.device("meta"):
        layer = make()
    if not counting():
        fill_layer(layer, make, source)
    return layer


def counting() -> bool:
    """Whether modules are being built without storage (`with torch.device("meta")`)."""
    return torch.empty(0).is_meta


def fill_layer(layer: nn.Module, make: Make, source: LayerSource) -> None:
    """Give a layer that was built without storage the tensors of its file, in memory of its own.

    Raises:
        CheckpointError: the file, or a tensor in it that is missing, extra or misshapen.
    """
    stored = source.open()
    check_layer(layer, stored, source)
    state: dict[str, torch.Tensor] = {}
    filled: dict[torch.Tensor, nn.Parameter] = {}
    for name, old in _stored_tensors(layer).items():
        # a copy: a file that changes or vanishes later does not reach the weights
        fresh = torch.empty(old.shape, dtype=old.dtype, device="cpu").copy_(source.share.take(name, stored.pop(name)))
        state[name] = fresh
        if isinstance(old, nn.Parameter):
            state[name] = filled[old] = nn.Parameter(fresh, old.requires_grad)
            filled[old].__dict__.update(vars(old))  # an engine's marks, which assigning would lose
    # parameters that the layer holds under two names stay one
    state |= {name: filled[old] for name, old in layer.named_parameters(remove_duplicate=False)}
    layer.load_state_dict(state, strict=False, assign=True)  # the names were checked; an engine may add some of its own
    _make_again(layer, make)


def check_layer(layer: nn.Module, stored: Mapping[str, torch.Tensor], source: LayerSource) -> None:
    """Compare a layer's names, shapes and types with those of a file; a wider floating type in the layer is fine.

    Raises:
        CheckpointError: a missing, extra or misshapen tensor; names up to five.
    """
    expected = _stored_tensors(layer)
    faults = [f"missing {name}" for name in expected if name not in stored]
    faults += [f"extra {name}" for name in stored if name not in expected]
    for name, old in expected.items():
        if name in stored:
            found = source.share.take(name, stored[name].to("meta"))
            if found.shape != old.shape or not _fits(found.dtype, old.dtype):
                faults.append(f"{name} is {describe_form(found)} instead of {describe_form(old)}")
    if faults:
        do = "Use the model, the tensor parallel size and new_num_tokens that fit the file"
        raise CheckpointError(f"layer file {source.path}", f"it does not fit: {list_faults(faults)}", do)


def _build_trainable(make: Make, source: LayerSource, mode: str, lora: LoraConfig) -> nn.Module:
    layer = build_layer(make, source)
    set_trainable(layer, mode, lora, source.share.layer_name)
    return layer


def _build_model(parts: ModelParts, sources: Mapping[str, LayerSource], mode: str, lora: LoraConfig) -> nn.Module:
    """The whole model, its layers filled one after another."""
    with torch.device("meta"):
        model = parts.build()
    layers: list[nn.Module] = model.layers()  # type: ignore[operator]
    for layer, (name, make) in zip(layers, parts.layers, strict=True):
        if not counting():
            fill_layer(layer, make, sources[name])
        set_trainable(layer, mode, lora, name)
    for name, earlier in parts.tied.items():
        module_name, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module_name), leaf, model.get_parameter(earlier))
    return model


def _build_like(parts: ModelParts, mode: str, lora: LoraConfig) -> nn.Module:
    """The whole model as `_build_model` builds it, with weights that no file gave."""
    model = parts.build()
    for layer, (name, _) in zip(model.layers(), parts.layers, strict=True):  # type: ignore[operator]
        set_trainable(layer, mode, lora, name)
    return model


def _find_source(parts: ModelParts, paths: Mapping[str, Path], layer: str, new_num_tokens: int) -> LayerSource:
    tied = {}
    for name, earlier in parts.tied.items():
        if name.startswith(f"{layer}."):
            owner = next(one for one in paths if earlier.startswith(f"{one}."))
            tied[name[len(layer) + 1 :]] = (paths[owner], earlier[len(owner) + 1 :])
    return LayerSource(paths[layer], Share(parts.plan, layer, new_num_tokens=new_num_tokens), tied)


def _check_model(parts: ModelParts, directory: Path, sizes: Mapping[str, Any]) -> None:
    """What the index says of the model and no shape shows: a fused projection is as tall with any number of heads."""
    index = read_index(directory)
    if index is None:
        return
    theirs = index.get("sizes", {})
    faults = [
        f"{key} is {theirs.get(key, 'not said')}, the run's is {size}"
        for key, size in sizes.items()
        if theirs.get(key) != size
    ]
    if index.get("tied", {}) != dict(parts.tied):
        faults.append(f"tied parameters are {index.get('tied', {})}, the run's are {dict(parts.tied)}")
    if faults:
        do = f"Use the model section of the checkpoint that was split, or: {SPLIT_AGAIN}"
        raise CheckpointError(f"layer files in {directory}", f"they are of another model: {list_faults(faults)}", do)


def _check_index(parts: ModelParts, directory: Path, sources: Mapping[str, LayerSource], vocabulary_hash: str) -> None:
    """What the index says of the vocabulary and of every layer, on every rank, before an engine starts."""
    index = read_index(directory)
    if index is None:
        return
    if vocabulary_hash and index.get("vocab_hash", vocabulary_hash) != vocabulary_hash:
        do = "Use the vocabulary of the checkpoint that was split, or give new_num_tokens where it grew"
        raise CheckpointError(f"layer files in {directory}", "they were trained with another vocabulary", do)
    stored = {directory / entry["file"]: entry["tensors"] for entry in index["layers"]}
    for name, make in parts.layers:
        source = sources[name]
        tied = {key: stored[path][other] for key, (path, other) in source.tied.items()}
        with torch.device("meta"):
            check_layer(make(), stored[source.path] | tied, source)


def _stored_tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name: what a file holds."""
    passing = {f"{prefix}.{key}" if prefix else key for prefix, _, key in _passing_tensors(layer)}
    buffers = {name: value for name, value in layer.named_buffers() if name not in passing}
    return {**dict(layer.named_parameters()), **buffers}


def _passing_tensors(layer: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(module name, module, attribute) of tensors that no file holds: non-persistent buffers, plain attributes."""
    for prefix, module in layer.named_modules():
        plain = [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
        buffers = [key for key in module._non_persistent_buffers_set if module._buffers[key] is not None]
        yield from ((prefix, module, key) for key in plain + buffers)


def _make_again(layer: nn.Module, make: Make) -> None:
    """Tensors that no file holds (tables of positions) come from the same layer, built in full and dropped."""
    passing = list(_passing_tensors(layer))
    real = make() if passing else layer
    for prefix, module, key in passing:
        setattr(module, key, getattr(real.get_submodule(prefix), key))


def _fits(found: torch.dtype, expected: torch.dtype) -> bool:
    floating = found.is_floating_point and expected.is_floating_point
    return found == expected or (floating and torch.promote_types(found, expected) == expected)
