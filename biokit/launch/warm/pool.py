"""Warm ranks: a pool of processes that run one cell after another in variables that stay.

A pool is a run of kind `ranks`, with the same supervisor and the same clean-up as any other. What it runs comes from
the process that started it, over a socket; what its ranks print goes to their files, as in any run.
"""

from __future__ import annotations

import atexit
import contextlib
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from biokit.errors import RunError
from biokit.failures import Failure, RankError, collect_failure, save_failure
from biokit.launch.failed_run import explain_end
from biokit.launch.orders import Order
from biokit.launch.run import start_run
from biokit.launch.started import find_started
from biokit.launch.tree import end_tree
from biokit.launch.values import part_secrets, write_values
from biokit.launch.warm.members import Member, admit, open_door, receive_any
from biokit.launch.warm.messages import FAILED, INTERRUPTED, write_token
from biokit.launch.warm.watch import GONE, POLL_S, CellWatch
from biokit.runs import RunFolder
from biokit.secrets import mask
from biokit.stacks import Hang, save_hang

CELLS = "cells"  # folder of what each cell left
START_S = 180.0  # for all ranks to come up
NOTICE_S = 3.0  # for torchrun to notice that a rank is gone, and end the others
EXIT_S = 2.0  # for ranks to end by themselves
END_S = 5.0  # for the supervisor to end what does not
ANSWER_S = 10.0  # for ranks between two cells


@dataclass(frozen=True)
class Cell:
    """What the ranks are to run.

    Attributes:
        code: the text below the magic's line.
        name: of the file that tracebacks name, without its ending.
        given: variables that all ranks get.
        wanted: names of the variables that rank 0 gives back.
        timeout_s: 0: none.
    """

    code: str
    name: str
    given: dict[str, Any] = field(default_factory=dict)
    wanted: tuple[str, ...] = ()
    timeout_s: float = 0.0


@dataclass(frozen=True)
class CellEnd:
    """How a cell ended.

    Attributes:
        states: of each rank: finished, failed, interrupted, gone, or busy (it was ended).
        result: file of the values that rank 0 gave back.
        interrupted: by the user, or a rank by a signal.
        groups_ended: the process groups were given up, to get a rank out of a collective.
        lost: the pool has been ended, and all variables with it.
        hang: where the ranks stood when the time was up, or before one was got out of a collective.
    """

    states: dict[int, str]
    result: Path
    interrupted: bool
    groups_ended: bool
    lost: bool
    failure: Failure | None = None
    hang: Hang | None = None


