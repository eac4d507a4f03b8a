"""`%torchrun` and `%%torchrun`, by hand in a shell and in a real kernel with real ranks."""

from __future__ import annotations

import atexit
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from IPython.core.completer import provisionalcompleter
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from biokit import load_ipython_extension
from biokit.errors import RunError
from biokit.launch.magics import torchrun_magics
from biokit.launch.magics.cell_program import run_cell, write_cell
from biokit.launch.magics.hidden_words import hide_words, show_words
from biokit.launch.run import Run
from biokit.launch.values import read_values
from biokit.runs import RunFolder

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
