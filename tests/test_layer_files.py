"""Layer files: a split that is whole or not there, named faults, nothing executed, pieces that join."""

import json
import os
import resource
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from biokit.errors import CheckpointError, ConfigError, DataError
from biokit.exchange.layers import split_layers
from biokit.models.molbart import MOLBART
from biokit.parallel.cuts import find_cut, join_tensors, padded_size
from biokit.parallel.layer_files import INDEX, Share, layer_file_name, open_layer_file
from biokit.parallel.layer_loading import load_layers
from biokit.parallel.layer_specs import PretrainedLayerSpec
from tests.layer_folder import make_config, make_parts, same_state, save, split_model, write_file


def test_the_index_describes_the_files(tmp_path):
    config, model, folder = split_model(tmp_path)
    index = json.loads((folder / INDEX).read_text())
    assert [entry["name"] for entry in index["layers"]] == [name for name, _ in make_parts(config).layers]
    assert sorted(path.name for path in folder.iterdir()) == sorted([INDEX, *(e["file"] for e in index["layers"])])
    count = sum(torch.Size(t["shape"]).numel() for entry in index["layers"] for t in entry["tensors"].values())
    assert count == sum(weight.numel() for weight in model.parameters())
    assert index["vocab_hash"] == "v1" and index["source"]["step"] == 3


def test_split_takes_only_sound_checkpoints_and_new_folders(tmp_path):
    checkpoint, _ = save(tmp_path / "run", make_config())
    target = tmp_path / "layers"
    target.mkdir()
    (target / layer_file_name(9)).touch()
    with pytest.raises(CheckpointError, match="not empty"):
        split_layers(checkpoint, target)
    (target / layer_file_name(9)).unlink()
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing or altered"):
        split_layers(checkpoint, target)
    assert list(target.iterdir()) == []
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
        split_layers(tmp_path / "nothing", target)


def test_a_full_disk_leaves_nothing_half(tmp_path):
    checkpoint, _ = save(tmp_path / "run", make_config())
    size = max(path.stat().st_size for path in checkpoint.iterdir()) // 10
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(DataError, match="layers"):
            split_layers(checkpoint, tmp_path / "layers")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_folders_that_are_not_this_models_are_refused(tmp_path):
    config, _, folder = split_model(tmp_path)

    def refused(match, **changes):
        with pytest.raises(CheckpointError, match=match):
            load_layers(make_parts(config, **changes), folder, vocabulary_hash="v1")

    with pytest.raises(CheckpointError, match="another vocabulary"):
        load_layers(make_parts(config), folder, vocabulary_hash="v2")
    refused(r"layers\.0.*tokens\.weight is \(13, 16\) float32 instead of \(14, 16\)", vocab_size=14)
    shutil.copy(folder / layer_file_name(0), folder / layer_file_name(6))
    refused(r"extra model\.layers\.6\.safetensors")
    (folder / layer_file_name(6)).rename(folder / layer_file_name(2))
    (folder / layer_file_name(5)).unlink()
    refused(r"missing model\.layers\.5\.safetensors")
    config.model = replace(config.model, num_layers=3)
    refused("6 layers, embed to head, not 8 layers, embed to head")
    (folder / INDEX).unlink()
    refused(r"missing model\.layers\.5.*missing model\.layers\.7")


def change_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def test_sizes_that_no_shape_shows_are_compared(tmp_path):
    """A fused projection is as tall with any number of heads; a tied table has the shape of an own one."""
    config, model, folder = split_model(tmp_path)
    sizes = {"name": MOLBART.name, **MOLBART.resolve(config.model)}
    assert same_state(load_layers(make_parts(config), folder, sizes=sizes).build(), model)
    config.model = replace(config.model, num_attention_heads=4)
    other = MOLBART.resolve(config.model)
    with pytest.raises(CheckpointError, match=r"another model: num_attention_heads is 2, the run's is 4\. Use"):
        load_layers(make_parts(config), folder, sizes=other)
    with pytest.raises(CheckpointError, match="name is molbart, the run's is bert"):
        load_layers(make_parts(config), folder, sizes={"name": "bert"})
    with pytest.raises(CheckpointError, match=r"tied parameters are \{\}, the run's are \{'head"):
        load_layers(make_parts(make_config(tied=True)), folder, sizes=sizes)
    change_index(folder, lambda index: index.pop("sizes"))
    with pytest.raises(CheckpointError, match="num_layers is not said, the run's is 2"):
        load_layers(make_parts(config), folder, sizes=sizes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index.update(layers=[]), "lists no layers"),
        (lambda index: index.update(layers={"0": {}}), "lists no layers"),
        (lambda index: index.update(sizes=[2]), "sizes or tied are no mapping"),
        (lambda index: index["layers"][1].update(file="../model.layers.1.safetensors"), r"layer 1 is '\.\./model"),
        (lambda index: index["layers"][1].update(file="model.layers.1.pt"), r"not model\.layers\.1\.safetensors"),
        (lambda index: index["layers"].reverse(), r"layer 0 is 'model\.layers\.5\.safetensors'"),
        (lambda index: index["layers"][2].pop("file"), "KeyError"),
        (lambda index: index["layers"][2].pop("sha256"), "KeyError"),
        (lambda index: index["layers"].insert(0, "embed"), "TypeError"),
        (lambda index: index["layers"][0]["tensors"]["embedding.tokens.weight"].update(shape=[-1]), "RuntimeError"),
    ],
)
def test_an_index_that_does_not_describe_layer_files_is_refused(tmp_path, change, words):
    config, _, folder = split_model(tmp_path)
    change_index(folder, change)
    for use in (lambda: load_layers(make_parts(config), folder), lambda: open_layer_file(folder / layer_file_name(0))):
        with pytest.raises(CheckpointError, match=f"index.*cannot be used.*{words}"):
            use()