class Pool:
    """The warm ranks of this process.

    Attributes:
        folder: the run folder.
        num_cells: that they have been given.
    """

    def __init__(
        self,
        folder: RunFolder,
        num_ranks: int,
        environment: Mapping[str, str] | None = None,
        timeout_s: float = START_S,
    ) -> None:
        """Start them, and wait until all are there.

        Args:
            environment: additions to this process's own.

        Raises:
            RunFailed: one of them failed while it came up.
            RunError: they did not come up in time.
        """
        self.folder, self.num_cells, self.life = folder, 0, 0
        self.members: list[Member] = []
        folder.create()
        self._cells_before = _last_cell(folder)  # of earlier ranks: their errors are not these ones'
        token_file = folder.path.absolute() / "ranks.token"
        token = write_token(token_file)
        try:
            with open_door() as (listener, path):
                program = ("-m", "biokit.launch.warm.rank", str(path), str(token_file))
                flags = ("--nproc-per-node", str(num_ranks))
                self._supervisor = self._start(Order("ranks", program, flags, environment=dict(environment or {})))
                self._wait_for(num_ranks, listener, token, timeout_s)
        finally:
            token_file.unlink(missing_ok=True)
        self.life = folder.last_life()

    def _start(self, order: Order) -> subprocess.Popen[bytes]:
        try:
            start_run(self.folder, order)
        except KeyboardInterrupt:
            self.folder.request_stop()  # heard by a supervisor that is not known here yet
            raise
        started = find_started(self.folder)
        assert started is not None
        atexit.register(self.end)
        return started.process

    @property
    def alive(self) -> bool:
        """Whether all ranks are there, as far as is known without asking them."""
        for member, _ in receive_any([member for member in self.members if not member.gone], 0):
            member.gone = True  # between two cells a rank has nothing to say
        return self._supervisor.poll() is None and not any(member.gone for member in self.members)

    def run(self, cell: Cell, look: Callable[[], object] = lambda: None) -> CellEnd:
        """Run a cell on all ranks and wait until it has ended on each.

        Args:
            look: called many times a second meanwhile.

        Raises:
            SyntaxError: the cell is no Python; no rank has seen it.
            DataError: a value that cannot be given.
        """
        self.num_cells += 1
        folder = RunFolder(self.folder.path / CELLS / f"{self._cells_before + self.num_cells:04d}")
        message = self._prepare(cell, folder)
        watch = CellWatch(self.members, self.folder.life(self.life), lambda: self._supervisor.poll() is None)
        watch.watch(message, cell.timeout_s, look)
        if message["given"]:
            Path(message["given"]).unlink(missing_ok=True)
        return self._judge(watch, folder)

    def _prepare(self, cell: Cell, folder: RunFolder) -> dict[str, Any]:
        """What the ranks are told of a cell; its text and the values given to it are left as files."""
        file, code = self.folder.path / f"{cell.name}.py", f"\n{cell.code}"  # line 1 is the magic's own
        compile(code, str(file), "exec", dont_inherit=True)
        folder.life(1).create()
        file.write_text(mask(code), encoding="utf-8", errors="surrogateescape")
        secret, plain = part_secrets(cell.given)
        given = folder.path / "given.safetensors"
        if plain:
            write_values(given, plain, "--with", secret.values())
        return {
            "do": "run",
            "code": code,
            "file": str(file.absolute()),
            "errors": str(folder.life(1).path.absolute()),  # not of the pool's own life: that goes on
            "printed": str(self.folder.life(self.life).path.absolute()),
            "given": str(given.absolute()) if plain else "",
            "secrets": secret,  # they are in no file
            "wanted": list(cell.wanted),
            "result": str(folder.result_file.absolute()),
            "environment": self._fresh_rendezvous(),
        }

    def _judge(self, watch: CellWatch, folder: RunFolder) -> CellEnd:
        """How the cell ended; a pool that is not whole any more is ended."""
        failure, lost = None, watch.given_up
        if watch.stuck and not lost:
            lost = len(self._ask({"do": "end_groups"}, ANSWER_S)) < len(self.members)
        if watch.hang is not None and not watch.stuck:
            save_hang(self.folder, watch.hang)
        elif watch.ranks(GONE) or self._supervisor.poll() is not None:
            failure = self._find_end(watch.ranks(GONE))
        elif watch.ranks(FAILED) and not watch.interrupted:
            failure = collect_failure(folder, 1)
            log = self.folder.life(self.life).output_file(max(0, failure.causes[0].rank))
            failure = replace(failure, life=self.life, logs=str(log), hang=watch.hang)
        if lost:
            self.end(at_once=True)
        if failure is not None:
            save_failure(self.folder, failure)
        interrupted = watch.interrupted or (failure is None and bool(watch.ranks(INTERRUPTED)))  # or by a signal
        groups_ended = watch.stuck and not lost
        return CellEnd(watch.states, folder.result_file, interrupted, groups_ended, lost, failure, watch.hang)

    def _find_end(self, gone: Sequence[int]) -> Failure:
        """Why processes of the pool ended, as torchrun saw it, or at least that they did."""
        self._ended_within(NOTICE_S)
        self.end(at_once=True)
        failure = collect_failure(self.folder, self.life)
        if not gone or any(one.rank in gone for one in failure.causes):
            return failure
        causes = [RankError(rank, time.time(), "", "exit", "its process has ended") for rank in gone]
        return replace(failure, headline=str(causes[0]), causes=tuple(causes))

    def show(self, names: Sequence[str], timeout_s: float = ANSWER_S) -> dict[int, dict[str, dict[str, str]]]:
        """`type`, `about` and `text` of each rank's variables of these names; what a rank does not have is left out.

        A rank that ends while it is asked (its values' own code says how they look) is left out too.
        """
        answers = self._ask({"do": "show", "names": list(names)}, timeout_s)
        return {rank: answer["variables"] for rank, answer in answers.items() if "variables" in answer}

    def end(self, at_once: bool = False) -> None:
        """End the ranks. `at_once`: those that do not answer are not waited for."""
        atexit.unregister(self.end)
        for member in self.members:
            if not at_once and not member.gone:
                member.send({"do": "exit"})
        if at_once or not self._ended_within(EXIT_S):
            with contextlib.suppress(ProcessLookupError):
                self._supervisor.send_signal(signal.SIGINT)
            for member in self.members:  # what hangs in compiled code hears no other signal
                member.signal(signal.SIGKILL)
            if not self._ended_within(END_S):
                end_tree(self._supervisor.pid, grace_s=0)
        self._supervisor.wait()
        for member in self.members:
            member.connection.close()
            member.gone = True

    def _wait_for(self, num_ranks: int, listener: socket.socket, token: str, timeout_s: float) -> None:
        """Until all have come up; where they do not, those that have are ended."""
        asked, end = f"{num_ranks} warm ranks in {self.folder.path}", time.monotonic() + timeout_s
        try:
            while len(self.members) < num_ranks:
                if self._supervisor.poll() is not None:
                    raise explain_end(self.folder, "they did not come up", "ranks")
                if time.monotonic() > end:
                    found = f"{len(self.members)} came up in {timeout_s:g} s"
                    raise RunError(asked, found, "Look at the logs there; start fewer")
                if member := admit(listener, token, 0.1):
                    self.members.append(member)
        except BaseException:
            self.end(at_once=True)
            raise
        self.members.sort(key=lambda member: member.rank)

    def _ended_within(self, timeout_s: float) -> bool:
        try:
            self._supervisor.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _ask(self, message: dict[str, Any], timeout_s: float) -> dict[int, dict[str, Any]]:
        """The answers of all ranks, none of which is busy; a rank that does not answer in time is taken for gone."""
        waiting = [member for member in self.members if not member.gone]
        answers: dict[int, dict[str, Any]] = {}
        for member in waiting:
            member.send(message)
        end = time.monotonic() + timeout_s
        while (left := [m for m in waiting if m.rank not in answers and not m.gone]) and time.monotonic() < end:
            for member, answer in receive_any(left, POLL_S):
                answers[member.rank] = answer
        for member in left:
            member.gone = True
        return answers

    def _fresh_rendezvous(self) -> dict[str, str]:
        """Where a process group that this cell makes would meet.

        After the first cell never in the store of torchrun's agent: it keeps the addresses of the group before, and
        a second group of the same name would wait for those for ever.
        """
        if self.num_cells == 1:
            return {}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}


def _last_cell(folder: RunFolder) -> int:
    """Number of the newest cell that earlier ranks ran in a folder; 0: none."""
    names = [path.name for path in (folder.path / CELLS).glob("*")]
    return max((int(name) for name in names if name.isascii() and name.isdecimal()), default=0)
