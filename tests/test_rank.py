"""A rank runs its program as Python itself would, and leaves what the supervisor needs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from biokit.launch.supervision.rank import note_start
from biokit.runs import LifeFolder

PROGRAMS = {
    "names": "import sys; print(__name__, __file__, sys.argv, sys.path[0], __spec__)",
    "code": "import sys; sys.exit(3)",
    "text": "import sys; sys.exit('a text')",
    "nothing": "raise SystemExit",
    "error": "def f():\n    return [][1]\ntry:\n    f()\nexcept IndexError as e:\n    raise ValueError('é') from e",
    "syntax": "print(1)\nx = (",
    "atexit": (
        "import atexit, sys\nprint('begun ', end='')\natexit.register(lambda: print('bye', __name__))\nsys.exit(4)"
    ),
    "pickle": "import pickle\nclass A: pass\nprint(pickle.loads(pickle.dumps(A())).__class__)",
    "spawn": (
        "import multiprocessing as mp\ndef double(x): return 2 * x\n"
        "if __name__ == '__main__':\n    with mp.get_context('spawn').Pool(1) as pool: print(pool.map(double, [1, 2]))"
    ),
    "streams": "import sys; print('out'); print('err', file=sys.stderr); sys.stdout.buffer.write(b'bytes\\n')",
    "child": "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'print(5)'])",
    "hook": "import sys\nsys.excepthook = lambda *found: print('mine', found[1])\nraise KeyError('k')",
}


def run_rank(life: LifeFolder, *words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    life.create()
    command = [sys.executable, "-u", "-m", "biokit.launch.supervision.rank", *words]
    environment = {**os.environ, **variables}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def run_python(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-u", *words]
    return subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_behaves_as_under_python(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "program.py").write_text(PROGRAMS[name], encoding="utf-8")
    life = LifeFolder(tmp_path / "life")
    plain = run_python("scripts/program.py", "--lr", "1", cwd=tmp_path)
    done = run_rank(life, str(life.path), "scripts/program.py", "--lr", "1", cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("", "")
    assert life.output_file(0).read_text(encoding="utf-8") == plain.stdout
    assert done.returncode == plain.returncode
    who = json.loads(life.rank_file(0).read_text())
    assert who["code"] == plain.returncode
    assert life.error_file(0).exists() == (plain.returncode != 0)


def test_a_module_behaves_as_under_python(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    text = "import sys\nfrom package import other\nprint(__name__, __spec__.name, __package__, sys.argv, sys.path[0])\n"
    (package / "__main__.py").write_text(f"{text}other.fail()\n")
    (package / "other.py").write_text("def fail(): raise ValueError('no')\n")
    life = LifeFolder(tmp_path / "life")
    plain = run_python("-m", "package", "a b", cwd=tmp_path)
    done = run_rank(life, str(life.path), "-m", "package", "a b", cwd=tmp_path)
    said = [line for line in plain.stdout.splitlines() if "runpy" not in line]
    assert life.output_file(0).read_text().splitlines() == said
    assert done.returncode == plain.returncode == 1


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    life = LifeFolder(tmp_path / "life")
    for words in (["nowhere.py"], ["-m", "no.such.module"]):
        assert run_rank(life, str(life.path), *words, cwd=tmp_path).returncode == 2
    assert run_rank(life, "--exec", str(life.path), "nosuch", cwd=tmp_path).returncode == 2
    said = life.output_file(0).read_text().splitlines()
    assert (
        said.pop()
        == "program nosuch: it cannot be run (No such file or directory). Check its name and its permissions."
    )
    assert said[0] == "program nowhere.py: it cannot be read (No such file or directory). Check the path."
    assert "there is no such module" in said[1] and len(said) == 2
    assert json.loads(life.error_file(0).read_text())["kind"] == "ProgramError"


def test_it_names_itself_before_the_program_begins(tmp_path: Path) -> None:
    life = LifeFolder(tmp_path / "life")
    script = tmp_path / "read.py"
    script.write_text(
        f"import json, os; w = json.load(open({str(life.rank_file(3))!r})); assert w['pid'] == os.getpid()"
    )
    done = run_rank(life, str(life.path), str(script), cwd=tmp_path, RANK="3", LOCAL_RANK="1", GROUP_RANK="1")
    assert done.returncode == 0, life.output_file(3).read_text()
    who = json.loads(life.rank_file(3).read_text())
    assert (who["rank"], who["local_rank"], who["node"], who["code"]) == (3, 1, 1, 0)


def test_an_interrupt_is_130(tmp_path: Path) -> None:
    life = LifeFolder(tmp_path / "life")
    script = tmp_path / "interrupted.py"
    script.write_text("raise KeyboardInterrupt")
    assert run_rank(life, str(life.path), str(script), cwd=tmp_path).returncode == 130
    assert life.output_file(0).read_text().endswith("KeyboardInterrupt\n")


def test_a_program_that_is_not_python(tmp_path: Path) -> None:
    life = LifeFolder(tmp_path / "life")
    words = ["--exec", str(life.path), sys.executable, "-c", "import os; print('pid', os.getpid())"]
    assert run_rank(life, *words, cwd=tmp_path).returncode == 0
    pid = json.loads(life.rank_file(0).read_text())["pid"]
    assert life.output_file(0).read_text() == f"pid {pid}\n"


def test_output_that_torchrun_keeps(tmp_path: Path) -> None:
    life = LifeFolder(tmp_path / "life")
    script = tmp_path / "said.py"
    script.write_text("import os; print('said', os.environ['SOME_TOKEN'])")
    words = ["--keep-output", str(life.path), str(script)]
    assert run_rank(life, *words, cwd=tmp_path, SOME_TOKEN="hf_abcdefgh123").stdout == "said ***\n"
    assert not life.output_file(0).exists()


def test_secrets_are_masked(tmp_path: Path) -> None:
    life = LifeFolder(tmp_path / "life")
    script = tmp_path / "telling.py"
    script.write_text("import os\nprint('it is', os.environ['SOME_TOKEN'])\nraise ValueError(os.environ['SOME_TOKEN'])")
    run_rank(life, str(life.path), str(script), cwd=tmp_path, SOME_TOKEN="hf_abcdefgh123")
    texts = [path.read_text() for path in (life.output_file(0), life.error_file(0))]
    assert all("hf_abcdefgh123" not in text and "***" in text for text in texts)
    script.write_text("print('a line that may begin with a secret: hf_a', end='')")
    run_rank(life, str(life.path), str(script), cwd=tmp_path, SOME_TOKEN="hf_abcdefgh123")
    assert life.output_file(0).read_text().endswith("a secret: hf_a")


def test_a_fatal_signal_leaves_a_stack(tmp_path: Path) -> None:
    life = LifeFolder(tmp_path / "life")
    script = tmp_path / "crash.py"
    script.write_text("import os, signal\ndef crash():\n    os.kill(os.getpid(), signal.SIGSEGV)\ncrash()")
    assert run_rank(life, str(life.path), str(script), cwd=tmp_path).returncode == -signal.SIGSEGV
    assert "in crash" in life.stack_file(0).read_text()
    assert "code" not in json.loads(life.rank_file(0).read_text())


@pytest.mark.parametrize("own", [True, False], ids=["the rank's", "a child's"])
def test_an_error_that_the_program_catches_itself(tmp_path: Path, own: bool) -> None:
    life = LifeFolder(tmp_path / "life")
    script = tmp_path / "catching.py"
    catching = (
        "import sys\nfrom biokit.errors import ConfigError\nfrom biokit.launch.supervision.rank import note_own_error\n"
        "try:\n    raise ConfigError('a', 'b', 'c')\nexcept ConfigError as error:\n    note_own_error(error)\n"
    )
    child = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {catching!r}])\n"
    script.write_text((catching if own else child) + "sys.exit(2)")
    assert run_rank(life, str(life.path), str(script), cwd=tmp_path).returncode == 2
    assert json.loads(life.error_file(0).read_text())["kind"] == ("ConfigError" if own else "SystemExit")


def test_errors_of_ranks_that_are_gone_are_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun went on with fewer ranks, under new numbers."""
    life = LifeFolder(tmp_path)
    life.create()
    for rank in range(4):
        life.error_file(rank).write_text("{}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    note_start(life, 1)
    assert [rank for rank in range(4) if life.error_file(rank).exists()] == [0]
