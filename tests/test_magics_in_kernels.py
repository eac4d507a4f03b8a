"""`%torchrun` and `%%torchrun` in real kernels, under papermill and under nbval."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from biokit.config import config_to_yaml
from biokit.errors import RunError
from biokit.launch.notebooks import run_notebook
from biokit.launch.run import Run
from biokit.runs import RunFolder
from tests.kernel import (
    Kernel,
    count_copies,
    list_processes,
    open_kernel,
    thread_of_kernels,
    wait_until,
    write_notebook,
)
from tests.small_run import small_config

ODD = "a b\"c'; touch X # $(touch Y) `touch Z` {x} $x \n end"
TOKEN = "hf_QwErTy123456"


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    with open_kernel(tmp_path_factory.mktemp("kernel"), HF_TOKEN=TOKEN) as made:
        yield made


def folder_of(kernel: Kernel) -> Path:
    return Path(kernel.process.cwd())


GIVES = """%%torchrun --nproc-per-node 2 --out total,found --with lr,weight,secret_key -- {odd}
import os, sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()
print("sees", lr, weight.dtype, secret_key, os.environ["HF_TOKEN"])
total = torch.ones(3) * (rank + 1)
dist.all_reduce(total)
for _ in range(10):
    dist.barrier()
    if rank == 1:
        print("now", time.time())
    time.sleep(0.05)
found = {"argv": sys.argv[1:], "n": [1, 2.5, None], "key": len(secret_key), 3: weight * 2}
dist.destroy_process_group()
"""


def test_values_go_in_and_come_back(kernel: Kernel) -> None:
    kernel.run(
        f"import torch; lr, odd, secret_key = 0.5, {ODD!r}, 'sk-123456'; weight = torch.ones(2, dtype=torch.bfloat16)"
    )
    delays: list[float] = []

    def note(output: Any) -> None:
        said = output.text.split("[rank 1] now ")[1:]
        delays.extend(time.time() - float(word.split()[0]) for word in said[len(delays) :])

    output = kernel.run(GIVES, note)
    assert output.status == "ok", (output.text, output.error)
    for rank in (0, 1):
        assert f"[rank {rank}] sees 0.5 torch.bfloat16 *** ***\n" in output.text
    assert len(delays) == 10 and sorted(delays)[5] <= 0.2, delays
    assert kernel.value("total, type(total)") == "(tensor([3., 3., 3.]), <class 'torch.Tensor'>)"
    assert kernel.value("found['argv'] == [odd], found['n'], found['key'], found[3].dtype") == (
        "(True, [1, 2.5, None], 9, torch.bfloat16)"
    )
    folder = folder_of(kernel)
    assert not {"X", "Y", "Z"} & {path.name for path in folder.iterdir()}
    assert count_copies(folder, TOKEN, "sk-123456") == {}


FAILS = """%%torchrun --nproc-per-node 2
import os, time
print("before", flush=True)
if os.environ["RANK"] == "1":
    loss = time.sleep(3)
    loss.item()
time.sleep(60)
"""


def test_a_failing_rank_fails_the_cell_with_a_card(kernel: Kernel) -> None:
    output = kernel.run(FAILS)
    assert output.status == "error" and output.error["ename"] == "RunFailed"
    assert "rank 1" in output.error["evalue"] and "AttributeError" in output.error["evalue"]
    (card,) = output.data
    for text in (card["text/html"], card["text/plain"]):
        assert "rank 1" in text and "line 6" in text and "loss.item()" in text
        assert "AttributeError: &#x27;NoneType" in text or "AttributeError: 'NoneType" in text
    assert "[rank 0] before" in output.text and "biokit/launch" not in card["text/plain"]
    assert kernel.value("1 + 1") == "2"


def test_a_background_run_is_an_object(kernel: Kernel) -> None:
    output = kernel.run("run = %torchrun --bg --no-python echo 'a  b'\nrun")
    assert output.status == "ok" and "text/html" in output.data[0]
    assert kernel.value("run.wait(60, show=False).status, run.logs()") == "('finished', 'a  b')"
    again = kernel.run("%torchrun --attach {run.folder.path}")
    assert again.status == "ok" and again.data[0]["text/plain"]
    assert kernel.run("%torchrun --status").data[0]["text/plain"]


LOOPS = """%%torchrun --nproc-per-node 2
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready")
while True:
    time.sleep(0.1)
