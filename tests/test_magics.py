"""`%torchrun` and `%%torchrun`, by hand in a shell and in a real kernel with real ranks."""

from __future__ import annotations

import atexit
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from IPython.core.completer import provisionalcompleter
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from biokit import load_ipython_extension
from biokit.config import config_to_yaml
from biokit.errors import RunError
from biokit.launch.magics import torchrun_magics
from biokit.launch.magics.cell_program import run_cell, write_cell
from biokit.launch.magics.hidden_words import hide_words, show_words
from biokit.launch.notebooks import run_notebook
from biokit.launch.run import Run
from biokit.launch.values import read_values
from biokit.runs import RunFolder
from tests.kernel import Kernel, count_copies, list_processes, open_kernel, wait_until, write_notebook
from tests.small_run import small_config

ODD = "a b\"c'; touch X # $(touch Y) `touch Z` {x} $x \n end"
TOKEN = "hf_QwErTy123456"


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InteractiveShell]:
    """A shell with the extension, in a folder of its own; nothing is started by it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    made = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    load_ipython_extension(made)
    yield made
    made.atexit_operations()
    atexit.unregister(made.atexit_operations)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RunFolder, Any, bool, dict[str, str]]]:
    """What would have been started: (folder, order, detach, variables)."""
    seen: list[tuple[RunFolder, Any, bool, dict[str, str]]] = []

    def note(folder: RunFolder, order: Any, detach: bool = False, *, variables: dict[str, str]) -> Run:
        seen.append((folder, order, detach, variables))
        return Run(folder)

    monkeypatch.setattr(torchrun_magics, "start_run", note)
    return seen


@pytest.mark.parametrize(
    ("line", "cell", "message"),
    [
        ("--bogus x.py", None, "unrecognized arguments: --bogus"),
        ("missing.py", None, "missing.py: there is no such file"),
        ("--with nope", "x = 1\n", "--with nope: the notebook has no such variable. Define it first."),
        ("--out y", "import os as z\ndef f():\n    global w\n    w = 2\n", "does not assign it. It assigns: f, w, z."),
        ("--out api_key", "api_key = 1\n", "--out api_key: it looks secret"),
        ("", "x = 1\n!ls\n", "line 3 is IPython's: !ls"),
        ("--with model", "x = 1\n", 'model["f"] is a function.'),
        ("--attach nowhere", None, "nowhere"),
        ("", "x = 1\ny = = 2\n", "the cell: line 3 is no Python (invalid syntax): y = = 2."),
        ("", "if True:\n    !ls\n", "line 3 is IPython's: !ls"),
        ("", "x = 1\0\n", "the cell"),
        ("", 's = """\n%d items\n"""\n\nx = = 3\n', "line 6 is no Python"),
        ("a" * 5000, None, "aaa[...]: there is no such file"),
        ("--no-python nosuch", None, "--no-python nosuch: there is no such program"),
        ("--dry-run -m nosuchmod.x", None, "-m nosuchmod.x: there is no such module"),
        ("--run-dir /proc/x x.py", None, "run folder /proc/x: it cannot be made"),
        ("--run-dir x.py/y x.py", None, "run folder x.py/y: there can be none (Not a directory)"),
        ("--run-dir x.py x.py", None, "run folder x.py: it is a file"),
        (f"--run-dir {'r' * 300} x.py", None, "there can be none (File name too long)"),
    ],
)  # fmt: skip
def test_mistakes_are_said_at_once(
    shell: InteractiveShell, started: list[Any], line: str, cell: str | None, message: str
) -> None:
    shell.user_ns["model"] = {"f": lambda: 0}
    Path("x.py").touch()
    with pytest.raises(UsageError) as caught:
        if cell is None:
            shell.run_line_magic("torchrun", line)
        else:
            shell.run_cell_magic("torchrun", line, cell)
    assert message in str(caught.value) and not started and not Path("runs").exists()


def test_names_that_only_the_run_can_tell_are_not_refused(shell: InteractiveShell, started: list[Any]) -> None:
    for cell in ("exec('y = 1')\n", "from os import *\n", "globals()['y'] = 1\n", "(y := 1)\n", "for y in []: pass\n"):
        shell.run_cell_magic("torchrun", "--bg --out y", cell)
    assert len(started) == 5


def test_a_secret_of_the_environment_is_not_written_into_the_cell_file(
    shell: InteractiveShell, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UsageError, match="spells out a secret"):
        shell.run_cell_magic("torchrun", "", f"login('{TOKEN}')\n")


def test_dry_run_starts_nothing(
    shell: InteractiveShell, started: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shell.user_ns["odd"] = ODD
    (tmp_path / "x.py").touch()
    shell.run_line_magic("torchrun", "--dry-run --nproc-per-node 2 x.py --name {odd} --token {odd}")
    printed = capsys.readouterr().out
    command = printed.partition("\nfolder")[0].removeprefix("command  ")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "x.py"]
    assert shlex.split(command) == [*words, "--name", ODD, "--token", "***"]
    assert "lives/0001/output/rank_00000.log" in printed and "runs/torchrun/" in printed
    shell.run_cell_magic("torchrun", "--dry-run --run-dir 'my run'", "x = 1\n")
    assert "folder   my run/" in capsys.readouterr().out
    assert not started and not [path for path in tmp_path.iterdir() if path.name not in ("ipython", "x.py")]


def test_what_is_started(shell: InteractiveShell, started: list[Any], tmp_path: Path) -> None:
    (tmp_path / "x.py").touch()
    shell.user_ns.update(odd=ODD, hf_token=TOKEN, lr=0.5)
    run = shell.run_line_magic("torchrun", "--nproc-per-node 2 --bg x.py {odd} --hub-token {hf_token} -v")
    assert isinstance(run, Run)
    folder, order, detach, variables = started.pop()
    assert (order.kind, order.torchrun, order.timeout_s, detach) == ("script", ("--nproc-per-node", "2"), 0.0, False)
    assert order.program[:3] == ("-m", "biokit.launch.magics.hidden_words", "x.py")
    assert list(variables.values()) == [TOKEN] and TOKEN not in repr(order)
    assert folder.path.parent == Path("runs/torchrun")
    shell.run_cell_magic("torchrun", "--detach --with lr,hf_token --out y -- --a {lr}", "y = lr\n")
    folder, order, detach, variables = started.pop()
    assert (order.kind, order.timeout_s, detach) == ("cell", 24 * 3600.0, True)
    assert order.program == (
        "-m", "biokit.launch.magics.cell_program", str(folder.path.absolute()), "--out", "y", "--", "--a", "0.5"
    )  # fmt: skip
    assert variables == {"BIOKIT_WITH_hf_token": TOKEN}
    assert (folder.path / "cell.py").read_text() == "\ny = lr\n"
    assert all(TOKEN.encode() not in path.read_bytes() for path in folder.path.rglob("*") if path.is_file())


def test_runs_stand_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BIOKIT_RUNS", str(tmp_path))
    first, second = torchrun_magics.new_folder(), torchrun_magics.new_folder()
    assert first.parent == tmp_path / "torchrun" and first != second


def test_names_of_a_function_are_seen(shell: InteractiveShell, started: list[Any]) -> None:
    shell.run_cell("def f(depth):\n    get_ipython().run_line_magic('torchrun', '--bg --no-python echo {depth}')\nf(7)")
    assert started.pop()[1].program == ("echo", "7")


def test_help_and_completion(shell: InteractiveShell, capsys: pytest.CaptureFixture[str]) -> None:
    for source in ("%torchrun --help", "%torchrun?"):
        shell.run_cell(source)
        text = capsys.readouterr().out
        assert "--with NAMES" in text and "Maximum number of worker group restarts" in text
    with provisionalcompleter():
        for line, expected in {
            "%torchrun --nproc-p": ["--nproc-per-node"],
            "%%torchrun --standalone --o": ["--out"],
            "%%torchrun --nproc-per-node 2 --rdzv-e": ["--rdzv-endpoint"],
            "%torchrun --rdzv_e": ["--rdzv_endpoint"],
            "%%ranks --ti": ["--timeout"],
            "%ranks --re": ["--restart"],
            "%submit --no": ["--no-follow", "--nodes"],
            "%check_parallel --s": ["--steps"],
            "%matplotlib --t": [],
            "x = 1 --o": [],
        }.items():
            found = [c.text for c in shell.Completer.completions(line, len(line)) if c.text.startswith("--")]
            assert found == expected, line
        shell.user_ns["--never"] = 1
        assert any(c.text == "torch" for c in shell.Completer.completions("import torc", 11))


@pytest.mark.parametrize("cell", ['x = """\n%d items\n!\n"""', "x = (7\n% 4)", "vars()['x'] = 3"])
def test_cells_that_only_look_wrong(shell: InteractiveShell, started: list[Any], cell: str) -> None:
    shell.run_cell_magic("torchrun", "--bg --out x", cell)
    assert started.pop()[1].kind == "cell"


def test_values_are_never_flags(shell: InteractiveShell, started: list[Any]) -> None:
    shell.user_ns |= {"flag": "--detach", "name": "--dry-run", "number": -1e-3}
    Path("s.py").touch()
    for line in ("{flag} s.py", "$flag s.py", "--rdzv-id {name} s.py", "--nproc-per-node 1 {number} s.py"):
        with pytest.raises(UsageError, match="would be read as a flag"):
            shell.run_line_magic("torchrun", line)
    assert not started
    shell.run_line_magic("torchrun", "--bg --rdzv-id={name} --rdzv-endpoint localhost:0 s.py {flag} {number}")
    assert started.pop()[1].program == ("s.py", "--detach", "-0.001")
    shell.user_ns["end"] = "--"
    for magic, line in (("ranks", "{flag}"), ("torchrun", "--nproc-per-node 2 {end} --bg")):
        with pytest.raises(UsageError, match="would be read as a flag"):
            shell.run_cell_magic(magic, line, "1")


def test_hidden_words(monkeypatch: pytest.MonkeyPatch) -> None:
    program = ("x.py", "--token", TOKEN, f"api_key={TOKEN}2", "--lr", "1")
    hidden, variables = hide_words(program)
    assert hidden[:3] == ("-m", "biokit.launch.magics.hidden_words", "x.py") and TOKEN not in " ".join(hidden)
    with pytest.raises(RunError, match="not written down"):
        show_words(hidden[2:])
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert tuple(show_words(hidden[2:])) == program
    assert hide_words(("x.py", "--lr", "1")) == (("x.py", "--lr", "1"), {})


def test_a_cell_runs_as_main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setattr(sys, "argv", ["before"])
    monkeypatch.setenv("BIOKIT_WITH_hf_token", TOKEN)
    folder = RunFolder(tmp_path)
    code = (
        "import sys, inspect, pickle\nclass A: pass\n"
        "seen = [__name__, sys.argv[1:], hf_token[::-1], x, inspect.currentframe().f_lineno, A.__module__]\n"
        "pickle.loads(pickle.dumps(A()))\nsys.exit()"
    )
    assert write_cell(folder, code, {"x": torch.ones(2), "hf_token": TOKEN}) == {"BIOKIT_WITH_hf_token": TOKEN}
    run_cell(folder, ["seen"], ["--lr", "3"])
    seen = read_values(folder.result_file)["seen"]
    assert seen[:3] == ["__main__", ["--lr", "3"], TOKEN[::-1]] and seen[4:] == [4, "__main__"]
    assert torch.equal(seen[3], torch.ones(2))
    write_cell(folder, "import sys\nsys.exit(3)", {})
    with pytest.raises(SystemExit):
        run_cell(folder, ["seen"], [])
    write_cell(folder, "if False: seen = 1", {})
    with pytest.raises(RunError.__bases__[0], match="--out seen: rank 0 has no such variable"):
        run_cell(folder, ["seen"], [])


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
