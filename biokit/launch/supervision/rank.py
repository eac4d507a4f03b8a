"""One rank of a run: `python -m biokit.launch.supervision.rank [--keep-output] [--exec] LIFE_DIR program...`.

It leaves its name in the life's folder before anything else, points its output to its own file, and then runs the
program as Python itself would: as `__main__`, with its own arguments, exit code and tracebacks.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import importlib.machinery
import importlib.util
import json
import os
import runpy
import socket
import sys
import time
import traceback
import types
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

import psutil

from biokit import failures, stacks
from biokit.errors import RunError
from biokit.launch.supervision.agent_file import PARENT
from biokit.launch.tree import end_with
from biokit.runs import LifeFolder, write_atomically
from biokit.secrets import masked_stream

EXIT_USER_ERROR = 2
LOST_PEER_WAIT_S = 1.0  # the rank that was the cause shall be seen to end first
LIFE = "BIOKIT_LIFE"  # variable: `process id:folder`, where a program that catches its own errors may leave them


class ProgramError(RunError):
    """There is nothing to run."""


def main(words: Sequence[str]) -> None:
    """Run one rank to its end; the exit code is the program's."""
    switches = {word for word in words[:2] if word in ("--keep-output", "--exec")}
    life_dir, *program = words[len(switches) :]
    life, rank = LifeFolder(Path(life_dir)), int(os.environ.get("RANK", "0"))
    parent = int(os.environ.pop(PARENT, os.getppid()))
    who = note_start(life, rank)
    if "--keep-output" not in switches:
        redirect_output(life.output_file(rank))
    sys.stdout, sys.stderr = _open_lines(1), _open_lines(2)
    end_with(parent)
    os.environ[LIFE] = f"{os.getpid()}:{life.path}"
    if "--exec" not in switches:
        stacks.answer_requests(life.stack_file(rank))
    code = 1
    try:
        (replace_process if "--exec" in switches else run_program)(program)
        code = 0
    except SystemExit as error:
        code = 0 if error.code is None else error.code if isinstance(error.code, int) else 1
        if code:
            note_error(life, rank, error)
        raise
    except ProgramError as error:
        note_error(life, rank, error)
        print(error, file=sys.stderr)
        code = EXIT_USER_ERROR
        sys.exit(code)
    except BaseException as error:
        error.__traceback__ = program_frames(error.__traceback__)
        note_error(life, rank, error)
        sys.excepthook(type(error), error, error.__traceback__)
        _let_the_cause_go_first(error)
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        sys.exit(code)
    finally:
        note_end(life, rank, who, code)


def note_own_error(error: BaseException) -> None:
    """For a program that catches its own errors: leaves one for the supervisor, where there is a supervisor."""
    pid, _, life_dir = os.environ.get(LIFE, "").partition(":")
    if pid == str(os.getpid()):  # and not a process that the program started: its error need not be the rank's
        note_error(LifeFolder(Path(life_dir)), int(os.environ.get("RANK", "0")), error)
        _let_the_cause_go_first(error)


def note_start(life: LifeFolder, rank: int) -> dict[str, Any]:
    """Say who this rank is; what an earlier start of the ranks by torchrun left of their ends is taken away."""
    who = {
        "rank": rank,
        "local_rank": int(os.environ.get("LOCAL_RANK", "0")),
        "node": int(os.environ.get("GROUP_RANK", "0")),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "pid_started": psutil.Process().create_time(),
        "time": time.time(),
    }
    life.error_file(rank).unlink(missing_ok=True)
    for error in life.error_file(0).parent.glob("rank_*.json"):  # torchrun goes on with fewer nodes: they are gone
        if int(error.stem.removeprefix("rank_")) >= int(os.environ.get("WORLD_SIZE", sys.maxsize)):
            error.unlink(missing_ok=True)
    write_atomically(life.rank_file(rank), json.dumps(who) + "\n")
    return who


