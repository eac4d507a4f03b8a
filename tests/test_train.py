"""Training: what it writes, that resuming is exact, how it stops, and what it refuses."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from biokit.checkpoint import load_checkpoint, load_model, newest_checkpoint
from biokit.config import config_from_dict, config_to_dict
from biokit.data.micro_batches import micro_batches, trim
from biokit.errors import CheckpointError, ConfigError, DataError, EngineError, RunError
from biokit.resume import flatten
from biokit.runs import RunFolder
from biokit.train import train
from tests.small_run import small_config


def losses(config):
    return [line["loss"] for line in RunFolder(config.run_dir).read_metrics()]


def weights(config):
    path = newest_checkpoint(RunFolder(config.run_dir))
    return (path / "model.safetensors").read_bytes()


def test_a_run_is_a_folder(tmp_path):
    config = small_config(tmp_path, eval_interval=3, eval_molecules=2, save_interval=3)
    manifest = train(config)
    folder = RunFolder(config.run_dir)
    assert manifest["status"] == folder.read_manifest()["status"] == "finished"
    assert folder.checkpoint_steps() == [3, 6]
    lines = folder.read_metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "lr", "tokens_per_s", "samples_per_s", "time", "token_accuracy", "perplexity", "grad_norm"):
        assert all(math.isfinite(line[key]) for line in lines), key
    for line in lines:  # alone a rank waits for nobody
        seconds = line["num_tokens"] / line["tokens_per_s"]
        assert 0 < line["step_s"] < 1.1 * seconds + 0.02
        assert 2**26 < line["memory_bytes"] < 2**36
    assert {"val_loss", "val_exact_match", "val_invalid_fraction"} <= set(lines[2])
    assert "val_loss" not in lines[0]
    assert lines[0]["loss"] > lines[-1]["loss"]
    assert json.loads((Path(config.run_dir) / "manifest.json").read_text())["config_hash"]


def test_same_config_same_curve(tmp_path):
    first, second = small_config(tmp_path, "a"), small_config(tmp_path, "b")
    train(first), train(second)
    assert losses(first) == losses(second)
    assert weights(first) == weights(second)
    other = config_from_dict(config_to_dict(first) | {"seed": 99, "run_dir": str(tmp_path / "c")})
    train(other)
    assert losses(other) != losses(first)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resume_is_bitwise(tmp_path, precision, monkeypatch):
    """Stopped after three steps and started again: the curve and the weights are those of one go."""
    keys = {"precision": precision, "eval_interval": 2, "early_stopping_patience": 5}
    whole = small_config(tmp_path, "whole", **keys)
    train(whole)
    parts = small_config(tmp_path, "parts", **keys)
    steps = iter([False, False, False, True])
    monkeypatch.setattr(RunFolder, "stop_requested", lambda self: next(steps, False))
    assert train(parts)["status"] == "stopped"
    assert RunFolder(parts.run_dir).checkpoint_steps()[-1] == 3
    manifest = train(parts)
    assert (manifest["status"], manifest["resumed_from"]) == ("finished", 3)
    assert losses(parts) == losses(whole)
    assert weights(parts) == weights(whole)


def test_lines_after_the_checkpoint_are_written_again(tmp_path):
    """As after a SIGKILL between two saves: the metrics file is ahead of the newest checkpoint."""
    whole = small_config(tmp_path, "whole", save_interval=2)
    train(whole)
    expected = losses(whole)
    folder = RunFolder(whole.run_dir)
    for step in (4, 6):
        path = folder.checkpoint_dir(step)
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    with folder.metrics_file().open("a") as file:
        file.write('{"step": 7, "lo')
    train(whole)
    assert losses(whole) == expected


def test_a_finished_run_is_left_alone(tmp_path):
    config = small_config(tmp_path)
    train(config)
    before = weights(config), losses(config)
    assert train(config)["status"] == "finished"
    assert (weights(config), losses(config)) == before


def test_training_can_be_made_longer(tmp_path):
    train(small_config(tmp_path))
    longer = small_config(tmp_path, train_iters=8)
    train(longer)
    assert len(losses(longer)) == 8


def test_do_training_false_preprocesses_and_stops(tmp_path):
    config = dataclasses.replace(small_config(tmp_path), do_training=False)
    manifest = train(config)
    assert manifest["status"] == "preprocessed"
    assert (Path(manifest["store_dir"]) / "train.bin").is_file()
    assert RunFolder(config.run_dir).checkpoint_steps() == []


def test_accumulation_gives_the_curve_of_one_batch(tmp_path):
    curves = []
    for name, micro in (("whole", 8), ("parts", 2)):
        config = small_config(tmp_path, name, micro_batch_size=micro)
        config.model.dropout = 0.0
        train(config)
        curves.append(losses(config))
    # fp32 sums in another order, amplified by six AdamW steps
    assert np.allclose(*curves, rtol=1e-5)
    assert curves[0] != curves[1]


def test_every_micro_batch_of_every_step_has_a_seed_of_its_own(tmp_path, monkeypatch):
    from biokit.parallel.single import Single

    seeds, train_batch = [], Single.train_batch
    monkeypatch.setattr(Single, "train_batch", lambda *a: seeds.extend(a[3]) or train_batch(*a))
    train(small_config(tmp_path, train_iters=3))
    assert len(set(seeds)) == len(seeds) == sum((n + 3) // 4 for n in (8, 8, 1))


def test_early_stopping(tmp_path):
    config = small_config(tmp_path, lr=0.0, lr_schedule="constant", eval_interval=1, early_stopping_patience=2)
    assert train(config)["step"] == 3  # the first evaluation is the best, two are not better


def early(folder, name):
    """Losses that never get better: patience 4 ends the run at step 5."""
    keys = {"train_iters": 20, "lr": 0.0, "lr_schedule": "constant", "eval_interval": 1, "early_stopping_patience": 4}
    return small_config(folder, name, **keys)


def test_patience_spans_a_stop(tmp_path, monkeypatch):
    train(early(tmp_path, "whole"))
    config = early(tmp_path, "parts")
    looks = iter([False, False, False, True])
    monkeypatch.setattr(RunFolder, "stop_requested", lambda self: next(looks, False))
    assert train(config)["step"] == 3
    manifest = train(config)
    assert (manifest["status"], manifest["step"]) == ("finished", 5)
    assert losses(config) == losses(early(tmp_path, "whole"))


def test_an_early_stopped_run_stays_as_it_is(tmp_path):
    config = early(tmp_path, "run")
    for _ in range(3):
        assert train(config)["step"] == 5
    assert len(losses(config)) == 5


def test_the_best_weights_are_kept(tmp_path):
    train(early(tmp_path, "run"))
    assert 1 in RunFolder(tmp_path / "run").checkpoint_steps()


def test_early_stopping_without_val_molecules_is_refused(tmp_path):
    config = small_config(tmp_path, eval_interval=1, early_stopping_patience=2)
    config.data.split_ratio = "100,0,0"
    with pytest.raises(DataError, match="val part holds no molecule"):
        train(config)


def test_other_molecules_are_refused(tmp_path):
    config = small_config(tmp_path)
    train(config)
    shutil.rmtree(Path(config.run_dir) / "data")
    path = Path(config.data.dataset_path)
    path.write_text("\n".join(path.read_text().split()[:-3]) + "\n")
    with pytest.raises(CheckpointError, match="other molecules"):
        train(config)


def test_moved_data_is_not_other_data(tmp_path):
    config = small_config(tmp_path)
    train(config)
    moved = tmp_path / "elsewhere.smi"
    Path(config.data.dataset_path).rename(moved)
    shutil.rmtree(Path(config.run_dir) / "data")
    config.data.dataset_path = str(moved)
    config.train.train_iters = 7
    assert train(config)["resumed_from"] == 6


def test_fewer_steps_than_made_are_refused(tmp_path):
    train(small_config(tmp_path))
    with pytest.raises(ConfigError, match=r"at step 6, beyond train\.train_iters=3"):
        train(small_config(tmp_path, train_iters=3))


def test_threads_are_given_back(tmp_path):
    import torch

    before = torch.get_num_threads()
    train(small_config(tmp_path, num_threads=before + 1))
    assert torch.get_num_threads() == before


def test_log_interval(tmp_path):
    config = small_config(tmp_path, log_interval=4)
    train(config)
    assert [line["step"] for line in RunFolder(config.run_dir).read_metrics()] == [4, 6]


def test_tensorboard_holds_the_curve(tmp_path):
    config = small_config(tmp_path, tensorboard=True)
    train(config)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(RunFolder(config.run_dir).tensorboard))
    events.Reload()
    found = [event.value for event in events.Scalars("loss")]
    assert np.allclose(found, losses(config), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": {"preset": "huge"}}, ConfigError, "no such preset"),
        ({"model": {"name": "gpt"}}, ConfigError, "no such model"),
        ({"strategy": "Zero9"}, ConfigError, "no such strategy"),
        ({"data": {"dataset_path": "none.csv"}}, DataError, "none.csv"),
    ],
)
def test_refused_before_any_work(tmp_path, change, error, words):
    tree = config_to_dict(small_config(tmp_path))
    for key, value in change.items():
        tree[key] = tree[key] | value if isinstance(value, dict) else value
    with pytest.raises(error, match=words):
        train(config_from_dict(tree))


def test_cuda_without_cuda_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(EngineError, match="no CUDA device"):
        train(small_config(tmp_path, device="cuda"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("group", "key", "value"),
    [("model", "dropout", 0.2), ("data", "mask_prob", 0.3), ("train", "global_batch_size", 4)],
)
def test_resuming_with_another_model_or_data_is_refused(tmp_path, group, key, value):
    config = small_config(tmp_path)
    train(config)
    before = weights(config)
    setattr(getattr(config, group), key, value)
    with pytest.raises(ConfigError, match=rf"{group}.{key}"):
        train(config)
    assert weights(config) == before


def test_resume_false_keeps_what_is_there(tmp_path):
    config = small_config(tmp_path)
    train(config)
    with pytest.raises(RunError, match="resume=false"):
        train(dataclasses.replace(config, resume=False))


def test_an_altered_checkpoint_is_refused(tmp_path):
    config = small_config(tmp_path)
    train(config)
    path = newest_checkpoint(RunFolder(config.run_dir)) / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is missing or altered"):
        train(config)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, monkeypatch):
    from biokit.parallel.single import Single

    monkeypatch.setattr(Single, "_backward", lambda *_: torch.tensor([math.nan, 0.0, 1.0]))
    with pytest.raises(RunError, match="the loss is nan"):
        train(small_config(tmp_path))


def test_a_checkpoint_is_usable_alone(tmp_path):
    config = small_config(tmp_path)
    train(config)
    path = newest_checkpoint(RunFolder(config.run_dir))
    model, tokenizer = load_model(path)
    saved = load_checkpoint(path).model
    assert all((saved[name] == parameter).all() for name, parameter in model.named_parameters())
    assert tokenizer.hash == load_checkpoint(path).manifest["vocab_hash"]


BLOCKER = """
import sys
from importlib.machinery import PathFinder

