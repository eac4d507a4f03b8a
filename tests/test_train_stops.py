"""A training in a process of its own: signals, the STOP file, and a second trainer."""

import os
import signal
import subprocess
import sys
import time

import pytest

from biokit.config import config_to_yaml
from biokit.errors import RunError
from biokit.runs import RunFolder
from biokit.train import train
from tests.small_run import small_config


def run_cli(*arguments, **keys):
    return subprocess.Popen([sys.executable, "-m", "biokit", *arguments], stderr=subprocess.PIPE, text=True, **keys)


def start_long_run(tmp_path):
    config = small_config(tmp_path, train_iters=100_000)
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(config))
    process = run_cli("train", str(path))
    folder = RunFolder(config.run_dir)
    for _ in range(600):
        if len(folder.read_metrics()) > 3:
            return process, folder
        time.sleep(0.1)
    process.kill()
    raise AssertionError(process.communicate())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_end_with_status_0(tmp_path, number):
    process, folder = start_long_run(tmp_path)
    os.kill(process.pid, number)
    assert process.wait(timeout=30) == 0
    process.communicate()
    manifest = folder.read_manifest()
    assert manifest["status"] == "stopped"
    assert folder.checkpoint_steps() == [manifest["step"]]


def test_stop_file(tmp_path):
    process, folder = start_long_run(tmp_path)
    folder.request_stop()
    assert process.wait(timeout=30) == 0
    process.communicate()
    assert folder.read_manifest()["status"] == "stopped"
    assert not folder.stop_requested()


def test_a_second_trainer_is_refused(tmp_path):
    process, _ = start_long_run(tmp_path)
    config = small_config(tmp_path)
    with pytest.raises(RunError, match="another process is training"):
        train(config)
    process.kill()
    process.communicate()


def test_stop_during_preparation_is_kept(tmp_path, monkeypatch):
    import biokit.train

    config, prepare = small_config(tmp_path), biokit.train.prepare_data

    def stop_and_prepare(config):
        RunFolder(config.run_dir).request_stop()
        return prepare(config)

    monkeypatch.setattr(biokit.train, "prepare_data", stop_and_prepare)
    manifest = train(config)
    assert (manifest["status"], manifest["step"]) == ("stopped", 0)
