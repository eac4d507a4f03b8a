"""Work in processes that may die: a row that ends its process costs that row, never the run.

Each worker is a Python process of its own (`-m module`), spoken to over pipes in frames of JSON and raw bytes: nothing
is forked, nothing is pickled, and the caller's main module is not imported again. When a worker dies, its chunk is
done again row by row in fresh ones. A worker ends by itself when its caller is gone, or when one row takes more
processor time than allowed, even inside compiled code.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import struct
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from biokit.errors import EngineError

Result = list[Any]
Chunk = list[Any]
ChunkFunction = Callable[[Chunk], tuple[list[Result], bytes]]

ENDED = "the parser ended the process"
TIMED_OUT = "the parser took too long"

_FRAME = struct.Struct("<QQ")
_PACKAGE_ROOT = Path(__file__).parents[2]


class GuardedPool:
    """A context manager with `num_workers` processes that run a module's `serve` loop.

    Args:
        module: a module whose `__main__` calls `serve`.
        setup: passed to it as JSON.
        failed: makes the result of a row whose process ended, from the reason.

    Raises:
        EngineError: the module cannot start.
    """

    def __init__(self, module: str, setup: dict[str, Any], num_workers: int, failed: Callable[[str], Result]) -> None:
        self._module, self._setup, self._failed = module, setup, failed
        self._num_workers = num_workers
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers: set[_Worker] = set()
        self._closed = False

    def __enter__(self) -> GuardedPool:
        self._threads = ThreadPoolExecutor(self._num_workers, thread_name_prefix="guarded")
        try:
            for _ in range(self._num_workers):
                self._idle.put(self._start())
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        for worker in list(self._workers):
            worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def map(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, list[Result], bytes]]:
        """Chunks with their results, in order; a few chunks a worker are read ahead."""
        waiting: deque[tuple[Chunk, Future[tuple[list[Result], bytes]]]] = deque()
        for chunk in chunks:
            waiting.append((chunk, self._threads.submit(self._run, chunk)))
            if len(waiting) > 3 * self._num_workers:
                first, future = waiting.popleft()
                yield first, *future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, *future.result()

    def _run(self, chunk: Chunk) -> tuple[list[Result], bytes]:
        answer = self._ask(chunk)
        if isinstance(answer, tuple):
            return answer
        if len(chunk) == 1:
            return [self._failed(answer)], b""
        results: list[Result] = []
        blobs: list[bytes] = []
        for row in chunk:
            row_results, blob = self._run([row])
            results += row_results
            blobs.append(blob)
        return results, b"".join(blobs)

    def _ask(self, chunk: Chunk) -> tuple[list[Result], bytes] | str:
        """The answer to a chunk, or why its worker ended."""
        worker = self._idle.get()
        try:
            answer = worker.ask(chunk)
        except (OSError, EOFError, ValueError):
            self._workers.discard(worker)
            if self._closed:
                raise EngineError("a worker's answer", "the pool was closed", "Start again") from None
            reason = worker.reason()
            worker = self._start()
            return reason
        finally:
            self._idle.put(worker)
        return answer

    def _start(self) -> _Worker:
        worker = _Worker(self._module, self._setup)
        self._workers.add(worker)
        return worker


class _Worker:
    """One process and its two pipes."""

    def __init__(self, module: str, setup: dict[str, Any]) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  # closed by kill
        path = os.pathsep.join([str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self._process.stdin and self._process.stdout
        self._to, self._from = self._process.stdin, self._process.stdout
        try:
            write_frame(self._to, setup)
            read_frame(self._from)
        except (OSError, EOFError) as error:
            self._process.wait()
            self._stderr.seek(0)
            lines = self._stderr.read().decode(errors="replace").strip().splitlines() or ["no message"]
            self.kill()
            found = f"it did not start ({lines[-1]})"
            raise EngineError(f"a worker process ({module})", found, "Run `biokit doctor`") from error
        except BaseException:  # an interrupt while it starts: nobody else knows this process yet
            self.kill()
            raise

    def ask(self, chunk: Chunk) -> tuple[list[Result], bytes]:
        write_frame(self._to, chunk)
        return read_frame(self._from)

    def reason(self) -> str:
        code = self._process.wait()
        self.kill()
        return TIMED_OUT if code == -signal.SIGVTALRM else ENDED

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._to, self._from, self._stderr):
            with contextlib.suppress(OSError):
                pipe.close()


def serve(prepare: Callable[[dict[str, Any]], ChunkFunction]) -> None:
    """A worker's life: read the setup, then answer chunks until the caller closes the pipe.

    What compiled code prints is thrown away; the pipe to the caller is out of its reach.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the caller, who ends the workers
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with Path(os.devnull).open("r+b", buffering=0) as nowhere:
        os.dup2(nowhere.fileno(), 0)
        os.dup2(nowhere.fileno(), 1)
        setup, _ = read_frame(source)
        run = prepare(setup)
        os.dup2(nowhere.fileno(), 2)  # only now: why a start failed is worth keeping
        write_frame(sink, "ready")
        while True:
            try:
                chunk, _ = read_frame(source)
            except EOFError:
                return
            results, blob = run(chunk)
            write_frame(sink, results, blob)


def limit_cpu_time(seconds: float) -> None:
    """End this process unless called again within so much of its own processor time; 0 lifts the limit."""
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)


def write_frame(pipe: IO[bytes], message: Any, blob: bytes = b"") -> None:
    """Send a JSON message and raw bytes."""
    text = json.dumps(message).encode()
    pipe.write(_FRAME.pack(len(text), len(blob)))
    pipe.write(text)
    pipe.write(blob)
    pipe.flush()


def read_frame(pipe: IO[bytes]) -> tuple[Any, bytes]:
    """What `write_frame` sent. Raises EOFError where the other side is gone."""
    head = pipe.read(_FRAME.size)
    if len(head) < _FRAME.size:
        raise EOFError("the other side is gone")
    text_size, blob_size = _FRAME.unpack(head)
    text, blob = pipe.read(text_size), pipe.read(blob_size)
    if len(text) < text_size or len(blob) < blob_size:
        raise EOFError("the other side is gone")
    return json.loads(text), blob