def test_an_index_beside_files_of_another_kind(tmp_path):
    config, _, folder = split_model(tmp_path)
    for path in folder.glob("*.safetensors"):
        path.rename(path.with_suffix(".pt"))
    with pytest.raises(CheckpointError, match=r"missing model\.layers\.0\.safetensors.*more"):
        load_layers(make_parts(config), folder)


def test_an_altered_or_left_over_file_is_refused_by_its_reader_alone(tmp_path):
    config, model, folder = split_model(tmp_path)
    path = folder / layer_file_name(2)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    layers = load_layers(make_parts(config), folder).layers
    assert same_state(layers[1][1](), model.layers()[1])  # another rank's layer
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.safetensors: it is not what index\.json says"):
        layers[2][1]()
    with torch.device("meta"):
        layers[2][1]()  # counting reads nothing
    shutil.copy(folder / layer_file_name(1), folder / layer_file_name(7))
    spec = PretrainedLayerSpec(nn.Linear, 2, 2, pretrained_ckpt_path=folder / layer_file_name(7))
    with pytest.raises(CheckpointError, match="left over from another split"):
        spec.build()


class Command:
    def __reduce__(self):
        return os.system, ("touch executed",)


GOOD = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"weight": GOOD["weight"]}, "missing bias"),
        ({**GOOD, "scale": torch.ones(1)}, "extra scale"),
        ({**GOOD, "weight": torch.ones(3, 2)}, r"weight is \(3, 2\) float32 instead of \(2, 3\) float32"),
        ({**GOOD, "bias": torch.ones(2, dtype=torch.float64)}, r"bias is \(2,\) float64 instead of \(2,\) float32"),
        ({**GOOD, "bias": torch.ones(2, dtype=torch.int32)}, r"bias is \(2,\) int32"),
        ({"Weight": torch.ones(1)}, "missing weight; missing bias; extra Weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, suffix, content, match):
    path = tmp_path / f"layer{suffix}"
    write_file(path, content)
    with pytest.raises(CheckpointError, match=match):
        PretrainedLayerSpec(nn.Linear, 3, 2, pretrained_ckpt_path=path).build()


def test_files_that_cannot_be_read_safely_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Command()}, "command.pt")
    torch.save(GOOD, "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save([GOOD], "list.pt")
    torch.save(GOOD, "whole.pt")
    torn = (tmp_path / "whole.pt").read_bytes()[:-300]
    for name in ("torn.pt", "torn.safetensors"):
        (tmp_path / name).write_bytes(torn)
    for name in ("command.pt", "legacy.pt", "list.pt", "torn.pt", "torn.safetensors", "missing.pt", "missing"):
        with pytest.raises(CheckpointError, match=name):
            PretrainedLayerSpec(nn.Linear, 3, 2, pretrained_ckpt_path=name).build()
    assert not (tmp_path / "executed").exists()


def test_half_precision_files_widen_exactly(tmp_path):
    half = {name: (value / 3).bfloat16() for name, value in GOOD.items()}
    save_file(half, tmp_path / "layer.safetensors")
    layer = PretrainedLayerSpec(nn.Linear, 3, 2, pretrained_ckpt_path=tmp_path / "layer.safetensors").build()
    assert layer.weight.dtype == torch.float32 and torch.equal(layer.weight, half["weight"].float())
    assert not load_file(tmp_path / "layer.safetensors")["weight"].equal(GOOD["weight"] / 3)


@pytest.mark.parametrize("num_tokens", [0, 13, 14, 18])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 4, 8])
def test_tensor_ranks_take_pieces_that_join(num_parts, num_tokens):
    """Column, row, vocabulary (grown and padded) and replicated tensors, against the whole one."""
    table, num_rows = torch.randn(13, 24), num_tokens or 13
    tensors = {"up.weight": torch.randn(48, 24), "up.bias": torch.randn(48), "down.weight": torch.randn(24, 48)}
    tensors |= {"down.bias": torch.randn(24), "tokens.weight": table, "tokens.bias": table[:, 0].clone()}
    plan = {"l.up": "column", "l.down": "row", "l.tokens": "vocab"}
    shares = [Share(plan, "l", num_parts, part, num_tokens) for part in range(num_parts)]
    grown = torch.cat([table, table.double().mean(0).float().expand(num_rows - 13, 24)])
    for name, whole in tensors.items():
        pieces = [share.take(name, whole) for share in shares]
        assert pieces[0].shape == shares[0].take(name, whole.to("meta")).shape
        expected = {"tokens.weight": grown, "tokens.bias": grown[:, 0]}.get(name, whole)
        assert torch.equal(join_tensors(pieces, find_cut(plan, f"l.{name}"), expected.shape), expected), name
        if name.startswith("tokens") and num_parts > 1:
            assert torch.cat(pieces)[num_rows:].count_nonzero() == 0
            assert len(torch.cat(pieces)) == padded_size(num_rows, num_parts)


def test_fewer_tokens_than_the_file_has_are_refused():
    with pytest.raises(ConfigError, match="new_num_tokens=12: the file has 13 tokens"):
        Share({"l.tokens": "vocab"}, "l", new_num_tokens=12).take("tokens.weight", torch.ones(13, 2))
