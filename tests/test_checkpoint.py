"""Checkpoints: whole or not there; every altered byte is found; nothing of a pickle."""

import json
import random
import resource
import signal

import pytest
import torch

from biokit.checkpoint import (
    CheckpointWriter,
    check_tensors,
    load_checkpoint,
    newest_checkpoint,
    read_manifest,
    remove_partial,
    remove_surplus,
    save_checkpoint,
)
from biokit.errors import CheckpointError
from biokit.runs import RunFolder

MODEL = {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}
OPTIMIZER = {"exp_avg.a.weight": torch.zeros(3, 4), "step.a.weight": torch.tensor(3.0)}
ABOUT = {"config": {"seed": 1}, "vocab_hash": "x"}


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def save(folder, step=3):
    return save_checkpoint(folder, step, MODEL, OPTIMIZER, {"step": step}, ABOUT, "<PAD>\n")


def test_round_trip_is_bitwise(folder):
    saved = load_checkpoint(save(folder))
    for found, expected in ((saved.model, MODEL), (saved.optimizer, OPTIMIZER)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k], expected[k]) and found[k].dtype == expected[k].dtype for k in expected)
    assert saved.state == {"step": 3}
    assert saved.manifest["config"] == {"seed": 1}


def test_no_file_is_a_pickle(folder):
    for path in save(folder).iterdir():
        assert path.suffix in (".safetensors", ".json", ".txt")


def test_newest(folder):
    assert newest_checkpoint(folder) is None
    save(folder, 20), save(folder, 3)
    (folder.checkpoints / ".partial-step_00000099-1").mkdir()
    assert newest_checkpoint(folder).name == "step_00000020"
    remove_partial(folder)
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["step_00000003", "step_00000020"]


def test_every_flipped_bit_is_found(folder):
    path = save(folder)
    rng = random.Random(0)
    files = [p for p in path.iterdir() if p.name != "manifest.json"]
    for _ in range(100):
        target = rng.choice(files)
        good = target.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        target.write_bytes(bad)
        with pytest.raises(CheckpointError, match=target.name):
            load_checkpoint(path)
        target.write_bytes(good)
    load_checkpoint(path)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "vocab.txt"])
def test_missing_file_is_named(folder, name):
    path = save(folder)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(path)


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"format": "other"})])
def test_bad_manifest(folder, text):
    path = save(folder)
    (path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError):
        read_manifest(path)


def test_disk_full_keeps_the_earlier_checkpoint(folder):
    save(folder, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot be written"):
            save(folder, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert [p.name for p in folder.checkpoints.iterdir()] == ["step_00000001"]
    load_checkpoint(newest_checkpoint(folder))


def test_a_finished_checkpoint_is_never_written_again(folder):
    path = save(folder)
    before = (path / "manifest.json").stat().st_mtime_ns
    assert save(folder) == path
    assert (path / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"b": MODEL["b"]}, "missing a.weight"),
        ({**MODEL, "c": torch.ones(1)}, "extra c"),
        ({**MODEL, "b": torch.ones(6, dtype=torch.bfloat16)}, r"b is \(6,\) bfloat16 instead of \(5,\) bfloat16"),
        ({**MODEL, "b": torch.ones(5)}, r"b is \(5,\) float32 instead of \(5,\) bfloat16"),
    ],
)
def test_unfitting_tensors_are_named(tmp_path, found, words):
    with pytest.raises(CheckpointError, match=words):
        check_tensors(tmp_path, found, MODEL)


def save_with(folder, values):
    for step, value in values.items():
        metrics = {} if value is None else {"val_loss": value, "val_exact_match": -value}
        save_checkpoint(folder, step, MODEL, OPTIMIZER, {"step": step}, {**ABOUT, "metrics": metrics}, "<PAD>\n")


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "metric", "kept"),
    [
        (0, 0, "val_loss", [1, 2, 3, 4, 5]),
        (2, 0, "val_loss", [4, 5]),
        (1, 2, "val_loss", [2, 3, 5]),
        (0, 1, "val_loss", [2, 5]),
        (0, 1, "val_exact_match", [2, 5]),
        (9, 1, "val_loss", [1, 2, 3, 4, 5]),
    ],
)
def test_retention_keeps_the_last_and_the_best(folder, keep_last, keep_best, metric, kept):
    save_with(folder, {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 9.0})
    removed = remove_surplus(folder, keep_last, keep_best, metric)
    assert folder.checkpoint_steps() == kept == sorted({1, 2, 3, 4, 5} - set(removed))
    assert not list(folder.checkpoints.glob(".*"))


def test_of_equal_checkpoints_the_later_is_kept(folder):
    save_with(folder, {1: 1.0, 2: 1.0, 3: 5.0})
    remove_surplus(folder, 1, 1, "val_loss")
    assert folder.checkpoint_steps() == [2, 3]


def writer(folder, beside, keep_last=0):
    return CheckpointWriter(folder, beside, keep_last, 0, "val_loss")


def test_writing_beside_gives_the_same_files(folder, tmp_path):
    other = RunFolder(tmp_path / "other")
    other.create()
    for place, beside in ((folder, True), (other, False)):
        made = writer(place, beside, keep_last=1)
        for step in (1, 2, 3):
            made.write(step, MODEL, OPTIMIZER, {"step": step}, ABOUT, "<PAD>\n")
        made.close()
        assert place.checkpoint_steps() == [3]
    for path in folder.checkpoint_dir(3).iterdir():
        assert path.read_bytes() == (other.checkpoint_dir(3) / path.name).read_bytes()


def test_a_failed_write_beside_is_raised_by_the_next(folder, monkeypatch):
    made = writer(folder, True)
    monkeypatch.setattr("biokit.checkpoint.save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    made.write(1, MODEL, OPTIMIZER, {}, ABOUT, "")
    with pytest.raises(CheckpointError, match="disk full"):
        made.write(2, MODEL, OPTIMIZER, {}, ABOUT, "")
    made.close()
    assert list(folder.checkpoints.iterdir()) == []


def test_tensors_are_read_one_at_a_time(folder):
    saved = load_checkpoint(save(folder))
    assert saved.check_s > 0.0
    assert {name: form.device.type for name, form in saved.model.forms().items()} == dict.fromkeys(MODEL, "meta")
    with pytest.raises(KeyError):
        saved.model["c"]


def test_a_folder_that_bears_another_step_is_refused(folder):
    save(folder, 3).rename(folder.checkpoint_dir(99))
    with pytest.raises(CheckpointError, match="it was made at step 3"):
        load_checkpoint(newest_checkpoint(folder))
    with pytest.raises(CheckpointError, match="it was made at step 3"):
        save(folder, 99)


def test_links_are_removed_as_links(folder, tmp_path):
    for step in (1, 2, 3):
        save(folder, step)
    moved = folder.checkpoint_dir(1).rename(tmp_path / "elsewhere")
    folder.checkpoint_dir(1).symlink_to(moved)
    remove_surplus(folder, 1, 0, "val_loss")
    assert folder.checkpoint_steps() == [3] and (moved / "manifest.json").is_file()
    (folder.checkpoints / ".partial-link").symlink_to(moved)
    (folder.checkpoints / ".partial-file").write_text("x")
    remove_partial(folder)
    assert not list(folder.checkpoints.glob(".*")) and (moved / "manifest.json").is_file()


@pytest.mark.parametrize("name", ["step_²", "step_6", "step_0000000x"])
def test_other_names_are_no_checkpoints(folder, name):
    save(folder, 3)
    (folder.checkpoints / name).mkdir()
    assert folder.checkpoint_steps() == [3]