HIDDEN = {"rdkit", "numba", "pyarrow", "tqdm", "matplotlib", "tensorboard", "pandas", "scipy"}
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.split(".")[0] in HIDDEN else find(name, *rest)
from biokit.config import load_config
from biokit.train import train
print(train(load_config(sys.argv[1]))["status"])
"""


def test_training_from_a_store_needs_torch_numpy_safetensors_and_yaml_only(tmp_path):
    from biokit.config import config_to_yaml

    config = small_config(tmp_path, progress=True, tensorboard=True)
    config.data.task = "mask"
    train(dataclasses.replace(config, do_training=False))
    config.data.dataset_path = str(Path(config.run_dir) / "data")
    config.run_dir = str(tmp_path / "from_store")
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(config))
    done = subprocess.run([sys.executable, "-c", BLOCKER, str(path)], capture_output=True, text=True)
    assert done.stdout.split() == ["finished"], done.stderr
    assert "no TensorBoard files" in done.stderr


def test_skipped_fp16_steps_are_told(tmp_path):
    config = small_config(tmp_path, precision="fp16", initial_loss_scale=2.0**40, tensorboard=True)
    assert train(config)["status"] == "finished"
    lines = RunFolder(config.run_dir).read_metrics()
    assert lines[0]["skipped"] and lines[0]["grad_norm"] is None
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_micro_batches_are_cut_and_trimmed():
    ids = np.zeros((5, 6), dtype=np.int64)
    for row, length in enumerate((2, 3, 6, 1, 4)):
        ids[row, :length] = 7
    keys = ("encoder_ids", "decoder_ids", "labels")
    parts = list(micro_batches({"encoder_ids": ids, "decoder_ids": ids, "labels": ids}, 2, 0, keys))
    assert [tuple(part["labels"].shape) for part in parts] == [(2, 3), (2, 6), (1, 4)]
    assert trim(ids, 0).shape == (5, 6)


def test_flatten():
    assert flatten({"a": {"b": 1}, "c": 2}) == {"a.b": 1, "c": 2}


def test_any_seed_that_passes_works(tmp_path):
    config = dataclasses.replace(small_config(tmp_path, train_iters=1, eval_molecules=2), seed=2**63 - 1)
    assert train(config)["status"] == "finished"


def test_do_training_false_leaves_a_whole_run_folder(tmp_path):
    config = dataclasses.replace(small_config(tmp_path), do_training=False)
    train(config)
    assert RunFolder(config.run_dir).config_file.is_file()


def test_molecules_in_evaluation_need_rdkit(tmp_path, monkeypatch):
    config = small_config(tmp_path, eval_molecules=2)
    train(dataclasses.replace(config, do_training=False))
    import biokit.train

    monkeypatch.setattr(biokit.trainer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match="rdkit is not installed"):
        train(config)


@pytest.mark.parametrize(("key", "value"), [("salts", "keep"), ("pool", 10), ("smiles_column", "foo")])
def test_a_ready_store_is_not_what_else_is_asked(tmp_path, key, value):
    config = small_config(tmp_path)
    train(dataclasses.replace(config, do_training=False))
    config.data.dataset_path = str(Path(config.run_dir) / "data")
    setattr(config.data, key, value)
    with pytest.raises(DataError, match=f"{key}={value}"):
        train(dataclasses.replace(config, run_dir=str(tmp_path / "other")))
