"""A warm rank: `python -m biokit.launch.warm.rank SOCKET TOKEN_FILE`, run in every rank of a pool.

It runs one cell after another in the same variables. The main thread runs them, as some libraries demand; another one
reads what the kernel says, so that a cell which waits for a peer that will never answer can be got out of it.
"""

from __future__ import annotations

import ast
import contextlib
import io
import linecache
import os
import queue
import signal
import socket
import sys
import threading
import tokenize
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from biokit import failures
from biokit.errors import RunError
from biokit.launch.supervision.rank import program_frames
from biokit.launch.values import read_values, write_values
from biokit.launch.warm.messages import FAILED, FINISHED, INTERRUPTED, receive_message, send_message
from biokit.launch.warm.variables import describe_variables
from biokit.runs import LifeFolder
from biokit.safe_files import read_end
from biokit.secrets import MaskedStream

_BLANK = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.DEDENT, tokenize.ENDMARKER)


class WarmRank:
    """Runs what the kernel sends, in variables that stay.

    Attributes:
        module: the `__main__` that cells run in.
    """

    def __init__(self, connection: socket.socket, rank: int, module: types.ModuleType) -> None:
        self.connection, self.rank, self.module = connection, rank, module
        self._messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._in_cell = self._interrupted = False

    def serve(self) -> None:
        """Do what the kernel says until it says `exit`, or is gone."""
        signal.signal(signal.SIGINT, self._interrupt)
        threading.Thread(target=self._read, daemon=True, name="biokit-warm-reader").start()
        while (message := self._messages.get()).get("do") != "exit":
            answer = self._answer(message)
            with contextlib.suppress(OSError):  # the kernel is gone: so will this process be
                send_message(self.connection, answer)

    def _read(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                message = receive_message(self.connection)
                if message.get("do") == "break":
                    leave_peers(message["peers"])
                else:
                    self._messages.put(message)
        self._messages.put({"do": "exit"})

    def _interrupt(self, _number: int, _frame: types.FrameType | None) -> None:
        """SIGINT ends a cell; between two cells it has nothing to end."""
        if self._in_cell:
            self._interrupted = True
            raise KeyboardInterrupt

    def _answer(self, message: Mapping[str, Any]) -> dict[str, Any]:
        if message["do"] == "show":
            return {"variables": describe_variables(vars(self.module), message["names"])}
        if message["do"] == "end_groups":
            return {"ended": end_groups()}
        return {"state": self._run(message)}

    def _run(self, message: Mapping[str, Any]) -> str:
        """Run a cell to its end, however it ends."""
        self._interrupted, ended_by = False, None
        os.environ |= message["environment"]
        try:
            try:
                self._in_cell = True
                self._run_cell(message)
            finally:
                self._in_cell = False
        except BaseException as error:
            ended_by = error
        self._in_cell = False
        end_output(self._output(message))
        if ended_by is None:
            return FINISHED
        if self._interrupted and isinstance(ended_by, KeyboardInterrupt):
            return INTERRUPTED
        ended_by.__traceback__ = program_frames(ended_by.__traceback__)
        failures.write_error(LifeFolder(Path(message["errors"])), self.rank, ended_by)
        return FAILED

    def _output(self, message: Mapping[str, Any]) -> Path:
        return LifeFolder(Path(message["printed"])).output_file(self.rank)

    def _run_cell(self, message: Mapping[str, Any]) -> None:
        scope = vars(self.module)
        if message["given"]:
            scope.update(read_values(Path(message["given"])))
        scope.update(message["secrets"])
        value = None
        try:
            value = run_code(message["code"], message["file"], scope)
        except SystemExit as error:
            if error.code:
                raise
        if value is not None:
            end_output(self._output(message))
            print(to_text(value))
            scope["_"] = value
        if message["wanted"] and self.rank == 0:
            wanted = pick(scope, message["wanted"])
            write_values(Path(message["result"]), wanted, "--out", message["secrets"].values())


def run_code(code: str, file: str, scope: dict[str, Any]) -> Any:
    """Run a cell; the value of its last expression, None where there is none or a semicolon ends it."""
    # tracebacks show its lines although the file may have been overwritten, or masked
    linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
    tree = ast.parse(code, file)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) and not is_silenced(code) else None
    exec(compile(tree, file, "exec", dont_inherit=True), scope)
    if not isinstance(last, ast.Expr):
        return None
    return eval(compile(ast.Expression(last.value), file, "eval", dont_inherit=True), scope)


def is_silenced(code: str) -> bool:
    """Whether a cell ends with a semicolon, as IPython has it; a comment may follow."""
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return [token.string for token in tokens if token.type not in _BLANK][-1:] == [";"]


def end_output(file: Path) -> None:
    """Have all that was printed stand in this rank's output file, in whole lines."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the cell may have put None in its place, or closed it
            stream.flush()
        if isinstance(stream, MaskedStream):  # it may hold back what could have been the begin of a secret
            stream.close()
    if read_end(file, 1) not in ("", "\n"):
        os.write(1, b"\n")


def to_text(value: Any) -> str:
    """A value as a notebook shows it in words."""
    try:
        from IPython.lib.pretty import pretty
    except ImportError:
        return repr(value)
    return pretty(value)


def pick(scope: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The variables of these names.

    Raises:
        RunError: rank 0 has none of that name.
    """
    missing = [name for name in names if name not in scope]
    if missing:
        found = "rank 0 has no variable of that name"
        raise RunError(f"--out {','.join(missing)}", found, "Assign it in the cell, or in one before")
    return {name: scope[name] for name in names}


def end_groups() -> bool:
    """Give up the process groups; whether there were any."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return False
    dist.destroy_process_group()
    return True


def leave_peers(peers: Sequence[int]) -> int:
    """Shut this process's TCP connections to others down: a collective that waits for them ends with an error.

    Python cannot interrupt gloo, which waits without looking at signals; an error on its connections ends the wait.

    Args:
        peers: process ids of the other ranks.

    Returns:
        How many connections there were.
    """
    theirs = set()
    for peer in peers:
        with contextlib.suppress(psutil.Error):
            theirs |= {found.laddr for found in psutil.Process(peer).net_connections("tcp") if found.raddr}
    num_left = 0
    for found in psutil.Process().net_connections("tcp"):
        if found.raddr in theirs:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(found.fd)) as own:
                if own.getpeername()[:2] == tuple(found.raddr):  # its number may be another file's by now
                    own.shutdown(socket.SHUT_RDWR)
                    num_left += 1
    return num_left


def preload() -> None:
    """Import what nearly every cell needs, so that the first one need not wait for it."""
    import torch.distributed  # noqa: F401

    with contextlib.suppress(ImportError):
        import IPython.lib.pretty  # noqa: F401


def main(words: Sequence[str]) -> None:
    """Join the kernel's pool and serve it to the end."""
    path, token_file = words
    preload()
    rank = int(os.environ["RANK"])
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        token = Path(token_file).read_text(encoding="ascii")
        send_message(connection, {"token": token, "rank": rank, "pid": os.getpid()})
        WarmRank(connection, rank, module).serve()


if __name__ == "__main__":
    main(sys.argv[1:])