"""


def test_an_interrupt_ends_all_ranks(kernel: Kernel) -> None:
    sent: list[float] = []

    def interrupt(output: Any) -> None:
        if output.text.count("ready") == 2 and not sent:
            sent.append(time.monotonic())
            assert len(list_processes(folder_of(kernel))) >= 4
            kernel.manager.interrupt_kernel()

    output = kernel.run(LOOPS, interrupt)
    assert sent and output.error["ename"] == "KeyboardInterrupt"
    assert output.error["traceback"] == ["KeyboardInterrupt: the cell was interrupted"]
    assert time.monotonic() - sent[0] < 10
    assert list_processes(folder_of(kernel)) == []
    assert kernel.value("1 + 1") == "2"


@pytest.mark.full
def test_an_interrupt_lets_a_training_save(kernel: Kernel) -> None:
    """Of `%torchrun -m biokit train`, too."""
    folder = folder_of(kernel)
    (folder / "small.yaml").write_text(config_to_yaml(small_config(folder, train_iters=100_000)))
    run, sent = RunFolder(folder / "run"), list[float]()

    def interrupt() -> None:
        wait_until(lambda: len(run.read_metrics()) > 3)
        sent.append(time.monotonic())
        with thread_of_kernels():
            kernel.manager.interrupt_kernel()

    thread = threading.Thread(target=interrupt)
    thread.start()
    output = kernel.run("%torchrun -m biokit train small.yaml")
    thread.join()
    assert sent and output.error["ename"] == "KeyboardInterrupt" and "stopping at the next step" in output.text
    assert run.read_manifest()["status"] == "stopped" and run.checkpoint_steps()
    assert list_processes(folder) == []


@pytest.mark.full
def test_a_time_out_shows_where_the_ranks_stood(kernel: Kernel) -> None:
    output = kernel.run(LOOPS.replace("2\n", "2 --timeout 6\n", 1))
    assert output.error["ename"] == "RunFailed" and "did not end in 6 s" in output.error["evalue"]
    assert "cell line 6" in output.data[0]["text/plain"]
    assert list_processes(folder_of(kernel)) == []


@pytest.mark.full
def test_a_detached_run_outlives_its_kernel(tmp_path: Path) -> None:
    with open_kernel(tmp_path) as kernel:
        output = kernel.run(LOOPS.replace("2\n", "2 --detach --run-dir kept\n", 1))
        assert "outlives this kernel, ends after 24 h" in output.text and output.status == "ok"
        kept = Run.attach(tmp_path / "kept")
        wait_until(lambda: kept.life and "ready" in kept.logs())
        kernel.process.kill()
        time.sleep(7)
    assert kept.status == "running" and len(list_processes(tmp_path)) >= 4
    with open_kernel(tmp_path) as kernel:
        assert kernel.run("%torchrun --stop kept").status == "ok"
    assert kept.status == "stopped" and list_processes(tmp_path) == []


def test_papermill_and_nbval_fail_with_the_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cell = "%%torchrun\nraise ValueError('the rank is cursed')"
    path = write_notebook(tmp_path / "a.ipynb", 'run_dir = ""  # folder', "%load_ext biokit", cell, "print('never')")
    with pytest.raises(RunError, match=r"RunFailed(?s:.*)the rank is cursed"):
        run_notebook(path, tmp_path / "out")
    executed = nbformat.read(tmp_path / "out" / "a.ipynb", 4)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert any("the rank is cursed" in o.get("data", {}).get("text/plain", "") for o in outputs)
    assert [o.ename for o in outputs if o.output_type == "error"] == ["RunFailed"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--nbval-lax",
        "--nbval-current-env",
        str(path),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "1 failed" in done.stdout and "the rank is cursed" in done.stdout
