"""The command line: what it prints, and that a user's mistake is one line and status 2, never a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from biokit.__main__ import main
from tests.small_run import write_smiles


def test_train_prints_the_end(tmp_path, capsys):
    arguments = [f"run_dir={tmp_path / 'run'}", f"data.dataset_path={write_smiles(tmp_path)}", "++train.train_iters=2"]
    keys = [
        "model.hidden_size=32",
        "train.tensorboard=False",
        "train.progress=False",
        "model.data.split_ratio=70,20,10",
    ]
    assert main(["train", "molbart_mini", *arguments, *keys]) == 0
    assert "finished at step 2 of 2" in capsys.readouterr().out


def test_do_training_false(tmp_path, capsys):
    arguments = [f"run_dir={tmp_path / 'run'}", f"data.dataset_path={write_smiles(tmp_path)}", "++do_training=False"]
    assert main(["train", "molbart_mini", *arguments, "train.progress=False"]) == 0
    assert "preprocessed, not trained" in capsys.readouterr().out
    assert (tmp_path / "run" / "data" / "train.bin").exists()


def test_preprocess(tmp_path, capsys):
    arguments = [f"run_dir={tmp_path / 'run'}", f"data.dataset_path={write_smiles(tmp_path)}"]
    assert main(["preprocess", "molbart_mini", *arguments]) == 0
    assert "24 rows read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "none"], "packaged name"),
        (["train", "molbart_mini", "train.lerning=1"], "Did you mean"),
        (["train", "molbart_mini", "train.lr"], "key=value"),
        (["preprocess", "molbart_mini", "data.dataset_path=none.csv"], "none.csv"),
        (["notebook", "none.ipynb", "out"], "no such file"),
    ],
)
def test_mistakes(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("biokit: ") and words in error and "Traceback" not in error


def test_module_and_console_script_are_the_same():
    script = Path(sys.executable).with_name("biokit")
    for command in ([sys.executable, "-m", "biokit"], [str(script)]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("biokit 0.1")


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out
