"""`%%ranks`, `%ranks` and `%check_parallel` in a real kernel."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel import Kernel, list_processes, open_kernel
from tests.small_run import small_config

FIRST = """%%ranks -n 2 --with lr,my_token
import time, torch, torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()
x = torch.full((3,), rank + lr)
print("begun", my_token, end="")
x"""
SECOND = """%%ranks --out x,found
dist.all_reduce(x)
found = {"rank": rank, "sizes": [1, 2]}
"""
FAILS = """%%ranks
def check(value):
    if rank == 1:
        raise ValueError(f"bad {value}")
    dist.all_reduce(x)

check(5)
"""
HANGS = """%%ranks --timeout 1
if not dist.is_initialized():
    dist.init_process_group("gloo")
dist.barrier() if rank else time.sleep(100)
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    folder = tmp_path_factory.mktemp("kernel")
    with open_kernel(folder) as made:
        made.run("import threading, time; lock = threading.Lock(); lr, my_token = 0.5, 'tk-0123456789'")
        yield made
    end = time.monotonic() + 10
    while list_processes(folder) and time.monotonic() < end:
        time.sleep(0.1)
    assert list_processes(folder) == []


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("%ranks", "no warm ranks; a %%ranks cell starts them"),
        ("%%ranks -n x\n1", "x is not a number above 0"),
        ("%%ranks --timeout 0\n1", "0 is not a time above 0 s"),
        ("%%ranks --with nothing\n1", "the notebook has no such variable"),
        ("%%ranks --out api_key\n1", "it looks secret"),
        ("%%ranks --out 1x\n1", "1x is not the name of a variable"),
        ("%%ranks --bg\n1", "unrecognized arguments: --bg"),
        ("%%ranks\n!ls", "line 2 is IPython's"),
        ("%%ranks --with lock\n1", "--with lock: lock is a lock"),
        ("%ranks 'x", "%ranks 'x: "),
        ("%ranks --show", "expected one argument"),
        ("%check_parallel", "the following arguments are required: config"),
        ("%check_parallel molbart_mini 1 dp0", "not of that form"),
        ("%check_parallel molbart_mini train.lr=1 1", "there is 1"),
        ("%check_parallel nowhere 1 dp2", "neither a YAML file nor a packaged name"),
    ],
)
def test_mistakes_start_nothing(kernel: Kernel, code: str, words: str) -> None:
    output = kernel.run(code)
    assert words in output.text, output
    assert (output.status == "error") == (code != "%ranks")
    assert list_processes(Path(kernel.process.cwd())) == []


def test_variables_stay_and_come_back(kernel: Kernel) -> None:
    output = kernel.run(FIRST)
    assert output.status == "ok", (output.text, output.error)
    assert output.text.startswith("starting 2 warm ranks\n")
    for rank in (0, 1):
        own = [line for line in output.text.splitlines() if line.startswith(f"[rank {rank}] ")]
        assert own[0] == f"[rank {rank}] begun tk-0123456789" and own[1].startswith(f"[rank {rank}] tensor([{rank}.5")
    started = time.monotonic()
    output = kernel.run(SECOND)
    assert output.status == "ok" and output.text == "" and time.monotonic() - started < 10  # the kernel imports torch
    started = time.monotonic()
    assert kernel.run("%%ranks\nrank").text.count("[rank") == 2
    assert time.monotonic() - started < 1.0
    assert kernel.value("x.tolist(), found") == "([2.0, 2.0, 2.0], {'rank': 0, 'sizes': [1, 2]})"
    folder = Path(kernel.process.cwd(), "runs")
    written = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "output"]
    assert written and not [path for path in written if b"tk-0123456789" in path.read_bytes()]


def test_variables_are_shown_by_name(kernel: Kernel) -> None:
    (shown,) = kernel.run("%ranks --show rank,x,nothing").data
    assert [line.split() for line in shown["text/plain"].splitlines()[1:3]] == [
        ["rank", "0", "int", "0"],
        ["rank", "1", "int", "1"],
    ]
    assert shown["text/plain"].count("[3] float32 cpu") == 2 and shown["text/plain"].count("(not there)") == 2
    assert "<table>" in shown["text/html"]
    (shown,) = kernel.run("%ranks").data
    assert shown["text/plain"].splitlines()[0].split() == ["rank", "process", "state", "memory"]


def test_another_number_of_ranks_is_refused(kernel: Kernel) -> None:
    output = kernel.run("%%ranks -n 3\n1")
    assert output.status == "error" and "2 ranks are there, with variables that would be lost" in output.text


