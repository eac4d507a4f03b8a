"""Runs functions on N gloo ranks of this machine cheaply: live processes, forked from a server with torch preloaded.

    def count(rank_name: str) -> float:                  # of a module, not a lambda or a nested function
        with join_processes(CPU, TIMEOUT_S, needs_group=True) as processes:
            return processes.sum([1.0])[0]

    assert ranks(2).run(count, "a") == [2.0, 2.0]        # one result a rank

`ranks(2)` and `ranks(4)` are shared by all test files of a session; `with Ranks(3) as own:` is a pool of one's own.
Every run gets the launcher's environment with a fresh port. After it the global state of DeepSpeed and Megatron (see
ENGINE_MODULES) is put back to what a new process has, and a process group that is left behind is an error; other
module state (torch's random state, classes that an engine patched) lives on in a rank. After a failure all ranks are
ended and the next run starts new ones. What ranks print is shown with a failure only.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import gc
import importlib
import itertools
import multiprocessing
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
TIMEOUT_S = 60.0  # for the process groups of tests
GRACE_S = 5.0  # that the other ranks have to end after one failed
OUTPUT_CHARS = 6000  # of a failed rank's output that are shown
ENGINE_MODULES = (
    "deepspeed.comm.comm",
    "deepspeed.ops",
    "deepspeed.runtime.activation_checkpointing.checkpointing",
    "deepspeed.runtime.pipe.p2p",
    "deepspeed.runtime.zero.partition_parameters",
    "deepspeed.utils.groups",
    "megatron.core.parallel_state",
    "megatron.core.tensor_parallel.random",
)


class RanksFailed(Exception):
    """At least one rank raised, died or did not end in time; `errors` in the order in which they were noticed."""

    def __init__(self, message: str, errors: Mapping[int, BaseException]) -> None:
        super().__init__(message)
        self.errors = dict(errors)


@dataclass(frozen=True)
class Answer:
    """What a rank sends back: a result, or an error and its traceback."""

    result: Any = None
    error: BaseException | None = None
    trace: str = ""


class Ranks:
    """A pool of `world_size` live processes."""

    def __init__(self, world_size: int, timeout_s: float = 150.0) -> None:
        self.world_size, self.timeout_s = world_size, timeout_s
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids by rank; empty before the first run and after a failure."""
        return [process.pid for process in self._processes]

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        environment: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> list[Any]:
        """Call a module's function with these arguments on every rank; returns the results by rank.

        Args:
            environment: more variables for this run, or other values of the launcher's.
            timeout_s: after which the ranks are ended and their stacks shown; None: that of the pool.

        Raises:
            RanksFailed: with the traceback and the output of the rank that failed first.
        """
        __tracebackhide__ = True
        call = pickle.dumps((function, args, {"MASTER_PORT": str(free_port()), **(environment or {})}))
        if not self._processes:
            self._start()
        try:
            for pipe in self._pipes:
                with contextlib.suppress(OSError):  # a rank that died meanwhile is noticed below
                    pipe.send_bytes(call)
            answers = self._collect(self.timeout_s if timeout_s is None else timeout_s)
            failed = len(answers) < self.world_size or any(answer.error for answer in answers.values())
            message = self._describe(answers) if failed else ""
        except BaseException:
            self.close()
            raise
        if failed:
            self.close()
            raise RanksFailed(message, {rank: answer.error for rank, answer in answers.items() if answer.error})
        return [answers[rank].result for rank in range(self.world_size)]

    def close(self) -> None:
        """End the ranks; the next run starts new ones."""
        for pipe in self._pipes:
            pipe.close()  # an idle rank ends by itself
        for process in self._processes:
            process.join(0.5)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._pipes, self._folder = [], [], None

    def _start(self) -> None:
        CONTEXT.set_forkserver_preload(["tests.preload"])
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        for rank in range(self.world_size):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(theirs, rank, self.world_size, str(self._output(rank))))
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _output(self, rank: int) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"rank_{rank}.txt"

    def _collect(self, timeout_s: float) -> dict[int, Answer]:
        """Answers by rank, as they come; not all where the time is over."""
        answers: dict[int, Answer] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < self.world_size:
            waiting: dict[Any, int] = {}
            for rank in set(range(self.world_size)) - set(answers):
                waiting[self._pipes[rank]] = waiting[self._processes[rank].sentinel] = rank
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in sorted({waiting[item] for item in ready}):
                answers[rank] = self._receive(rank)
                if answers[rank].error:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        return answers

    def _receive(self, rank: int) -> Answer:
        try:
            if self._pipes[rank].poll(0):
                return pickle.loads(self._pipes[rank].recv_bytes())
        except (EOFError, OSError):
            pass
        self._processes[rank].join(5)
        code = self._processes[rank].exitcode
        how = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit status {code}"
        return Answer(error=ChildProcessError(f"rank {rank} died: {how}"))

    def _describe(self, answers: Mapping[int, Answer]) -> str:
        missing = [rank for rank in range(self.world_size) if rank not in answers]
        for rank in missing:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)  # its stack goes to its output
        if missing:
            time.sleep(0.3)
        failed = [rank for rank, answer in answers.items() if answer.error]
        lines = [f"rank {rank} of {self.world_size} did not end in time" for rank in missing]
        for rank in failed:
            error = answers[rank].error
            lines.append(f"rank {rank} of {self.world_size} failed: {type(error).__name__}: {error}")
        first = failed[0] if failed else missing[0]
        if failed and answers[first].trace:
            lines += [f"--- rank {first}", answers[first].trace.rstrip()]
        for rank in [first, *missing]:
            text = self._output(rank).read_text(errors="replace")[-OUTPUT_CHARS:].strip()
            if text:
                lines += [f"--- output of rank {rank}", text]
        return "\n".join(lines)


