"""A model by itself: the same weights, nothing of the training, and every file checked before a tensor is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import biokit.model_folder
from biokit.__main__ import main
from biokit.checkpoint import load_checkpoint
from biokit.errors import BiokitError, CheckpointError, ConfigError, DataError
from biokit.model_folder import (
    DTYPES,
    PACKAGED,
    export_model,
    find_model_folder,
    list_models,
    load_model,
    open_model,
)
from biokit.runs import RunFolder
from biokit.train import train
from tests.small_run import small_config


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunFolder:
    folder = tmp_path_factory.mktemp("trained")
    train(small_config(folder, train_iters=3))
    return RunFolder(folder / "run")


@pytest.fixture
def exported(run, tmp_path) -> Path:
    return export_model(run.path, tmp_path / "model").folder


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_exported_model_is_the_runs_newest_one(run, tmp_path, dtype):
    saved = export_model(run.path, tmp_path / "model", dtype)
    assert {path.name for path in saved.folder.iterdir()} == {"model.safetensors", "vocab.txt", "model.json"}
    newest = load_checkpoint(run.checkpoint_dir(3))
    model, tokenizer = load_model(tmp_path / "model")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, newest.model[name].to(DTYPES[dtype]).float())
    assert not model.training and tokenizer.hash == newest.manifest["vocab_hash"] == saved.about["vocab_hash"]
    assert saved.about["step"] == 3 and saved.about["num_parameters"] == sum(p.numel() for p in model.parameters())
    sizes = [
        (run.checkpoint_dir(3) / "model.safetensors").stat().st_size,
        (saved.folder / "model.safetensors").stat().st_size,
    ]
    assert sizes[1] / sizes[0] == pytest.approx(1.0 if dtype == "fp32" else 0.5, abs=0.1)


def test_a_checkpoint_a_run_and_a_model_are_loaded_alike(run, exported):
    first, _ = load_model(run.path)
    second, _ = load_model(run.checkpoint_dir(3))
    third, _ = load_model(str(exported))
    for one, other, rounded in zip(first.parameters(), second.parameters(), third.parameters(), strict=True):
        assert torch.equal(one, other) and torch.equal(one.bfloat16().float(), rounded)


def test_no_path_of_the_training_machine_is_left(run, exported):
    text = (exported / "model.json").read_text()
    assert str(run.path.parent) not in text and "molecules.smi" not in text
    assert json.loads(text)["config"]["data"]["max_length"] == 60


@pytest.mark.parametrize("damage", ["bytes", "missing", "vocabulary", "index", "format", "no index"])
def test_a_damaged_model_is_told_and_not_loaded(exported, damage):
    weights, index = exported / "model.safetensors", exported / "model.json"
    about = json.loads(index.read_text())
    if damage == "bytes":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "missing":
        weights.unlink()
    elif damage == "vocabulary":
        (exported / "vocab.txt").write_text("A\nB\n")
    elif damage == "index":
        index.write_text(json.dumps({**about, "step": 99}))
    elif damage == "format":
        index.write_text(json.dumps({**about, "format": "other"}))
    else:
        index.write_text("{")
    messages = {
        "bytes": "model.safetensors is missing or altered", "missing": "model.safetensors is missing or altered",
        "vocabulary": "vocab.txt is missing or altered", "index": "model.json is altered",
        "format": "is not of format biokit-model-1", "no index": "cannot be read",
    }  # fmt: skip
    with pytest.raises(CheckpointError, match=messages[damage]):
        load_model(exported)


def test_a_folder_without_a_model_and_an_unknown_name(tmp_path):
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run with one"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match=f"no such folder or ready model.*{', '.join(list_models())}"):
        load_model("molbart_maxi")


def test_nothing_half_written(run, exported, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="there is a folder already"):
        export_model(run.path, exported)
    with pytest.raises(ConfigError, match="dtype=int8"):
        export_model(run.path, tmp_path / "new", "int8")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(biokit.model_folder, "save_file", full)
    with pytest.raises(BiokitError, match="No space left"):
        export_model(run.path, tmp_path / "new")
    assert not (tmp_path / "new").exists() and {path.name for path in tmp_path.iterdir()} <= {
        "model",
        ".new.partial.lock",
    }


def test_the_command_line(run, tmp_path, capsys):
    assert main(["export-model", str(run.path), str(tmp_path / "model")]) == 0
    assert "parameters in bf16" in capsys.readouterr().out
    assert main(["export-model", str(tmp_path / "none"), str(tmp_path / "other")]) == 2
    assert "no such folder or ready model" in capsys.readouterr().err


@pytest.mark.parametrize("strategy", ["Single", "DDP"])
def test_a_training_begins_with_a_model(exported, tmp_path, strategy):
    config = small_config(tmp_path, train_iters=2, lr=0.0)
    config.load, config.strategy = str(exported), strategy
    train(config)
    begun, _ = load_model(tmp_path / "run")
    expected, _ = load_model(exported)
    for one, other in zip(begun.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)  # a learning rate of 0: the weights that it began with
    lines = RunFolder(tmp_path / "run").read_metrics()
    assert [line["step"] for line in lines] == [1, 2]
    train_again = small_config(tmp_path, train_iters=3, lr=0.0)
    train_again.load, train_again.strategy = "there/is/no/more", strategy
    with pytest.raises(ConfigError, match="load=there/is/no/more: there is no such folder"):
        train(train_again)


def test_a_model_of_another_size_or_vocabulary_is_refused(exported, tmp_path):
    config = small_config(tmp_path, train_iters=2)
    config.load, config.model.num_layers = str(exported), 1
    with pytest.raises(CheckpointError, match=r"extra decoder\.1"):
        train(config)
    other = tmp_path / "vocab.txt"
    other.write_text((exported / "vocab.txt").read_text().replace("\nBr\n", "\n[Xe]\n"))
    config = small_config(tmp_path, "second", train_iters=2)
    config.load, config.data.vocab_file, config.data.on_bad = str(exported), str(other), "drop"
    with pytest.raises(CheckpointError, match=r"another vocabulary.*data\.vocab_file="):
        train(config)


@pytest.mark.parametrize("name", list_models())
def test_the_ready_models_are_whole_small_and_described(name):
    saved = open_model(name)
    files = {path.name: path.stat().st_size for path in find_model_folder(name).iterdir() if path.is_file()}
    assert files["model.safetensors"] <= 16e6 and saved.about["dtype"] == "bf16"
    card = (PACKAGED / name / "README.md").read_text()
    for part in ("## Data", "## Training", "## What it reaches", "## Limits"):
        assert part in card
    assert f"{saved.about['num_parameters']:,}" in card and f"{saved.about['step']:,}" in card
