"""torch's key-value store with a limit to every wait: where the link to it is cut, torch itself waits for ever."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.distributed as dist

SPARE_S = 1.0  # torch's own limit, where it knows one, comes first


class SilentStore(RuntimeError):
    """The store did not answer in time: who keeps it hangs, or cannot be reached."""


class LimitedStore:
    """A store that is asked in a thread of its own, which a lost answer leaves behind.

    Attributes:
        limit_s: after which an answer is no longer waited for.
    """

    def __init__(self, store: dist.Store, limit_s: float) -> None:
        self.limit_s = limit_s
        self._store = store
        self._asked: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True, name="biokit-store").start()

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
        """Let the thread end, unless it waits for an answer that does not come."""
        self._asked.put(None)

    def _ask(self, call: Callable[[], Any]) -> Any:
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._asked.put((call, answers))
        try:
            result, error = answers.get(timeout=self.limit_s + SPARE_S)
        except queue.Empty:
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


@contextlib.contextmanager
def limited(store: dist.Store, limit_s: float) -> Iterator[LimitedStore]:
    """The same store, with a limit to every wait, for as long as the block lasts."""
    store_in_thread = LimitedStore(store, limit_s)
    try:
        yield store_in_thread
    finally:
        store_in_thread.close()