@functools.cache
def ranks(world_size: int) -> Ranks:
    """The session's pool of that size; it starts with its first run and ends with the session."""
    pool = Ranks(world_size)
    atexit.register(pool.close)
    return pool


def free_port() -> int:
    """A port that is free now, outside the range from which the kernel serves connections; never the same twice."""
    for port in _PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise RuntimeError("no free port")


_PORTS = itertools.cycle(random.Random(os.getpid()).sample(range(11_000, 19_000), 8_000))


def _serve(pipe: Connection, rank: int, world_size: int, output: str) -> None:
    """A rank: calls what the pipe brings until it is closed."""
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    faulthandler.enable(2)
    faulthandler.register(signal.SIGUSR1, 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the ranks
    warnings.resetwarnings()
    warnings.simplefilter("ignore")  # of third parties; those of our own modules are errors, as in the tests' process
    warnings.filterwarnings("error", module=r"(biokit|tests)\b")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    import torch

    torch.set_num_threads(1)
    restore, variables = _snapshot_engines(), dict(os.environ)
    while True:
        try:
            call = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        os.ftruncate(log, 0)
        answer = _answer(call)
        sys.stdout.flush()
        with contextlib.suppress(OSError):
            pipe.send_bytes(answer)
        os.environ.clear()
        os.environ |= variables
        gc.collect()
        restore()


def _answer(call: bytes) -> bytes:
    """Plain pickles: tensors are copied, not handed over through shared memory that ends with the rank."""
    import torch.distributed as dist

    try:
        function, args, environment = pickle.loads(call)
        os.environ |= environment
        answer = Answer(function(*args))
        if dist.is_initialized():
            raise RuntimeError(f"{function.__name__} left a process group behind")
        return pickle.dumps(answer)
    except BaseException as error:
        trace = traceback.format_exc()
        if dist.is_initialized():
            with contextlib.suppress(Exception):
                dist.destroy_process_group()
        with contextlib.suppress(Exception):
            whole = pickle.dumps(Answer(error=error, trace=trace))
            pickle.loads(whole)
            return whole
        return pickle.dumps(Answer(error=RuntimeError(repr(error)), trace=trace))


def _snapshot_engines() -> Callable[[], None]:
    """A function that puts the engines' global variables back to what they are now."""
    saved = []
    for name in ENGINE_MODULES:
        with contextlib.suppress(ImportError):
            module = importlib.import_module(name)
            variables = {key: value for key, value in vars(module).items() if key != "__builtins__"}
            saved.append((module, variables, list(_copy_containers(variables))))

    def restore() -> None:
        for module, variables, containers in saved:
            vars(module).update(variables)
            for container, content in containers:
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)

    return restore


def _copy_containers(variables: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    for value in variables.values():
        if isinstance(value, (dict, list, set)):
            yield value, value.copy()
