"""Processes that do tasks ahead, with results in the order of the tasks."""

from __future__ import annotations

import multiprocessing
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from biokit.errors import BiokitError, DataError

_AHEAD = 4  # tasks a worker holds
_STOP_TIMEOUT_S = 5.0


class OrderedWorkers:
    """`num_workers` fresh processes (spawned: no inherited threads, locks or files) that call one function.

    Results come in the order of the tasks, whoever made them. A context manager: leaving it ends the processes and
    closes their pipes. A worker also ends by itself when the parent is gone.

    Args:
        function: picklable; called with the items of each task.
        what: names the work in errors.
    """

    def __init__(self, function: Callable[..., Any], num_workers: int, what: str) -> None:
        self._function, self._num_workers, self._what = function, num_workers, what
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> OrderedWorkers:
        context = multiprocessing.get_context("spawn")
        try:
            for number in range(self._num_workers):
                here, there = context.Pipe()
                self._pipes.append(here)
                name = f"biokit-worker-{number}"
                process = context.Process(target=_serve, args=(there, self._function), name=name, daemon=True)
                try:
                    process.start()
                    self._processes.append(process)
                finally:
                    there.close()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def run(self, tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Results of the tasks, in order; up to `_AHEAD` tasks a worker are under way.

        Raises:
            DataError: a worker died.
            BiokitError: what a worker raised; other exceptions come as DataError with the worker's traceback.
        """
        remaining, pending, given = iter(tasks), deque[int](), 0
        while True:
            while len(pending) < _AHEAD * self._num_workers:
                task = next(remaining, None)
                if task is None:
                    break
                worker = given % self._num_workers
                try:
                    self._pipes[worker].send(task)
                except OSError as error:
                    raise self._died(worker) from error
                pending.append(worker)
                given += 1
            if not pending:
                return
            yield self._receive(pending.popleft())

    def _receive(self, worker: int) -> Any:
        pipe = self._pipes[worker]
        wait([pipe, self._processes[worker].sentinel])
        try:
            if not pipe.poll():
                raise EOFError
            result, error, trace = pipe.recv()
        except (EOFError, OSError) as lost:
            raise self._died(worker) from lost
        if isinstance(error, BiokitError):
            raise error
        if error is not None:
            raise DataError(self._what, f"worker {worker} raised {error}\n{trace}", "Set data.num_workers=0 to debug")
        return result

    def _died(self, worker: int) -> DataError:
        process = self._processes[worker]
        process.join(_STOP_TIMEOUT_S)
        code = process.exitcode
        cause = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
        return DataError(
            self._what,
            f"worker {worker} (process {process.pid}) {cause}",
            "Check the memory, guard a script's body by `if __name__ == '__main__':`, or set data.num_workers=0",
        )

    def _stop(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(_STOP_TIMEOUT_S)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        self._pipes, self._processes = [], []


def _serve(pipe: Connection, function: Callable[..., Any]) -> None:
    """A worker: take tasks until the parent closes the pipe. An interrupt is the parent's affair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tasks: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
    # tasks are read all the time: were both ends to write and none to read, both would wait for ever
    threading.Thread(target=_read_tasks, args=(pipe, tasks), daemon=True).start()
    while (task := tasks.get()) is not None:
        try:
            answer: tuple[Any, Any, str] = (function(*task), None, "")
        except BiokitError as error:
            answer = (None, error, "")
        except Exception as error:
            answer = (None, repr(error), traceback.format_exc())
        try:
            pipe.send(answer)
        except OSError:
            return


def _read_tasks(pipe: Connection, tasks: queue.SimpleQueue[tuple[Any, ...] | None]) -> None:
    try:
        while True:
            tasks.put(pipe.recv())
    except (EOFError, OSError):
        tasks.put(None)