def note_end(life: LifeFolder, rank: int, who: dict[str, Any], code: int) -> None:
    """Say that this rank has come to its end by itself."""
    with contextlib.suppress(OSError):  # a full disk must not hide the error itself
        write_atomically(life.rank_file(rank), json.dumps({**who, "ended": time.time(), "code": code}) + "\n")


def note_error(life: LifeFolder, rank: int, error: BaseException) -> None:
    """Leave the error, unless the program has left its own."""
    if life.error_file(rank).exists():
        return
    try:
        failures.write_error(life, rank, error)
    except Exception:  # whatever fails here must not hide the error itself
        traceback.print_exc()


def _let_the_cause_go_first(error: BaseException) -> None:
    """torchrun ends all ranks when one has ended: so it shall not be one that only lost its peers."""
    if failures.is_lost_peer(error):
        time.sleep(LOST_PEER_WAIT_S)


def redirect_output(path: Path) -> None:
    """Point standard output and error, of this process and its children, to one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(handle, number)
    os.close(handle)


def _open_lines(number: int) -> IO[str]:
    """A stream for Python's own output: by whole lines, so that those of two processes do not mix, secrets masked."""
    stream = masked_stream(
        os.fdopen(number, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    )
    atexit.register(stream.close)
    return cast(IO[str], stream)


def replace_process(program: Sequence[str]) -> None:
    """Become a program that is not Python's.

    Raises:
        ProgramError: there is no such program.
    """
    try:
        os.execvp(program[0], list(program))
    except OSError as error:
        found = f"it cannot be run ({error.strerror})"
        raise ProgramError(f"program {program[0]}", found, "Check its name and its permissions") from error


def run_program(program: Sequence[str]) -> None:
    """Run a script (a path) or a module (`-m`, a name) in this process as Python itself would.

    Raises:
        RunError: there is no such program; of a class of its own, as the program may raise one too.
    """
    if program[0] == "-m":
        name, sys.argv = program[1], list(program[1:])
        code, main = _load_module(name)
    else:
        path, sys.argv = Path(program[0]), list(program)
        folder = path if path.is_dir() else path.resolve().parent
        if not sys.flags.safe_path:
            sys.path[0] = str(folder)
        if path.is_dir() or path.suffix in (".zip", ".pyz"):
            sys.path[0] = str(path)
            runpy.run_path(str(path), run_name="__main__")
            return
        code, main = _load_script(path)
    # the real one, and not a passing module as runpy has it: classes stay picklable, threads and atexit find it
    sys.modules["__main__"] = main
    exec(code, main.__dict__)


def _load_script(path: Path) -> tuple[types.CodeType, types.ModuleType]:
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ProgramError(f"program {path}", f"it cannot be read ({error.strerror})", "Check the path") from error
    main, file = types.ModuleType("__main__"), str(path.absolute())
    main.__dict__.update(__file__=file, __cached__=None, __builtins__=builtins)
    main.__loader__ = importlib.machinery.SourceFileLoader("__main__", file)
    return compile(source, file, "exec", dont_inherit=True), main


def _load_module(name: str) -> tuple[types.CodeType, types.ModuleType]:
    asked = f"program -m {name}"
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.loader is None:
        raise ProgramError(asked, "there is no such module", "Check its name, and the folder you start from")
    code = spec.loader.get_code(spec.name)  # type: ignore[attr-defined]
    if code is None:
        raise ProgramError(asked, "it is not written in Python", "Give a script or a Python module")
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=spec.origin, __cached__=spec.cached, __builtins__=builtins)
    main.__spec__, main.__loader__, main.__package__ = spec, spec.loader, spec.parent
    sys.argv[0] = str(spec.origin)
    return code, main


def program_frames(trace: types.TracebackType | None) -> types.TracebackType | None:
    """A traceback without the frames of the launcher, which ran the program or the cell."""
    own = str(Path(__file__).parents[1])
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(own):
        trace = trace.tb_next
    return trace


if __name__ == "__main__":
    main(sys.argv[1:])
