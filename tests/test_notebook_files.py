"""Executed notebooks tell no secrets, and nothing of them outlives who ran them."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import pytest

from biokit.errors import RunError
from biokit.launch.notebook_files import mask_notebook
from biokit.launch.notebooks import run_notebook
from tests.kernel import REPOSITORY, count_copies, list_processes, wait_until, write_notebook

GIVEN, HELD, SHORT = "hf_GivenAsParameter1", "sk-HeldByEnvironment'2", "pw7"
FINISH = "from biokit.runs import RunFolder; _ = RunFolder(run_dir).update_manifest(status='finished')"
TELLS = f"""import hashlib, os, warnings
from pathlib import Path
print(hf_token, repr(os.environ["WANDB_API_KEY"]), password)
warnings.warn(hf_token)
Path(run_dir, "digest").write_text(hashlib.sha256(hf_token.encode()).hexdigest() + os.environ["WANDB_API_KEY"][:2])
{FINISH}
{{"token": hf_token, "key": [os.environ["WANDB_API_KEY"]]}}"""
RANKS_TELL = """%%torchrun --nproc-per-node 2 --with hf_token,fails --out length -- --hub-token {hf_token}
import os, sys
print(hf_token, os.environ["WANDB_API_KEY"], sys.argv)
os.system("echo a child says $WANDB_API_KEY")
length = len(hf_token) + len(sys.argv[2])
assert os.environ["RANK"] == "0" or not fails, hf_token + os.environ["WANDB_API_KEY"]"""
COUNTS = """import json
saved = Path(run_dir, "a.ipynb").read_text()
counts = [saved.count(hf_token), saved.count(os.environ["WANDB_API_KEY"]), len(saved)]
Path(run_dir, "counts").write_text(json.dumps(counts))"""


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_API_KEY", HELD)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("BIOKIT_RUNS", str(tmp_path / "runs"))


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("fails", [False, pytest.param(True, marks=pytest.mark.full)])
def test_no_copy_of_a_secret_is_left(tmp_path: Path, fails: bool) -> None:
    parameters = f'run_dir = ""  # folder\nhf_token = ""  # token\npassword = ""  # password\nfails = {fails}  # how'
    cells = [parameters, "%load_ext biokit", TELLS, COUNTS, RANKS_TELL, "assert length == 2 * len(hf_token)"]
    path = write_notebook(tmp_path / "a.ipynb", *cells)
    out = tmp_path / "out {x}"
    values = {"hf_token": GIVEN, "password": SHORT, "fails": fails}
    if fails:
        with pytest.raises(RunError) as caught:
            run_notebook(path, out, values)
        assert not any(secret in str(caught.value) for secret in (GIVEN, HELD)) and "***" in str(caught.value)
        assert caught.value.__cause__ is None and caught.value.__suppress_context__
    else:
        run_notebook(path, out, values)
    assert count_copies(tmp_path, GIVEN, HELD) == {}
    assert (out / "digest").read_text() == hashlib.sha256(GIVEN.encode()).hexdigest() + HELD[:2]  # it had the values
    given, held, length = json.loads((out / "counts").read_text())
    assert (given, held) == (0, 0) and length > 2000  # of the file as it was after each cell
    executed = nbformat.read(out / "a.ipynb", 4)
    assert executed.metadata.papermill.parameters.hf_token == executed.metadata.papermill.parameters.password == "***"
    (injected,) = [cell.source for cell in executed.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    assert 'hf_token = "***"' in injected and SHORT not in injected and f"fails = {fails}" in injected
    assert executed.metadata.papermill.output_path == str(out.resolve() / "a.ipynb")


def test_masking_changes_nothing_else() -> None:
    notebook: dict[str, Any] = {
        "cells": [{"metadata": {}, "source": ["x = 1\n", "y"], "outputs": [{"data": {"image/png": "iVBOR"}, "n": 3}]}],
        "metadata": {"papermill": {"parameters": {"lr": 0.1}}},
    }
    assert mask_notebook(json.loads(json.dumps(notebook)), {"lr": 0.1}) == notebook


HOLDS = """%torchrun --bg --nproc-per-node 2 stays.py
import time
time.sleep(600)"""
STAYS = (
    "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('ready', flush=True)\ntime.sleep(600)\n"
)


@pytest.mark.full
@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["TERM", "KILL"])
@pytest.mark.parametrize("runner", ["biokit", "papermill"])
def test_nothing_outlives_who_runs_a_notebook(tmp_path: Path, number: signal.Signals, runner: str) -> None:
    (tmp_path / "stays.py").write_text(STAYS)
    path = write_notebook(tmp_path / "a.ipynb", 'run_dir = ""  # folder', "%load_ext biokit", HOLDS)
    words = ["biokit", "notebook", str(path), str(tmp_path / "out")]
    if runner == "papermill":
        words = ["papermill", "-k", "python3", str(path), str(tmp_path / "b.ipynb"), "--cwd", str(tmp_path)]
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, "-m", *words],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        logs = tmp_path / "runs" / "torchrun"
        wait_until(lambda: sum("ready" in log.read_text() for log in logs.glob("*/lives/0001/output/*.log")) == 2, 90)
        assert len(list_processes(tmp_path)) >= 4
        process.send_signal(number)
        process.wait()
    end = time.monotonic() + 10
    while (left := list_processes(tmp_path)) and time.monotonic() < end:
        time.sleep(0.2)
    assert left == []
