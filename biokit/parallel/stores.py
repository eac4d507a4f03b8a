"""torch's key-value store with a limit to every wait: where the link to it is cut, torch itself waits for ever."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

SPARE_S = 1.0  # torch's own limit, where it knows one, comes first
END_S = 2.0  # that the thread has to end once nobody can answer it any more


class SilentStore(RuntimeError):
    """The store did not answer in time: who keeps it hangs, or cannot be reached."""


class LimitedStore:
    """A store that is asked in a thread of its own.

    Args:
        limit_s: after which an answer is no longer waited for.
        port: of whom keeps the store. Its connections are given up where it does not answer: an answer that comes
            while the process ends would abort it.
    """

    def __init__(self, store: dist.Store, limit_s: float, port: int) -> None:
        self.limit_s, self.port = limit_s, port
        self._store = store
        self._asked: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, daemon=True, name="biokit-store")
        self._thread.start()

    def set(self, key: str, value: str) -> None:
        """Set a key."""
        self._ask(lambda: self._store.set(key, value))

    def get(self, key: str) -> bytes:
        """Wait for a key, as long as the store itself does."""
        return self._ask(lambda: self._store.get(key))

    def add(self, key: str, amount: int) -> int:
        """Add to a number, which begins as 0; the sum."""
        return self._ask(lambda: self._store.add(key, amount))

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all of them are set."""
        return self._ask(lambda: self._store.check(list(keys)))

    def close(self) -> None:
        """End the thread."""
        self._asked.put(None)
        self._thread.join(END_S)

    def _ask(self, call: Callable[[], Any]) -> Any:
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._asked.put((call, answers))
        try:
            result, error = answers.get(timeout=self.limit_s + SPARE_S)
        except queue.Empty:
            hang_up(self.port)
            with contextlib.suppress(queue.Empty):
                answers.get(timeout=END_S)
            raise SilentStore(f"the key-value store did not answer: wait timeout after {self.limit_s:g} s") from None
        if error is not None:
            raise error
        return result

    def _serve(self) -> None:
        while (asked := self._asked.get()) is not None:
            call, answers = asked
            try:
                answers.put((call(), None))
            except Exception as error:
                answers.put((None, error))


def hang_up(port: int) -> None:
    """End this process's connections to a port; who waits there gets an error."""
    numbers = [int(path.name) for path in Path("/proc/self/fd").iterdir()] if Path("/proc/self/fd").is_dir() else []
    for number in numbers:
        with contextlib.suppress(OSError):  # closed meanwhile, no socket, or no connected one
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                with socket.socket(fileno=os.dup(number)) as connection:
                    if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getpeername()[1] == port:
                        connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def limited(store: dist.Store, limit_s: float, port: int) -> Iterator[LimitedStore]:
    """A `LimitedStore` for as long as the block lasts."""
    store_in_thread = LimitedStore(store, limit_s, port)
    try:
        yield store_in_thread
    finally:
        store_in_thread.close()