def test_a_failing_rank_fails_the_cell_with_a_card(kernel: Kernel) -> None:
    output = kernel.run(FAILS)
    assert output.status == "error" and output.error["ename"] == "RunFailed"
    (card,) = output.data
    assert "rank 1 failed" in card["text/plain"] and "ValueError: bad 5" in card["text/plain"]
    assert "line 4, in check" in card["text/plain"] and "Rank 0 waits in all_reduce" in card["text/plain"]
    assert "biokit/launch" not in card["text/plain"]
    assert "The ranks keep their variables, but the process groups are ended" in output.text
    kept = kernel.run("%%ranks\nfound['rank']")
    assert kept.status == "ok", kept.error
    assert sorted(kept.text.splitlines()) == ["[rank 0] 0", "[rank 1] 1"]


def test_what_is_too_much_to_show_of_one_cell_is_not_shown_with_the_next(kernel: Kernel) -> None:
    first = kernel.run("%%ranks\nfor i in range(3000):\n    print('line', i)")
    assert first.text.count("line") < 2100 and "2,000 lines are shown" in first.text
    second = kernel.run("%%ranks\nprint('next')").text
    assert sorted(second.splitlines()) == ["[rank 0] next", "[rank 1] next"]


def test_a_time_out_ends_the_ranks_and_says_where_they_stood(kernel: Kernel) -> None:
    output = kernel.run(HANGS)
    assert output.error["ename"] == "RunFailed" and "did not end in 1 s" in output.error["evalue"]
    assert "rank 1 waits in barrier" in output.data[0]["text/plain"].lower()
    assert "their variables are lost" in output.text
    assert list_processes(Path(kernel.process.cwd())) == []


def test_new_ranks_are_said_to_be_new(kernel: Kernel) -> None:
    output = kernel.run("%ranks --restart -n 1")
    assert output.status == "ok" and output.text == "starting 1 warm rank\n"
    assert "name 'found' is not defined" in kernel.run("%%ranks\nfound").error["evalue"]
    (rank,) = [
        p for p in list_processes(Path(kernel.process.cwd())) if "biokit.launch.supervision.rank" in p.cmdline()[:5]
    ]
    rank.kill()
    rank.wait(10)
    time.sleep(1.0)
    output = kernel.run("%ranks")
    assert output.text.splitlines()[0] == "The ranks have ended since the last cell, and their variables are lost."
    assert kernel.run("%ranks --stop").status == "ok"


def test_a_value_that_ends_its_rank_when_it_is_shown(kernel: Kernel) -> None:
    kernel.run("%%ranks -n 1\nimport os\nclass Odd:\n    def __repr__(self):\n        os._exit(3)\nodd = Odd()")
    output = kernel.run("%ranks --show odd")
    assert "(its rank has ended)" in output.data[0]["text/plain"] and "their variables are lost" in output.text


def test_layouts_are_compared(kernel: Kernel, tmp_path: Path) -> None:
    from biokit.config import config_to_yaml

    path = tmp_path / "my config.yaml"
    path.write_text(config_to_yaml(small_config(tmp_path)))
    kernel.run(f"from biokit.config import load_config; path = {str(path)!r}; mine = load_config(path)")
    output = kernel.run("check = %check_parallel {path} train.lr=1e-4 1 dp2 --steps 2\ncheck")
    assert output.status == "ok", (output.text, output.error)
    assert "dp2 (DDP, 2 processes): step 2" in output.text
    assert {"image/png", "text/html"} <= set(output.data[-1]) and "within" in output.data[-1]["text/plain"]
    output = kernel.run("%check_parallel mine 1 dp3")
    assert output.status == "error" and "dp3: train.global_batch_size=8" in output.text


def test_ranks_in_a_folder_of_the_users(kernel: Kernel) -> None:
    folder = Path(kernel.process.cwd())
    (folder / "mine" / "cells").mkdir(parents=True)
    (folder / "mine" / "cells" / "hela.csv").touch()
    (folder / "file").touch()
    kernel.run("%ranks --restart -n 1")
    assert kernel.run("%%ranks\nkept = 3").status == "ok"
    for path, words in (("file", "it is a file"), ("r" * 300, "File name too long")):
        output = kernel.run(f"%ranks --restart --run-dir {path}")
        assert output.text.startswith("UsageError") and words in output.text
    assert "Start new ones: %ranks --restart --run-dir mine" in kernel.run("%%ranks --run-dir mine\n1").text
    assert kernel.run("%%ranks\nprint(kept)").text == "3\n"  # the old ones are there
    for _ in range(2):  # the errors of earlier ranks of the folder are not those of new ones
        kernel.run("%ranks --restart -n 1 --run-dir mine")
        assert "division by zero" in kernel.run("%%ranks\n1 / 0").error["evalue"]
        assert kernel.run("%%ranks\nprint('well')").text == "well\n"
    assert (folder / "mine" / "cells" / "hela.csv").exists()
    kernel.run("%ranks --stop")
